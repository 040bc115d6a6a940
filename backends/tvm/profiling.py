"""Times of the kernel calls of a run, measured by running its table call by call.

    for each in time_calls(exe, {"tokens": ids}, rounds=9):
        print(each.step.kernel.title, each.seconds)

Each measured run executes the whole table, so every call works on its usual values. Each call has an overhead that does
not occur in an ordinary run: about 2 microseconds of Python, and a cold start of the call's threads. On
a device, each launch is waited for, which takes some ten microseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.backends.states import States
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.lowering.program import KernelStep


@dataclass(frozen=True)
class TimedCall:
    """A kernel call: its step, the median of its times in seconds, the sizes of the run's symbols, and the address of
    each of its pointers; on a device, numbers that differ for different storages.
    """

    step: KernelStep
    seconds: float
    sizes: Mapping[str, int]
    addresses: tuple[int, ...]


def time_calls(
    exe: KernelExecutable,
    arrays: Mapping[str, Any],
    rounds: int,
    *,
    entry: str | None = None,
    states: States | None = None,
) -> list[TimedCall]:
    """Time every kernel call of a run, in order, over `rounds` runs after one warm-up run.

    entry   the entry to run; None: the main one
    states  the states that each run works on; a run writes them as a call does

    Raises BackendError as a call does.
    """
    timed = exe.timed if entry is None else exe.timed_entries[entry]
    plan, sizes, times = timed(arrays, rounds + 1, states)
    return [
        TimedCall(step, statistics.median(of[1:]), sizes, plan.addresses(number))
        for number, (step, of) in enumerate(zip(plan.steps, times, strict=True))
    ]
