"""Generation: rows of a session continued token by token, others joining as rows finish.

for token in generate(session, [[464, 3139], [15496]], most=32):
    print(token.row, token.id)
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np

from treadle.ir.errors import UsageError
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session

Array = np.ndarray[Any, Any]
Ending = Literal["end", "context", "count"]
"""Why a row ends: a token that ends a text, a full context, or as many tokens as were asked for."""


@dataclass(frozen=True)
class Token:
    """One generated token.

    row      its prompt's number
    id       of the vocabulary
    ending   why the row ends with it, None where it goes on
    logprob  the natural logarithm of the probability that the model gave it, before it was chosen
    """

    row: int
    id: int
    ending: Ending | None = None
    logprob: float = 0.0

    @property
    def last(self) -> bool:
        """Whether the row ends with it."""
        return self.ending is not None


@dataclass
class _Running:
    """A prompt that is being continued: its number, its row, and the logits after its last token."""

    number: int
    row: int
    logits: Array
    made: int = 0


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Iterator[Token]:
    """Continue each prompt by up to `most` tokens, a step at a time, prompts in order within a step.

    A prompt ends after an id in `stop` (which is given, too), when its row is full, or after `most` tokens. More
    prompts than the session has free rows wait for one; one that joins depends on nothing of the others.

    inputs   for each prompt what the model takes beside tokens; see `Session.open`

    Raises UsageError at once, before a token is asked for, for an empty prompt, one that leaves no room, or a session
    without a free row.
    """
    most = _count(most)
    rows = [list(p) for p in prompts]
    for i, ids in enumerate(rows, 1):
        if not ids:
            raise UsageError(f"prompt {i} of {len(rows)} has no tokens", hint="a prompt with a word in it")
        if len(ids) > session.capacity:
            raise UsageError(
                f"prompt {i} of {len(rows)} has {len(ids)} tokens, {session.who_takes} takes {session.capacity}",
                hint="a shorter prompt",
            )
    if rows and not session.free:
        raise _no_free_row()
    if inputs is not None and len(inputs) != len(rows):
        raise UsageError(f"inputs for {len(inputs)} prompts, of {len(rows)}")
    return _generated(session, rows, most, sampling or Sampling(), frozenset(stop), inputs or [{}] * len(rows))


def _generated(
    session: Session,
    prompts: list[list[int]],
    most: int,
    sampling: Sampling,
    stop: frozenset[int],
    inputs: Sequence[dict[str, Any]],
) -> Iterator[Token]:
    waiting = deque(range(len(prompts))) if most > 0 else deque[int]()
    running: list[_Running] = []
    try:
        while waiting or running:
            running += _joined(session, prompts, inputs, waiting)
            if not running:
                raise _no_free_row()
            going: dict[int, int] = {}
            for each in list(running):
                token = sampling.choose(each.logits, row=each.number, step=each.made)
                each.made += 1
                ending = _ending(session, each, token in stop, each.made == most)
                logprob = _logprob(each.logits, token)
                if ending is not None:
                    running.remove(each)
                    session.close(each.row)
                else:
                    going[each.row] = token
                yield Token(each.number, token, ending, logprob)
            if going:
                found = session.step(going)
                for each in running:
                    each.logits = found[each.row]
    finally:
        for each in running:
            session.close(each.row)


def _joined(
    session: Session, prompts: list[list[int]], inputs: Sequence[dict[str, Any]], waiting: deque[int]
) -> list[_Running]:
    """As many of those that wait as there are free rows, prefilled together; none stays open where one fails."""
    rows: dict[int, int] = {}
    try:
        while waiting and session.free:
            number = waiting.popleft()
            rows[session.open(**inputs[number])] = number
        logits = session.prefill({row: prompts[number] for row, number in rows.items()})
    except BaseException:
        for row in rows:
            session.close(row)
        raise
    return [_Running(number, row, logits[row]) for row, number in rows.items()]


def _count(most: object) -> int:
    if isinstance(most, bool) or not isinstance(most, SupportsIndex) or (count := operator.index(most)) < 0:
        raise UsageError("most must be a number of tokens, 0 or more", received=repr(most))
    return count


def _no_free_row() -> UsageError:
    return UsageError("the session has no free row", hint="close one, or a session with more rows")


def _ending(session: Session, each: _Running, is_end: bool, is_all: bool) -> Ending | None:
    if is_end:
        return "end"
    if session.full == "error" and session.length(each.row) + 1 > session.capacity:
        return "context"
    return "count" if is_all else None


def _logprob(logits: Array, token: int) -> float:
    scores = logits.astype(np.float64)
    top = scores.max()
    return float(scores[token] - top - np.log(np.exp(scores - top).sum()))
