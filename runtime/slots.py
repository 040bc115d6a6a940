"""Slots of a session: the rows that occupy them, and the texts that free slots still hold.

If a row is closed, its slot keeps the contents until another row takes the slot. A new row whose tokens begin like such
a text, or like the text of an open row, continues from the common prefix. If there is a prefix cache, a text that loses
its slot is stored there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.backends.states import States
from treadle.ir.errors import UsageError
from treadle.runtime.prefix_cache import BLOCK, CachedPrefix, Parts, PrefixCache
from treadle.runtime.row_inputs import RowPrompt, first_difference

Array = np.ndarray[Any, Any]

LEAST = 16
"""A shorter prefix is recomputed: call widths are multiples of this number, so reusing the prefix saves no time."""


@dataclass
class Row:
    """A text in a slot.

    tokens     all tokens of the text
    forgotten  number of the oldest tokens that the slot no longer holds
    verified   tokens that `verify` wrote after `tokens` and that are not accepted yet
    is_lost    True if a failed call may have changed the states of these tokens
    written    number of written positions of the slot, including padding and rolled-back tokens
    along      values of inputs along the sequence, [n, ...] each, for at least all tokens
    key        hash of the inputs that the row began with
    """

    tokens: list[int] = field(default_factory=list)
    forgotten: int = 0
    verified: list[int] = field(default_factory=list)
    is_lost: bool = False
    written: int = 0
    along: dict[str, Array] = field(default_factory=dict)
    key: str = ""

    @property
    def length(self) -> int:
        """Number of filled positions of the row's slot."""
        return len(self.tokens) - self.forgotten


@dataclass(frozen=True)
class Ring:
    """A ring buffer: a cache with a fixed number of positions, of which a token reads the `reach` positions before its
    own.
    """

    capacity: int
    reach: int

    def holds(self, row: Row, length: int) -> bool:
        """Return True if the ring still holds all positions that a token at this position reads. Each write has
        replaced the position one ring length earlier.
        """
        return row.written <= self.capacity or length - self.reach >= row.written - self.capacity


class Slots:
    """The slots of a session.

    rows    open rows by slot, in the order in which they were opened
    count   number of slots
    states  states in which every slot has a part
    rings   the caches in which old positions are overwritten
    capacity  the symbol of a cache's number of positions
    whole   True if a row can continue only from a whole text, since running sums cannot be rolled back
    cache   a cache of prefixes that no slot holds; None: such prefixes are dropped
    """

    def __init__(self, states: States, count: int, rings: Sequence[Ring], *, capacity: str, whole: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.states, self.rings, self.whole = states, tuple(rings), whole
        self.count, self.capacity = count, capacity
        self._empty = list(range(count))[::-1]
        self._kept: dict[int, Row] = {}  # texts of closed rows, least recently used first
        self.cache: PrefixCache | None = None

    @property
    def free(self) -> int:
        """Number of free slots, including closed rows whose caches are kept."""
        return len(self._empty) + len(self._kept)

    def take(self) -> int:
        """Return a free slot: an empty one if possible, else the least recently used one, whose text is then dropped or
        stored in the prefix cache.

        Raises UsageError if no slot is free.
        """
        if not self.free:
            raise UsageError(
                f"all {len(self.rows)} rows are open", hint="close a row, or open a session with more rows"
            )
        if self._empty:
            return self._empty.pop()
        slot = next(iter(self._kept))
        self._store(slot, self._kept.pop(slot))
        return slot

    def give_back(self, slot: int) -> None:
        """Return a slot without a text to the empty slots."""
        self._empty.append(slot)

    def close(self, slot: int, *, keep: bool) -> None:
        """Close a slot's row; with `keep`, another row may continue from its text."""
        row = self.rows.pop(slot)
        if keep and row.tokens and not row.is_lost:
            self._kept[slot] = row
        else:
            self.give_back(slot)

    def held(self, prompt: RowPrompt) -> int:
        """Return the length of the longest prefix of a prompt that a slot or the prefix cache holds. The last token
        does not count, since the logits after it must still be computed.
        """
        return max(self._longest(prompt)[1], self.cache.length(prompt.tokens) if self.cache is not None else 0)

    def fork(self, source: int) -> int:
        """Open a row with a copy of another row's text; return its slot. Raises UsageError if no slot is free."""
        slot, held = self.take(), self.rows[source]
        self._copy(source, slot, held.length)
        self.rows[slot] = Row(
            list(held.tokens), held.forgotten, written=held.written, along=dict(held.along), key=held.key
        )
        return slot

    def resume(self, prompt: RowPrompt) -> int | None:
        """Open a row with the longest prefix of a prompt that a slot or the prefix cache holds. Return its slot, or
        None if neither holds a prefix.

        If the row continues the whole text of a closed row, it takes over that slot. Otherwise the common prefix is
        copied, so that the other text can be continued as well. Raises UsageError if no slot is free.
        """
        source, length = self._longest(prompt)
        if self.cache is not None and self.cache.length(prompt.tokens) >= length + BLOCK:
            return self._restore(prompt.tokens, self.cache.find(prompt.tokens))
        if not length:
            return None
        held = self._kept.pop(source, None)
        opened = Row(prompt.tokens[:length], along=dict(prompt.along), key=prompt.key)
        opened.written = (held or self.rows[source]).written
        if held is not None and (held.length == length or not self.free):
            if held.length > length:
                self._store(source, held)
            self.rows[source] = opened
            return source
        slot = self.take()
        if held is not None:
            self._kept[source] = held  # mark it as the most recently used
        self._copy(source, slot, length)
        self.rows[slot] = opened
        return slot

    def _copy(self, source: int, slot: int, length: int) -> None:
        """Copy a slot's contents into another slot: of rings all positions, of other caches only the first `length`
        positions.
        """
        for name, part in self._parts(slice(length)):
            self.states.copy(name, (source, *part), (slot, *part))

    def _parts(self, positions: slice) -> list[tuple[str, tuple[slice, ...]]]:
        """Return the name of each state with the index of these positions in a slot; of rings, the index of all
        positions.
        """
        found = []
        for port in self.states.kinds.ports:
            sizes = [size.as_symbol for size in port.type.shape]
            part = [positions if size == self.capacity else slice(None) for size in sizes[1:]]
            found.append((port.name, tuple(part)))
        return found

    def _store(self, slot: int, row: Row) -> None:
        """Store a text that is about to lose its slot in the prefix cache, if there is one."""

        def read(start: int, stop: int) -> Parts:
            return self.states.read([(name, (slot, *part)) for name, part in self._parts(slice(start, stop))])

        if self.cache is not None:
            self.cache.store(row.tokens[row.forgotten :], read)

    def _restore(self, tokens: list[int], prefix: CachedPrefix) -> int:
        """Open a row with a prefix from the prefix cache; return its slot."""
        slot = self.take()
        for number, parts in enumerate(prefix.parts):
            places = self._parts(slice(number * BLOCK, (number + 1) * BLOCK))
            for (name, part), copied in zip(places, parts, strict=True):
                self.states.write(name, (slot, *part), copied)
        self.rows[slot] = Row(tokens[: prefix.length], written=prefix.length)
        return slot

    def _longest(self, prompt: RowPrompt) -> tuple[int, int]:
        """Return the slot that holds the longest prefix of a prompt, and the prefix's length (0 if no prefix is long
        enough).
        """
        found = slot = 0
        for each, row in (*self._kept.items(), *self.rows.items()):
            if row.is_lost or row.key != prompt.key:
                continue
            along = {name: values[row.forgotten :] for name, values in row.along.items()}
            length = self.worth(prompt, RowPrompt(row.tokens[row.forgotten :], along, key=row.key))
            if length > found and all(ring.holds(row, length) for ring in self.rings):
                slot, found = each, length
        return slot, found

    def worth(self, prompt: RowPrompt, other: RowPrompt) -> int:
        """Return the number of tokens of a prompt that can be reused from another text; 0 if there are too few."""
        if prompt.key != other.key:
            return 0
        tokens, others = prompt.tokens, other.tokens
        low, high = 0, min(len(tokens) - 1, len(others))
        while low < high:  # the first `low` tokens are equal
            middle = (low + high + 1) // 2
            if tokens[low:middle] == others[low:middle]:
                low = middle
            else:
                high = middle - 1
        low = first_difference(prompt.along, other.along, low)
        return low if low >= LEAST and (low == len(others) or not self.whole) else 0
