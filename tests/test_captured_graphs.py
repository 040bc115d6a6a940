"""CUDA graphs of the torch backend: the decision what is captured, and capture and replay on a recording device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.backend_checks import graph_of, message
from treadle.backends.registry import find_backend
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.runtime.session import bucket

torch = pytest.importorskip("torch", minversion="2.9")

from tests.support.recorded_graphs import RecordingDevice
from tests.support.standin_device import standin
from tests.test_standin_device import APPENDING, MODELS, STEPPED, inputs_of
from treadle.backends.torch import kernels

CUDA = Target("cuda")


@pytest.mark.parametrize("name", MODELS)
def test_a_replay_computes_what_the_program_does(name: str) -> None:
    here = t.compile(name, backend="torch", seed=1, **MODELS[name])
    with standin(device := RecordingDevice()):
        there = t.compile(name, backend="torch", target="cuda", seed=1, **MODELS[name])
        results = []
        for number in range(4):
            given = inputs_of(name, number)
            results.append((there(**given), here(**given)))
        assert (device.captures, device.replays) == (1, 3)
    for made, wanted in results:  # a result is not overwritten by the next replay
        for output, expected in wanted.items():
            np.testing.assert_allclose(made[output], expected, atol=1e-5)


def test_a_graph_belongs_to_one_set_of_sizes() -> None:
    here = t.compile("gpt2", backend="torch", seed=1, **MODELS["gpt2"])
    with standin(device := RecordingDevice()):
        there = t.compile("gpt2", backend="torch", target="cuda", seed=1, **MODELS["gpt2"])
        for length in (3, 5, 3, 5, 40, 3, 5, 3, 5):  # the arena grows in between
            tokens = np.arange(2 * length).reshape(2, length) % 100
            np.testing.assert_allclose(there(tokens=tokens)["logits"], here(tokens=tokens)["logits"], atol=1e-5)
        assert device.captures >= 2


def test_an_index_out_of_range_is_found_in_a_replay() -> None:
    with standin(device := RecordingDevice()):
        there = t.compile("gpt2", backend="torch", target="cuda", seed=1, **MODELS["gpt2"])
        given = inputs_of("gpt2")
        for _ in range(3):
            wanted = there(**given)["logits"]
        wrong = {"tokens": given["tokens"].copy()}
        wrong["tokens"][1, 3] = 100
        assert "index 100 is outside an axis of size 100" in message(lambda: there(**wrong))
        assert device.replays == 3
        np.testing.assert_array_equal(there(**given)["logits"], wanted)


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("how", [None, "random"])
def test_steps_of_sessions_are_replayed(name: str, how: str | None) -> None:
    """Over a boundary between two ranges of positions, with rows in any order, in two sessions."""
    with standin(device := RecordingDevice()):
        sizes = {**MODELS[name], "vocab": 100}
        here, there = (t.compile(name, backend="torch", target=at, seed=1, **sizes) for at in ("cpu", "cuda"))
        pairs = [tuple(exe.session(rows=3, capacity=200) for exe in (here, there)) for _ in range(2)]
        if how is not None:
            pairs = [(here.session(rows=3, capacity=200), there.session(rows=3, capacity=200, device_sampling=how))]
        rng = np.random.default_rng(0)
        for mine, other in pairs:
            text = rng.integers(0, 100, 120).tolist()
            for row in (mine.open(), mine.open()):
                assert other.open() == row
                mine.prefill({row: text[row:]})
                other.prefill({row: text[row:]}) if how is None else other.sample({row: text[row:]})
        for number in range(20):
            for mine, other in pairs:
                rows = [0, 1] if number % 3 else [1, 0] if number % 2 else [1]
                tokens = {row: int(rng.integers(100)) for row in rows}
                wanted = mine.step(tokens)
                if how is None:
                    made = other.step(tokens)
                    for row in rows:
                        np.testing.assert_allclose(made[row], wanted[row], atol=1e-5)
                else:
                    chosen = other.sample({row: [token] for row, token in tokens.items()})
                    assert chosen == {row: int(wanted[row].argmax()) for row in rows}
        assert device.replays > 10 * len(pairs)


@pytest.mark.parametrize("how", [None, "random"])
def test_numbers_of_rows_share_graphs(how: str | None) -> None:
    """Steps of 1 to 7 rows have 4 sizes: 1, 2, 4 and 8 rows."""
    with standin(device := RecordingDevice()):
        here, there = (
            t.compile("gpt2", backend="torch", target=at, seed=1, **MODELS["gpt2"]) for at in ("cpu", "cuda")
        )
        mine, other = here.session(rows=7, capacity=40), there.session(rows=7, capacity=40, device_sampling=how)
        rng = np.random.default_rng(0)
        for row in range(7):
            text = {row: rng.integers(0, 100, 3 + row).tolist()}
            assert mine.open() == other.open() == row
            mine.prefill(text)
            other.prefill(text) if how is None else other.sample(text)
        captured = device.captures
        for number in range(21):
            tokens = {int(row): int(rng.integers(100)) for row in rng.permutation(7)[: number % 7 + 1]}
            wanted = mine.step(tokens)
            if how is None:
                made = other.step(tokens)
                assert list(made) == list(tokens)
                for row, logits in wanted.items():
                    np.testing.assert_allclose(made[row], logits, atol=1e-5)
            else:
                chosen = other.sample({row: [token] for row, token in tokens.items()})
                assert chosen == {row: int(logits.argmax()) for row, logits in wanted.items()}
        assert device.captures - captured == 4
        assert (mine.free, other.free) == (0, 0)
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 17)] == [1, 2, 4, 4, 8, 8, 16, 24]


def test_values_that_the_host_knows_are_checked_before_a_replay() -> None:
    graph, x = parse_graph(APPENDING), np.ones((2, 2, 4), np.float32)
    with standin(device := RecordingDevice()):
        there: Any = find_backend("torch").compile(graph, CUDA, {})
        states = there.new_states(R=3, C=100)
        for start in range(4):
            there.entry("main")(states, x=x * start, rows=np.array([0, 2]), start=np.array([start, start + 1]))
        assert device.replays == 3
        before = {name: array.clone() for name, array in states.items()}
        for wrong in ({"rows": [0, 3]}, {"rows": [-1, 0]}, {"start": [4, 99]}, {"start": [-1, 4]}):
            given = {"x": x * 9, "rows": np.array([0, 2]), "start": np.array([5, 5])}
            given |= {name: np.array(values) for name, values in wrong.items()}
            text = message(lambda given=given: there.entry("main")(states, **given))
            assert "has no room" in text or "rows" in wrong
            torch.testing.assert_close(dict(states), before)
        there.entry("main")(states, x=x * 7, rows=np.array([0, 2]), start=np.array([97, 98]))
        assert states["mem"][0, 97:99].eq(7).all() and states["mem"][2, 98:].eq(7).all()
        assert device.replays == 4 and device.captures == 1


def test_a_read_back_prevents_the_capture_and_the_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = kernels.embedding

    def reading(indices: Any, table: Any, **options: Any) -> Any:
        assert int(indices.sum()) >= 0
        return embedding(indices, table, **options)

    monkeypatch.setattr(kernels, "embedding", reading)
    given = inputs_of("gpt2")
    with standin(device := RecordingDevice()):
        there: Any = t.compile("gpt2", backend="torch", target="cuda", seed=1, **MODELS["gpt2"])
        results = [there(**given)["logits"] for _ in range(3)]
        (entry,) = there.executable.called.values()
        assert device.captures == 0 and "aten.item" in entry._module.arrays.graphs.failure
    np.testing.assert_array_equal(results[0], results[2])


def test_a_donated_input_prevents_the_capture() -> None:
    exe = t.compile(graph_of(lambda b: b.exp(b.input("x", "f32[B, 4]"))), backend="torch", target="h100", donate=("x",))
    (line,) = exe.optimized.lowered.log[-1].notes
    assert line == "main: not captured as a CUDA graph: input x is donated, and has another address in each call"
