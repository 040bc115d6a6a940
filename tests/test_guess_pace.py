"""Lengths of guesses by given costs and acceptance, and texts that do not depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

import treadle as t
from treadle.compiled import Compiled
from treadle.runtime import speculation
from treadle.runtime.generation import generate
from treadle.runtime.guess_pace import GuessPace
from treadle.runtime.session import Session
from treadle.runtime.speculation import PromptLookup, SpeculationTally, speculate


def paced(slope: float, rights: Sequence[tuple[int, int]], **more: bool) -> GuessPace:
    """Return a pace after calls whose cost grows by this part of a call for each token, and judged guesses."""
    made = GuessPace(**more)
    for tokens in (1, 9, 1, 9):
        made.measured(tokens, 0.004 * (1 + slope * (tokens - 1)))
    for right, guessed in rights:
        made.judged(right=right, guessed=guessed)
    return made


def test_lengths_follow_from_acceptance_and_cost() -> None:
    good, bad, half = [(8, 8)] * 5, [(0, 8)] * 20, [(1, 2)] * 30
    assert paced(0.25, good).length(8) == 8
    assert paced(0.25, good).length(3) == 3
    assert paced(0.25, bad).length(8) == 0
    assert paced(1.1, good).length(8) == 0, "a call of n tokens takes longer than n calls"
    assert 0 < paced(0.2, half).length(8) < 4
    assert paced(0.02, half).length(8) > paced(0.2, half).length(8)
    assert GuessPace().length(8) == 0, "nothing is known"


def test_costs_are_of_the_fastest_recent_calls_without_the_first() -> None:
    made = GuessPace()
    assert [made.cost(n) for n in (1, 5)] == [1, 2]
    for seconds in (9.0, 4.0, 5.0):
        made.measured(1, seconds)
    made.measured(5, 90.0)
    assert made.cost(5) == 2, "the first call of a length does not count"
    made.measured(5, 12.0)
    assert [made.cost(n) for n in (1, 5, 3, 9)] == [1, 3, 2, 5]
    for _ in range(4):
        made.measured(5, 16.0)
    assert made.cost(5) == 4


def test_acceptance_follows_the_latest_guesses() -> None:
    made = paced(0.25, [(8, 8)] * 10)
    high = made.acceptance
    for _ in range(12):
        made.judged(right=0, guessed=1)
    assert high > 0.95 > 0.6 > made.acceptance
    assert made.length(8) < 8


def test_a_source_that_is_not_cheap_is_tried_now_and_then() -> None:
    made = paced(0.25, [(0, 8)] * 20, tries=True)
    lengths = [made.length(8) for _ in range(40)]
    assert set(lengths) == {0, 1}
    assert 2 <= sum(lengths) <= 3
    assert lengths[0] == 1


@pytest.fixture(scope="module")
def model() -> Compiled:
    return t.compile("gpt2", seed=3, vocab=30, dim=32, heads=4, layers=2, context=64)


class Clock:
    """A clock on which a step takes 1, and a call of n tokens 1 + slope * (n - 1)."""

    def __init__(self, session: Session, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        verify, step = session.verify, session.step

        def timed_verify(row: int, tokens: Sequence[int]) -> object:
            self.now += 1 + slope * (len(tokens) - 1)
            return verify(row, tokens)

        def timed_step(tokens: dict[int, int]) -> object:
            self.now += 1
            return step(tokens)

        session.verify, session.step = timed_verify, timed_step  # type: ignore[method-assign, assignment]
        monkeypatch.setattr(speculation, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.mark.parametrize("slope", [0.05, 0.4, 3.0])
def test_texts_do_not_depend_on_the_pace(model: Compiled, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of several tokens are cheap, or so dear that nothing is guessed."""
    session = model.session(rows=1)
    clock = Clock(session, slope, monkeypatch)
    draw = np.random.default_rng(0)
    prompts = [[int(i) for i in draw.integers(0, 30, 9)] * 3 for _ in range(3)]
    wanted = [token.id for token in generate(model.session(rows=1), prompts, most=30)]
    tally, pace = SpeculationTally(), GuessPace()
    guess = PromptLookup(count=16)
    assert [token.id for token in speculate(session, prompts, most=30, guess=guess, tally=tally, pace=pace)] == wanted
    if slope == 3.0:
        assert tally.guessed < 8
        assert clock.now <= 1.15 * tally.made
    if slope == 0.05:
        assert tally.accepted > 10
        assert clock.now < 0.9 * tally.made


class _Always:
    """A guess that is always wrong, and not cheap."""

    is_cheap: ClassVar[bool] = False

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def begin(self) -> None:
        pass

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        self.lengths.append(most)
        return [0] * most

    def end(self) -> None:
        pass


def test_a_draft_that_is_wrong_is_seldom_called(model: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    guess, session = _Always(), model.session(rows=1)
    Clock(session, 0.3, monkeypatch)
    pace = GuessPace(tries=True)
    found = [token.id for token in speculate(session, [[3, 4, 5]], most=50, guess=guess, pace=pace)]
    assert found == [k.id for k in generate(model.session(rows=1), [[3, 4, 5]], most=50)]
    assert 0 not in found, "the guess is wrong"
    assert 2 <= len(guess.lengths) <= 6
