"""Attention in PyTorch, with masks and biases as tensors that broadcast against the scores [b, h, s, t]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.backends.torch.cached_terms import BLOCK, BlockTerms, LiveTerms, MaskedCache
from treadle.backends.torch.counting import parsed_terms, t5_buckets
from treadle.backends.torch.indexed_kernels import on_host, within
from treadle.backends.torch.status import At
from treadle.ir.attention.attention_terms import Padding
from treadle.ir.attention.cached_positions import live_positions


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
    slots, past = within(rows, k.shape[0]).tolist(), list(zip(start.tolist(), *lengths, strict=True))
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
    held, slots = within(rows, states[0].shape[0], report), on_host(rows, report)
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
