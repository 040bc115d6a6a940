"""Generation by recomputing: every step runs the whole prefix again and appends one token a row.

Rows of a batch are padded at the right; a causal model does not see the padding, so that a row's next token is read at
its own last position. A model with a key/value cache will need none of this; the interface stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from treadle.ir.analysis.following import follow
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph, Value
from treadle.runtime.sampling import Sampling

Array = np.ndarray[Any, Any]
Run = Callable[..., Mapping[str, Any]]
Ending = Literal["end", "context", "count"]
"""Why a row ends: a token that ends a text, a full context, or as many tokens as were asked for."""


@dataclass(frozen=True)
class Token:
    """One generated token: its row in the batch, its id, and why the row ends with it, None where it goes on."""

    row: int
    id: int
    ending: Ending | None = None

    @property
    def last(self) -> bool:
        """Whether the row ends with it."""
        return self.ending is not None


@dataclass(frozen=True)
class Stepper:
    """A language model as generation needs it.

    run      the executable, called by name
    tokens   the name of its input of ids [B, S]
    logits   the name of its output [B, S, vocab]
    context  the longest sequence that it takes, or None
    padding  an id of the vocabulary, for positions after a row's end
    """

    run: Run
    tokens: str
    logits: str
    context: int | None
    padding: int = 0

    @staticmethod
    def of(graph: Graph, run: Run) -> Stepper:
        """Find the ids, logits and context in a graph. Raises UsageError where it is not a causal language model:
        another number of inputs, no logits, or an axis that may not be stepped, with what stands against it."""
        if len(graph.main.inputs) != 1:
            names = ", ".join(v.name for v in graph.main.inputs)
            raise UsageError(
                "generation needs a model of one input, the tokens [B, S]",
                received=f"{graph.name} takes {names or 'nothing'}",
                hint="an encoder-decoder model, or one with optional inputs, cannot be continued yet",
            )
        (tokens,) = graph.main.inputs
        symbol = tokens.type.shape[-1].as_symbol if tokens.type.rank == 2 and tokens.type.dtype.is_int else None
        if symbol is None:
            raise UsageError("generation needs integer tokens [B, S]", received=f"{tokens.name}: {tokens.type}")
        name = _logits(graph, tokens)
        verdict = follow(graph, symbol).step()
        if not verdict:
            raise UsageError(f"{graph.name} is no causal model: {verdict}", hint="an encoder cannot be continued")
        return Stepper(run, tokens.name, name, graph.symbols[symbol].upper)

    def next_logits(self, rows: Sequence[Sequence[int]]) -> Array:
        """The logits [B, vocab] after each row's last token."""
        lengths = np.array([len(row) for row in rows])
        ids = np.full((len(rows), int(lengths.max())), self.padding, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        logits = np.asarray(self.run(**{self.tokens: ids})[self.logits])
        picked: Array = logits[np.arange(len(rows)), lengths - 1]
        return picked


def _logits(graph: Graph, tokens: Value) -> str:
    for name, value in graph.main.outputs.items():
        if value.type.rank == 3 and value.type.dtype.is_float and value.type.shape[:2] == tokens.type.shape:
            return name
    found = ", ".join(f"{n}: {v.type}" for n, v in graph.main.outputs.items())
    raise UsageError("generation needs logits [B, S, vocab]", received=found)


def generate(
    model: Stepper,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
) -> Iterator[Token]:
    """Continue each prompt by up to `most` tokens, a step at a time, rows in order within a step.

    A row ends after an id in `stop` (which is given, too), when the context is full, or after `most` tokens. Raises
    UsageError at once, before a token is asked for, for an empty prompt, or one that leaves no room in the context.
    """
    rows = [list(p) for p in prompts]
    for i, row in enumerate(rows, 1):
        if not row:
            raise UsageError(f"prompt {i} of {len(rows)} has no tokens", hint="a prompt with a word in it")
        if model.context is not None and len(row) > model.context:
            raise UsageError(
                f"prompt {i} of {len(rows)} has {len(row)} tokens, the model takes {model.context}",
                hint="a shorter prompt",
            )
    return _generated(model, rows, most, sampling or Sampling(), frozenset(stop))


def _generated(
    model: Stepper, rows: list[list[int]], most: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[Token]:
    running = list(range(len(rows))) if most > 0 else []
    for step in range(most):
        if not running:
            return
        logits = model.next_logits([rows[i] for i in running])
        going = []
        for i, scores in zip(running, logits, strict=True):
            token = sampling.choose(scores, row=i, step=step)
            rows[i].append(token)
            made = Token(i, token, _ending(model, len(rows[i]), token in stop, step + 1 == most))
            yield made
            if not made.last:
                going.append(i)
        running = going


def _ending(model: Stepper, length: int, is_end: bool, is_all: bool) -> Ending | None:
    if is_end:
        return "end"
    if model.context is not None and length > model.context:
        return "context"
    return "count" if is_all else None
