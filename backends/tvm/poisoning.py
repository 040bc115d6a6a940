"""Poison mode on TVM: the arena is filled with NaN before a run, and each value is overwritten after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from treadle.backends.poison import BYTE
from treadle.backends.tvm.kernels.host.calling import address
from treadle.backends.tvm.planning import Plan
from treadle.backends.tvm.runtimes.device_memory import DeviceBuffer, DeviceMemory
from treadle.backends.tvm.runtimes.device_plans import DevicePlan
from treadle.backends.tvm.spaces import Arena, Output, Space
from treadle.passes.memory.frames import ALIGNMENT, aligned

Array = np.ndarray[Any, Any]


def run_poisoned(plan: Plan, table: Array, arena: Array, made: Mapping[str, Array], run: Callable[[Array], int]) -> int:
    """Run a plan's table in parts, filling dead memory in between. Return -1, or the number of the call that failed.

    made  the outputs; an output's memory may hold other values before the output is written
    run   runs consecutive calls, and returns -1 or the number of the call that failed
    """
    begin = aligned(address(arena), ALIGNMENT) - address(arena)
    arena[:] = BYTE
    spaces: dict[Space, Array] = {Arena(): arena[begin:]}
    if plan.host is not None:
        spaces[Output(plan.host)] = made[plan.host].reshape(-1).view(np.uint8)
        spaces[Output(plan.host)][:] = BYTE
    done = 0
    for calls, pointer, count in plan.freed:
        if calls > done:
            failed = run(table[done:calls])
            if failed >= 0:
                return done + failed
            done = calls
        spaces[pointer.space][pointer.at : pointer.at + count] = BYTE
    failed = run(table[done:]) if done < len(table) else -1
    return done + failed if failed >= 0 else -1


def run_poisoned_on_device(
    plan: DevicePlan,
    memory: DeviceMemory,
    buffers: Mapping[Space, DeviceBuffer],
    over: Mapping[str, str],
    run: Callable[[int, int], None],
) -> None:
    """Run a plan on a device in parts, filling dead memory in between, and the arena and outputs before the run.

    over  outputs that are stored in a donated input, by the names of both
    run   runs consecutive launches, from the first number to the one after the last
    """
    for space, buffer in buffers.items():
        if isinstance(space, Arena) or (isinstance(space, Output) and space.name not in over):
            memory.fill(buffer, BYTE, buffer.nbytes)
    done = 0
    for calls, pointer, count in plan.freed:
        if calls > done:
            run(done, calls)
            done = calls
        if count:
            memory.fill(buffers[pointer.space], BYTE, count, pointer.at)
    if done < len(plan.steps):
        run(done, len(plan.steps))
