"""Masks and biases of attention for a part of the queries and keys, and the range of keys that they may see."""

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

BLOCK = 128
"""Number of queries of a block."""

BUCKET = 128
"""The numbers of keys that a device reads are multiples of this, or the capacity."""


class CachedTerms(TermVisitor[Tensor, Tensor]):
    """Terms as tensors that broadcast against [b, h, s, t].

    i, j   the positions of the queries, [s, 1] or [b, 1, s, 1], and of the keys that are read, [t] or [b, 1, 1, t]
    parts  the indices of these rows, queries and keys in the operands, by axis; a missing axis is read as a whole
    """

    def __init__(self, i: Tensor, j: Tensor, **parts: slice) -> None:
        self.i, self.j, self.parts = i, j, parts

    def biases(self, terms: Sequence[Term], operands: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the biases of all terms."""
        return [t.accept(self, *x) for t, x in zip(terms, operands, strict=True) if isinstance(t, BiasTerm)]

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
        values = table[bucket[(self.j - self.i).clamp(-far, far) + far]].movedim(-1, -3)
        return values.flatten(1, 2) if values.dim() > 4 else values  # from [b, 1, h, s, t]

    def alibi(self, term: Alibi, slopes: Tensor) -> Tensor:
        return slopes[:, None, None] * (self.j - self.i).to(slopes.dtype)

    def _laid_out(self, x: Tensor, axes: str) -> Tensor:
        """Return an operand as a tensor with all axes, for these rows and keys, with size 1 for missing axes."""
        held = axes.split()
        x = x[tuple(self.parts.get(axis, slice(None)) for axis in held)]
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
        i = torch.arange(start, start + queries, device=device)[:, None]
        if not self.wraps:
            keys = slice(first, first + len(live))
            j = torch.arange(live.start, live.stop, device=device)
        else:
            keys = slice(0, capacity)
            newest = live.stop - 1
            j = newest - (newest - torch.arange(capacity, device=device)) % capacity
        super().__init__(i, j, b=rows, t=keys)
        self.keys = keys

    def masks(self, terms: Sequence[Term], operands: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the masks of all terms, except masks of positions that hide no live key, such as causal for a single
        query.
        """
        made = [(self.j >= self.live.start)[None]] if self.wraps and len(self.live) < len(self.j) else []
        for term, own in zip(terms, operands, strict=True):
            # the lengths already bound the live keys
            shown = isinstance(term, BiasTerm | Padding) or keeps_all(term, self.start, self.queries, self.live)
            if not shown:
                made.append(term.accept(self, *own))
        return made


def keeps_all(term: Term, start: int, queries: int, keys: range) -> bool:
    """Return True if a mask of positions hides none of these keys from queries from `start` on."""
    if not isinstance(term, Causal | Window):
        return False
    low, high = term.reach
    oldest, newest = keys.start - (start + queries - 1), keys.stop - 1 - start
    return (low is None or low <= oldest) and (high is None or newest <= high)


class BlockTerms(CachedTerms):
    """Terms for a block of queries, and the keys that their positions allow.

    keys  the positions of these keys
    """

    def __init__(self, terms: Sequence[Term], first: int, queries: int, keys: int, device: torch.device) -> None:
        """`first` is the position of the block's first query, `keys` the number of all keys."""
        self.first, self.queries = first, queries
        self.live = live_positions(terms, first, queries, keys, (), ring=False)
        self.keys = slice(self.live.start, self.live.stop)
        i = counted(first + queries, device)[first:, None]
        j = counted(keys, device)[self.keys]
        super().__init__(i, j, s=slice(first, first + queries), t=self.keys)

    def masks(self, terms: Sequence[Term], operands: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the masks of all terms, except masks of positions that hide none of the keys."""
        hiding = [
            (term, own)
            for term, own in zip(terms, operands, strict=True)
            if not isinstance(term, BiasTerm) and not keeps_all(term, self.first, self.queries, self.live)
        ]
        return [term.accept(self, *own) for term, own in hiding]


class MaskedCache:
    """The keys that rows of different positions read together, with masks. No value is read back from the device.

    keys     the positions in the slots that are read: a range that includes the live keys of all rows
    terms    the terms at these positions
    masks    the masks of all terms
    all_see  True if every query sees a key, whatever the operands hold
    """

    def __init__(
        self,
        terms: Sequence[Term],
        operands: Sequence[Sequence[Tensor]],
        start: Tensor,
        starts: Sequence[int] | None,
        queries: int,
        capacity: int,
        *,
        ring: bool,
    ) -> None:
        """`starts` are the values of `start`, or their limits, if the host knows them. Otherwise the whole slots are
        read.
        """
        starts = [min(each, capacity - queries) for each in starts or ()]  # a row beyond has no room, and is not read
        live = range(capacity) if ring or not starts else _bucket(terms, starts, queries, capacity)
        self.keys = slice(live.start, live.stop)
        first = start[:, None, None, None]
        i = first + counted(queries, start.device)[:, None]
        if ring:
            newest = first + (queries - 1)
            j = newest - (newest - counted(capacity, start.device)) % capacity
        else:
            j = counted(capacity, start.device)[self.keys]
        self.terms = CachedTerms(i, j, t=self.keys)
        self._live = self._live_keys(terms, operands, first, queries, ring=ring)
        by_position = queries == 1  # the live keys are then exactly the keys that masks of positions keep
        self.masks = [self._live] if by_position else [j >= 0] if ring else []
        for term, own in zip(terms, operands, strict=True):
            if not isinstance(term, BiasTerm) and not (by_position and isinstance(term, Causal | Window | Padding)):
                self.masks.append(term.accept(self.terms, *own))
        kinds = {type(term) for term in terms if not isinstance(term, BiasTerm)}
        holds_own = ring or (bool(starts) and max(starts or (0,)) + queries <= capacity)
        sees_own = kinds <= {Causal} or (kinds <= {Causal, Window} and holds_own)
        self.all_see = sees_own and not any(isinstance(term, TensorBias) for term in terms)

    def _live_keys(
        self, terms: Sequence[Term], operands: Sequence[Sequence[Tensor]], first: Tensor, queries: int, *, ring: bool
    ) -> Tensor:
        """Return bool[b, 1, 1, t]: keys that some query of the row may see, by position and by the row's length."""
        low, high = reach_of(terms)
        bounds = [] if high is None else [self.terms.j <= first + (queries - 1 + high)]
        bounds += [] if low is None else [self.terms.j >= first + low]
        bounds += [self.terms.j >= 0] if ring else []
        bounds += [t.accept(self.terms, *x) for t, x in zip(terms, operands, strict=True) if isinstance(t, Padding)]
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
