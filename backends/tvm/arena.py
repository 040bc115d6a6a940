"""One arena for a routine's locals: offsets such that what lives at once never overlaps, and the check of it.

Greedy by size: the largest buffer first, each at the lowest offset that is free for all of its life (Pisarchyk & Lee
2020, "Efficient memory management for deep neural net inference").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.errors import BackendError
from treadle.passes.memory.instances import Lifetime

Array = np.ndarray[Any, Any]

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


def plan_arena(lives: Sequence[Lifetime]) -> list[int]:
    """An offset in bytes for each buffer, a multiple of ALIGNMENT."""
    first, end, size = _columns(lives)
    offsets = np.zeros(len(lives), np.int64)
    placed = np.zeros(len(lives), bool)
    for i in sorted(range(len(lives)), key=lambda i: (-lives[i].size, i)):
        meets = np.flatnonzero(placed & (first < end[i]) & (first[i] < end))
        at = 0
        for j in meets[np.argsort(offsets[meets], kind="stable")]:
            if at + size[i] <= offsets[j]:
                break
            at = max(at, -(-int(offsets[j] + size[j]) // ALIGNMENT) * ALIGNMENT)
        offsets[i] = at
        placed[i] = True
    return [int(n) for n in offsets]


def check_arena(lives: Sequence[Lifetime], offsets: Sequence[int]) -> int:
    """The bytes that a plan takes. Raises BackendError where two buffers that live at once overlap."""
    first, end, size = _columns(lives)
    at = np.array(offsets, np.int64)
    for i in range(len(lives)):
        wrong = (at < at[i] + size[i]) & (at[i] < at + size) & (first < end[i]) & (first[i] < end) & (size > 0)
        wrong[i] = False
        if size[i] and wrong.any():
            j = int(np.flatnonzero(wrong)[0])
            raise BackendError(
                "the memory plan is wrong: two buffers that live at once overlap",
                received=f"{lives[i]} at {offsets[i]}, {lives[j]} at {offsets[j]}",
            )
    return max((-(-(o + x.size) // ALIGNMENT) * ALIGNMENT for o, x in zip(offsets, lives, strict=True)), default=0)


def _columns(lives: Sequence[Lifetime]) -> tuple[Array, Array, Array]:
    table = np.array([(x.first, x.end, x.size) for x in lives], np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]
