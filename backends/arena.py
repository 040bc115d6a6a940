"""One arena for a routine's locals: offsets such that what lives at once never overlaps, and the check of it.

Greedy by size: the largest buffer first, each at the lowest offset that is free for all of its life (Pisarchyk & Lee
2020, "Efficient memory management for deep neural net inference").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.ir.errors import BackendError

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer: its size in bytes, alive from step `first` to before step `end`."""

    name: str
    first: int
    end: int
    size: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are alive at once."""
        return self.first < other.end and other.first < self.end


def plan_arena(lives: Sequence[Lifetime]) -> list[int]:
    """An offset in bytes for each buffer, a multiple of ALIGNMENT."""
    offsets = [0] * len(lives)
    placed: list[int] = []
    for i in sorted(range(len(lives)), key=lambda i: (-lives[i].size, i)):
        taken = sorted((offsets[j], offsets[j] + lives[j].size) for j in placed if lives[i].meets(lives[j]))
        at = 0
        for start, end in taken:
            if at + lives[i].size <= start:
                break
            at = max(at, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[i] = at
        placed.append(i)
    return offsets


def check_arena(lives: Sequence[Lifetime], offsets: Sequence[int]) -> int:
    """The bytes that a plan takes. Raises BackendError where two buffers that live at once overlap."""
    order = sorted(range(len(lives)), key=lambda i: offsets[i])
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            if offsets[j] >= offsets[i] + lives[i].size:
                break
            if lives[i].meets(lives[j]) and lives[j].size and lives[i].size:
                raise BackendError(
                    "the memory plan is wrong: two buffers that live at once overlap",
                    received=f"{lives[i]} at {offsets[i]}, {lives[j]} at {offsets[j]}",
                )
    return max((-(-(o + x.size) // ALIGNMENT) * ALIGNMENT for o, x in zip(offsets, lives, strict=True)), default=0)
