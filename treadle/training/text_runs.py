"""A training run on texts: updates of `accumulate` micro-batches each, and the loss on held-out blocks.

for update in updates(trainer, data, steps=1000, accumulate=4):
    print(update.step, update.loss, update.tokens / update.seconds)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from treadle.training.text_data import TextData
from treadle.training.texts import NOT_COUNTED

if TYPE_CHECKING:  # importing it loads the compiler
    from treadle.training.trainer import StepResult

_TRAINED_ON, _HELD_OUT = 0, 1
"""The first number of the random seeds of masks: one for training batches, another for held-out blocks."""
_MOST_LOSS = 700.0  # its exponential is still a finite float64


class Steps(Protocol):
    """The methods of `treadle.training.trainer.Trainer` that a run uses."""

    @property
    def steps(self) -> int: ...
    def step(self, **arrays: Any) -> StepResult: ...
    def evaluate(self, **arrays: Any) -> float: ...


@dataclass(frozen=True)
class Update:
    """The result of one update, or of several consecutive updates.

    step     the number of the last update, counted from 1
    loss     the mean over all counted positions
    norm     the gradient norm of the last update
    rate     the learning rate of the last update
    tokens   number of input tokens
    seconds  elapsed time
    counted  number of positions with a target
    """

    step: int
    loss: float
    norm: float
    rate: float
    tokens: int
    seconds: float
    counted: int

    @classmethod
    def joined(cls, several: Sequence[Update]) -> Update:
        """Combine the results of several consecutive updates in one. Sums are rounded once, since the last digits of
        `sum` differ between versions of Python.
        """
        counted = sum(each.counted for each in several)
        return cls(
            several[-1].step,
            math.fsum(each.loss * each.counted for each in several) / counted,
            several[-1].norm,
            several[-1].rate,
            sum(each.tokens for each in several),
            math.fsum(each.seconds for each in several),
            counted,
        )


def updates(trainer: Steps, data: TextData, *, steps: int, accumulate: int = 1) -> Iterator[Update]:
    """Train, and yield the result of each update, until `steps` updates are done. Updates of an earlier run that the
    trainer continues are included in this number.

    Each batch and its masks depend only on the batch's number, so a run in two parts gives the same weights as an
    uninterrupted run.
    """
    number = trainer.steps * accumulate
    batches = data.batches.after(number)
    for step in range(trainer.steps + 1, steps + 1):
        parts = []
        for _ in range(accumulate):
            tokens = next(batches)
            asked = data.objective.asked(tokens, _TRAINED_ON, number)
            result = trainer.step(**asked)
            counted = int((asked["targets"] != NOT_COUNTED).sum())
            parts.append(
                Update(step, result.loss, result.norm, result.learning_rate, tokens.size, result.seconds, counted)
            )
            number += 1
        yield Update.joined(parts)


def held_out_loss(
    trainer: Steps, data: TextData, *, progress: Callable[[int], None] = lambda _: None, ends: Callable[[], bool]
) -> float | None:
    """Return the mean loss over the targets of the held-out blocks; None if `ends` returns True before the end.

    progress  called with the number of finished batches
    """
    total = counted = 0.0
    rows = data.batches.rows
    for number, at in enumerate(range(0, len(data.heldout), rows)):
        if ends():
            return None
        asked = data.objective.asked(data.heldout[at : at + rows], _HELD_OUT, number)
        count = int(np.count_nonzero(asked["targets"] != NOT_COUNTED))
        if count:
            total += trainer.evaluate(**asked) * count
        counted += count
        progress(number + 1)
    return total / counted if counted else None


def perplexity_of(loss: float) -> float:
    """Return exp(loss), the perplexity for a mean of -ln p. Very large losses are capped to keep the result finite."""
    return math.exp(min(loss, _MOST_LOSS))
