"""Scores of labels from logits, best first. config.json specifies the conversion."""

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
    """Return the softmax over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    found: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return found


def label_scores(logits: Array, config: Mapping[str, Any]) -> Array:
    """Return the scores [labels] for logits [labels].

    If config.json's problem_type is a regression, the scores are the logits. For a multi-label model, or a single
    label, each score is a sigmoid. Otherwise the scores are a softmax.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return logits.astype(np.float64)
    if kind == "multi_label_classification" or len(logits) == 1:
        return 1 / (1 + np.exp(-logits.astype(np.float64)))
    return softmax(logits)


def best_first(scores: Array, labels: Sequence[str]) -> tuple[Scored, ...]:
    """Return all labels with their scores, the highest score first. Labels with equal scores stay in order."""
    order = np.argsort(-scores, kind="stable")
    return tuple(Scored(labels[i], float(scores[i])) for i in order)
