"""Speculation: the same text as generation without a draft model, in fewer calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle.backends.registry import find_backend
from treadle.compiled import Compiled
from treadle.ir.errors import UsageError
from treadle.runtime.generation import generate
from treadle.runtime.sampling import Sampling
from treadle.runtime.speculation import DraftModel, Guess, PromptLookup, SpeculationTally, speculate
from treadle.runtime.token_rules import TokenRules

SMALL = {"vocab": 30, "dim": 32, "heads": 4, "layers": 2, "context": 48}


@pytest.fixture(scope="module", params=["numpy", "torch", "tvm"])
def model(request: pytest.FixtureRequest) -> Compiled:
    if reason := find_backend(request.param).available():
        pytest.skip(f"backend {request.param}: {reason}")
    return t.compile("gpt2", seed=3, backend=request.param, **SMALL)


def drawn_prompts(count: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [[int(i) for i in draw.integers(0, 30, draw.integers(1, 20))] * 2 for _ in range(count)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.3, min_p=0.1, seed=4)])
@pytest.mark.parametrize("rules", [None, TokenRules(repetition_penalty=1.1, no_repeat_ngram=6)])
def test_it_is_the_text_without_guesses(model: Compiled, sampling: Sampling, rules: TokenRules | None) -> None:
    options: dict[str, Any] = {"most": 30, "sampling": sampling, "rules": rules, "stop": [7], "likely": 2}
    prompts, tally = drawn_prompts(4), SpeculationTally()
    wanted: list[list[Any]] = [[] for _ in prompts]
    for token in generate(model.session(), prompts, **options):
        wanted[token.row].append(token)
    found: list[list[Any]] = [[] for _ in prompts]
    for token in speculate(model.session(rows=1), prompts, guess=PromptLookup(), tally=tally, **options):
        found[token.row].append(token)
    for ours, theirs in zip(found, wanted, strict=True):
        assert [(k.id, k.ending) for k in ours] == [(k.id, k.ending) for k in theirs]
        np.testing.assert_allclose([k.logprob for k in ours], [k.logprob for k in theirs], atol=1e-4)
    assert tally.made == sum(map(len, wanted))
    assert 0 < tally.accepted <= tally.guessed
    assert tally.calls < tally.made - len(prompts), "guesses saved calls"


def test_a_model_that_drafts_for_itself_is_always_right(model: Compiled) -> None:
    tally, session = SpeculationTally(), model.session(rows=1)
    draft = DraftModel(session, count=4)
    prompts = drawn_prompts(3)
    found = [k.id for k in speculate(model.session(rows=1), prompts, most=20, guess=draft, tally=tally)]
    wanted = [k.id for k in generate(model.session(rows=1), prompts, most=20)]
    assert found == wanted
    if tally.margin > 1e-4:
        assert tally.accepted == tally.guessed
        assert tally.unused == 0, "no text ended early"
    assert tally.accepted_length > 2
    assert session.free == 1


class Known(Guess):
    """Guesses that are right: the text is known."""

    is_cheap = True

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def follow(self, tokens: Sequence[int], most: int) -> list[int]:
        return self.text[len(tokens) :][: min(most, 4)]


@pytest.mark.parametrize("end", range(1, 9))  # at each position of a guess
def test_guesses_after_the_end_of_a_text_are_neither_right_nor_wrong(model: Compiled, end: int) -> None:
    prompt, sampling = [1, 2, 3], Sampling(temperature=3.0, seed=2)
    made = [k.id for k in generate(model.session(rows=1), [prompt], most=20, sampling=sampling)]
    last = made.index(made[end])
    tally = SpeculationTally()
    options: dict[str, Any] = {"most": 20, "sampling": sampling, "stop": [made[end]]}
    guess = Known([*prompt, *made])
    assert len([*speculate(model.session(rows=1), [prompt], guess=guess, tally=tally, **options)]) == last + 1
    assert tally.accepted + tally.unused == tally.guessed
    assert tally.unused == max(0, 3 - (last - 1) % 5), "a call yields 4 guesses and one more token"


def test_another_model_drafts(model: Compiled) -> None:
    other = t.compile("gpt2", seed=9, **{**SMALL, "layers": 1, "context": 20})
    prompts = drawn_prompts(4)
    found = [k.id for k in speculate(model.session(rows=1), prompts, most=12, guess=DraftModel(other.session(rows=1)))]
    assert found == [k.id for k in generate(model.session(rows=1), prompts, most=12)]


def test_a_full_context_ends_it_as_without_guesses() -> None:
    model = t.compile("gpt2", seed=3, **SMALL)
    prompts = [[1, 2, 3] * 15, [5, 5, 5, 5] * 11]
    for session in (model.session(rows=1), model.session(rows=1, capacity=46, full="slide")):
        wanted = [(k.id, k.ending) for k in generate(session, prompts, most=10)]
        assert wanted == [(k.id, k.ending) for k in speculate(session, prompts, most=10, guess=PromptLookup())]
        assert session.free == 1


def test_look_up_finds_the_latest_of_the_longest() -> None:
    guess = PromptLookup(longest=2, count=3)
    assert guess.follow([1, 2, 9, 1, 2, 8, 7, 6, 1, 2], 5) == [8, 7, 6]
    assert guess.follow([3, 2, 9, 1, 2], 5) == [9, 1, 2]
    assert guess.follow([1, 2, 3], 5) == []
    assert guess.follow([1, 1], 5) == [1]
    assert guess.follow([4], 5) == []
    assert guess.follow([1, 2, 9, 1, 2], 1) == [9]


def test_models_without_speculation() -> None:
    model = t.compile("gpt2", seed=3, **SMALL)
    with pytest.raises(UsageError, match="prompt 1 of 1 has no tokens"):
        speculate(model.session(rows=1), [[]], most=3, guess=PromptLookup())
    with pytest.raises(UsageError):
        PromptLookup(count=0)
    with pytest.raises(UsageError):
        DraftModel(model.session(rows=1), count=0)
    full = model.session(rows=1)
    full.open()
    with pytest.raises(UsageError, match="no free row"):
        speculate(full, [[1]], most=1, guess=PromptLookup())
