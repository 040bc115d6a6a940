"""Attention in NumPy, with masks and biases as arrays that broadcast against the scores [b, h, s, t].

Masks called `hidden` are true where a query must not see a key; `masks` are true where it may.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from treadle.backends.python.workspace import NOTHING, Workspace
from treadle.ir.attention.attention_terms import AXES, T5Relative
from treadle.ir.attention.term_text import parse_term
from treadle.ir.ops.along_axes import wide_array

Array = np.ndarray[Any, Any]

SCORES = 1 << 22
"""Maximum number of scores that attention computes at a time."""


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    masks: Sequence[Array] = (),
    hidden: Sequence[Array] = (),
    biases: Sequence[Array] = (),
    softcap: float | None = None,
    out: Array | None = None,
    work: Workspace = NOTHING,
) -> Array:
    """Compute attention of q [b, h, s, d], k [b, g, t, d], v [b, g, t, e]. Return [b, h, s, e]; see
    `treadle.ir.ops.attention`.

    Scores are computed for some rows and queries at a time, as many as fit into `work.scores`, so that they need
    bounded memory. A query without visible keys gets zeros.
    """
    rows, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    keys_across = np.swapaxes(k, -1, -2)
    made = np.empty((rows, heads, queries, v.shape[-1]), q.dtype) if out is None else out
    by_group = made.reshape(rows, groups, heads // max(1, groups), queries, v.shape[-1])
    some_queries = min(queries, max(1, SCORES // max(1, heads * keys)))
    some_rows = max(1, SCORES // max(1, heads * keys * some_queries))
    if work.scores is not None:
        some_rows, _, some_queries, _ = work.scores.shape
    for row in range(0, rows, max(1, some_rows)):
        for query in range(0, queries, max(1, some_queries)):
            b, s = slice(row, row + some_rows), slice(query, query + some_queries)
            seen, unseen, added = ([_part(x, b, s) for x in each] for each in (masks, hidden, biases))
            some_q = q[b, :, s]
            p = _probabilities(some_q, keys_across[b], scale, seen, unseen, added, softcap, _some(work, some_q.shape))
            _product(_grouped(p, groups), v[b, :, None], by_group[b, :, :, s])
    return made


def _some(work: Workspace, shape: tuple[int, ...]) -> Workspace:
    """Return the parts of a workspace for the number of rows and queries in `shape`."""
    if work.scores is None:
        return NOTHING
    held = ("scaled", "scores", "row", "blank")
    return Workspace(**{name: getattr(work, name)[: shape[0], :, : shape[2]] for name in held})


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
    """Return the result of `attention`, and the probabilities [b, h, s, t], which are also zeros for a query without
    visible keys.
    """
    groups = k.shape[1]
    p = _probabilities(q, np.swapaxes(k, -1, -2), scale, masks, (), biases, softcap, NOTHING)
    out = _product(_grouped(p, groups), v[:, :, None])
    return out.reshape(*q.shape[:3], v.shape[-1]), p


def _probabilities(
    q: Array,
    keys_across: Array,
    scale: float,
    masks: Sequence[Array],
    hidden: Sequence[Array],
    biases: Sequence[Array],
    softcap: float | None,
    work: Workspace,
) -> Array:
    """Return probabilities [b, h, s, t] for keys [b, g, d, t]."""
    heads, groups, keys = q.shape[1], keys_across.shape[1], keys_across.shape[-1]
    scaled = np.multiply(q, scale, out=work.scaled)
    to = None if work.scores is None else _grouped(work.scores, groups)
    made = _product(_grouped(scaled, groups), keys_across[:, :, None], to)
    scores = made.reshape(made.shape[0], heads, q.shape[2], keys) if work.scores is None else work.scores
    if softcap is not None:
        np.divide(scores, softcap, out=scores)
        np.tanh(scores, out=scores)
        np.multiply(softcap, scores, out=scores)
    for bias in biases:
        scores += bias
    for mask in masks:
        np.copyto(scores, -np.inf, where=~mask)
    for mask in hidden:
        np.copyto(scores, -np.inf, where=mask)
    return _safe_softmax(wide_array(scores), work).astype(q.dtype, copy=False)


def _product(x: Array, y: Array, out: Array | None = None) -> Array:
    """Return x @ y. float16 numbers are multiplied and added in float32."""
    if x.dtype != np.float16:
        return np.matmul(x, y, out=out)
    made: Array = (wide_array(x) @ wide_array(y)).astype(x.dtype, copy=False)
    if out is None:
        return made
    out[...] = made
    return out


def _grouped(x: Array, groups: int) -> Array:
    """Split heads into groups: return [b, g, r, s, d] for [b, (g r), s, d]."""
    return x.reshape(x.shape[0], groups, x.shape[1] // max(1, groups), *x.shape[2:])


def _part(x: Array, rows: slice, queries: slice) -> Array:
    """Return the part for some rows and queries of an array that broadcasts against [b, h, s, t]."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    return x[rows if x.shape[0] > 1 else slice(None), :, queries if x.shape[2] > 1 else slice(None)]


def _safe_softmax(scores: Array, work: Workspace) -> Array:
    """Compute softmax in place. A row in which all scores are -inf becomes zeros."""
    row = np.max(scores, axis=-1, keepdims=True, initial=-np.inf, out=work.row)
    scores -= _or_else(np.greater(row, -np.inf, out=work.blank), row, 0.0)
    np.exp(scores, out=scores)
    row = np.sum(scores, axis=-1, keepdims=True, out=work.row)
    scores /= _or_else(np.greater(row, 0, out=work.blank), row, 1.0)
    return scores


def _or_else(holds: Array, row: Array, otherwise: float) -> Array:
    """Return `row` where the condition holds, else the number `otherwise`. The condition is overwritten."""
    np.copyto(row, otherwise, where=np.logical_not(holds, out=holds))
    return row


# -- masks and biases ----------------------------------------------------------------------------------------


def counted(out: Array) -> Array:
    """Fill a row-major array with 0, 1, ... along the last axis, in place."""
    size = out.shape[-1]
    if not out.size:
        return out
    rows = out.reshape(-1, size)
    first, done = rows[0], 1
    first[0] = 0
    while done < size:
        more = min(done, size - done)
        np.add(first[:more], done, out=first[done : done + more])
        done += more
    rows[1:] = first
    return out


def term(text: str, queries: int, keys: int, *operands: Array) -> Array:
    """Evaluate a mask or bias in its text form, such as `window(128)`, by its definition. The result broadcasts against
    [b, h, s, t].
    """
    return _read(text).reference(np.arange(queries)[:, None], np.arange(keys), *operands)


_read = lru_cache(maxsize=64)(parse_term)


def laid_out(x: Array, axes: str) -> Array:
    """Return an operand whose axes are some of b, h, s, t as an array [b, h, s, t], with size 1 for missing axes."""
    sizes = dict(zip(axes.split(), x.shape, strict=True))
    return x.reshape([sizes.get(axis, 1) for axis in AXES])


# Each function takes positions of queries i and keys j as arguments, and writes to `out`.


def causal(queries: Array, keys: Array, out: Array) -> Array:
    """Hidden: j > i"""
    return np.greater(counted(keys), counted(queries)[:, None], out=out)


def window(queries: Array, keys: Array, size: int, later: Array, out: Array) -> Array:
    """Hidden: j <= i - size or j >= i + size. The result is written over i; `later` is a workspace for the second
    condition.
    """
    bound = np.subtract(counted(queries), size, out=queries)[:, None]
    np.less_equal(counted(keys), bound, out=out)
    bound += 2 * size
    return np.logical_or(out, np.greater_equal(keys, bound, out=later), out=out)


def padding(lengths: Array, keys: Array, out: Array) -> Array:
    """Hidden: j >= lengths[b]"""
    return np.greater_equal(counted(keys), laid_out(lengths, "b"), out=out)


def segments(of_queries: Array, of_keys: Array, out: Array) -> Array:
    """Hidden: the query and the key have different segments."""
    return np.not_equal(laid_out(of_queries, "b s"), laid_out(of_keys, "b t"), out=out)


def hidden_by(mask: Array, axes: str, out: Array) -> Array:
    """Hidden: the mask is false"""
    return np.logical_not(laid_out(mask, axes), out=out)


def t5_relative(text: str, table: Array, queries: Array, keys: Array, apart: Array, bucket: Array, out: Array) -> Array:
    """Return the T5 relative position bias, table[bucket_of(j - i), h], in out [s, t, h].

    `apart` and `bucket` are scratch arrays [s, t].
    """
    kind = _read(text)
    assert isinstance(kind, T5Relative)
    far = kind.max_distance
    np.subtract(counted(keys), counted(queries)[:, None], out=apart)
    np.maximum(apart, -far, out=apart)
    np.minimum(apart, far, out=apart)
    apart += far
    np.take(kind.bucket_by_offset, apart, out=bucket, mode="clip")
    return np.moveaxis(np.take(table, bucket, axis=0, out=out, mode="clip"), -1, 0)


def alibi(slopes: Array, queries: Array, keys: Array, apart: Array, out: Array) -> Array:
    """Return slopes[h] * (j - i), with positions in the slopes' dtype; `apart` [s, t] holds the distance."""
    np.subtract(counted(keys), counted(queries)[:, None], out=apart)
    return np.multiply(laid_out(slopes, "h"), apart, out=out)
