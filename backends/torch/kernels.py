"""PyTorch kernels that emitted source calls, if one expression does not suffice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.backends.outside_axis import NoRoom, OutsideAxis
from treadle.backends.torch.cached_terms import CachedTerms
from treadle.backends.torch.encoded_rows import (  # noqa: F401  emitted source
    decode_groups,
    decode_int8_rows,
    decode_uint8_rows,
    encode_groups,
    encode_int8_rows,
    encode_uint8_rows,
    encoded_linear,
)
from treadle.ir.attention.attention_terms import Padding, T5Relative, Term
from treadle.ir.attention.cached_positions import live_positions
from treadle.ir.attention.term_text import parse_term
from treadle.ir.ops.rounding import FORMATS

# -- element by element --------------------------------------------------------------------------------------


def round_to(x: Tensor, format: str, *, saturate: bool) -> Tensor:
    """Round to the nearest numbers of a narrower float format. The result has the dtype of x; see
    `treadle.ir.ops.rounding`.
    """
    known = FORMATS[format]
    wide = x.double()
    finite = torch.where(wide.isfinite(), wide, 0.0)
    spacing = (torch.frexp(finite).exponent - 1).clamp(min=known.least) - known.fraction
    y = torch.ldexp(torch.round(torch.ldexp(finite, -spacing)), spacing)
    beyond = known.largest if saturate or known.beyond is None else known.beyond
    y = torch.where(wide.isinf() | (y.abs() > known.largest), torch.full_like(wide, beyond).copysign(wide), y)
    y = torch.where(wide.isnan(), 0.0 if known.beyond is None else math.nan, y)
    return (y if known.minus_zero else y + 0.0).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = "") -> Tensor:
    """Multiply x by the transpose of a weight that `treadle.backends.torch.packing` packed, with oneDNN's fused
    activation.
    """
    row = None if bias is None else bias.contiguous()  # oneDNN ignores the bias's strides
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, row, activation, [], algorithm)
    return y


# -- along an axis -------------------------------------------------------------------------------------------


def cumsum(x: Tensor, axis: int, *, exclusive: bool, reverse: bool) -> Tensor:
    """Return running sums: of the elements up to each one, or from each one on if `reverse`. If `exclusive`, the
    element itself is not included.
    """
    terms = x.flip(axis) if reverse else x
    sums = torch.cumsum(terms, axis, dtype=x.dtype)
    if exclusive:
        sums = torch.cat((torch.zeros_like(sums.narrow(axis, 0, 1)), sums.narrow(axis, 0, x.shape[axis] - 1)), axis)
    return sums.flip(axis) if reverse else sums


def top_k(x: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    """Return the k greatest elements, greatest first, and their positions. Among equal elements, the first position
    comes first.

    torch.topk may choose any of several equal elements, so all elements are sorted.
    """
    values, indices = torch.sort(x, dim=axis, descending=True, stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


# -- indices -------------------------------------------------------------------------------------------------
#
# PyTorch's error for an index out of bounds names neither the index nor the bound, and on a GPU its assertion makes the
# device unusable.


def _within(indices: Tensor, size: int) -> Tensor:
    """Return the indices unchanged. Raises OutsideAxis for an index out of the bounds of an axis of this size."""
    outside = (indices < 0) | (indices >= size)
    if bool(outside.any()):
        raise OutsideAxis(int(indices[outside][0]), size)
    return indices


def embedding(indices: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Return rows of a table."""
    within = _within(indices, table.shape[0])
    if out is None:
        return F.embedding(within, table)
    torch.index_select(table, 0, within.reshape(-1), out=out.view(within.numel(), table.shape[1]))
    return out


def take_along_axis(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Return elements of x along an axis, at indices in the result's layout."""
    return x.gather(axis, _within(indices, x.shape[axis]))


def scatter_add(target: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """Add updates to target: the transpose of `take_along_axis`."""
    within = _within(indices, target.shape[axis])
    return _wide(target).scatter_add(axis, within, _wide(updates)).to(target.dtype)


def take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Return slices of x along an axis, at indices of any rank."""
    axis %= x.dim()
    picked = x.index_select(axis, _within(indices, x.shape[axis]).reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def index_add(target: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """Add updates to target: the transpose of `take`."""
    axis %= target.dim()
    rows = updates.reshape((*target.shape[:axis], indices.numel(), *target.shape[axis + 1 :]))
    within = _within(indices, target.shape[axis]).reshape(-1)
    return _wide(target).index_add(axis, within, _wide(rows)).to(target.dtype)


def append(state: Tensor, x: Tensor, rows: Tensor, start: Tensor, axis: int, *, ring: bool) -> Tensor:
    """Write x into a state, from each row's start, and return the state. Raises OutsideAxis or NoRoom before anything
    is written.
    """
    capacity, count = state.shape[axis], x.shape[axis]
    slots = _within(rows, state.shape[0])[:, None]
    lost = (start < 0) if ring else (start < 0) | (start > capacity - count)
    if bool(lost.any()):
        row = int(lost.nonzero()[0])
        raise NoRoom(row, int(start[row]), capacity)
    places = start[:, None] + torch.arange(count, device=start.device)
    state.movedim(axis, 1)[slots, places % capacity if ring else places] = x.movedim(axis, 1)
    return state


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype of sums, which is float32 for 16-bit dtypes: PyTorch rounds after every in-place
    addition.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fold_windows(x: Tensor, axis: int, size: int, stride: int, dilation: int) -> Tensor:
    """Return the sum of windows, each added at its original positions. The elements of a window are along the last
    axis.
    """
    axis %= x.dim() - 1
    shape = [*x.shape[:-1]]
    shape[axis] = size
    wide = _wide(x)
    y = wide.new_zeros(shape)
    moved, reach = y.movedim(axis, 0), (x.shape[axis] - 1) * stride + 1
    for k in range(x.shape[-1]):
        first = k * dilation
        moved[first : first + reach : stride] += wide[..., k].movedim(axis, 0)
    return y.to(x.dtype)


# -- rotary positions ----------------------------------------------------------------------------------------


def rotary(x: Tensor, positions: Tensor, frequencies: Tensor, layout: str) -> Tensor:
    """Rotate pairs of dimensions of x [b, h, s, d] by positions [b, s] times frequencies [f]. Dimensions after the
    rotated ones are unchanged.
    """
    angles = (positions[:, None, :, None] * frequencies).to(frequencies.dtype)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned, rest = x.tensor_split((2 * frequencies.shape[0],), dim=-1)
    first, second = turned.chunk(2, dim=-1) if layout == "half" else (turned[..., ::2], turned[..., 1::2])
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.cat(pairs, -1) if layout == "half" else torch.stack(pairs, -1).flatten(-2)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


# -- attention -----------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    masks: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    softcap: float | None = None,
) -> Tensor:
    """Compute attention of q [b, h, s, d], k [b, g, t, d], v [b, g, t, e]. Return [b, h, s, e]; see
    `treadle.ir.ops.attention`.

    Masks and biases broadcast against [b, h, s, t]. A query without visible keys gets zeros, which PyTorch's own
    function does not guarantee.
    """
    mask = _joined(masks, biases)
    if softcap is not None:
        return _weighted(_probabilities(q, k, scale, softcap, mask), v)
    empty = _empty_rows(mask)
    if mask is not None and empty is not None:  # a row of NaN would spread to other rows in a bfloat16 product
        mask = mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out if empty is None else out.masked_fill(empty, 0.0)


def attention_with_probabilities(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    masks: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of `attention`, and the probabilities [b, h, s, t], which are also zeros for a query without
    visible keys.
    """
    p = _probabilities(q, k, scale, softcap, _joined(masks, biases))
    return _weighted(p, v), p


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    start: Tensor,
    *operands: Tensor,
    terms: Sequence[str],
    scale: float,
    softcap: float | None = None,
    ring: bool = False,
) -> Tensor:
    """Compute attention of q [b, h, s, d], k [R, g, C, d], v [R, g, C, e]. Return [b, h, s, e]; see
    `treadle.ir.ops.cached_attention`.

    terms  in their text form; their operands follow `start` in that order

    The live part of each slot is read as a view, and cast to q's dtype if it differs. Rows in consecutive slots with
    the same position are computed together. Raises OutsideAxis for a row outside the slots. On a GPU, the call waits
    until rows, start and lengths have been computed.
    """
    read, rest = _read(tuple(terms)), iter(operands)
    given = [[next(rest) for _ in term.operands] for term in read]
    lengths = [x[0].tolist() for term, x in zip(read, given, strict=True) if isinstance(term, Padding)]
    slots, past = _within(rows, k.shape[0]).tolist(), list(zip(start.tolist(), *lengths, strict=True))
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    first = 0
    while first < len(slots):
        end = first + 1
        while end < len(slots) and slots[end] == slots[end - 1] + 1 and past[end] == past[first]:
            end += 1
        some, held, (at, *limits) = slice(first, end), slice(slots[first], slots[end - 1] + 1), past[first]
        live = live_positions(read, at, q.shape[2], k.shape[2], limits, ring=ring)
        if live:
            says = CachedTerms(live, at, q.shape[2], k.shape[2], some, q.device)
            masks, biases = says.masks(read, given), says.biases(read, given)
            keys, values = (x[held, :, says.keys].to(q.dtype) for x in (k, v))
            out[some] = attention(q[some], keys, values, scale=scale, masks=masks, biases=biases, softcap=softcap)
        first = end
    return out


@lru_cache(maxsize=256)
def _read(terms: tuple[str, ...]) -> tuple[Term, ...]:
    return tuple(map(parse_term, terms))


def _joined(masks: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor | None:
    """Return masks and biases as one tensor: bool, or float if there is a bias; None if there are neither."""
    mask: Tensor | None = None
    for keep in masks:
        mask = keep if mask is None else mask & keep
    if biases:
        bias = biases[0]
        for other in biases[1:]:
            bias = bias + other
        mask = bias if mask is None else torch.where(mask, bias, -math.inf)
    return mask


def _empty_rows(mask: Tensor | None) -> Tensor | None:
    """Return a condition [..., s, 1], true for queries without visible keys, or None if there are no such queries. On a
    GPU, the check would wait for all pending work, so the condition is always returned if there is a mask.
    """
    if mask is None:
        return None
    empty = ~(mask if mask.dtype == torch.bool else mask > -math.inf).any(-1, keepdim=True)
    return empty if mask.device.type != "cpu" or bool(empty.any()) else None


def _probabilities(q: Tensor, k: Tensor, scale: float, softcap: float | None, mask: Tensor | None) -> Tensor:
    """Return probabilities [b, h, s, t], zeros for a query without visible keys. PyTorch's own attention does not
    return probabilities, and has no soft-cap.
    """
    scores = (_grouped(q * scale, k.shape[1]) @ k.transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    p = torch.softmax(scores, -1)
    empty = _empty_rows(mask)
    return p if empty is None else p.masked_fill_(empty, 0.0)


def _weighted(p: Tensor, v: Tensor) -> Tensor:
    """Return values weighted by probabilities, [b, h, s, e]."""
    return (_grouped(p, v.shape[1]) @ v.unsqueeze(2)).flatten(1, 2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Split heads into groups: return [b, g, r, s, d] for [b, (g r), s, d]."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """[s, t]: j <= i"""
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device)[:, None]


def window(queries: int, keys: int, size: int, device: torch.device) -> Tensor:
    """[s, t]: |i - j| < size"""
    offsets = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    return offsets.abs() < size


def padding(lengths: Tensor, keys: int) -> Tensor:
    """[b, 1, 1, t]: j < lengths[b]"""
    return torch.arange(keys, device=lengths.device) < lengths[:, None, None, None]


def segments(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """[b, 1, s, t]: of_queries[b, i] == of_keys[b, j]"""
    return of_queries[:, None, :, None] == of_keys[:, None, None, :]


def laid_out(x: Tensor, axes: str) -> Tensor:
    """Return a tensor whose axes are some of b, h, s and t as a tensor [b, h, s, t], with size 1 for missing axes."""
    sizes = dict(zip(axes.split(), x.shape, strict=True))
    return x.reshape([sizes.get(axis, 1) for axis in "bhst"])


def t5_relative(table: Tensor, queries: int, keys: int, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """[1, h, s, t]: table[bucket(j - i), h]"""
    bucket = _t5_buckets(buckets, max_distance, bidirectional, table.device)
    offsets = _offsets(queries, keys, table.device).clamp(-max_distance, max_distance) + max_distance
    return _by_offset(table[bucket[offsets]].T, queries, keys)


@lru_cache(maxsize=64)
def _t5_buckets(buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    return torch.from_numpy(T5Relative(buckets, max_distance, bidirectional).bucket_by_offset).to(device)


def alibi(slopes: Tensor, queries: int, keys: int) -> Tensor:
    """[1, h, s, t]: slopes[h] (j - i)"""
    return _by_offset(slopes[:, None] * _offsets(queries, keys, slopes.device).to(slopes.dtype), queries, keys)


def _offsets(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return all values of j - i, in ascending order. If there are no queries, return the values for one query."""
    return torch.arange(1 - max(1, queries), keys, device=device)


def _by_offset(values: Tensor, queries: int, keys: int) -> Tensor:
    """Return values [h, s + t - 1], one for each j - i, as a view [1, h, s, t]: row i is the window that starts at s -
    1 - i.
    """
    return values.unfold(-1, keys, 1).flip(1)[None, :, :queries]
