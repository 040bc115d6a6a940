"""Kernels in NumPy that emitted source calls: what one expression cannot say, or says wastefully.

Each gives results in the dtype of its operands, and sums in it: emitted source passes float16 in float32. Attention
alone takes it as it is, and rounds scores and probabilities as its body does. Nothing here loops over elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from treadle.backends.outside_axis import NoRoom, OutsideAxis
from treadle.ir.attention.attention_terms import parse_term
from treadle.ir.ops.along_axes import wide_array
from treadle.ir.ops.error_function import erf as exact_erf

Array = np.ndarray[Any, Any]

_CHUNK = 1 << 16
"""Elements that a function of one element works on at a time, so that its temporaries stay in the cache."""

_SCORES = 1 << 22
"""Scores that attention holds at a time."""


# -- functions of an element ---------------------------------------------------------------------------------

# erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, where float32's erf reaches 1. Fitted by iteratively reweighted least
# squares to a relative error of 2.5e-8; evaluated in float32 it is within 3.2e-7 of erf.
_ERF_P = (1.12837911, 0.193525076, 0.0530990697, 0.00388249033, 0.000284547103, 1.98693124e-06)
_ERF_Q = (1.0, 0.504839718, 0.115341716, 0.0152055258, 0.00118536584, 3.74207593e-05)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value += coefficient
        value *= x
    value += coefficients[0]
    return value


def _erf(x: Array) -> Array:
    if x.dtype != np.float32:
        return exact_erf(x)
    clipped = np.clip(x, -4.0, 4.0)
    square = clipped * clipped
    clipped *= _polynomial(_ERF_P, square)
    clipped /= _polynomial(_ERF_Q, square)
    return np.clip(clipped, -1.0, 1.0, out=clipped)


def _gelu(x: Array) -> Array:
    y = _erf(x * math.sqrt(0.5))
    y += 1.0
    y *= x
    y *= 0.5
    return y


def _gelu_tanh(x: Array) -> Array:
    y = x * x
    y *= 0.044715
    y += 1.0
    y *= x
    y *= math.sqrt(2.0 / math.pi)
    np.tanh(y, out=y)
    y += 1.0
    y *= x
    y *= 0.5
    return y


def _chunked(function: Callable[[Array], Array], x: Array) -> Array:
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = function(flat[part])
    return out.reshape(np.shape(x))


def erf(x: Array) -> Array:
    """The error function; in float32 within 3.2e-7."""
    return _chunked(_erf, x)


def gelu(x: Array) -> Array:
    """x/2 (1 + erf(x / sqrt 2))"""
    return _chunked(_gelu, x)


def gelu_tanh(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))"""
    return _chunked(_gelu_tanh, x)


# -- along an axis -------------------------------------------------------------------------------------------


def softmax(x: Array, axis: int) -> Array:
    """e^(x - max) / sum of e^(x - max)"""
    weights = np.asarray(x - np.max(x, axis=axis, keepdims=True))
    np.exp(weights, out=weights)
    weights /= np.sum(weights, axis=axis, keepdims=True)
    return weights


def log_softmax(x: Array, axis: int) -> Array:
    """x - max - ln(sum of e^(x - max))"""
    shifted = np.asarray(x - np.max(x, axis=axis, keepdims=True))
    shifted -= np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))
    return shifted


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis"""
    y: Array = x - np.mean(x, axis=-1, keepdims=True)
    y /= np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y *= weight
    if bias is not None:
        y += bias
    return y


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis"""
    y: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y *= weight
    return y


def take(x: Array, indices: Array, axis: int) -> Array:
    """Slices of x along an axis. Raises OutsideAxis for an index that is outside: NumPy would count from the end."""
    return np.take(x, within(indices, x.shape[axis]), axis=axis)


def within(indices: Array, size: int) -> Array:
    """The indices of an axis of this size. Raises OutsideAxis for one that is outside."""
    outside = (indices < 0) | (indices >= size)
    if np.any(outside):
        raise OutsideAxis(int(np.asarray(indices)[outside].flat[0]), size)
    return indices


def append(state: Array, x: Array, rows: Array, start: Array, axis: int, *, ring: bool) -> Array:
    """Write x into a state, from where each row goes on. Raises OutsideAxis or NoRoom, and then writes nothing."""
    capacity, count = state.shape[axis], x.shape[axis]
    slots = within(rows, state.shape[0])[:, None]
    lost = (start < 0) if ring else (start < 0) | (start > capacity - count)
    if np.any(lost):
        row = int(np.flatnonzero(lost)[0])
        raise NoRoom(row, int(start[row]), capacity)
    places = start[:, None] + np.arange(count)
    np.moveaxis(state, axis, 1)[slots, places % capacity if ring else places] = np.moveaxis(x, axis, 1)
    return state


# -- products ------------------------------------------------------------------------------------------------


def einsum(equation: str, *operands: Array) -> Array:
    """NumPy's einsum; a product of two operands goes through matmul, which is BLAS."""
    left, right = equation.split("->")
    terms = left.split(",")
    if len(operands) != 2 or "." in equation:
        return np.asarray(np.einsum(equation, *operands, optimize=len(operands) > 2))
    x = _summed(terms[0], operands[0], right + terms[1])
    y = _summed(terms[1], operands[1], right + terms[0])
    shared = [c for c in x[0] if c in y[0]]
    batch, inner = [c for c in shared if c in right], [c for c in shared if c not in right]
    rows, columns = ([c for c in term if c not in shared] for term, _ in (x, y))
    sizes = dict(zip(x[0] + y[0], x[1].shape + y[1].shape, strict=True))

    def laid_out(term: str, operand: Array, *groups: list[str]) -> Array:
        order = [c for group in groups for c in group]
        shape = [sizes[c] for c in batch] + [math.prod(sizes[c] for c in group) for group in groups[1:]]
        return operand.transpose([term.index(c) for c in order]).reshape(shape)

    product: Array = np.matmul(laid_out(*x, batch, rows, inner), laid_out(*y, batch, inner, columns))
    made = [*batch, *rows, *columns]
    return product.reshape([sizes[c] for c in made]).transpose([made.index(c) for c in right])


def _summed(term: str, x: Array, kept: str) -> tuple[str, Array]:
    """An operand without the axes that it alone has and the result has not, summed."""
    axes = tuple(i for i, c in enumerate(term) if c not in kept)
    return "".join(c for c in term if c in kept), np.sum(x, axis=axes, dtype=x.dtype) if axes else x


# -- attention -----------------------------------------------------------------------------------------------


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    masks: Sequence[Array] = (),
    biases: Sequence[Array] = (),
    softcap: float | None = None,
) -> Array:
    """q [b, h, s, d], k [b, g, t, d], v [b, g, t, e] -> [b, h, s, e]; see `treadle.ir.ops.attention`.

    Works on some rows and queries at a time, so that the scores take bounded memory. A query that may see no key gets
    zeros.
    """
    rows, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    keys_across = np.swapaxes(k, -1, -2)
    out = np.empty((rows, heads, queries, v.shape[-1]), q.dtype)
    some_queries = min(queries, max(1, _SCORES // max(1, heads * keys)))
    some_rows = max(1, _SCORES // max(1, heads * keys * some_queries))
    for row in range(0, rows, some_rows):
        for query in range(0, queries, some_queries):
            b, s = slice(row, row + some_rows), slice(query, query + some_queries)
            some_masks, some_biases = ([_part(x, b, s) for x in parts] for parts in (masks, biases))
            p = _probabilities(q[b, :, s], keys_across[b], scale, some_masks, some_biases, softcap)
            out[b, :, s] = _product(_grouped(p, groups), v[b, :, None]).reshape(out[b, :, s].shape)
    return out


def attention_with_probabilities(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    masks: Sequence[Array] = (),
    biases: Sequence[Array] = (),
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """The same, and the probabilities [b, h, s, t], which are zeros too for a query that may see no key."""
    groups = k.shape[1]
    p = _probabilities(q, np.swapaxes(k, -1, -2), scale, masks, biases, softcap)
    out = _product(_grouped(p, groups), v[:, :, None])
    return out.reshape(*q.shape[:3], v.shape[-1]), p


def _probabilities(
    q: Array,
    keys_across: Array,
    scale: float,
    masks: Sequence[Array],
    biases: Sequence[Array],
    softcap: float | None,
) -> Array:
    """[b, h, s, t], of keys [b, g, d, t]"""
    heads, groups, keys = q.shape[1], keys_across.shape[1], keys_across.shape[-1]
    scores = _product(_grouped(q * scale, groups), keys_across[:, :, None])
    scores = scores.reshape(scores.shape[0], heads, -1, keys)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    for bias in biases:
        scores += bias
    for mask in masks:
        np.copyto(scores, -np.inf, where=~mask)
    return _safe_softmax(wide_array(scores)).astype(q.dtype, copy=False)


def _product(x: Array, y: Array) -> Array:
    """x @ y, of float16 summed in float32"""
    made: Array = (wide_array(x) @ wide_array(y)).astype(x.dtype, copy=False)
    return made


def _grouped(x: Array, groups: int) -> Array:
    """[b, (g r), s, d] -> [b, g, r, s, d]"""
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def _part(x: Array, rows: slice, queries: slice) -> Array:
    """Some rows and queries of what broadcasts against [b, h, s, t]."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    return x[rows if x.shape[0] > 1 else slice(None), :, queries if x.shape[2] > 1 else slice(None)]


def _safe_softmax(scores: Array) -> Array:
    """In place; zeros for a row that is -inf throughout."""
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    scores -= np.where(peak > -np.inf, peak, 0.0)
    np.exp(scores, out=scores)
    total = np.sum(scores, axis=-1, keepdims=True)
    scores /= np.where(total > 0, total, 1.0)
    return scores


def term(text: str, queries: int, keys: int, *operands: Array) -> Array:
    """A mask or bias, written as `window(128)`, by its own meaning; broadcasts against [b, h, s, t]."""
    return _read(text).reference(np.arange(queries)[:, None], np.arange(keys), *operands)


_read = lru_cache(maxsize=64)(parse_term)
