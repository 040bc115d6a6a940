"""Generation: continue rows of a session token by token. If a row ends, a waiting prompt takes its place.

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

from treadle.ir.errors import Hint, UsageError
from treadle.runtime.device_sampling import TokenDraw, sampling_inputs
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.sampling import Sampling, most_likely
from treadle.runtime.session import Session
from treadle.runtime.token_rules import TokenRules, log_probabilities

Array = np.ndarray[Any, Any]
Ending = Literal["end", "stop", "context", "count"]
"""Reason for the end of a row: an end token of the model, a stop condition of the caller, a full context, or the
requested number of tokens.
"""
Until = Callable[[int, int], bool]
"""A predicate of a prompt's number and a token id. It returns True if the token ends the row. It is called once for
each token, in order.
"""

_GREEDY = Sampling()
_NO_RULES = TokenRules()


@dataclass(frozen=True)
class Token:
    """One generated token.

    row      number of its prompt
    id       token id
    ending   the reason if the row ends with this token, else None
    logprob  natural logarithm of the probability that the model assigned to the token, before sampling options; None if
             they were not requested, or the device chose the token
    likely   the requested number of most likely tokens at this position, in order, each with its log probability
    """

    row: int
    id: int
    ending: Ending | None = None
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()

    @property
    def last(self) -> bool:
        """True if the row ends with this token."""
        return self.ending is not None


@dataclass(frozen=True)
class Choosing:
    """The rules for choosing the next token of a row, and the conditions that end the row.

    most      maximum number of generated tokens
    sampling  sampling options; greedy if absent
    rules     token rules, applied before sampling
    stop      token ids that end a text
    until     a further condition that ends a row
    likely    number of most likely tokens returned with each token, and its log probability; None: no log probabilities
    """

    most: int
    sampling: Sampling = _GREEDY
    rules: TokenRules | None = None
    stop: frozenset[int] = frozenset()
    until: Until | None = None
    likely: int | None = None

    def choose(self, logits: Array, number: int, prompt: Sequence[int], made: Sequence[int]) -> int:
        """Return the next token id from logits [vocab] after the generated tokens. Raises UsageError if no token can be
        chosen.
        """
        if self.rules is None or self.rules == _NO_RULES:
            return self.sampling.choose(logits, row=number, step=len(made))
        is_last = len(made) + 1 == self.most
        scores = self.rules.apply(logits, prompt=prompt, generated=made, end=tuple(self.stop), is_last=is_last)
        return self.sampling.choose(scores, row=number, step=len(made))

    def token(self, logits: Array | None, number: int, made: Sequence[int], is_full: bool) -> Token:
        """Return the last generated token, with the reason if it ends the row. `is_full`: the row has no room for
        another token.
        """
        chosen = made[-1]
        ending: Ending | None = "end" if chosen in self.stop else None
        if self.until is not None and self.until(number, chosen):
            ending = ending or "stop"
        if ending is None and is_full:
            ending = "context"
        if ending is None and len(made) == self.most:
            ending = "count"
        if self.likely is None or logits is None:
            return Token(number, chosen, ending)
        best = most_likely(logits, self.likely) if self.likely else ()
        ids = [chosen, *map(int, best)]
        logprob, *others = log_probabilities(logits, ids).tolist()
        return Token(number, chosen, ending, logprob, tuple(zip(ids[1:], others, strict=True)))

    def check_device(self, how: str) -> None:
        """Raise UsageError for options that need logits, where tokens are chosen on the device as `how`."""
        needs = [
            name
            for name, is_set in (("rules", self.rules not in (None, _NO_RULES)), ("likely", self.likely is not None))
            if is_set
        ]
        if needs:
            raise UsageError(
                f"{' and '.join(needs)} need logits, and this session chooses tokens on the device",
                received=str(self.rules) if "rules" in needs else f"likely={self.likely}",
                hint=Hint("a session without device_sampling", "leave out --device-sampling"),
            )
        sampling_inputs(how, [TokenDraw(self.sampling)])


@dataclass
class _Running:
    """A prompt in generation: its number, its row, and the logits after its last token, or the token that the device
    has chosen from them.
    """

    number: int
    row: int
    logits: Array | int
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
    likely: int | None = None,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Iterator[Token]:
    """Yield the tokens that continue each prompt, by up to `most` tokens. Each step yields one token per running
    prompt, in the order of the prompts.

    A prompt ends after a token id in `stop` (which is returned too), after a token for which `until` is True, if its
    row is full, or after `most` tokens. If there are more prompts than free rows, the others wait; a prompt's tokens do
    not depend on the other prompts. Equal prompts are prefilled once and forked. If the session reuses prefixes, a
    prompt that begins like another prompt reuses the common prefix.

    rules    token rules, applied to the logits after the row's earlier tokens
    until    called for each token; True ends the row of the token
    likely   number of most likely tokens returned with each token, and its log probability; None: no log probabilities
    inputs   for each prompt, the model's inputs in addition to the tokens; see `Session.open`

    Raises UsageError at the call, before the first token is requested, for an empty prompt, a prompt that leaves no
    room, or a session without a free row.
    """
    choosing = Choosing(count_of(most), sampling or Sampling(), rules, frozenset(stop), until, likely)
    if session.derived.sampling is not None:
        choosing.check_device(session.derived.sampling)
    rows = checked_prompts(session, prompts, inputs)
    if rows and not session.free:
        raise no_free_row()
    return _generated(session, rows, choosing)


def checked_prompts(
    session: Session, prompts: Sequence[Sequence[int]], inputs: Sequence[dict[str, Any]] | None
) -> list[RowPrompt]:
    """Return the prompts with their further inputs. Raises UsageError for a prompt that is empty or too long, and for
    inputs that do not fit.
    """
    rows = [list(p) for p in prompts]
    for i, ids in enumerate(rows, 1):
        if not ids:
            raise UsageError(f"prompt {i} of {len(rows)} has no tokens", hint="a prompt of at least one token")
        if len(ids) > session.capacity:
            raise UsageError(
                f"prompt {i} of {len(rows)} has {len(ids)} tokens, {session.who_takes} takes {session.capacity}",
                hint="a shorter prompt",
            )
    if inputs is not None and len(inputs) != len(rows):
        raise UsageError(f"inputs for {len(inputs)} of {len(rows)} prompts")
    return [session.prompt(ids, **given) for ids, given in zip(rows, inputs or [{}] * len(rows), strict=True)]


def _generated(session: Session, prompts: list[RowPrompt], choosing: Choosing) -> Iterator[Token]:
    waiting = deque(range(len(prompts))) if choosing.most > 0 else deque[int]()
    running: list[_Running] = []
    try:
        while waiting or running:
            running += _joined(session, prompts, waiting, choosing)
            if not running:
                raise no_free_row()
            going: dict[int, int] = {}
            for each in list(running):
                logits = None if isinstance(each.logits, int) else each.logits
                chosen = (
                    each.logits
                    if isinstance(each.logits, int)
                    else choosing.choose(each.logits, each.number, prompts[each.number].tokens, each.made)
                )
                each.made.append(chosen)
                token = choosing.token(logits, each.number, each.made, is_full(session, each.row))
                if token.last:
                    running.remove(each)
                    session.close(each.row, keep=True)
                else:
                    going[each.row] = chosen
                yield token
            if going and session.derived.sampling is not None:
                draws = {each.row: TokenDraw(choosing.sampling, each.number, len(each.made)) for each in running}
                sampled = session.sample({row: [token] for row, token in going.items()}, draws)
                for each in running:
                    each.logits = sampled[each.row]
            elif going:
                found = session.step(going)
                for each in running:
                    each.logits = found[each.row]
    finally:
        for each in running:
            session.close(each.row)


def _joined(session: Session, prompts: list[RowPrompt], waiting: deque[int], choosing: Choosing) -> list[_Running]:
    """Open a row for each waiting prompt until no row is free. If an error occurs, all these rows are closed.

    The prompts are prefilled together. A prompt that begins like another prompt is prefilled later, from the common
    prefix, unless the device chooses the tokens: a row that is forked has no logits from which its own is drawn.
    """
    samples = session.derived.sampling is not None
    left = [waiting.popleft() for _ in range(min(len(waiting), session.free))]
    joined: dict[int, _Running] = {}
    before = set(session.rows)
    try:
        while left:
            reading: list[int] = []
            later: dict[int, int] = {}
            for number in left:
                alike = {} if samples else {n: prompts[n] for n in reading}
                ahead = prompt_ahead(session, prompts[number], alike)
                if ahead is None:
                    reading.append(number)
                else:
                    later[number] = ahead[0]
            rows = {number: session.begin(prompts[number]) for number in reading}
            pieces = {row: prompts[n].tokens[session.length(row) :] for n, row in rows.items()}
            found: Mapping[int, Array | int]
            if samples:
                found = session.sample(pieces, {row: TokenDraw(choosing.sampling, n) for n, row in rows.items()})
            else:
                found = session.prefill(pieces)
            joined |= {number: _Running(number, row, found[row]) for number, row in rows.items()}
            left = []
            for number, first in later.items():
                if prompts[number].equals(prompts[first]):
                    joined[number] = _Running(number, session.fork(rows[first]), joined[first].logits)
                else:
                    left.append(number)
    except BaseException:
        for row in set(session.rows) - before:
            session.close(row)
        raise
    return [joined[number] for number in sorted(joined)]


def prompt_ahead(session: Session, prompt: RowPrompt, others: Mapping[int, RowPrompt]) -> tuple[int, int] | None:
    """Return the other prompt that `prompt` should wait for, and the number of tokens that it then need not compute.

    others  prompts that are about to be prefilled, by number

    If both prompts are equal, this is the number of all tokens. Returns None if no other prompt shares a longer prefix
    than the session already holds.
    """
    found, most = None, session.prefix_length(prompt)
    for number, other in others.items():
        count = len(prompt.tokens) if other.equals(prompt) else session.shared(prompt, other)
        if count > most:
            found, most = (number, count), count
    return found


def count_of(most: object) -> int:
    """Return `most` as an integer. Raises UsageError if it is not a number of tokens."""
    if isinstance(most, bool) or not isinstance(most, SupportsIndex) or (count := operator.index(most)) < 0:
        raise UsageError("most must be a number of tokens, 0 or more", received=repr(most))
    return count


def no_free_row() -> UsageError:
    """Return the error for a session without a free row."""
    return UsageError("the session has no free row", hint="close a row, or open a session with more rows")


def is_full(session: Session, row: int) -> bool:
    """Return True if a row has no room for another token, and its session does not slide full rows."""
    return session.full == "error" and session.length(row) + 1 > session.capacity
