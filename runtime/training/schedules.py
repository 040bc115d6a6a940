"""Learning rate schedules: the learning rate of each step, counted from 1.

schedule = Schedule(3e-4, warmup=100, steps=10_000, shape="cosine", end=0.1)
schedule(1), schedule(100), schedule(10_001)          # 3e-6, 3e-4, 3e-5
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from treadle.ir.errors import Hint, UsageError
from treadle.ir.wording.checked_calls import with_checked_constructor
from treadle.runtime.training.number_ranges import check_count, check_number

SHAPES = ("constant", "cosine", "linear")


@with_checked_constructor()
@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule: a linear warmup from peak / warmup at step 1 to the peak at step `warmup`, then a
    shape.

    peak    maximum learning rate
    warmup  number of steps until the peak; 0 starts at the peak, as does 1
    steps   number of steps of the run. A decaying shape reaches its end at the step after the run, as in PyTorch's and
            transformers' schedules, so that no step has a learning rate of 0
    shape   "constant", "linear", or "cosine" (Loshchilov & Hutter 2017, without restarts)
    end     final learning rate of a decaying shape, as a fraction of the peak

    Raises UsageError for a value out of range, and for values that contradict each other.
    """

    peak: float
    warmup: int = 0
    steps: int | None = None
    shape: Literal["constant", "cosine", "linear"] = "constant"
    end: float = 0.0

    def __post_init__(self) -> None:
        check_number("a learning rate", self.peak, hint="3e-4, or Schedule(3e-4, warmup=100)")
        check_count("warmup", self.warmup, least=0, hint="0, or a hundredth of all steps")
        check_number("end", self.end, hint="0.1, a tenth of the peak")
        if self.steps is not None:
            check_count("steps", self.steps, hint="the number of steps of the run")
        if self.shape not in SHAPES:
            hint = Hint("one of " + ", ".join(map(repr, SHAPES)), "one of " + ", ".join(SHAPES))
            raise UsageError(f"unknown schedule shape {self.shape!r}", hint=hint)
        if self.end > 1:
            raise UsageError(
                "the end of a schedule must be between 0 and 1", received=f"end={self.end!r}", hint="end=0.1"
            )
        if self.shape == "constant" and self.end:
            raise UsageError(
                "end= does not apply to a constant schedule",
                received=f"end={self.end!r}",
                hint='shape="cosine" or "linear"',
            )
        if self.shape != "constant" and (self.steps is None or self.steps <= self._first):
            raise UsageError(
                f"a {self.shape} schedule needs steps after step {self._first} to decay",
                received=f"steps={self.steps}",
                hint=Hint(f"steps={max(1000, 10 * self._first)}", "a shorter --warmup, or more --steps"),
            )

    @property
    def _first(self) -> int:
        """The step of the peak."""
        return max(self.warmup, 1)

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step. Raises UsageError for a step below 1."""
        check_count("a step", step, hint="1 for the first one")
        if step < self._first:
            return self.peak * step / self.warmup
        if self.shape == "constant" or self.steps is None:
            return self.peak
        if step > self.steps:
            return self.peak * self.end
        gone = (step - self._first) / (self.steps + 1 - self._first)
        fallen = gone if self.shape == "linear" else (1 - math.cos(math.pi * gone)) / 2
        return self.peak * (1 - (1 - self.end) * fallen)


def schedule_of(value: Schedule | float) -> Schedule:
    """Return a schedule unchanged, or a constant schedule for a number. Raises UsageError for other values."""
    return value if isinstance(value, Schedule) else Schedule(value)
