"""Slots of a session: which rows live in them, and what texts the free ones still hold.

The slot of a row that was closed holds what it held until another row takes it. A new row whose tokens begin as such a
text does, or as one that still grows, goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from treadle.backends.states import States
from treadle.ir.errors import UsageError
from treadle.passes.stepping.functions import CAPACITY

LEAST = 16
"""A beginning of fewer tokens is computed again: calls are as wide as a multiple of this, so it would save none."""


@dataclass
class Row:
    """A text in a slot.

    tokens     so far
    forgotten  how many of them, the oldest, are no longer known
    verified   what `verify` left in the slot after them, not accepted yet
    is_lost    a call was broken off that may have changed what the slot holds of these tokens
    written    how many positions of the slot were written, padding and tokens that were taken back included
    """

    tokens: list[int] = field(default_factory=list)
    forgotten: int = 0
    verified: list[int] = field(default_factory=list)
    is_lost: bool = False
    written: int = 0

    @property
    def length(self) -> int:
        """How many positions of its slot are filled."""
        return len(self.tokens) - self.forgotten


@dataclass(frozen=True)
class Ring:
    """A cache of so many positions, of which a token sees those that lie `reach` before it."""

    capacity: int
    reach: int

    def holds(self, row: Row, length: int) -> bool:
        """Whether what a token at this position sees is still there: each write took away what lay a ring before it."""
        return row.written <= self.capacity or length - self.reach >= row.written - self.capacity


class Slots:
    """The slots of a session.

    rows    that are open, by slot, in the order in which they were opened
    states  in which every slot has a part
    rings   those caches among them in which old positions are written over
    whole   whether a text can only be gone on from as a whole, since states have sums, which are not cut back
    """

    def __init__(self, states: States, count: int, rings: Sequence[Ring], *, whole: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.states, self.rings, self.whole = states, tuple(rings), whole
        self._empty = list(range(count))[::-1]
        self._kept: dict[int, Row] = {}  # texts of closed rows, the least recently used one first

    @property
    def free(self) -> int:
        """How many more rows can be opened."""
        return len(self._empty) + len(self._kept)

    def take(self) -> int:
        """A free slot: an empty one, else that of the text that was used least recently, which is forgotten.

        Raises UsageError where none is free.
        """
        if not self.free:
            raise UsageError(f"all {len(self.rows)} rows are open", hint="close one, or a session with more rows")
        if self._empty:
            return self._empty.pop()
        slot = next(iter(self._kept))
        del self._kept[slot]
        return slot

    def give_back(self, slot: int) -> None:
        """A slot that was taken holds nothing that anybody may go on from."""
        self._empty.append(slot)

    def close(self, slot: int, *, keep: bool) -> None:
        """Close its row; `keep`: another may go on from its text."""
        row = self.rows.pop(slot)
        if keep and row.tokens and not row.is_lost:
            self._kept[slot] = row
        else:
            self.give_back(slot)

    def held(self, tokens: list[int]) -> int:
        """How many of the first of these tokens a slot holds: not the last one, whose logits are still to be had."""
        return self._longest(tokens)[1]

    def fork(self, source: int) -> int:
        """Open a row of the text that another row has; returns its slot. Raises UsageError where none is free."""
        slot, held = self.take(), self.rows[source]
        self._copy(source, slot, held.length)
        self.rows[slot] = Row(list(held.tokens), held.forgotten, written=held.written)
        return slot

    def resume(self, tokens: list[int]) -> int:
        """Open a row of as many of these tokens as a slot holds; returns its slot.

        It takes the slot of a closed row whose whole text it goes on from. Of other texts it copies what is shared, so
        that they can be gone on from as well. Raises UsageError where no slot is free.
        """
        source, length = self._longest(tokens)
        held = self._kept.pop(source, None) if length else None
        if held is not None and (held.length == length or not self.free):
            self.rows[source] = Row(tokens[:length], written=held.written)
            return source
        slot = self.take()
        if held is not None:
            self._kept[source] = held  # as the one that was used last
        text = held or self.rows.get(source) if length else None
        if text is not None:
            self._copy(source, slot, length)
        self.rows[slot] = Row(tokens[:length], written=0 if text is None else text.written)
        return slot

    def _copy(self, source: int, slot: int, length: int) -> None:
        """Copy what a slot holds into another: of caches that are no rings so many positions alone."""
        for port in self.states.kinds.ports:
            sizes = [size.as_symbol for size in port.type.shape]
            part = [slice(None)] * len(sizes[1:])
            if CAPACITY in sizes:
                part[sizes.index(CAPACITY) - 1] = slice(length)
            state = self.states[port.name]
            state[(slot, *part)] = state[(source, *part)]

    def _longest(self, tokens: list[int]) -> tuple[int, int]:
        """The slot that holds the most of a text's beginning, and how much: 0 where none holds enough."""
        found = slot = 0
        for each, row in (*self._kept.items(), *self.rows.items()):
            length = self.worth(tokens, row.tokens[row.forgotten :])
            if length > found and not row.is_lost and all(ring.holds(row, length) for ring in self.rings):
                slot, found = each, length
        return slot, found

    def worth(self, tokens: list[int], other: list[int]) -> int:
        """How many tokens of a text need not be computed where another one's are held; 0 where these are too few."""
        low, high = 0, min(len(tokens) - 1, len(other))
        while low < high:  # the first `low` are the same
            middle = (low + high + 1) // 2
            if tokens[low:middle] == other[low:middle]:
                low = middle
            else:
                high = middle - 1
        return low if low >= LEAST and (low == len(other) or not self.whole) else 0
