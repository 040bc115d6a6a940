"""A cache of prefixes in host memory: the states of texts that no slot of a session holds any more.

    cache = PrefixCache(512 << 20)
    cache.store([464, 3139, ...], read)         # read(start, stop) returns copies of the states at these positions
    found = cache.find([464, 3139, ...])        # the blocks of the longest cached prefix
    found.length, found.parts                   # 32, the copies in order

A text is stored in blocks of `BLOCK` tokens. Texts with a common prefix share the blocks of the prefix. If the limit is
reached, the least recently used blocks are dropped, the last block of a text first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

BLOCK = 16
"""Number of tokens of a block."""

Parts = list[Any]
"""Copies of the states of one block, an array for each state."""


@dataclass(eq=False)
class _Block:
    """A block of tokens with its states, and the blocks that follow it in some text."""

    tokens: tuple[int, ...]
    before: _Block | None
    parts: Parts
    nbytes: int
    after: dict[tuple[int, ...], _Block] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedPrefix:
    """The longest cached prefix of a text: its number of tokens, and the states of its blocks in order."""

    length: int
    parts: tuple[Parts, ...]


class PrefixCache:
    """Prefixes of texts with their states.

    limit   maximum size of all states in bytes
    nbytes  current size in bytes
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._first: dict[tuple[int, ...], _Block] = {}
        self._used: OrderedDict[_Block, None] = OrderedDict()  # least recently used first; each before its predecessor

    def store(self, tokens: Sequence[int], read: Callable[[int, int], Parts]) -> None:
        """Store the whole blocks of a text.

        read  a function that returns copies of the states from a position up to another one
        """
        path = list(self._path(tokens))
        self._touch(path)
        before, size = path[-1] if path else None, sum(block.nbytes for block in path)
        for start in range(len(path) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            key = tuple(tokens[start : start + BLOCK])
            parts = read(start, start + BLOCK)
            block = _Block(key, before, parts, sum(int(part.nbytes) for part in parts))
            size += block.nbytes
            if size > self.limit:
                break  # the text alone fills the cache
            (self._first if before is None else before.after)[key] = block
            self._used[block] = None
            self.nbytes += block.nbytes
            path.append(block)
            before = block
            self._drop()
        self._touch(path)

    def length(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens of the longest cached prefix of a text. The text's last token does not count."""
        return BLOCK * sum(1 for _ in self._path(tokens[:-1]))

    def find(self, tokens: Sequence[int]) -> CachedPrefix:
        """Return the longest cached prefix of a text, and mark it as used. The text's last token does not count."""
        path = list(self._path(tokens[:-1]))
        self._touch(path)
        return CachedPrefix(BLOCK * len(path), tuple([block.parts for block in path]))

    def _path(self, tokens: Sequence[int]) -> Iterator[_Block]:
        after = self._first
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            block = after.get(tuple(tokens[start : start + BLOCK]))
            if block is None:
                return
            yield block
            after = block.after

    def _touch(self, path: Sequence[_Block]) -> None:
        for block in reversed(path):
            self._used.move_to_end(block)

    def _drop(self) -> None:
        """Drop the least recently used blocks until the limit holds. No other block follows such a block."""
        while self.nbytes > self.limit:
            block, _ = self._used.popitem(last=False)
            del (self._first if block.before is None else block.before.after)[block.tokens]
            self.nbytes -= block.nbytes
