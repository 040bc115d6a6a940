"""NumPy kernels that emitted source calls, if one expression does not suffice or would be wasteful.

Each kernel returns results in the dtype of its operands, and adds in this dtype; emitted source converts float16 to
float32 before a call. Only attention accepts float16 itself, and rounds scores and probabilities as its body does. No
kernel loops over elements in Python.

    out    the destination of the result; None: a new array
    work   the workspace of a call, arrays by name (`treadle.backends.numpy.workspaces`); missing ones are allocated
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.backends.numpy.attention_kernels import alibi as alibi  # called by emitted source, like all of these
from treadle.backends.numpy.attention_kernels import attention as attention
from treadle.backends.numpy.attention_kernels import attention_with_probabilities as attention_with_probabilities
from treadle.backends.numpy.attention_kernels import causal as causal
from treadle.backends.numpy.attention_kernels import counted
from treadle.backends.numpy.attention_kernels import hidden_by as hidden_by
from treadle.backends.numpy.attention_kernels import laid_out as laid_out
from treadle.backends.numpy.attention_kernels import padding as padding
from treadle.backends.numpy.attention_kernels import segments as segments
from treadle.backends.numpy.attention_kernels import t5_relative as t5_relative
from treadle.backends.numpy.attention_kernels import term as term
from treadle.backends.numpy.attention_kernels import window as window
from treadle.backends.outside_axis import NoRoom, OutsideAxis
from treadle.backends.python.workspace import NOTHING, Workspace
from treadle.ir.ops.error_function import erf as exact_erf

Array = np.ndarray[Any, Any]

CHUNK = 1 << 16
"""Number of elements per chunk of an elementwise function, so that its temporaries stay in the cache."""


# -- functions of an element ---------------------------------------------------------------------------------

# erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, where float32's erf reaches 1. Fitted by iteratively reweighted least squares
# to a relative error of 2.5e-8; evaluated in float32 it is within 3.2e-7 of erf.
_ERF_P = (1.12837911, 0.193525076, 0.0530990697, 0.00388249033, 0.000284547103, 1.98693124e-06)
_ERF_Q = (1.0, 0.504839718, 0.115341716, 0.0152055258, 0.00118536584, 3.74207593e-05)


def _polynomial(coefficients: Sequence[float], x: Array, out: Array | None) -> Array:
    value: Array = np.multiply(x, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        value += coefficient
        value *= x
    value += coefficients[0]
    return value


def _erf(x: Array, y: Array, work: Workspace) -> None:
    if x.dtype != np.float32:
        y[...] = exact_erf(x)
        return
    np.clip(x, -4.0, 4.0, out=y)
    square = np.multiply(y, y, out=work.square)
    y *= _polynomial(_ERF_P, square, work.polynomial)
    y /= _polynomial(_ERF_Q, square, work.polynomial)
    np.clip(y, -1.0, 1.0, out=y)


def _gelu(x: Array, y: Array, work: Workspace) -> None:
    _erf(np.multiply(x, math.sqrt(0.5), out=y), y, work)
    y += 1.0
    y *= x
    y *= 0.5


def _gelu_tanh(x: Array, y: Array, work: Workspace) -> None:
    np.multiply(x, x, out=y)
    y *= 0.044715
    y += 1.0
    y *= x
    y *= math.sqrt(2.0 / math.pi)
    np.tanh(y, out=y)
    y += 1.0
    y *= x
    y *= 0.5


def _chunked(
    function: Callable[[Array, Array, Workspace], None], x: Array, out: Array | None, work: Workspace
) -> Array:
    """Apply a function to x chunk by chunk. Chunks of x, of the result and of the workspace have the same length. If x
    has gaps, `work.kept` holds a copy of a chunk.
    """
    x = np.asarray(x)
    made = np.empty(x.shape, x.dtype) if out is None else out
    parts: dict[str, Array] = vars(work)
    chunk = next((len(part) for part in parts.values()), CHUNK)
    to = made.reshape(-1)
    if "kept" in parts:
        np.copyto(made, x)
    flat = to if "kept" in parts else x.reshape(-1)
    for start in range(0, flat.size, max(1, chunk)):  # if there are no elements, there are no chunks
        here = flat[start : start + chunk]
        some = {name: part[: len(here)] for name, part in parts.items()}
        if "kept" in some:
            np.copyto(some["kept"], here)
            here = some["kept"]
        function(here, to[start : start + chunk], Workspace(**some))
    return made


def erf(x: Array, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """Return erf(x); in float32 with an error of at most 3.2e-7."""
    return _chunked(_erf, x, out, work)


def gelu(x: Array, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """x/2 (1 + erf(x / sqrt 2))"""
    return _chunked(_gelu, x, out, work)


def gelu_tanh(x: Array, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))"""
    return _chunked(_gelu_tanh, x, out, work)


def sigmoid(x: Array, out: Array | None = None) -> Array:
    """1 / (1 + e^-x)"""
    y: Array = np.asarray(np.negative(x, out=out))
    np.exp(y, out=y)
    y += 1.0
    np.divide(1.0, y, out=y)
    return y


def silu(x: Array, out: Array | None = None) -> Array:
    """x / (1 + e^-x)"""
    return _x_over(x, np.negative(x, out=out))


def quick_gelu(x: Array, out: Array | None = None) -> Array:
    """x / (1 + e^(-1.702 x))"""
    return _x_over(x, np.multiply(x, -1.702, out=out))


def rsqrt(x: Array, out: Array | None = None) -> Array:
    """1 / sqrt(x)"""
    y: Array = np.asarray(np.sqrt(x, out=out))
    np.divide(1.0, y, out=y)
    return y


def _x_over(x: Array, y: Any) -> Array:
    """x / (1 + e^y), written over y"""
    made: Array = np.asarray(y)
    np.exp(made, out=made)
    made += 1.0
    np.divide(x, made, out=made)
    return made


# -- shapes and choices --------------------------------------------------------------------------------------


def copied(x: Array, shape: tuple[int, ...], out: Array | None = None) -> Array:
    """Copy the elements of x in row-major order to another shape."""
    made = np.empty(shape, x.dtype) if out is None else out
    np.copyto(made.reshape(x.shape), x)
    return made


def cast(x: Array, dtype: Any, out: Array | None = None) -> Array:
    """Return x in another dtype."""
    if out is None:
        return x.astype(dtype)
    np.copyto(out, x, casting="unsafe")
    return out


def where(condition: Array, x: Any, y: Any, out: Array | None = None) -> Array:
    """Return x where the condition holds, else y."""
    if out is None:
        made: Array = np.where(condition, x, y)
        return made
    np.copyto(out, y)
    np.copyto(out, x, where=condition)
    return out


def pad(x: Array, axis: int, before: int, after: int, value: float, out: Array | None = None) -> Array:
    """Return x padded along an axis with a number."""
    axis %= x.ndim
    size = x.shape[axis]
    shape = (*x.shape[:axis], before + size + after, *x.shape[axis + 1 :])
    made = np.empty(shape, x.dtype) if out is None else out
    along = np.moveaxis(made, axis, 0)
    along[:before] = along[before + size :] = value
    along[before : before + size] = np.moveaxis(x, axis, 0)
    return made


def iota(size: int, dtype: Any, out: Array | None = None) -> Array:
    """Return 0, 1, ..., size - 1."""
    return np.arange(size, dtype=dtype) if out is None else counted(out)


def positions(x: Array, out: Array | None = None) -> Array:
    """Return 0, 1, ... along the last axis, in the shape of x."""
    if out is None:
        return np.broadcast_to(np.arange(x.shape[-1]), x.shape)
    return counted(out)


# -- along an axis -------------------------------------------------------------------------------------------


def softmax(x: Array, axis: int, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """e^(x - max) / sum of e^(x - max)"""
    y = np.asarray(np.subtract(x, np.max(x, axis=axis, keepdims=True, out=work.row), out=out))
    np.exp(y, out=y)
    y /= np.sum(y, axis=axis, keepdims=True, out=work.row)
    return y


def log_softmax(x: Array, axis: int, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """x - max - ln(sum of e^(x - max))"""
    y = np.asarray(np.subtract(x, np.max(x, axis=axis, keepdims=True, out=work.row), out=out))
    total = np.asarray(np.sum(np.exp(y, out=work.powers), axis=axis, keepdims=True, out=work.row))
    y -= np.log(total, out=total)
    return y


def mean(x: Array, axes: tuple[int, ...], keepdims: bool = False, out: Array | None = None) -> Array:
    """Return the mean along the axes."""
    total: Any = np.sum(x, axis=axes, keepdims=keepdims, out=out)
    count = math.prod(x.shape[axis] for axis in axes)
    made: Array = np.divide(total, count, out=total if isinstance(total, np.ndarray) else None)
    return made


def layer_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None = None, work: Workspace = NOTHING
) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis"""
    y: Array = np.subtract(x, mean(x, (-1,), True, work.row), out=out)
    row = mean(np.multiply(y, y, out=work.squares), (-1,), True, work.row)
    row += eps
    y /= np.sqrt(row, out=row)
    if weight is not None:
        y *= weight
    if bias is not None:
        y += bias
    return y


def rms_norm(x: Array, weight: Array | None, eps: float, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis"""
    y: Array = np.multiply(x, x, out=out)
    row = mean(y, (-1,), True, work.row)
    row += eps
    np.divide(x, np.sqrt(row, out=row), out=y)
    if weight is not None:
        y *= weight
    return y


def take(x: Array, indices: Array, axis: int, out: Array | None = None) -> Array:
    """Return slices of x along an axis. Raises OutsideAxis for an index out of bounds; negative indices are out of
    bounds.
    """
    return np.take(x, within(indices, x.shape[axis]), axis=axis, out=out, mode="clip")


def within(indices: Array, size: int) -> Array:
    """Return the indices unchanged. Raises OutsideAxis for an index out of the bounds of an axis of this size."""
    if np.size(indices) and (np.min(indices) < 0 or np.max(indices) >= size):
        given = np.asarray(indices)
        raise OutsideAxis(int(given[(given < 0) | (given >= size)].flat[0]), size)
    return indices


def take_along_axis(x: Array, indices: Array, axis: int, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """Return x[..., indices[..., i, ...], ...]. With a workspace, x must be row-major. Raises OutsideAxis for an index
    out of bounds.
    """
    within(indices, x.shape[axis])
    if work.places is None:
        return np.take_along_axis(x, indices, axis)
    places, axis = work.places, axis % x.ndim
    np.multiply(indices, math.prod(x.shape[axis + 1 :]), out=places)
    for other in range(x.ndim):
        if other != axis:
            steps = counted(work.steps[: x.shape[other]])
            steps *= math.prod(x.shape[other + 1 :])
            places += steps.reshape([-1 if a == other else 1 for a in range(x.ndim)])
    return np.take(x.reshape(-1), places, out=out, mode="clip")


def append(state: Array, x: Array, rows: Array, start: Array, axis: int, *, ring: bool) -> Array:
    """Write x into a state, from each row's start, and return the state. Raises OutsideAxis or NoRoom before anything
    is written.
    """
    capacity, count = state.shape[axis], x.shape[axis]
    slots = within(rows, state.shape[0])[:, None]
    lost = (start < 0) if ring else (start < 0) | (start > capacity - count)
    if np.any(lost):
        row = int(np.flatnonzero(lost)[0])
        raise NoRoom(row, int(start[row]), capacity)
    places = start[:, None] + np.arange(count)
    np.moveaxis(state, axis, 1)[slots, places % capacity if ring else places] = np.moveaxis(x, axis, 1)
    return state


def rotary(
    x: Array, positions: Array, frequencies: Array, layout: str, out: Array | None = None, work: Workspace = NOTHING
) -> Array:
    """Rotate pairs of the first 2f dimensions of x [b, h, s, d]; see `treadle.ir.ops.rotary`."""
    f = frequencies.shape[0]
    at = np.empty(positions.shape, frequencies.dtype) if work.positions is None else work.positions
    np.copyto(at, positions, casting="unsafe")
    cos = np.multiply(at[:, None, :, None], frequencies, out=work.cos)
    sin = np.sin(cos, out=work.sin)
    np.cos(cos, out=cos)
    first, second = (slice(0, f), slice(f, 2 * f)) if layout == "half" else (slice(0, 2 * f, 2), slice(1, 2 * f, 2))
    y = np.empty(x.shape, x.dtype) if out is None else out
    one, other = x[..., first], x[..., second]
    turned, beside = y[..., first], y[..., second]
    np.multiply(one, cos, out=turned)
    turned -= np.multiply(other, sin, out=work.part)
    np.multiply(other, cos, out=beside)
    beside += np.multiply(one, sin, out=work.part)
    y[..., 2 * f :] = x[..., 2 * f :]
    return y


# -- products ------------------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array, out: Array | None = None) -> Array:
    """Return x weight^T + bias, with weight [n, k]."""
    y: Array = np.matmul(x, weight.T, out=out)
    y += bias
    return y


class EinsumOrder:
    """The axes of an einsum of two operands as a matrix product [batch, rows, inner] by [batch, inner, columns]. An
    axis is a letter.

    made      the axes of matmul's output; the einsum's result is a permutation of it
    operands  for each operand, the axes in that order, and the positions that separate the three dimensions
    """

    def __init__(self, terms: Sequence[str], right: str) -> None:
        x, y = terms
        shared = [c for c in x if c in y]
        self.batch, inner = [c for c in shared if c in right], [c for c in shared if c not in right]
        self.rows, self.columns = ([c for c in term if c not in shared] for term in (x, y))
        self.made = [*self.batch, *self.rows, *self.columns]
        self.operands = ((self.rows, inner), (inner, self.columns))


def einsum(equation: str, *operands: Array, out: Array | None = None, work: Workspace = NOTHING) -> Array:
    """Return NumPy's einsum. A product of two operands is computed by matmul, which uses BLAS.

    With a workspace, every axis of an operand must also be in the other operand or in the result.
    """
    left, right = equation.split("->")
    terms = left.split(",")
    if len(operands) != 2 or "." in equation:
        return np.asarray(np.einsum(equation, *operands, optimize=len(operands) > 2))
    x = _summed(terms[0], operands[0], right + terms[1])
    y = _summed(terms[1], operands[1], right + terms[0])
    order = EinsumOrder((x[0], y[0]), right)
    sizes = dict(zip(x[0] + y[0], x[1].shape + y[1].shape, strict=True))
    batch = [sizes[c] for c in order.batch]

    def laid_out(term: str, operand: Array, groups: Sequence[list[str]], to: Array | None) -> Array:
        axes = [c for group in (order.batch, *groups) for c in group]
        permuted = operand.transpose([term.index(c) for c in axes])
        if to is None:
            return permuted.reshape(batch + [math.prod(sizes[c] for c in group) for group in groups])
        np.copyto(to.reshape(permuted.shape), permuted)
        return to

    one, other = laid_out(*x, order.operands[0], work.x), laid_out(*y, order.operands[1], work.y)
    is_made = order.made == list(right)
    whole = [*batch, math.prod(sizes[c] for c in order.rows), math.prod(sizes[c] for c in order.columns)]
    to = work.product if not is_made or out is None else out.reshape(whole)
    product = np.matmul(one, other, out=to).reshape([sizes[c] for c in order.made])
    result: Array = product.transpose([order.made.index(c) for c in right])
    if (is_made and out is not None) or (out is None and to is None):
        return result if out is None else out
    return copied(result, result.shape, out)


def _summed(term: str, x: Array, kept: str) -> tuple[str, Array]:
    """Return an operand summed over the axes that are neither in the other operand nor in the result, and its remaining
    axes.
    """
    axes = tuple(i for i, c in enumerate(term) if c not in kept)
    return "".join(c for c in term if c in kept), np.sum(x, axis=axes, dtype=x.dtype) if axes else x
