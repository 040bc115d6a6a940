"""The arena of a plan: where each local of a routine lies, planned when sizes are seen for the first time.

The best of the greedy orders of `treadle.passes.memory`, without the search behind them, since a call waits for it.
Most often the first order, largest first, takes as few bytes as any placement could, and no other one is tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treadle.passes.memory.greedy import live_bytes, place_greedily
from treadle.passes.memory.instances import Lifetime

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


def plan_arena(lives: Sequence[Lifetime]) -> list[int]:
    """An offset in bytes for each storage, a multiple of ALIGNMENT."""
    table = np.array([(x.first, x.end, -(-x.size // ALIGNMENT) * ALIGNMENT) for x in lives], np.int64).reshape(-1, 3)
    solid = table[:, 2] > 0
    first, end, size = table[solid].T
    offsets = np.zeros(len(lives), np.int64)
    if solid.any():
        offsets[solid] = place_greedily(first, end, size, int(live_bytes(first, end, size)[1].max()))
    return [int(n) for n in offsets]
