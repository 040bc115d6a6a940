"""Speculative decoding: guess the next tokens, and let the model check all of them in one call.

    tally = SpeculationTally()
    for token in speculate(session, [[464, 3139]], most=64, guess=PromptLookup(), tally=tally):
        print(token.id)
    print(tally.accepted_length)

A guessed token is accepted if the model would have chosen the same token (Leviathan et al. 2023). Each token is chosen
from the model's own logits, by the same random draw as without guesses. So the text is the same as from `generate`,
greedy or sampled. If a backend rounds differently for several tokens at once than for one, a choice between two nearly
equal tokens may differ; `SpeculationTally.margin` reports the smallest difference between the two best scores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from treadle.ir.errors import UsageError
from treadle.runtime.generation import Choosing, Token, Until, checked_prompts, count_of, no_free_row
from treadle.runtime.guess_pace import GuessPace
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.token_rules import TokenRules

Array = np.ndarray[Any, Any]


class Guess(Protocol):
    """A source of guesses for the next tokens.

    is_cheap  True if a guess takes far less time than a call of the model
    """

    is_cheap: ClassVar[bool]

    def begin(self) -> None:
        """Start a new sequence."""

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may follow all the tokens of a text so far; possibly none."""

    def end(self) -> None:
        """End the text, whether finished or aborted."""


@dataclass(frozen=True)
class PromptLookup:
    """Prompt lookup: guess the tokens that followed an earlier occurrence of the last tokens (Saxena 2023). Useful for
    texts that quote, edit or repeat.

    longest  maximum number of last tokens to search for; if there is no match, fewer are tried, down to 1
    count    number of tokens to guess
    """

    longest: int = 3
    count: int = 8
    is_cheap: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.longest < 1 or self.count < 1:
            raise UsageError("longest and count must be 1 or more", received=repr(self))

    def begin(self) -> None:
        """Do nothing: no state is kept for a sequence."""

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return the tokens after the latest earlier occurrence of the longest suffix of the text."""
        row = np.asarray(tokens)
        (found,) = np.nonzero(row[:-1] == row[-1])  # the last places of matches of one token
        if not len(found):
            return []
        for size in range(2, self.longest + 1):
            longer = found[found >= size - 1]
            longer = longer[row[longer - size + 1] == row[-size]] if len(longer) else longer
            if not len(longer):
                break
            found = longer
        start = int(found[-1]) + 1
        return [int(token) for token in row[start : start + min(self.count, most)]]

    def end(self) -> None:
        """Do nothing: no state is kept for a sequence."""


class DraftModel:
    """A draft model: propose tokens by greedy decoding with a smaller model that has the same vocabulary. It uses one
    row of its own session.
    """

    is_cheap: ClassVar[bool] = False

    def __init__(self, session: Session, *, count: int = 4) -> None:
        """Create a draft model that guesses `count` tokens at a time.

        Raises UsageError for a session without a free row, or a model whose rows cannot be rolled back.
        """
        if count < 1:
            raise UsageError("count must be 1 or more", received=repr(count))
        if session.derived.carries:
            raise UsageError(
                f"{session.derived.graph.name} has running sums over its tokens, which cannot be rolled back"
            )
        self.session, self.count = session, count
        self._row: int | None = None

    def begin(self) -> None:
        """Open a row."""
        if not self.session.free:
            raise no_free_row()
        self._row = self.session.open()

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return the tokens that the draft model chooses, or fewer tokens if the draft model's row is full."""
        row, session = self._row, self.session
        if row is None:
            raise UsageError("begin must be called before follow", hint="begin()")
        count = min(self.count, most, session.capacity - len(tokens), session.chunk - 1)
        new = [int(token) for token in tokens[session.length(row) :]]
        if count < 1 or not new:
            return []
        if len(new) > 1 and len(new) + count > min(session.chunk, 2 * self.count + 2):
            session.prefill({row: new[:-1]})
            new = new[-1:]
        guessed: list[int] = []
        for _ in range(count):
            logits = session.verify(row, [*new, *guessed])
            guessed.append(int(logits[-1].argmax()))
        session.accept(row, new)
        return guessed

    def end(self) -> None:
        """Close the row."""
        if self._row is not None:
            self.session.close(self._row)
            self._row = None


@dataclass
class SpeculationTally:
    """Counts of a speculative run.

    calls     calls of the model after the prompts
    guessed   guessed tokens
    accepted  guessed tokens that the model accepted
    made      tokens of all texts
    margin    smallest difference between the best and the second-best score over all greedy choices; infinite if none
    unused    guessed tokens after the end of a text, which the model neither accepted nor rejected
    """

    calls: int = 0
    guessed: int = 0
    accepted: int = 0
    made: int = 0
    margin: float = float("inf")
    unused: int = 0

    @property
    def accepted_length(self) -> float:
        """Mean number of accepted tokens per call."""
        return self.accepted / self.calls if self.calls else 0.0


def speculate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    guess: Guess,
    sampling: Sampling | None = None,
    rules: TokenRules | None = None,
    stop: Sequence[int] = (),
    until: Until | None = None,
    likely: int | None = None,
    inputs: Sequence[dict[str, Any]] | None = None,
    tally: SpeculationTally | None = None,
    pace: GuessPace | None = None,
) -> Iterator[Token]:
    """Yield the tokens that `generate` yields for the same arguments, prompt by prompt, with fewer calls of the model.

    guess  source of guesses for the next tokens
    tally  counts of the run, which this function updates
    pace   limits guesses to lengths that save time; None: all guessed tokens are checked

    Raises UsageError at the call as `generate` does, and for a model whose rows cannot be rolled back.
    """
    if session.derived.carries:
        raise UsageError(
            f"{session.derived.graph.name} has running sums over its tokens, which cannot be rolled back",
            hint="generate, without speculation",
        )
    choosing = Choosing(count_of(most), sampling or Sampling(), rules, frozenset(stop), until, likely)
    rows = checked_prompts(session, prompts, inputs)
    if rows and not session.free:
        raise no_free_row()
    return _speculated(session, rows, choosing, guess, tally or SpeculationTally(), pace)


def _speculated(
    session: Session,
    prompts: list[RowPrompt],
    choosing: Choosing,
    guess: Guess,
    tally: SpeculationTally,
    pace: GuessPace | None,
) -> Iterator[Token]:
    for number, prompt in enumerate(prompts if choosing.most else []):
        row = session.begin(prompt)
        try:
            guess.begin()
            yield from _continued(session, row, number, prompt.tokens, choosing, guess, tally, pace)
        finally:
            guess.end()
            session.close(row, keep=True)


def _continued(
    session: Session,
    row: int,
    number: int,
    prompt: list[int],
    choosing: Choosing,
    guess: Guess,
    tally: SpeculationTally,
    pace: GuessPace | None,
) -> Iterator[Token]:
    made: list[int] = []
    guessed: list[int] = []
    unchecked: list[int] = []  # a guess that was not checked by the model, but shows what it would have been worth
    # Logits [n, vocab]: after the tokens that the row holds, and after each guess.
    found = session.prefill({row: prompt[session.length(row) :]})[row][None]
    while True:
        head, right = made[-1:], 0
        for logits in found:
            chosen = choosing.choose(logits, number, prompt, made)
            made.append(chosen)
            tally.made += 1
            tally.margin = min(tally.margin, _margin(logits, chosen))
            is_full = session.full == "error" and len(prompt) + len(made) > session.capacity
            token = choosing.token(logits, number, made, is_full)
            yield token
            if token.last:
                judged = guessed[: right + 1]
                tally.accepted += right + (judged[right:] == [chosen])
                tally.unused += len(guessed) - len(judged)
                return
            if pace is not None and unchecked:
                pace.judged(right=int(chosen == unchecked[0]), guessed=1)
                unchecked = []
            if right == len(guessed) or chosen != guessed[right]:
                break
            right += 1
        if guessed:  # as after a step, the row then holds all tokens but the last
            session.accept(row, [*head, *guessed[:right]])
            if pace is not None:
                pace.judged(right=right, guessed=len(guessed))
        tally.accepted += right
        tally.calls += 1
        room = min(session.capacity - session.length(row) - 1, session.chunk - 1, choosing.most - len(made) - 1)
        started, most = time.perf_counter(), max(0, room)
        if pace is not None and not guess.is_cheap:
            most = pace.length(most)
        guessed = guess.follow([*prompt, *made], most)[:most] if most else []
        if pace is not None and guess.is_cheap and guessed:
            most = pace.length(len(guessed))
            unchecked, guessed = ([], guessed[:most]) if most else (guessed, [])
        tally.guessed += len(guessed)
        new = made[-1]
        found = session.verify(row, [new, *guessed]) if guessed else session.step({row: new})[row][None]
        if pace is not None:
            pace.measured(1 + len(guessed), time.perf_counter() - started)


def _margin(logits: Array, chosen: int) -> float:
    """Return the difference between the best and the second-best score, or infinity if another token was chosen."""
    best = logits.max()
    if logits[chosen] != best:
        return float("inf")
    second = max(logits[:chosen].max(initial=-np.inf), logits[chosen + 1 :].max(initial=-np.inf))
    return float(best) - float(second)
