"""Sampling: the choice of the next token from the logits of a row.

Greedy sampling takes the largest logit, and the lowest id among equals. Otherwise a token is drawn from softmax(logits
/ temperature), restricted to the k most likely tokens (top-k), to the smallest set whose probability reaches p (top-p,
Holtzman et al. 2020), and to tokens with at least a given fraction of the largest probability (min-p, Nguyen et al.
2024).

Everything is computed in float64. A draw depends only on the seed, the row and the step, so that a run can be repeated
and a row's text does not depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import UsageError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """Options of sampling.

    temperature  divisor of the logits; 0: greedy sampling; 1: the model's own distribution
    top_k        keep the k most likely tokens (0: all)
    top_p        keep the most likely tokens until their probabilities reach p (1: all)
    seed         seed of the random draws
    min_p        keep tokens whose probability is at least this fraction of the largest one (0: all)

    Raises UsageError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise UsageError("temperature must be 0 or more", received=repr(self.temperature))
        if self.top_k < 0:
            raise UsageError("top_k must be 0 or more", received=repr(self.top_k))
        if not 0 < self.top_p <= 1:
            raise UsageError("top_p must lie between 0 and 1", received=repr(self.top_p))
        if not 0 <= self.min_p <= 1:
            raise UsageError("min_p must lie between 0 and 1", received=repr(self.min_p))
        if self.seed < 0:
            raise UsageError("a seed must be 0 or more", received=repr(self.seed))

    def choose(self, logits: Array, *, row: int = 0, step: int = 0) -> int:
        """Return the next token id from logits [vocab]. Raises UsageError if no logit is finite."""
        scores = logits.astype(np.float64)
        if not np.isfinite(scores).any() or np.isnan(scores).any():
            raise no_finite_logit()
        if self.temperature == 0:
            return int(scores.argmax())
        order, probabilities = self.distribution(scores)
        at = int(np.searchsorted(np.cumsum(probabilities), self.draw(row, step), side="right"))
        return int(order[min(at, len(order) - 1)])

    def draw(self, row: int, step: int) -> float:
        """Return the random number in [0, 1) of a row and a step: the first one of NumPy's default generator, seeded
        with seed, row and step.
        """
        return float(np.random.default_rng([self.seed, row, step]).random())

    def distribution(self, logits: Array) -> tuple[Array, Array]:
        """Return the ids that can be drawn from logits [vocab], most likely first (the lower id among equals), and
        their probabilities, which sum to 1.
        """
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        scaled = logits[order] / max(self.temperature, 1e-300)
        weights = np.exp(scaled - scaled[0])
        probabilities = weights / weights.sum()
        before = np.cumsum(probabilities) - probabilities
        kept = before < self.top_p
        kept &= probabilities >= self.min_p * probabilities[0]
        kept[0] = True
        return order[kept], probabilities[kept] / probabilities[kept].sum()


def no_finite_logit() -> UsageError:
    """Return the error for logits from which no token can be chosen."""
    return UsageError("no token can be chosen: the logits are not finite", hint="treadle verify, to find the op")
