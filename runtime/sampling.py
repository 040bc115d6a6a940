"""Sampling: the choice of the next token from the logits of a row.

Greedy sampling takes the largest logit, and the lowest id among equals. Otherwise a token is drawn from softmax(logits
/ temperature), restricted to the k most likely tokens (top-k), to the smallest set whose probability reaches p (top-p,
Holtzman et al. 2020), and to tokens with at least a given fraction of the largest probability (min-p, Nguyen et al.
2024).

Probabilities are computed in float64. Only the tokens that a draw can reach are sorted: a draw needs the order of the
most likely tokens, and of all others only the sum. A draw depends only on the seed, the row and the step, so that a run
can be repeated and a row's text does not depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import UsageError
from treadle.ir.wording.checked_calls import with_checked_constructor

Array = np.ndarray[Any, Any]

_FLOORS = (1e-3, 1e-4, 1e-5, 1e-7, 0.0)
"""Least weights of the tokens that are sorted, relative to the largest weight. Each is tried if the tokens above the
one before it are not enough for the draw. Most draws need the first or the second.
"""


@with_checked_constructor(
    {
        "do_sample": "temperature=1.0",
        **dict.fromkeys(
            ("repetition_penalty", "frequency_penalty", "presence_penalty"),
            "generate(prompt, sampling=..., rules=t.TokenRules(repetition_penalty=1.2))",
        ),
        "no_repeat_ngram_size": "generate(prompt, sampling=..., rules=t.TokenRules(no_repeat_ngram=3))",
        **dict.fromkeys(("max_new_tokens", "max_tokens"), "generate(prompt, sampling=..., most=64)"),
    }
)
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
        """Return the next token id from logits [vocab]. Raises UsageError if the largest logit is not finite."""
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):  # `argmax` returns the place of a NaN, if there is one
            raise no_finite_logit()
        if self.temperature == 0:
            return best
        drawn = self.draw(row, step)
        weights = self._weights(logits)
        largest, sums, total = self._largest(logits, weights, drawn)
        rank = min(int(np.searchsorted(sums, drawn * total, side="right")), len(largest) - 1)
        (ids,) = np.nonzero(weights == largest[rank])
        return int(ids[rank - np.count_nonzero(largest > largest[rank])])

    def draw(self, row: int, step: int) -> float:
        """Return the random number in [0, 1) of a row and a step: the first one of NumPy's default generator, seeded
        with seed, row and step.
        """
        return float(np.random.default_rng([self.seed, row, step]).random())

    def distribution(self, logits: Array) -> tuple[Array, Array]:
        """Return the ids that can be drawn from logits [vocab], most likely first (the lower id among equals), and
        their probabilities, which sum to 1.
        """
        weights = self._weights(logits)
        largest, _, total = self._largest(logits, weights, np.inf)
        return most_likely(weights, len(largest)), largest / total

    def _weights(self, logits: Array) -> Array:
        """Return weights f64[vocab] in proportion to softmax(logits / temperature); the largest is 1."""
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores /= max(self.temperature, 1e-300)
        return np.exp(scores, out=scores)

    def _largest(self, logits: Array, weights: Array, share: float) -> tuple[Array, Array, float]:
        """Return the largest of the weights that can be drawn, in order, their cumulative sums, and the sum of all
        weights that can be drawn. The returned weights have more than this share of the sum, or they are all.
        """
        if self.top_k:
            at = max(0, len(logits) - self.top_k)
            largest = weights[(logits >= np.partition(logits, at)[at]) & (weights > 0)]
            largest = np.sort(largest)[::-1][: self.top_k]
            total = largest.sum()
        else:
            total = weights.sum()
            needed = (self.top_p if self.top_p < 1 else share) * total
            floors = (self.min_p,) if self.min_p else _FLOORS
            for floor in floors:
                largest = weights[np.flatnonzero(weights >= floor if floor else weights > 0)]
                if largest.sum() > needed:
                    break
            largest = np.sort(largest)[::-1]
        sums = np.cumsum(largest)
        count = len(largest)
        if self.min_p:
            count = max(1, int(np.count_nonzero(largest >= self.min_p)))
        if self.top_p < 1:  # the sum of the weights before the last one is less than p
            count = min(count, 1 + int(np.searchsorted(sums, self.top_p * total)))
        if self.min_p or self.top_p < 1:
            total = sums[count - 1]
        return largest[:count], sums[:count], float(total)


def most_likely(scores: Array, count: int) -> Array:
    """Return the ids of the `count` largest scores [vocab], the largest first, and the lower id among equals."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    (ids,) = np.nonzero(scores >= least)
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def no_finite_logit() -> UsageError:
    """Return the error for logits from which no token can be chosen."""
    return UsageError("no token can be chosen: the logits are not finite", hint="`treadle verify MODEL` finds the op")
