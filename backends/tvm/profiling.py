"""How long each kernel call of a run takes: the run's table, call by call.

    for each in time_calls(exe, {"tokens": ids}, rounds=9):
        print(each.step.kernel.title, each.seconds)

A run goes through its whole table, so every call works on the numbers that it works on in any run. What stands between
two calls (some 2 microseconds of Python, a cold start of each call's threads) is not in what a run takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.lowering.program import KernelStep


@dataclass(frozen=True)
class TimedCall:
    """A kernel call: the step that it is of, the median of its times in seconds, and the sizes of the run's symbols."""

    step: KernelStep
    seconds: float
    sizes: Mapping[str, int]


def time_calls(exe: KernelExecutable, arrays: Mapping[str, Any], rounds: int) -> list[TimedCall]:
    """Every kernel call of a run of a stateless executable, in order, timed in so many runs after one that warms up.

    Raises BackendError as a call does.
    """
    plan, sizes, times = exe.timed(arrays, rounds + 1)
    return [TimedCall(step, statistics.median(of[1:]), sizes) for step, of in zip(plan.steps, times, strict=True)]
