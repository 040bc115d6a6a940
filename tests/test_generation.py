"""Sampling, and generation with the decoding steps of a model."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as t
from treadle.compiled import Compiled
from treadle.ir.errors import UsageError
from treadle.runtime.generation import generate
from treadle.runtime.sampling import Sampling

SMALL = {"vocab": 50, "dim": 32, "heads": 4, "layers": 2, "context": 16}


@pytest.fixture(scope="module")
def model() -> Compiled:
    return t.compile("gpt2", seed=3, **SMALL)


def continued(model: Compiled, prompts: list[list[int]], **options: object) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for token in generate(model.session(), prompts, **options):  # type: ignore[arg-type]
        rows[token.row].append(token.id)
    return rows


def test_greedy_is_the_argmax_of_the_whole_prefix_each_time(model: Compiled) -> None:
    (row,) = continued(model, [[1, 2, 3]], most=5)
    prefix = [1, 2, 3]
    for token in row:
        logits = model(tokens=np.array([prefix]))["logits"]
        assert token == int(logits[0, -1].argmax())
        prefix.append(token)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=7)])
def test_a_row_does_not_depend_on_its_neighbours(model: Compiled, sampling: Sampling) -> None:
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8]]
    together = continued(model, prompts, most=6, sampling=sampling)
    (first,) = continued(model, prompts[:1], most=6, sampling=sampling)
    assert together[0] == first
    assert together == continued(model, prompts, most=6, sampling=sampling)


def test_a_row_ends_at_a_stop_token_and_at_the_context(model: Compiled) -> None:
    (free,) = continued(model, [[1, 2, 3]], most=5)
    tokens = list(generate(model.session(), [[1, 2, 3]], most=5, stop=[free[1]]))
    assert [k.id for k in tokens] == free[: free.index(free[1]) + 1]
    assert tokens[-1].last
    tokens = list(generate(model.session(), [list(range(14))], most=10))
    assert len(tokens) == 3, "a context of 16 has room for two more tokens, whose logits give a third"
    assert tokens[-1].last


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    sampling = Sampling(temperature=1.0, seed=11)
    draws = np.bincount([sampling.choose(logits, step=i) for i in range(20_000)], minlength=4) / 20_000
    # 20,000 draws: four standard deviations of a binomial share are at most 0.0142.
    np.testing.assert_allclose(draws, [0.5, 0.25, 0.15, 0.1], atol=0.0142)


@pytest.mark.parametrize(
    ("sampling", "ids", "probabilities"),
    [
        (Sampling(temperature=1.0, top_k=2), [1, 0], [2 / 3, 1 / 3]),
        (Sampling(temperature=1.0, top_p=0.5), [1], [1.0]),
        (Sampling(temperature=1.0, top_p=0.51), [1, 0], [2 / 3, 1 / 3]),
        (Sampling(temperature=0.5), [1, 0, 2, 3], [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
    ],
)
def test_what_may_be_drawn(sampling: Sampling, ids: list[int], probabilities: list[float]) -> None:
    order, found = sampling.distribution(np.log(np.array([0.25, 0.5, 0.15, 0.1])))
    assert list(order) == ids
    np.testing.assert_allclose(found, probabilities, rtol=1e-12)


def test_ties_go_to_the_lower_id() -> None:
    assert Sampling().choose(np.array([1.0, 3.0, 3.0])) == 1


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_sampling_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)  # type: ignore[arg-type]


def test_rows_are_given_back_where_generation_ends_early(model: Compiled) -> None:
    session = model.session(rows=2)
    with pytest.raises(UsageError, match="token 99 is not in the vocabulary"):
        list(generate(session, [[1], [99]], most=2))
    assert session.free == 2
    tokens = generate(session, [[1], [2], [3]], most=5)
    next(tokens)
    assert session.free == 0
    tokens.close()  # type: ignore[attr-defined]
    assert session.free == 2


def test_prompts_that_wait_for_rows_that_others_took_say_so(model: Compiled) -> None:
    session = model.session(rows=1)
    tokens = generate(session, [[1], [2]], most=1)
    next(tokens)
    session.open()
    with pytest.raises(UsageError, match="no free row"):
        next(tokens)


def test_prompts_that_cannot_be_continued_are_refused_at_once(model: Compiled) -> None:
    session = model.session()
    with pytest.raises(UsageError, match="prompt 1 of 1 has no tokens"):
        generate(session, [[]], most=1)
    with pytest.raises(UsageError, match="17 tokens, the model takes 16"):
        generate(session, [[0] * 17], most=1)
    with pytest.raises(UsageError, match="17 tokens, a row of the session takes 12"):
        generate(model.session(capacity=12), [[0] * 17], most=1)
    for most in (-1, 2.5):
        with pytest.raises(UsageError, match="most must be a number of tokens"):
            generate(session, [[1]], most=most)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="inputs for 1 of 2 prompts"):
        generate(session, [[1], [2]], most=1, inputs=[{}])
    full = model.session(rows=1)
    full.open()
    with pytest.raises(UsageError, match="no free row"):
        generate(full, [[1]], most=1)
    with pytest.raises(UsageError, match="not finite"):
        Sampling().choose(np.array([np.nan, 1.0]))
