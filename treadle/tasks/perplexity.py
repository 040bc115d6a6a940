"""Perplexity of a causal language model on a text, with and without quantization.

    meter = PerplexityMeter.open(Program("smollm2", backend="tvm", quantize="int8"))
    found = meter.measure(meter.tokens(text))
    found.perplexity, found.beside.perplexity, found.beside.divergence

Perplexity is exp of the mean of -ln p over the tokens of a text, where p is the probability that the model gives a
token after the preceding tokens (Jelinek et al. 1977). A model that chooses among n equally likely tokens has
perplexity n. A text is read in windows, each of which begins half a window after the previous one. Every token except
the first is counted once, in the first window that contains it. So it has at least half a window of context, except in
the first window.

A quantized model is compared with the same model without quantization on the same windows. The divergence of a token is
the Kullback-Leibler divergence, sum p ln(p / q), where p is the original probability and q the quantized one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.compiled import Compiled
from treadle.compiling import compile_program, optimized_graph
from treadle.continuation import need_for_text
from treadle.files.shown_names import printable
from treadle.frontends.text import TextTokenizer
from treadle.ir.analysis.causal_runs import causality_in_runs
from treadle.ir.analysis.causality import is_causal
from treadle.ir.errors import Hint, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import i64
from treadle.models.family import LANGUAGE_ONLY
from treadle.passes.stepping.last_position import with_all_positions
from treadle.program.program import Program
from treadle.program.source import ModelSource
from treadle.tasks.causal_models import fixed_length
from treadle.tasks.classifying import Progress
from treadle.tasks.fitted_tokenizers import are_logits, fit_tokenizer
from treadle.tasks.opening import token_positions

Array = np.ndarray[Any, Any]

WINDOW = 512
_MOST_LOSS = 700.0  # its exponential is still a finite float64
_CAUSAL = "a causal language model, such as smollm2"
_ROWS = 64  # number of positions whose probabilities are in memory as float64 at a time


@dataclass(frozen=True)
class Beside:
    """Results of the model without quantization, and the difference from it.

    perplexity  perplexity of the model without quantization
    divergence  mean over tokens of the divergence of the quantized from the original probabilities, in nats
    largest     99th percentile of the divergence
    alike       fraction of tokens for which both models have the same most likely prediction
    """

    perplexity: float
    divergence: float
    largest: float
    alike: float


@dataclass(frozen=True)
class Perplexity:
    """The result of a measurement.

    tokens      number of predicted tokens
    windows     number of windows
    perplexity  exp of the mean of -ln p
    error       standard error of that mean, times the perplexity; None if only one token was predicted
    beside      comparison with the model without quantization; None if that model did not run
    """

    tokens: int
    windows: int
    perplexity: float
    error: float | None
    beside: Beside | None


@dataclass(frozen=True)
class PerplexityMeter:
    """A causal language model with its tokenizer. If it is quantized, also the model without quantization.

    positions  the maximum number of tokens of a text, according to its files
    """

    model: Compiled
    tokenizer: TextTokenizer
    beside: Compiled | None
    positions: int | None = None

    @classmethod
    def open(cls, program: Program, *, alone: bool = False) -> PerplexityMeter:
        """Compile a model. If `options` reduce its precision, the model in its original precision is compiled, too,
        unless `alone`.

        Raises UsageError if the model is not a causal language model of tokens alone, and the errors of
        `treadle.compile` and of reading the tokenizer.
        """
        source = program.source.for_text()
        program = Program(source, program.options)
        need_for_text(source)
        try:
            tokenizer = source.tokenizer(cut=False)
        except TreadleError:  # of a file; first the errors of a model that no file mends
            _check_causal(optimized_graph(program), source)
            raise
        made = compile_program(program)
        logits = _check_causal(made.graph, source, made.weights)
        tokenizer = fit_tokenizer(tokenizer, source, made.graph.main, made.inputs[0].name)
        if not are_logits(logits, made.graph.main.outputs[logits].type, tokenizer):
            raise UsageError(
                f"{printable(source.label)} has no perplexity: its output is not the logits of all tokens",
                received=f"{logits}: {made.graph.main.outputs[logits].type}, and {tokenizer.largest_id + 1:,} tokens",
                hint=_CAUSAL,
            )
        fewer = program.options.quantize is not None or program.options.dtype is not None
        other = compile_program(program.but(quantize=None, dtype=None)) if fewer and not alone else None
        return cls(made, tokenizer, other, source.positions)

    def tokens(self, text: str, most: int | None = None) -> list[int]:
        """Return the first `most` token ids of a text. Raises UsageError if the text is not valid Unicode."""
        return [number for part in self.tokenizer.encode([text])[0] for number in part.ids][:most]

    @property
    def window(self) -> int:
        """The default number of tokens of a window: 512, or the model's maximum."""
        return min([WINDOW, *self._limits])

    @property
    def _limits(self) -> list[int]:
        """The maximum numbers of tokens of the model and of its files."""
        found = token_positions(self.model, self.model.inputs[0].name)
        return [n for n in (found, self.positions) if n is not None]

    def measure(self, ids: Sequence[int], *, window: int | None = None, progress: Progress | None = None) -> Perplexity:
        """Return the perplexity of the model on the tokens of a text.

        window    number of tokens of a window; None: 512, or the model's maximum
        progress  called with the number of finished windows

        Raises UsageError if there are fewer than two tokens, if a window has fewer than two tokens or more than the
        model supports, or if logits are not finite.
        """
        limits = self._limits
        window = self.window if window is None else window
        if window < 2 or (limits and window > min(limits)):
            bound = f" and at most {min(limits):,}, the model's maximum" if limits else ""
            hint = Hint(f"window={self.window}", f"--window {self.window}")
            raise UsageError(f"a window must have at least 2 tokens{bound}", received=f"{window:,}", hint=hint)
        if len(ids) < 2:
            raise UsageError("perplexity needs a text of two tokens or more", received=f"{len(ids)}")
        counted, apart, alike = [], [], []
        other: list[Array] = []
        cut = list(windows(len(ids), window))
        for number, (begin, end, first) in enumerate(cut):
            read, targets = np.array([ids[begin:end]], np.int64), np.array(ids[first:end])
            ours = _logits(self.model, read)[first - begin - 1 : -1]
            theirs = None if self.beside is None else _logits(self.beside, read)[first - begin - 1 : -1]
            for at in range(0, len(targets), _ROWS):
                rows = slice(at, at + _ROWS)
                q, named = log_probabilities(ours[rows]), targets[rows, None]
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
    """Yield (first token, end, first counted token) of each window of a text with `count` tokens."""
    yield 0, (done := min(window, count)), 1
    while done < count:
        end = min(done + window // 2, count)
        yield end - window, end, done
        done = end


def log_probabilities(logits: Array) -> Array:
    """Return ln softmax over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    found: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return found


def _perplexity(losses: Array) -> float:
    return math.exp(min(float(losses.mean()), _MOST_LOSS))


def _logits(model: Compiled, tokens: Array) -> Array:
    """Return the logits [S, vocabulary] of one row. Raises UsageError if a logit is NaN or infinite."""
    results = model(tokens)
    found: Array = np.asarray(results["logits"] if len(results) > 1 else next(iter(results.values())))[0]
    if not np.isfinite(found).all():
        raise UsageError(f"logits of {model.name} contain NaN or infinity", received=f"tokens [1, {tokens.shape[1]}]")
    return found


def _check_causal(graph: Graph, source: ModelSource, weights: Mapping[str, Array] | None = None) -> str:
    """Return the name of the logits of a causal model that maps tokens [B, S], its only input, to logits: the output
    of this name, or the only output. Raises UsageError for another model.
    """
    inputs, outputs = graph.main.inputs, graph.main.outputs
    axis = logits = None
    if len(inputs) == 1 and inputs[0].type.dtype is i64 and inputs[0].type.rank == 2:
        axis = inputs[0].type.shape[-1].as_symbol
    if "logits" in outputs or len(outputs) == 1:
        logits = "logits" if "logits" in outputs else next(iter(outputs))
    if axis is not None and logits is not None:
        if axis in outputs[logits].type.symbols and (
            is_causal(graph, axis, logits) or causality_in_runs(graph, axis, logits, weights)
        ):
            return logits
        if with_all_positions(graph, axis) is not None:
            raise UsageError(
                f"{printable(source.label)} has no perplexity: it returns the logits of its last token alone",
                received=f"{logits}: {outputs[logits].type}",
                hint="a model that returns the logits of all tokens",
            )
    takes = ", ".join(f"{value.name}: {value.type}" for value in inputs)
    gives = ", ".join(f"{name}: {value.type}" for name, value in outputs.items())
    why, hint = "it is not a causal language model of tokens alone", _CAUSAL
    if source.kind == "gguf":
        hint = LANGUAGE_ONLY
    elif logits is not None and (fixed := fixed_length(inputs)) is not None:
        why, hint = "the length of its inputs is fixed", fixed
    raise UsageError(
        f"{printable(source.label)} has no perplexity: {why}", received=f"({takes}) -> ({gives})", hint=hint
    )
