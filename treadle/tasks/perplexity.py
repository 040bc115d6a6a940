"""Perplexity: how well a causal language model foretells a text, and what fewer bits cost of it.

    meter = PerplexityMeter.open(ModelOptions("smollm2", backend="tvm", quantize="int8"))
    found = meter.measure(meter.tokens(text))
    found.perplexity, found.beside.perplexity, found.beside.divergence

Perplexity is e to the mean of -ln p over the tokens of a text, p being the probability that the model gave a token
after those before it (Jelinek et al. 1977): as many equally likely tokens would be as hard to foretell. A text is read
in windows, each of which begins half a window after the one before it: every token but the first is counted once, in
the first window that has it, with half a window or more before it, but for the first window's.

Beside a model in fewer bits runs the same model without these, on the same windows. The divergence of a token is
Kullback and Leibler's, sum p ln(p / q), of the probabilities q in fewer bits from p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treadle.compiled import Compiled
from treadle.continuation import need_for_text, text_tokenizer
from treadle.files.shown_names import printable
from treadle.frontends.text import TextTokenizer
from treadle.ir.analysis.following import follow
from treadle.ir.errors import UsageError
from treadle.ir.types import i64
from treadle.tasks.classifying import Progress
from treadle.tasks.opening import token_positions
from treadle.tasks.options import ModelOptions

Array = np.ndarray[Any, Any]

WINDOW = 512
_MOST_LOSS = 700.0  # whose exponential a float64 still holds
_ROWS = 64  # positions whose probabilities are in float64 at a time


@dataclass(frozen=True)
class Beside:
    """The same model without fewer bits.

    perplexity  its own
    divergence  of the probabilities in fewer bits from its own, the mean over tokens, in nats
    largest     the divergence that 99 of 100 tokens stay below
    alike       the part of tokens in whose place both have the same likeliest one
    """

    perplexity: float
    divergence: float
    largest: float
    alike: float


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    tokens      how many were foretold
    windows     in how many windows
    perplexity  e to the mean of -ln p
    error       the standard error of that mean, times the perplexity; None of one token
    beside      the same model without fewer bits; None where it did not run
    """

    tokens: int
    windows: int
    perplexity: float
    error: float | None
    beside: Beside | None


@dataclass(frozen=True)
class PerplexityMeter:
    """A causal language model with its tokenizer, and the same without fewer bits, if it has them."""

    model: Compiled
    tokenizer: TextTokenizer
    beside: Compiled | None

    @classmethod
    def open(cls, options: ModelOptions, *, alone: bool = False) -> PerplexityMeter:
        """Compile a model; where it is to compute in fewer bits, as it is without these as well, unless it is `alone`.

        Raises UsageError where it gives no logits of causal tokens, and what `treadle.compile` and reading its
        tokenizer raise.
        """
        need_for_text(options.model)
        tokenizer = text_tokenizer(options.model, options.limits)
        made = _causal(options.compile(), options.model)
        fewer = options.quantize is not None or options.dtype is not None
        other = replace(options, quantize=None, dtype=None).compile() if fewer and not alone else None
        return cls(made, tokenizer, other)

    def tokens(self, text: str, most: int | None = None) -> list[int]:
        """The ids of a text, its first `most`. Raises UsageError for one that is not valid Unicode."""
        return [number for part in self.tokenizer.encode([text])[0] for number in part.ids][:most]

    def measure(self, ids: Sequence[int], *, window: int = WINDOW, progress: Progress | None = None) -> Perplexity:
        """The perplexity of a text's tokens.

        window    tokens that are read at a time
        progress  is told how many windows are done

        Raises UsageError for fewer than two tokens, for a window that has fewer, or more than the model takes, and
        where logits are not finite.
        """
        positions = token_positions(self.model)
        if window < 2 or (positions is not None and window > positions):
            bound = "" if positions is None else f" and at most {positions:,}, as the model takes"
            raise UsageError(f"a window has at least 2 tokens{bound}", received=f"{window:,}", hint="window=512")
        if len(ids) < 2:
            raise UsageError("perplexity takes a text of two tokens or more", received=f"{len(ids)}")
        counted, apart, alike = [], [], []
        other: list[Array] = []
        cut = list(windows(len(ids), window))
        for number, (begin, end, first) in enumerate(cut):
            read, told = np.array([ids[begin:end]], np.int64), np.array(ids[first:end])
            ours = _logits(self.model, read)[first - begin - 1 : -1]
            theirs = None if self.beside is None else _logits(self.beside, read)[first - begin - 1 : -1]
            for at in range(0, len(told), _ROWS):
                rows = slice(at, at + _ROWS)
                q, named = log_probabilities(ours[rows]), told[rows, None]
                counted.append(-np.take_along_axis(q, named, 1)[:, 0])
                if theirs is not None:
                    p = log_probabilities(theirs[rows])
                    other.append(-np.take_along_axis(p, named, 1)[:, 0])
                    apart.append((np.exp(p) * (p - q)).sum(-1))
                    alike.append(p.argmax(-1) == q.argmax(-1))
            if progress is not None:
                progress(number + 1)
        losses = np.concatenate(counted)
        found, error = _perplexity(losses), None
        if len(losses) > 1:
            error = found * float(losses.std(ddof=1)) / math.sqrt(len(losses))
        beside = None
        if self.beside is not None:
            far = np.concatenate(apart)
            beside = Beside(
                _perplexity(np.concatenate(other)),
                float(far.mean()),
                float(np.quantile(far, 0.99)),
                float(np.concatenate(alike).mean()),
            )
        return Perplexity(len(losses), len(cut), found, error, beside)


def windows(count: int, window: int) -> Iterator[tuple[int, int, int]]:
    """From which token on and up to which each window goes, and the first that is counted in it, of so many tokens."""
    yield 0, (done := min(window, count)), 1
    while done < count:
        end = min(done + window // 2, count)
        yield end - window, end, done
        done = end


def log_probabilities(logits: Array) -> Array:
    """ln softmax over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    found: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return found


def _perplexity(losses: Array) -> float:
    return math.exp(min(float(losses.mean()), _MOST_LOSS))


def _logits(model: Compiled, tokens: Array) -> Array:
    """[S, vocabulary] of one row. Raises UsageError where one is not finite."""
    found: Array = np.asarray(model(tokens=tokens)["logits"])[0]
    if not np.isfinite(found).all():
        raise UsageError(f"{model.name} gives logits that are not finite", received=f"tokens [1, {tokens.shape[1]}]")
    return found


def _causal(model: Compiled, named: Any) -> Compiled:
    """The model. Raises UsageError where it is no causal one from tokens [B, S] alone to logits."""
    takes, gives = [port.name for port in model.inputs], [port.name for port in model.outputs]
    kind = model.inputs[0].type
    axis = kind.shape[-1].as_symbol if takes == ["tokens"] and kind.dtype is i64 and kind.rank == 2 else None
    if axis is None or "logits" not in gives or not follow(model.graph, axis).step():
        raise UsageError(
            f"{printable(str(named))} has no perplexity: it is no causal language model of tokens alone",
            received=f"({', '.join(map(str, model.inputs))}) -> ({', '.join(map(str, model.outputs))})",
            hint="a model that is, such as smollm2",
        )
    return model
