"""Speculation: tokens that are likely to follow are guessed, and the model checks all of them in one call.

    tally = SpeculationTally()
    for token in speculate(session, [[464, 3139]], most=64, guess=PromptLookup(), tally=tally):
        print(token.id)
    print(tally.accepted_length)

A guess is kept as far as the model would have chosen the same (Leviathan et al. 2023). Each token is chosen from the
model's own logits, by the same draw as without guesses, so the text is the one that `generate` gives: greedy or drawn.
Where a backend computes several tokens at once with other rounding than one by one, a choice between two tokens that
are nearly alike may fall otherwise; `SpeculationTally.margin` says how near the nearest two were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from treadle.ir.errors import UsageError
from treadle.runtime.generation import Choosing, Token, Until, checked_prompts, count_of, no_free_row
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.token_rules import TokenRules

Array = np.ndarray[Any, Any]


class Guess(Protocol):
    """What guesses the tokens that follow."""

    def begin(self) -> None:
        """Another text begins."""

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow all the tokens of a text so far; perhaps none."""

    def end(self) -> None:
        """The text has ended, or was broken off."""


@dataclass(frozen=True)
class PromptLookup:
    """What followed where the last tokens stood before (Saxena 2023): for texts that quote, edit or go on as they
    began.

    longest  how many of the last tokens are looked for, at most; then fewer, down to 1
    count    how many tokens are guessed
    """

    longest: int = 3
    count: int = 8

    def __post_init__(self) -> None:
        if self.longest < 1 or self.count < 1:
            raise UsageError("a look-up takes 1 token or more, and guesses as many", received=repr(self))

    def begin(self) -> None:
        """Nothing is kept of a text."""

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        """What came after the latest earlier place of the longest run that ends the text."""
        row = np.asarray(tokens)
        for size in range(min(self.longest, len(row) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(row, size)[:-1]
            (found,) = np.nonzero((windows == row[-size:]).all(1))
            if len(found):
                start = int(found[-1]) + size
                return [int(token) for token in row[start : start + min(self.count, most)]]
        return []

    def end(self) -> None:
        """Nothing is kept of a text."""


class DraftModel:
    """What a smaller model of the same vocabulary would say: greedily, in a row of its own session."""

    def __init__(self, session: Session, *, count: int = 4) -> None:
        """`count` tokens are guessed at a time.

        Raises UsageError for a session without a free row, or a model whose rows cannot take tokens back.
        """
        if count < 1:
            raise UsageError("a draft guesses 1 token or more", received=repr(count))
        if session.derived.carries:
            raise UsageError(f"{session.derived.graph.name} carries sums over its tokens, which cannot be taken back")
        self.session, self.count = session, count
        self._row: int | None = None

    def begin(self) -> None:
        """Take a row."""
        if not self.session.free:
            raise no_free_row()
        self._row = self.session.open()

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        """The tokens that the draft model chooses; fewer where its own row is full."""
        row, session = self._row, self.session
        if row is None:
            raise UsageError("a draft guesses within a text", hint="begin()")
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
        """Give the row back."""
        if self._row is not None:
            self.session.close(self._row)
            self._row = None


@dataclass
class SpeculationTally:
    """What guessing came to.

    calls     of the model, after a text's prompt
    guessed   tokens that were guessed
    accepted  those of them that were right, in texts that went on
    made      tokens of all texts
    margin    the least difference between the best two scores of which the better was chosen; infinite where none was
              chosen so
    """

    calls: int = 0
    guessed: int = 0
    accepted: int = 0
    made: int = 0
    margin: float = float("inf")

    @property
    def accepted_length(self) -> float:
        """Guessed tokens that were right, a call."""
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
    likely: int = 0,
    inputs: Sequence[dict[str, Any]] | None = None,
    tally: SpeculationTally | None = None,
) -> Iterator[Token]:
    """The tokens that `generate` gives of the same arguments, prompt by prompt, with fewer calls of the model.

    guess  what guesses the tokens that follow
    tally  counts what it came to

    Raises UsageError at once as `generate` does, and for a model whose rows cannot take tokens back.
    """
    if session.derived.carries:
        raise UsageError(
            f"{session.derived.graph.name} carries sums over its tokens, which cannot be taken back",
            hint="generate, without guesses",
        )
    choosing = Choosing(count_of(most), sampling or Sampling(), rules, frozenset(stop), until, likely)
    rows, given = checked_prompts(session, prompts, inputs)
    if rows and not session.free:
        raise no_free_row()
    return _speculated(session, rows, choosing, given, guess, tally or SpeculationTally())


def _speculated(
    session: Session,
    prompts: list[list[int]],
    choosing: Choosing,
    inputs: Sequence[dict[str, Any]],
    guess: Guess,
    tally: SpeculationTally,
) -> Iterator[Token]:
    for number, prompt in enumerate(prompts if choosing.most else []):
        row = session.resume(prompt, **inputs[number])
        try:
            guess.begin()
            yield from _continued(session, row, number, prompt, choosing, guess, tally)
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
) -> Iterator[Token]:
    made: list[int] = []
    guessed: list[int] = []
    # Logits [n, vocab]: after what the row holds, and after each guess.
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
                return
            if right == len(guessed) or chosen != guessed[right]:
                break
            right += 1
        if guessed:  # the row then holds all tokens but the last, as it does after a step
            session.accept(row, [*head, *guessed[:right]])
        tally.accepted += right
        tally.calls += 1
        room = min(session.capacity - session.length(row) - 1, session.chunk - 1, choosing.most - len(made) - 1)
        guessed = guess.follow([*prompt, *made], room)[:room] if room > 0 else []
        tally.guessed += len(guessed)
        new = made[-1]
        found = session.verify(row, [new, *guessed]) if guessed else session.step({row: new})[row][None]


def _margin(logits: Array, chosen: int) -> float:
    """How far the best score lies above the second, where the best was chosen."""
    second, best = np.partition(logits.astype(np.float64), -2)[-2:]
    return float(best - second) if logits[chosen] == best else float("inf")
