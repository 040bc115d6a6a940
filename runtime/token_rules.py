"""Rules of which tokens may come next: what changes the logits of a row by the tokens that it has, before one is
chosen.

    rules = TokenRules(repetition_penalty=1.2, no_repeat_ngram=3)
    scores = rules.apply(logits, prompt=[464, 3139], made=[286])

They are applied in the order of the fields, which is the order of Hugging Face's logits processors, so that what a
folder's generation_config.json asks for means here what it means there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import UsageError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TokenRules:
    """What is asked of the next token.

    repetition_penalty  logits of tokens that the row has, prompt included, are divided by it where they are positive,
                        and multiplied where they are negative (Keskar et al. 2019); 1 changes nothing
    presence_penalty    is subtracted from the logits of tokens that were made, the prompt's not among them
    no_repeat_ngram     no run of so many tokens comes twice, the prompt's included; 0: any may
    banned              ids that never come
    banned_runs         runs of ids that never come: after all of a run but the last, the last one does not
    fewest              tokens that are made before one that ends a text
    shortest            tokens that a row has, prompt included, before one that ends a text
    first               the id that comes first; None: any
    last                the id that comes last, where as many tokens were made as may be; None: any
    banned_first        ids that do not come first, or, where `first` is given, second

    Raises UsageError for a value out of range.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int = 0
    banned: tuple[int, ...] = ()
    banned_runs: tuple[tuple[int, ...], ...] = ()
    fewest: int = 0
    shortest: int = 0
    first: int | None = None
    last: int | None = None
    banned_first: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError("repetition_penalty must be more than 0", received=repr(self.repetition_penalty))
        if not -math.inf < self.presence_penalty < math.inf:
            raise UsageError("presence_penalty must be a finite number", received=repr(self.presence_penalty))
        for name in ("no_repeat_ngram", "fewest", "shortest"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be 0 or more", received=repr(getattr(self, name)))
        if not all(self.banned_runs):
            raise UsageError("banned_runs must have one id or more each", received=repr(self.banned_runs))

    def apply(
        self,
        logits: Array,
        *,
        prompt: Sequence[int],
        made: Sequence[int],
        end: Sequence[int] = (),
        is_last: bool = False,
    ) -> Array:
        """Scores f64[vocab] of the next token, from logits [vocab] or logarithms of probabilities.

        prompt   the row's tokens that were given to it
        made     the tokens that followed
        end      ids that end a text
        is_last  whether no token may come after this one

        Raises UsageError where no token is left, and for an id out of the vocabulary.
        """
        scores = logits.astype(np.float64)
        self._check_ids(len(scores))
        self._penalize(scores, prompt, made)
        for token in self._repeating([*prompt, *made]):
            scores[token] = -np.inf
        scores[list(self.banned)] = -np.inf
        for *before, token in self.banned_runs:
            if not before or [*prompt, *made][-len(before) :] == before:
                scores[token] = -np.inf
        if len(made) < self.fewest or len(prompt) + len(made) < self.shortest:
            scores[[token for token in end if token < len(scores)]] = -np.inf
        if self.first is not None and not made:
            scores = _only(self.first, len(scores))
        if self.last is not None and is_last:
            scores = _only(self.last, len(scores))
        if len(made) == (0 if self.first is None else 1):
            scores[list(self.banned_first)] = -np.inf
        if np.isneginf(scores).all() and not np.isneginf(logits).all():
            raise UsageError("the rules leave no token that may come next", received=repr(self))
        return scores

    def _penalize(self, scores: Array, prompt: Sequence[int], made: Sequence[int]) -> None:
        if self.repetition_penalty != 1:
            seen = _distinct(prompt, made)
            held = scores[seen]
            scores[seen] = np.where(held < 0, held * self.repetition_penalty, held / self.repetition_penalty)
        if self.presence_penalty:
            scores[_distinct(made)] -= self.presence_penalty

    def _repeating(self, tokens: list[int]) -> list[int]:
        """The tokens that would end a run which the row has already."""
        size = self.no_repeat_ngram
        if not size or len(tokens) < size:
            return []
        end = tokens[len(tokens) - size + 1 :]
        return [tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == end]

    def _check_ids(self, vocabulary: int) -> None:
        ends = [run[-1] for run in self.banned_runs]
        for token in (*self.banned, *ends, *self.banned_first, self.first, self.last):
            if token is not None and not 0 <= token < vocabulary:
                raise UsageError(f"token {token} is not in the vocabulary", received=f"ids are 0 to {vocabulary - 1}")


def log_probabilities(logits: Array) -> Array:
    """The natural logarithms of softmax(logits), in float64: [vocab] of [vocab]."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    found: Array = scores - np.log(np.exp(scores).sum())
    return found


def _distinct(*rows: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(token for row in rows for token in row))


def _only(token: int, vocabulary: int) -> Array:
    scores = np.full(vocabulary, -np.inf)
    scores[token] = 0.0
    return scores
