"""Masks and biases of attention over a cache, for queries from a given position on, and the keys that they may see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.backends.torch.counting import counted, t5_buckets
from treadle.ir.attention.attention_terms import (
    Alibi,
    BiasTerm,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.attention.cached_positions import live_positions
from treadle.ir.attention.seen_keys import reach_of
from treadle.ir.attention.term_visitor import TermVisitor

BUCKET = 128
"""The numbers of keys that a device reads are multiples of this, or the capacity."""


class CachedTerms(TermVisitor[Tensor, Tensor]):
    """Terms as tensors that broadcast against [b, h, s, t].

    i, j   the positions of the queries, [b, 1, s, 1], and of the keys that are read, [b, 1, 1, t], or with b of 1
    rows   the indices of these rows in the operands
    keys   the positions in the slot of these keys
    """

    def __init__(self, i: Tensor, j: Tensor, rows: slice, keys: slice) -> None:
        self.i, self.j, self.rows, self.keys = i, j, rows, keys

    def biases(self, terms: Sequence[Term], given: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the biases of all terms."""
        return [t.accept(self, *x) for t, x in zip(terms, given, strict=True) if isinstance(t, BiasTerm)]

    # -- a term --------------------------------------------------------------------------------------------------

    def causal(self, term: Causal) -> Tensor:
        return self.j <= self.i

    def window(self, term: Window) -> Tensor:
        return (self.i - self.j).abs() < term.size

    def padding(self, term: Padding, lengths: Tensor) -> Tensor:
        return self.j < self._laid_out(lengths, "b")

    def segments(self, term: Segments, of_queries: Tensor, of_keys: Tensor) -> Tensor:
        return self._laid_out(of_queries, "b s") == self._laid_out(of_keys, "b t")

    def boolean_mask(self, term: BooleanMask, mask: Tensor) -> Tensor:
        return self._laid_out(mask, term.axes)

    def tensor_bias(self, term: TensorBias, bias: Tensor) -> Tensor:
        return self._laid_out(bias, term.axes)

    def t5_relative(self, term: T5Relative, table: Tensor) -> Tensor:
        far = term.max_distance
        bucket = t5_buckets(term.buckets, far, term.bidirectional, table.device)
        return table[bucket[(self.j - self.i).clamp(-far, far) + far]].squeeze(1).movedim(-1, 1)

    def alibi(self, term: Alibi, slopes: Tensor) -> Tensor:
        return slopes[:, None, None] * (self.j - self.i).to(slopes.dtype)

    def _laid_out(self, x: Tensor, axes: str) -> Tensor:
        """Return an operand as a tensor with all axes, for these rows and keys, with size 1 for missing axes."""
        held = axes.split()
        parts = {"b": self.rows, "t": self.keys}
        x = x[tuple(parts.get(axis, slice(None)) for axis in held)]
        sizes = dict(zip(held, x.shape, strict=True))
        return x.reshape([sizes.get(axis, 1) for axis in "bhst"])


class LiveTerms(CachedTerms):
    """Terms for rows whose queries have the same positions, and exactly the keys that these rows may see.

    live   the positions of these keys
    keys   the positions in the slot that are read: the live keys, or the whole ring if the live keys wrap around
    """

    def __init__(self, live: range, start: int, queries: int, capacity: int, rows: slice, device: torch.device) -> None:
        self.live, self.start, self.queries = live, start, queries
        first = live.start % capacity
        self.wraps = first + len(live) > capacity
        i = torch.arange(start, start + queries, device=device)[None, None, :, None]
        if not self.wraps:
            keys = slice(first, first + len(live))
            j = torch.arange(live.start, live.stop, device=device)
        else:
            keys = slice(0, capacity)
            newest = live.stop - 1
            j = newest - (newest - torch.arange(capacity, device=device)) % capacity
        super().__init__(i, j[None, None, None], rows, keys)

    def masks(self, terms: Sequence[Term], given: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the masks of all terms, except masks of positions that hide no live key, such as causal for a single
        query.
        """
        made = [self.j >= self.live.start] if self.wraps and len(self.live) < self.j.shape[-1] else []
        for term, operands in zip(terms, given, strict=True):
            if not isinstance(term, BiasTerm) and not self._keeps_all(term):
                made.append(term.accept(self, *operands))
        return made

    def _keeps_all(self, term: Term) -> bool:
        if not isinstance(term, Causal | Window):
            return isinstance(term, Padding)  # the lengths already bound the live keys
        low, high = term.reach
        oldest, newest = self.live.start - (self.start + self.queries - 1), self.live.stop - 1 - self.start
        return (low is None or low <= oldest) and (high is None or newest <= high)


class MaskedCache:
    """The keys that rows of different positions read together, with masks. No value is read back from the device.

    keys                     the positions in the slots that are read: a range that includes the live keys of all rows
    terms                    the terms at these positions
    masks                    the masks of all terms
    every_query_sees_a_key   True if this follows from the terms, whatever the operands hold
    """

    def __init__(
        self,
        terms: Sequence[Term],
        given: Sequence[Sequence[Tensor]],
        start: Tensor,
        starts: Sequence[int] | None,
        queries: int,
        capacity: int,
        *,
        ring: bool,
    ) -> None:
        """`starts` are the values of `start`, if the host knows them. Otherwise the whole slots are read."""
        live = range(capacity) if ring or not starts else _bucket(terms, starts, queries, capacity)
        self.keys = slice(live.start, live.stop)
        first = start[:, None, None, None]
        i = first + counted(queries, start.device)[:, None]
        if ring:
            newest = first + (queries - 1)
            j = newest - (newest - counted(capacity, start.device)) % capacity
        else:
            j = counted(capacity, start.device)[self.keys][None, None, None]
        self.terms = CachedTerms(i, j, slice(None), self.keys)
        self._live = self._live_keys(terms, given, first, queries, ring=ring)
        by_position = queries == 1  # the live keys are then exactly the keys that masks of positions keep
        self.masks = [self._live] if by_position else [j >= 0] if ring else []
        for term, operands in zip(terms, given, strict=True):
            if not isinstance(term, BiasTerm) and not (by_position and isinstance(term, Causal | Window | Padding)):
                self.masks.append(term.accept(self.terms, *operands))
        kinds = {type(term) for term in terms if not isinstance(term, BiasTerm)}
        holds_own = ring or (bool(starts) and max(starts or (0,)) + queries <= capacity)
        sees_own = kinds <= {Causal} or (kinds <= {Causal, Window} and holds_own)
        self.every_query_sees_a_key = sees_own and not any(isinstance(term, TensorBias) for term in terms)

    def _live_keys(
        self, terms: Sequence[Term], given: Sequence[Sequence[Tensor]], first: Tensor, queries: int, *, ring: bool
    ) -> Tensor:
        """Return bool[b, 1, 1, t]: keys that some query of the row may see, by position and by the row's length."""
        low, high = reach_of(terms)
        bounds = [] if high is None else [self.terms.j <= first + (queries - 1 + high)]
        bounds += [] if low is None else [self.terms.j >= first + low]
        bounds += [self.terms.j >= 0] if ring else []
        bounds += [t.accept(self.terms, *x) for t, x in zip(terms, given, strict=True) if isinstance(t, Padding)]
        live = bounds[0]  # causal or padding is among the terms
        for bound in bounds[1:]:
            live = live & bound
        return live

    def part_of(self, x: Tensor) -> Tensor:
        """Return keys or values [b, g, t, d] with zeros where no query may see them: the slot may hold NaN there, and
        0 times NaN is NaN.
        """
        return torch.where(self._live.transpose(-1, -2), x, 0.0)


def _bucket(terms: Sequence[Term], starts: Sequence[int], queries: int, capacity: int) -> range:
    """Return a range of positions that includes the live keys of all rows. Its ends are multiples of `BUCKET`, so that
    few sizes occur.
    """
    oldest = live_positions(terms, min(starts), queries, capacity, (), ring=False)
    newest = live_positions(terms, max(starts), queries, capacity, (), ring=False)
    end = min(capacity, -(-max(newest.stop, 1) // BUCKET) * BUCKET)
    return range(min(oldest.start // BUCKET * BUCKET, end), end)
