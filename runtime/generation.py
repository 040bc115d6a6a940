"""Generation: rows of a session continued token by token, others joining as rows finish.

for token in generate(session, [[464, 3139], [15496]], most=32):
    print(token.row, token.id)
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex

import numpy as np

from treadle.ir.errors import UsageError
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.token_rules import TokenRules, log_probabilities

Array = np.ndarray[Any, Any]
Ending = Literal["end", "stop", "context", "count"]
"""Why a row ends: a token that ends a text, the caller's word, a full context, or as many tokens as were asked for."""
Until = Callable[[int, int], bool]
"""Whether a row ends with a token, by its prompt's number and the token's id; asked once of each token, in order."""

_GREEDY = Sampling()
_NO_RULES = TokenRules()


@dataclass(frozen=True)
class Token:
    """One generated token.

    row      its prompt's number
    id       of the vocabulary
    ending   why the row ends with it, None where it goes on
    logprob  the natural logarithm of the probability that the model gave it, before it was chosen
    likely   the likeliest tokens in its place, likeliest first, each with its own logarithm; as many as were asked for
    """

    row: int
    id: int
    ending: Ending | None = None
    logprob: float = 0.0
    likely: tuple[tuple[int, float], ...] = ()

    @property
    def last(self) -> bool:
        """Whether the row ends with it."""
        return self.ending is not None


@dataclass(frozen=True)
class Choosing:
    """How the next token of a row is chosen, and when the row ends.

    most      the most tokens that are made
    sampling  greedy, where it is not said
    rules     what is asked of tokens before
    stop      ids that end a text
    until     what else ends a row
    likely    how many of the likeliest tokens are told beside each
    """

    most: int
    sampling: Sampling = _GREEDY
    rules: TokenRules | None = None
    stop: frozenset[int] = frozenset()
    until: Until | None = None
    likely: int = 0

    def choose(self, logits: Array, number: int, prompt: Sequence[int], made: Sequence[int]) -> int:
        """The id that follows, of logits [vocab] after the tokens made. Raises UsageError where none can be chosen."""
        if self.rules is None or self.rules == _NO_RULES:
            return self.sampling.choose(logits, row=number, step=len(made))
        is_last = len(made) + 1 == self.most
        scores = self.rules.apply(logits, prompt=prompt, made=made, end=tuple(self.stop), is_last=is_last)
        return self.sampling.choose(scores, row=number, step=len(made))

    def token(self, logits: Array, number: int, made: Sequence[int], is_full: bool) -> Token:
        """The last of the tokens made as it is told, with why the row ends: is_full where it has room for no more."""
        chosen = made[-1]
        scores = log_probabilities(logits)
        best = np.argsort(-scores, kind="stable")[: self.likely] if self.likely else ()
        ending: Ending | None = "end" if chosen in self.stop else None
        if self.until is not None and self.until(number, chosen):
            ending = ending or "stop"
        if ending is None and is_full:
            ending = "context"
        if ending is None and len(made) == self.most:
            ending = "count"
        return Token(number, chosen, ending, float(scores[chosen]), tuple((int(i), float(scores[i])) for i in best))


@dataclass
class _Running:
    """A prompt that is being continued: its number, its row, and the logits after its last token."""

    number: int
    row: int
    logits: Array
    made: list[int] = field(default_factory=list)


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    sampling: Sampling | None = None,
    rules: TokenRules | None = None,
    stop: Sequence[int] = (),
    until: Until | None = None,
    likely: int = 0,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Iterator[Token]:
    """Continue each prompt by up to `most` tokens, a step at a time, prompts in order within a step.

    A prompt ends after an id in `stop` (which is given, too), where `until` says so, when its row is full, or after
    `most` tokens. More prompts than the session has free rows wait for one; one that joins depends on nothing of the
    others. A prompt that is given several times at once is prefilled once, and forked; one that begins as another does
    goes on from there, where the session resumes.

    rules    what is asked of the next token, by those before it
    until    asked of each token whether its row ends with it
    likely   how many of the likeliest tokens are told beside each one
    inputs   for each prompt what the model takes beside tokens; see `Session.open`

    Raises UsageError at once, before a token is asked for, for an empty prompt, one that leaves no room, or a session
    without a free row.
    """
    choosing = Choosing(count_of(most), sampling or Sampling(), rules, frozenset(stop), until, likely)
    rows, given = checked_prompts(session, prompts, inputs)
    if rows and not session.free:
        raise no_free_row()
    return _generated(session, rows, choosing, given)


def checked_prompts(
    session: Session, prompts: Sequence[Sequence[int]], inputs: Sequence[dict[str, Any]] | None
) -> tuple[list[list[int]], Sequence[dict[str, Any]]]:
    """Prompts, and what each brings beside tokens. Raises UsageError for one without tokens, or with too many."""
    rows = [list(p) for p in prompts]
    for i, ids in enumerate(rows, 1):
        if not ids:
            raise UsageError(f"prompt {i} of {len(rows)} has no tokens", hint="a prompt with a word in it")
        if len(ids) > session.capacity:
            raise UsageError(
                f"prompt {i} of {len(rows)} has {len(ids)} tokens, {session.who_takes} takes {session.capacity}",
                hint="a shorter prompt",
            )
    if inputs is not None and len(inputs) != len(rows):
        raise UsageError(f"inputs for {len(inputs)} prompts, of {len(rows)}")
    return rows, inputs if inputs is not None else [{}] * len(rows)


def _generated(
    session: Session, prompts: list[list[int]], choosing: Choosing, inputs: Sequence[dict[str, Any]]
) -> Iterator[Token]:
    waiting = deque(range(len(prompts))) if choosing.most > 0 else deque[int]()
    running: list[_Running] = []
    try:
        while waiting or running:
            running += _joined(session, prompts, inputs, waiting)
            if not running:
                raise no_free_row()
            going: dict[int, int] = {}
            for each in list(running):
                chosen = choosing.choose(each.logits, each.number, prompts[each.number], each.made)
                each.made.append(chosen)
                token = choosing.token(each.logits, each.number, each.made, is_full(session, each.row))
                if token.last:
                    running.remove(each)
                    session.close(each.row, keep=True)
                else:
                    going[each.row] = chosen
                yield token
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
    """As many of those that wait as there are free rows; none stays open where one fails.

    They are prefilled together, but for those that begin as one of them does, which go on from it.
    """
    left = [waiting.popleft() for _ in range(min(len(waiting), session.free))]
    joined: dict[int, _Running] = {}
    before = set(session.rows)
    try:
        while left:
            reading: list[int] = []
            later: dict[int, int] = {}
            for number in left:
                alike = {n: prompts[n] for n in reading if _bring_the_same(inputs[n], inputs[number])}
                ahead = prompt_ahead(session, prompts[number], alike)
                if ahead is None:
                    reading.append(number)
                else:
                    later[number] = ahead[0]
            rows = {number: session.resume(prompts[number], **inputs[number]) for number in reading}
            logits = session.prefill({row: prompts[n][session.length(row) :] for n, row in rows.items()})
            joined |= {number: _Running(number, row, logits[row]) for number, row in rows.items()}
            left = []
            for number, first in later.items():
                if prompts[number] == prompts[first]:
                    joined[number] = _Running(number, session.fork(rows[first]), joined[first].logits)
                else:
                    left.append(number)
    except BaseException:
        for row in set(session.rows) - before:
            session.close(row)
        raise
    return [joined[number] for number in sorted(joined)]


def prompt_ahead(
    session: Session, prompt: Sequence[int], others: Mapping[int, Sequence[int]]
) -> tuple[int, int] | None:
    """Of the prompts that are about to be prefilled, by number, the one that a prompt should wait for, since it begins
    alike, and how many of its tokens need not be computed then: all of them where the two are the same.

    None where none of them has more of it than the session holds already.
    """
    found, most = None, session.held(prompt)
    for number, other in others.items():
        count = len(prompt) if other == prompt else session.shared(prompt, other)
        if count > most:
            found, most = (number, count), count
    return found


def _bring_the_same(inputs: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two prompts come with the same beside their tokens: nothing, or one thing."""
    return inputs is others or not (inputs or others)


def count_of(most: object) -> int:
    """A number of tokens. Raises UsageError for what is none."""
    if isinstance(most, bool) or not isinstance(most, SupportsIndex) or (count := operator.index(most)) < 0:
        raise UsageError("most must be a number of tokens, 0 or more", received=repr(most))
    return count


def no_free_row() -> UsageError:
    """What is said where a session has no row to give."""
    return UsageError("the session has no free row", hint="close one, or a session with more rows")


def is_full(session: Session, row: int) -> bool:
    """Whether a row has room for no token more, and does not slide."""
    return session.full == "error" and session.length(row) + 1 > session.capacity
