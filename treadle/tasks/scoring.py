"""Scores of labels from logits, best first, as config.json specifies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scored:
    """A label and its score: a probability, or the head's output for a regression."""

    label: str
    score: float


def softmax(logits: Array) -> Array:
    """Return softmax over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    found: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return found


def label_scores(logits: Array, config: Mapping[str, Any]) -> Array:
    """Return scores [labels] from logits [labels].

    config.json's problem_type decides: the logits themselves for a regression, a sigmoid each for multi-label models or
    a single label, else softmax.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return logits.astype(np.float64)
    if kind == "multi_label_classification" or len(logits) == 1:
        return 1 / (1 + np.exp(-logits.astype(np.float64)))
    return softmax(logits)


def best_first(scores: Array, labels: Sequence[str]) -> tuple[Scored, ...]:
    """Return all labels with their scores, the highest first; for equal scores the lower number first."""
    order = np.argsort(-scores, kind="stable")
    return tuple(Scored(labels[i], float(scores[i])) for i in order)
