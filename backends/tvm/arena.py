"""The arena of a plan: where each local of a routine lies, planned when sizes are seen for the first time.

Largest first, at the lowest free offset: one greedy order of `treadle.passes.memory`, since a call waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treadle.passes.memory.greedy import first_fit
from treadle.passes.memory.instances import Lifetime

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""


def plan_arena(lives: Sequence[Lifetime]) -> list[int]:
    """An offset in bytes for each buffer, a multiple of ALIGNMENT."""
    table = np.array([(x.first, x.end, -(-x.size // ALIGNMENT) * ALIGNMENT) for x in lives], np.int64).reshape(-1, 3)
    first, end, size = table.T
    return [int(n) for n in first_fit(first, end, size, np.argsort(-size, kind="stable"))]
