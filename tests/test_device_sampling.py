"""Sampling on the device: an op of the graph, sessions that return tokens, and `treadle generate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.support.standin_device import standin
from treadle.backends.registry import find_backend
from treadle.compiled import Compiled
from treadle.ir.builder import Builder
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.stepping.sampled import OPTIONS
from treadle.runtime.device_sampling import TokenDraw, sampling_inputs
from treadle.runtime.generation import generate
from treadle.runtime.sampling import Sampling
from treadle.runtime.token_rules import TokenRules

SMALL = {"vocab": 90, "dim": 32, "heads": 4, "layers": 2, "context": 64}
VOCABULARY = 300


def sampler() -> Graph:
    graph = Graph("sampler")
    b = Builder(graph)
    x = b.input("x", f"f32[B, {VOCABULARY}]")
    b.outputs(y=b.sample_token(x, *(b.input(name, f"{dtype}[B]") for name, dtype in OPTIONS.items())))
    return graph


def drawn(rows: int) -> tuple[Any, list[TokenDraw]]:
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((rows, VOCABULARY)) * 3).astype(np.float32)
    logits[:, 7] = -np.inf  # as a rule excludes a token
    logits[::3, 11] = logits[::3].max(1)  # two most likely tokens
    options = [
        Sampling(*(float(rng.choice([0, 0.5, 1.5])), int(rng.choice([0, 1, 40])), float(rng.choice([1, 0.8]))), 9)
        for _ in range(rows)
    ]
    options = [
        Sampling(each.temperature, each.top_k, each.top_p, each.seed, 0.02 * (n % 3)) for n, each in enumerate(options)
    ]
    return logits, [TokenDraw(each, row, step=4) for row, each in enumerate(options)]


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm", "standin"])
def test_the_op_chooses_the_token_that_the_host_chooses(backend: str) -> None:
    logits, draws = drawn(200)
    inputs = sampling_inputs("random", draws)
    if backend == "standin":
        with standin() as counts:
            executable = find_backend("torch").compile(sampler(), Target("cuda"), {})
            counts.clear()
            found = executable(x=logits, **inputs)["y"]
            assert counts.waits == 1 and counts.copies_in == 1
    else:
        found = find_backend(backend).compile(sampler(), Target("cpu"), {})(x=logits, **inputs)["y"]
    expected = [d.sampling.choose(x, row=d.row, step=d.step) for d, x in zip(draws, logits, strict=True)]
    assert found.tolist() == expected
    assert len(set(expected)) > 50


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_logits_that_are_not_finite_have_no_token(backend: str) -> None:
    logits, draws = drawn(4)
    logits[0, 3], logits[1], logits[2, 5] = np.nan, -np.inf, np.inf
    executable = find_backend(backend).compile(sampler(), Target("cpu"), {})
    found = executable(x=logits, **sampling_inputs("random", draws))["y"]
    assert found[:3].tolist() == [-1, -1, -1] and found[3] >= 0


@pytest.fixture(scope="module")
def exe() -> Compiled:
    return t.compile("gpt2", backend="torch", seed=3, **SMALL)


PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10], [1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("how", "sampling"),
    [
        ("greedy", Sampling()),
        ("random", Sampling()),
        ("random", Sampling(1.0, 20, 0.9, seed=4)),
        ("random", Sampling(0.7, seed=1, min_p=0.05)),
    ],
    ids=str,
)
def test_generated_tokens_are_the_hosts(exe: Compiled, how: str, sampling: Sampling) -> None:
    """The prompts are more than the rows, and two are equal: they have different draws."""
    host = generate(exe.session(rows=3, capacity=30), PROMPTS, most=8, sampling=sampling)
    device = list(generate(exe.session(rows=3, capacity=30, device_sampling=how), PROMPTS, most=8, sampling=sampling))
    assert [(x.row, x.id, x.ending) for x in device] == [(x.row, x.id, x.ending) for x in host]
    assert all(token.logprob is None for token in device)


@pytest.mark.parametrize("backend", ["numpy", "tvm"])
def test_other_backends_choose_the_same_tokens(exe: Compiled, backend: str) -> None:
    other, sampling = t.compile("gpt2", backend=backend, seed=3, **SMALL), Sampling(1.0, 20, 0.9, seed=4)
    found = generate(other.session(rows=3, capacity=30, device_sampling="random"), PROMPTS, most=4, sampling=sampling)
    expected = generate(exe.session(rows=3, capacity=30), PROMPTS, most=4, sampling=sampling)
    assert [(x.row, x.id) for x in found] == [(x.row, x.id) for x in expected]


def test_only_tokens_are_copied_from_the_device() -> None:
    with standin() as counts:
        exe = t.compile("gpt2", backend="torch", target="cuda", seed=3, **SMALL)
        session = exe.session(rows=4, capacity=30, device_sampling="random")
        rows = [session.open() for _ in range(3)]
        draws = {row: TokenDraw(Sampling(0.8, seed=2), row) for row in rows}
        chosen = session.sample({row: [1, 2, row] for row in rows}, draws)
        counts.clear()
        session.sample({row: [token] for row, token in chosen.items()}, draws)
        assert (counts.waits, counts.copies_in) == (1, 1)
        assert counts.lines("copy out") == {"host": 2}
        assert counts.nbytes_out == 4 * len(rows) + 3 * 24  # the tokens, and three checks of indices


def test_sessions_that_choose_tokens_refuse_what_needs_logits(exe: Compiled) -> None:
    session = exe.session(rows=1, capacity=30, device_sampling="greedy")
    row = session.open()
    with pytest.raises(UsageError, match="prefill returns logits"):
        session.prefill({row: [1, 2]})
    with pytest.raises(UsageError, match="step returns logits"):
        session.step({row: 1})
    with pytest.raises(UsageError, match="takes the most likely token"):
        session.sample({row: [1, 2]}, {row: TokenDraw(Sampling(0.5))})
    with pytest.raises(UsageError, match="likely need logits"):
        generate(session, [[1]], most=2, likely=3)
    with pytest.raises(UsageError, match="rules need logits"):
        generate(session, [[1]], most=2, rules=TokenRules(banned=(3,)))
    with pytest.raises(UsageError, match="this session returns logits"):
        exe.session(rows=1, capacity=30).sample({0: [1]})
    with pytest.raises(UsageError, match="unknown sampling 'both'"):
        exe.session(rows=1, capacity=30, device_sampling="both")
    assert session.length(row) == 0
    assert session.verify(row, [1, 2]).shape == (2, 90)


def test_a_session_that_chooses_tokens_names_logits_that_are_not_finite(exe: Compiled) -> None:
    weights = {name: np.full_like(x, np.nan) if name == "ln_f.weight" else x for name, x in exe.weights.items()}
    broken = t.compile("gpt2", backend="numpy", weights=weights, **SMALL)
    session = broken.session(rows=1, capacity=30, device_sampling="greedy")
    with pytest.raises(UsageError, match="the logits are not finite"):
        session.sample({session.open(): [1, 2]})
