"""Masks and biases of attention over a cache, for queries from a given position on, and the keys that they may see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
from treadle.ir.attention.term_visitor import TermVisitor


class CachedTerms(TermVisitor[Tensor, Tensor]):
    """Terms as tensors that broadcast against [b, h, s, t], for rows whose queries have the same positions.

    live   the positions of the keys that the rows may see
    rows   the indices of these rows in the operands
    keys   the positions in the slot that are read: the live keys, or the whole ring if the live keys wrap around
    i, j   the positions of the queries [s, 1] and of these keys [t]
    """

    def __init__(self, live: range, start: int, queries: int, capacity: int, rows: slice, device: torch.device) -> None:
        self.live, self.start, self.queries, self.rows = live, start, queries, rows
        self.i = torch.arange(start, start + queries, device=device)[:, None]
        first = live.start % capacity
        self.wraps = first + len(live) > capacity
        if not self.wraps:
            self.keys = slice(first, first + len(live))
            self.j = torch.arange(live.start, live.stop, device=device)
        else:
            self.keys = slice(0, capacity)
            newest = live.stop - 1
            self.j = newest - (newest - torch.arange(capacity, device=device)) % capacity

    def masks(self, terms: Sequence[Term], given: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the masks of all terms, except masks of positions that hide no live key, such as causal for a single
        query.
        """
        made = [(self.j >= self.live.start)[None]] if self.wraps and len(self.live) < len(self.j) else []
        for term, operands in zip(terms, given, strict=True):
            if not isinstance(term, BiasTerm) and not self._keeps_all(term):
                made.append(term.accept(self, *operands))
        return made

    def biases(self, terms: Sequence[Term], given: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the biases of all terms."""
        return [t.accept(self, *x) for t, x in zip(terms, given, strict=True) if isinstance(t, BiasTerm)]

    def _keeps_all(self, term: Term) -> bool:
        if not isinstance(term, Causal | Window):
            return isinstance(term, Padding)  # the lengths already bound the live keys
        low, high = term.reach
        oldest, newest = self.live.start - (self.start + self.queries - 1), self.live.stop - 1 - self.start
        return (low is None or low <= oldest) and (high is None or newest <= high)

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
        bucket = torch.from_numpy(term.bucket_by_offset).to(table.device)
        return table[bucket[(self.j - self.i).clamp(-far, far) + far]].movedim(-1, 0)[None]

    def alibi(self, term: Alibi, slopes: Tensor) -> Tensor:
        return slopes[:, None, None] * (self.j - self.i).to(slopes.dtype)

    def _laid_out(self, x: Tensor, axes: str) -> Tensor:
        """Return an operand as a tensor with all axes, for these rows and keys, with size 1 for missing axes."""
        held = axes.split()
        parts = {"b": self.rows, "t": self.keys}
        x = x[tuple(parts.get(axis, slice(None)) for axis in held)]
        sizes = dict(zip(held, x.shape, strict=True))
        return x.reshape([sizes.get(axis, 1) for axis in "bhst"])
