"""Poison mode on TVM: the arena is filled before a run, and what dies in it after the last kernel that reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from treadle.backends.poison import BYTE
from treadle.backends.tvm.kernels.calling import address
from treadle.backends.tvm.planning import Plan
from treadle.passes.memory.frame_placement import ALIGNMENT
from treadle.passes.memory.frames import aligned

Array = np.ndarray[Any, Any]


def run_poisoned(plan: Plan, table: Array, arena: Array, run: Callable[[Array], int]) -> int:
    """Run a plan's table in parts; -1, or the number of the call that failed.

    run  runs calls that follow each other, and gives -1 or the number of the one that failed
    """
    begin = aligned(address(arena), ALIGNMENT) - address(arena)
    arena[:] = BYTE
    done = 0
    for records, first, count in [*plan.freed, (len(table), 0, 0)]:
        if records > done:
            failed = run(table[done:records])
            if failed >= 0:
                return done + failed
            done = records
        arena[begin + first : begin + first + count] = BYTE
    return -1
