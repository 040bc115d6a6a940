"""Token rules (logits processors): changes to the logits of a row that depend on the row's tokens, before a token is
chosen.

    rules = TokenRules(repetition_penalty=1.2, no_repeat_ngram=3)
    scores = rules.apply(logits, prompt=[464, 3139], generated=[286])

Rules are applied in the order of the fields, which is the order of Hugging Face's logits processors. So the settings of
a folder's generation_config.json have the same meaning here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import UsageError
from treadle.ir.wording.checked_calls import with_checked_constructor

Array = np.ndarray[Any, Any]


@with_checked_constructor()
@dataclass(frozen=True)
class TokenRules:
    """Constraints on the next token.

    repetition_penalty  positive logits of tokens that occur in the row or its prompt are divided by this value,
                        negative ones multiplied (Keskar et al. 2019); 1: no penalty
    presence_penalty    is subtracted from the logits of generated tokens; the prompt's tokens do not count
    no_repeat_ngram     no n-gram of this length occurs twice, the prompt included; 0: no limit
    banned              token ids that never occur
    banned_runs         runs of token ids that never occur: the last id of a run is excluded after the others
    fewest              minimum number of generated tokens before a token that ends a text
    shortest            minimum number of tokens of a row, prompt included, before a token that ends a text
    first               id of the first token; None: any
    last                id of the last token, if the maximum number of tokens is reached; None: any
    banned_first        ids excluded as the first token or, if `first` is set, as the second
    frequency_penalty   is subtracted from the logit of a generated token once for each time it was generated
    logit_bias          pairs of a token id and a number that is added to its logit

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
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError("repetition_penalty must be more than 0", received=repr(self.repetition_penalty))
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} must be a finite number", received=repr(getattr(self, name)))
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise UsageError("logit_bias must have finite numbers", received=repr(self.logit_bias))
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
        generated: Sequence[int],
        end: Sequence[int] = (),
        is_last: bool = False,
    ) -> Array:
        """Return the scores f64[vocab] of the next token, from logits [vocab] or log probabilities.

        prompt   tokens of the row's prompt
        generated  generated tokens
        end      token ids that end a text
        is_last  True if no token can follow this one

        Raises UsageError if the rules exclude every token, and for an id outside the vocabulary.
        """
        scores = logits.astype(np.float64)
        self._check_ids(len(scores))
        self._penalize(scores, prompt, generated)
        for token in self._repeating([*prompt, *generated] if self.no_repeat_ngram else []):
            scores[token] = -np.inf
        scores[list(self.banned)] = -np.inf
        for *before, token in self.banned_runs:
            if not before or [*prompt, *generated][-len(before) :] == before:
                scores[token] = -np.inf
        if len(generated) < self.fewest or len(prompt) + len(generated) < self.shortest:
            scores[[token for token in end if token < len(scores)]] = -np.inf
        if self.first is not None and not generated:
            scores = _only(self.first, len(scores))
        if self.last is not None and is_last:
            scores = _only(self.last, len(scores))
        if len(generated) == (0 if self.first is None else 1):
            scores[list(self.banned_first)] = -np.inf
        if self.frequency_penalty and generated:
            counts = Counter(generated)
            scores[list(counts)] -= self.frequency_penalty * np.fromiter(counts.values(), np.float64, len(counts))
        for token, bias in self.logit_bias:
            scores[token] += bias
        if scores.max() == -np.inf and logits.max() != -np.inf:
            raise UsageError("the token rules exclude every token", received=repr(self))
        return scores

    def _penalize(self, scores: Array, prompt: Sequence[int], made: Sequence[int]) -> None:
        if self.repetition_penalty != 1:
            seen = _distinct(prompt, made)
            held = scores[seen]
            scores[seen] = np.where(held < 0, held * self.repetition_penalty, held / self.repetition_penalty)
        if self.presence_penalty:
            scores[_distinct(made)] -= self.presence_penalty

    def _repeating(self, tokens: list[int]) -> list[int]:
        """Return the tokens that would complete an n-gram that the row already has."""
        size = self.no_repeat_ngram
        if not size or len(tokens) < size:
            return []
        end = tokens[len(tokens) - size + 1 :]
        return [tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == end]

    def _check_ids(self, vocabulary: int) -> None:
        ends = [run[-1] for run in self.banned_runs]
        biased = [token for token, _ in self.logit_bias]
        for token in (*self.banned, *ends, *self.banned_first, self.first, self.last, *biased):
            if token is not None and not 0 <= token < vocabulary:
                raise UsageError(f"token {token} is not in the vocabulary", received=f"ids are 0 to {vocabulary - 1}")


def log_probabilities(logits: Array, ids: Sequence[int] | None = None) -> Array:
    """Return log(softmax(logits)) in float64 from logits [vocab]: of all ids, or f64[len(ids)] of these."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    found: Array = scores.copy() if ids is None else scores[ids]
    found -= np.log(np.exp(scores, out=scores).sum())
    return found


def _distinct(*rows: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(token for row in rows for token in row))


def _only(token: int, vocabulary: int) -> Array:
    scores = np.full(vocabulary, -np.inf)
    scores[token] = 0.0
    return scores
