"""PyTorch kernels that emitted source calls, if one expression does not suffice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.backends.outside_axis import NoRoom, OutsideAxis, StatusKind
from treadle.backends.torch.cached_terms import BLOCK, BlockTerms, LiveTerms, MaskedCache
from treadle.backends.torch.counting import counted, parsed_terms, t5_buckets
from treadle.backends.torch.encoded_rows import (  # noqa: F401  emitted source
    decode_groups,
    decode_int4_groups,
    decode_int8_rows,
    decode_uint8_rows,
    encode_groups,
    encode_int8_rows,
    encode_uint8_rows,
    encoded_linear,
    group_linear,
)
from treadle.backends.torch.status import At, record
from treadle.ir.attention.attention_terms import Padding
from treadle.ir.attention.cached_positions import live_positions
from treadle.ir.ops.rounding import FORMATS

_MOST = 2**63 - 1

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
# device unusable. So indices are checked first. With `report`, the host does not read indices back from the device:
# a failed check is recorded (`treadle.backends.torch.status`), and the index is replaced by one in range.


def _within(indices: Tensor, size: int, report: At | None = None) -> Tensor:
    """Return the indices. Raises OutsideAxis for an index out of the bounds of an axis of this size; with `report`,
    records it, and returns an index in range in its place.
    """
    if report is not None and not indices.numel():
        return indices
    if (known := on_host(indices, report)) is not None:
        _limit(indices, 0, size - 1)
        _refuse_outside(known, size)
        return indices
    if report is not None and size:
        inside = indices.clamp(0, size - 1)
        record(report, StatusKind.OUTSIDE_AXIS, size, indices, inside != indices)
        return inside
    outside = (indices < 0) | (indices >= size)
    if bool(outside.any()):
        raise OutsideAxis(int(indices[outside][0]), size)
    return indices


def embedding(indices: Tensor, table: Tensor, out: Tensor | None = None, report: At | None = None) -> Tensor:
    """Return rows of a table."""
    within = _within(indices, table.shape[0], report)
    if out is None:
        return F.embedding(within, table)
    torch.index_select(table, 0, within.reshape(-1), out=out.view(within.numel(), table.shape[1]))
    return out


def take_along_axis(x: Tensor, indices: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Return elements of x along an axis, at indices in the result's layout."""
    return x.gather(axis, _within(indices, x.shape[axis], report))


def scatter_add(target: Tensor, indices: Tensor, updates: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Add updates to target: the transpose of `take_along_axis`."""
    within = _within(indices, target.shape[axis], report)
    return _wide(target).scatter_add(axis, within, _wide(updates)).to(target.dtype)


def take(x: Tensor, indices: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Return slices of x along an axis, at indices of any rank."""
    axis %= x.dim()
    picked = x.index_select(axis, _within(indices, x.shape[axis], report).reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def index_add(target: Tensor, indices: Tensor, updates: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Add updates to target: the transpose of `take`."""
    axis %= target.dim()
    rows = updates.reshape((*target.shape[:axis], indices.numel(), *target.shape[axis + 1 :]))
    within = _within(indices, target.shape[axis], report).reshape(-1)
    return _wide(target).index_add(axis, within, _wide(rows)).to(target.dtype)


def append(
    state: Tensor, x: Tensor, rows: Tensor, start: Tensor, axis: int, *, ring: bool, report: At | None = None
) -> Tensor:
    """Write x into a state, from each row's start, and return the state. Raises OutsideAxis or NoRoom before anything
    is written.

    With `report`, a failed check of values that the host does not know is recorded, and nothing is written for the row.
    """
    capacity, count = state.shape[axis], x.shape[axis]
    last = None if ring else capacity - count  # the greatest start
    slots, first, lost = _within(rows, state.shape[0], report), start, None
    if (known := on_host(start, report)) is not None:
        _limit(start, 0, _MOST if last is None else last)
        for row, at in enumerate(known):
            if at < 0 or (last is not None and at > last):
                raise NoRoom(row, at, capacity)
    elif start.numel():
        without = (start < 0) if last is None else (start < 0) | (start > last)
        if report is not None:
            record(report, StatusKind.NO_ROOM, capacity, start, without)
            first, lost = start.clamp(0, last), without
        elif bool(without.any()):
            row = int(without.nonzero()[0])
            raise NoRoom(row, int(start[row]), capacity)
    if slots is not rows:
        lost = slots != rows if lost is None else lost | (slots != rows)
    places = first[:, None] + (counted(count, start.device) if report else torch.arange(count, device=start.device))
    where = slots[:, None], places % capacity if ring else places
    written, moved = x.movedim(axis, 1), state.movedim(axis, 1)
    if lost is not None:
        written = torch.where(lost.view(-1, *[1] * (x.dim() - 1)), moved[where], written)
    moved[where] = written
    return state


def on_host(x: Tensor, report: At | None) -> list[int] | None:
    """Return the values of an input that the host keeps besides the device; None if it does not, or need not."""
    return None if report is None else getattr(x, "on_host", None)


def _limit(x: Tensor, low: int, high: int) -> None:
    """Report limits of an input's values that the host checks, for calls that repeat this one without its checks."""
    limits: list[tuple[int, int]] | None = getattr(x, "limits", None)
    if limits is not None:
        limits.append((low, high))


def _refuse_outside(indices: Sequence[int], size: int) -> None:
    for index in indices:
        if not 0 <= index < size:
            raise OutsideAxis(index, size)


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
    all_see: bool | None = None,
) -> Tensor:
    """Compute attention of q [b, h, s, d], k [b, g, t, d], v [b, g, t, e]. Return [b, h, s, e]; see
    `treadle.ir.ops.attention`.

    Masks and biases broadcast against [b, h, s, t]. A query without visible keys gets zeros, which PyTorch's own
    function does not guarantee.

    all_see  True if every query sees a key; False if a query may see none; None: read the mask to find out
    """
    mask = _joined(masks, biases)
    if softcap is not None:
        return _weighted(_probabilities(q, k, scale, softcap, mask, all_see), v)
    empty = _empty_rows(mask, all_see)
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
    all_see: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of `attention`, and the probabilities [b, h, s, t], which are also zeros for a query without
    visible keys.
    """
    p = _probabilities(q, k, scale, softcap, _joined(masks, biases), all_see)
    return _weighted(p, v), p


def attention_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *operands: Tensor,
    terms: Sequence[str],
    scale: float,
    softcap: float | None = None,
    all_see: bool = False,
) -> Tensor:
    """Compute attention as `attention` does, for a block of queries at a time, over the keys that positions allow.

    terms  in their text form; their operands follow v in that order. One of them limits the keys by position.

    No mask is larger than a block's: for a window, the work grows with the window, and not with the number of keys.
    """
    read, rest = parsed_terms(tuple(terms)), iter(operands)
    given = [[next(rest) for _ in term.operands] for term in read]
    parts = []
    for first in range(0, q.shape[2], BLOCK):
        some = q[:, :, first : first + BLOCK]
        block = BlockTerms(read, first, some.shape[2], k.shape[2], q.device)
        keys, values = k[:, :, block.keys], v[:, :, block.keys]
        masks, biases = block.masks(read, given), block.biases(read, given)
        if keys.shape[2]:
            made = attention(
                some, keys, values, scale=scale, masks=masks, biases=biases, softcap=softcap, all_see=all_see
            )
        else:
            made = some.new_zeros((*some.shape[:3], v.shape[-1]))
        parts.append(made)
    return (
        torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] if parts else q.new_zeros((*q.shape[:3], v.shape[-1]))
    )


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
    report: At | None = None,
) -> Tensor:
    """Compute attention of q [b, h, s, d], k [R, g, C, d], v [R, g, C, e]. Return [b, h, s, e]; see
    `treadle.ir.ops.cached_attention`.

    terms  in their text form; their operands follow `start` in that order

    The live part of each slot is read as a view, and cast to q's dtype if it differs. Rows in consecutive slots with
    the same position are computed together. Raises OutsideAxis for a row outside the slots.

    With `report`, nothing is read back from the device: all rows are computed together, over a range of keys that
    includes the live keys of all of them, with masks.
    """
    read, rest = parsed_terms(tuple(terms)), iter(operands)
    given = [[next(rest) for _ in term.operands] for term in read]
    if report is not None:
        starts = on_host(start, report) or getattr(start, "bounds", None)
        masked = MaskedCache(read, given, start, starts, q.shape[2], k.shape[2], ring=ring)
        keys, values = (masked.part_of(x.to(q.dtype)) for x in _slots_of((k, v), rows, masked.keys, report))
        biases = masked.terms.biases(read, given)
        all_see = masked.all_see
        return attention(
            q, keys, values, scale=scale, masks=masked.masks, biases=biases, softcap=softcap, all_see=all_see
        )
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
            says = LiveTerms(live, at, q.shape[2], k.shape[2], some, q.device)
            masks, biases = says.masks(read, given), says.biases(read, given)
            keys, values = (x[held, :, says.keys].to(q.dtype) for x in (k, v))
            out[some] = attention(q[some], keys, values, scale=scale, masks=masks, biases=biases, softcap=softcap)
        first = end
    return out


def _slots_of(states: Sequence[Tensor], rows: Tensor, keys: slice, report: At) -> list[Tensor]:
    """Return a range of keys of the rows' slots: views if the host knows that they are consecutive, else copies."""
    held, slots = _within(rows, states[0].shape[0], report), on_host(rows, report)
    if slots and slots == list(range(slots[0], slots[0] + len(slots))):
        return [state[slots[0] : slots[-1] + 1, :, keys] for state in states]
    return [state[:, :, keys].index_select(0, held) for state in states]


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


def _empty_rows(mask: Tensor | None, all_see: bool | None) -> Tensor | None:
    """Return a condition [..., s, 1], true for queries without visible keys, or None if there are no such queries.

    With `all_see` of None, the host reads the mask. On a device it would wait for all pending work.
    """
    if mask is None or all_see:
        return None
    empty = ~(mask if mask.dtype == torch.bool else mask > -math.inf).any(-1, keepdim=True)
    return empty if all_see is False or bool(empty.any()) else None


def _probabilities(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, mask: Tensor | None, all_see: bool | None
) -> Tensor:
    """Return probabilities [b, h, s, t], zeros for a query without visible keys. PyTorch's own attention does not
    return probabilities, and has no soft-cap.
    """
    scores = (_grouped(q * scale, k.shape[1]) @ k.transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    p = torch.softmax(scores, -1)
    empty = _empty_rows(mask, all_see)
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
    bucket = t5_buckets(buckets, max_distance, bidirectional, table.device)
    offsets = _offsets(queries, keys, table.device).clamp(-max_distance, max_distance) + max_distance
    return _by_offset(table[bucket[offsets]].T, queries, keys)


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
