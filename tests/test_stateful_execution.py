"""Graphs with states on every backend, compared with the interpreter over sequences of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.stateful_graphs import OLD, SUMS, blocks, counter, product
from treadle.backends.protocol import StatefulExecutable
from treadle.backends.registry import find_backend
from treadle.backends.states import StateKinds, States
from treadle.ir.analysis.state_views import deadlines
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret_entry
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

Array = np.ndarray[Any, Any]
BACKENDS = ("numpy", "torch", "tvm")
each_backend = pytest.mark.parametrize("backend", BACKENDS)

SIZES = {"R": 3, "C": 9}
# Tolerance for sums of up to ten products in float32, in any order; 16-bit states round the appended values once more.
NEAR = {"f32": 1e-5, "f16": 4e-3, "bf16": 4e-2}


def weights_of(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(5)
    return {n: rng.standard_normal(v.type.evaluate({}), np.float32) for n, v in graph.parameters.items()}


def compiled(graph: Graph, backend: str) -> Any:
    found = find_backend(backend)
    if (reason := found.available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    return found.compile(graph, Target("cpu"), weights_of(graph))


def sizes_for(graph: Graph) -> dict[str, int]:
    symbols = {s for v in graph.states.values() for s in v.type.symbols}
    return {name: size for name, size in SIZES.items() if name in symbols}


class Pair:
    """A graph on a backend and in the interpreter; both run the same calls."""

    def __init__(self, graph: Graph, backend: str, near: float = NEAR["f32"]) -> None:
        self.graph, self.near = graph, near
        self.exe = compiled(graph, backend)
        self.states: States = self.exe.new_states(**sizes_for(graph))
        self.weights = weights_of(graph)
        self.meant: dict[str, Array] = {
            n: np.zeros(v.type.evaluate(SIZES), v.type.dtype.numpy or np.float32) for n, v in graph.states.items()
        }

    def call(self, entry: str, **inputs: Any) -> Mapping[str, Any]:
        """Return the backend's outputs, after a check that outputs and states agree with the interpreter's."""
        held = {name: address_of(array) for name, array in self.states.items()}
        made = self.exe.entry(entry)(self.states, **inputs)
        outputs, self.meant = interpret_entry(self.graph, entry, inputs, self.weights, self.meant)
        for name, wanted in outputs.items():
            self.agree(made[name], wanted, name)
        for name, wanted in self.meant.items():
            self.agree(as_numbers(self.states[name]), wanted, name)
        assert held == {name: address_of(array) for name, array in self.states.items()}, "states stay where they are"
        return made

    def agree(self, made: Any, wanted: Array, name: str) -> None:
        scale = max(1.0, float(np.max(np.abs(wanted), initial=0.0)))
        np.testing.assert_allclose(np.asarray(made, wanted.dtype), wanted, rtol=0, atol=self.near * scale, err_msg=name)


def address_of(array: Any) -> int:
    return int(array.data_ptr() if hasattr(array, "data_ptr") else array.__array_interface__["data"][0])


def as_numbers(array: Any) -> Array:
    """Return a state's array as a NumPy array; bf16 as float32."""
    if hasattr(array, "detach"):
        return np.asarray(array.float() if str(array.dtype) == "torch.bfloat16" else array)
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else np.asarray(array)


def drawn_calls(lengths: tuple[int, ...], width: int, seed: int = 0) -> Iterator[dict[str, Array]]:
    """Draw calls of two of three rows in turn. Each row continues at its own position."""
    rng = np.random.default_rng(seed)
    past = np.zeros(3, np.int64)
    for length in lengths:
        rows = rng.permutation(3)[:2]
        x = rng.standard_normal((2, length, width), np.float32)
        yield {"x": x, "rows": rows, "start": past[rows]}
        past[rows] += length


# -- results -----------------------------------------------------------------------------------------------------


@each_backend
def test_a_counter_counts_in_its_slots(backend: str) -> None:
    pair = Pair(counter(), backend)
    for given in ([0, 2], [2], [1, 2], [2, 0, 1]):
        pair.call("main", rows=np.array(given))
    np.testing.assert_array_equal(as_numbers(pair.states["count"])[:, 0], [2, 2, 4])


@each_backend
def test_a_scan_goes_on(backend: str) -> None:
    """Chunks of any length return the same sums as the whole sequence."""
    pair = Pair(parse_graph(SUMS), backend)
    rng = np.random.default_rng(3)
    whole = rng.standard_normal((2, 7, 4), np.float32)
    parts = [pair.call("main", x=x, rows=np.array([2, 0]))["y"] for x in np.split(whole, [1, 4, 5], axis=1)]
    np.testing.assert_allclose(np.concatenate([np.asarray(p) for p in parts], 1), np.cumsum(whole, 1), atol=1e-5)


@each_backend
def test_blocks_write_into_the_states_of_their_scopes(backend: str) -> None:
    pair = Pair(blocks(), backend)
    for entry, lengths in (("prefill", (2, 3)), ("step", (1, 1)), ("prefill", (1, 2))):
        for given in drawn_calls(lengths, 4, seed=len(lengths)):
            pair.call(entry, **given)
    assert np.any(as_numbers(pair.states["h.1.mem.k"])) and np.any(as_numbers(pair.states["seen"]))


@each_backend
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("ring", [False, True])
def test_products_over_a_cache(backend: str, dtype: str, ring: bool) -> None:
    if (backend, dtype) == ("numpy", "bf16"):
        with pytest.raises(BackendError, match="NumPy has no bf16"):
            compiled(product(dtype), backend)
        return
    pair = Pair(product(dtype, ring=ring), backend, NEAR[dtype])
    for given in drawn_calls((2, 1, 3, 1, 1) if not ring else (4, 5, 1, 6, 2, 9), 6):
        pair.call("main", **given)


@each_backend
def test_values_read_before_an_update_stay(backend: str) -> None:
    pair = Pair(parse_graph(OLD), backend)
    rng = np.random.default_rng(1)
    given = []
    for at in range(3):
        x = rng.standard_normal((2, 1, 4), np.float32)
        outputs = pair.call("main", x=x, rows=np.array([at % 3, (at + 1) % 3]), start=np.array([at, 0]))
        given.append((outputs["v"], np.array(outputs["v"])))
    for output, then in given:  # a view of a state is returned as a copy
        np.testing.assert_array_equal(output, then)


@each_backend
def test_an_optimized_graph_agrees(backend: str) -> None:
    """The portable passes and a backend's own passes preserve the results, entry by entry."""
    pair = Pair(blocks(), backend)
    pair.exe = compiled(PassManager(DEFAULT).run(pair.graph).graph, backend)
    pair.states = pair.exe.new_states(**SIZES)
    for given in drawn_calls((1, 1, 1), 4):
        pair.call("step", **given)


@each_backend
def test_entries_share_what_is_made_of_weights(backend: str) -> None:
    text = """graph g {
  symbols B, S
  parameters {
    w: f32[40, 32]
  }
  prefill(x: f32[B, S, 32]) -> (y: f32[B, S, 40]) {
    twice = add($w, $w)       # f32[40, 32]
    y = linear(x, twice)      # f32[B, S, 40]
    return y = y
  }
  step(x: f32[B, 1, 32]) -> (y: f32[B, 1, 40]) {
    twice = add($w, $w)       # f32[40, 32]
    y = linear(x, twice)      # f32[B, 1, 40]
    return y = y
  }
}
"""
    pair = Pair(parse_graph(text), backend)
    rng = np.random.default_rng(2)
    for entry, length in (("prefill", 5), ("step", 1)):
        pair.call(entry, x=rng.standard_normal((2, length, 32), np.float32))
        x = rng.standard_normal((1, 1, 32), np.float32)
        np.testing.assert_array_equal(pair.exe.entry(entry)(x=x)["y"].shape, (1, 1, 40))  # this entry needs no states
    if backend == "tvm":
        assert len(pair.exe.machine.weights) == 1


# -- memory ------------------------------------------------------------------------------------------------------


def test_longer_texts_mean_no_new_plans() -> None:
    pair = Pair(product(), "tvm")
    for given in drawn_calls((1,) * 6, 6):
        pair.call("main", **given)
    assert len(pair.exe.machine.plans) == 1


@each_backend
def test_two_states_of_one_executable_are_apart(backend: str) -> None:
    exe = compiled(product(), backend)
    first, second = exe.new_states(**SIZES), exe.new_states(R=1, C=20)
    (given,) = drawn_calls((1,), 6)
    exe.entry("main")(first, **given)
    assert np.any(as_numbers(first["k"])) and not np.any(as_numbers(second["k"]))
    assert exe.entry("main")(second, x=given["x"][:1], rows=[0], start=[19])["y"].shape == (1, 2, 1, 20)
    assert (
        (first.nbytes, second.nbytes)
        == (3 * 2 * 9 * 3 * 4, 2 * 20 * 3 * 4)
        == (
            exe.state_bytes(**SIZES),
            exe.state_bytes(R=1, C=20),
        )
    )
    assert repr(second) == "<1 states of product, R=1, C=20: 480 bytes>"


def test_pending_updates_are_known() -> None:
    """`twice` and `linear` may be computed until the update, even if their results are read after it."""
    graph = parse_graph(OLD)
    found = {node.results[0].name: at for node, at in deadlines(graph.main).items()}
    assert found == {"twice": 2, "linear": 2}
    assert {n.results[0].name for n in deadlines(graph.functions["grown"])} == {"y"}
    assert (
        deadlines(parse_graph("graph g {\n  main(x: f32[2]) -> (x: f32[2]) {\n    return x = x\n  }\n}\n").main) == {}
    )


# -- refusals ----------------------------------------------------------------------------------------------------

X = np.zeros((2, 1, 6), np.float32)
ROWS, START = np.array([0, 1]), np.array([0, 0])
REFUSED: dict[str, tuple[Callable[[Any, States], object], str]] = {
    "no entry's name": (lambda e, s: e(x=X, rows=ROWS, start=START), "product is called by its entries"),
    "an unknown entry": (lambda e, s: e.entry("step"), "product has no entry 'step'"),
    "no states": (
        lambda e, s: e.entry("main")(x=X, rows=ROWS, start=START),
        "has states, which must be the first argument of a call",
    ),
    "something else": (
        lambda e, s: e.entry("main")({"k": X}, x=X, rows=ROWS, start=START),
        "has states, which must be the first argument",
    ),
    "no size": (lambda e, s: e.new_states(R=3), "the states of product need a size for C"),
    "another size": (lambda e, s: e.state_bytes(R=3, C=2, S=1), "the states of product have no symbol S"),
    "a size of nothing": (lambda e, s: e.new_states(R=3, C=0), "C must be a size of at least 1, is 0"),
    "no whole number": (lambda e, s: e.new_states(R=3.0, C=9), "R must be a size of at least 1, is 3.0"),
    "no memory": (lambda e, s: e.new_states(R=2**30, C=2**30), "there is not enough memory for its states"),
    "more than there is room for": (
        lambda e, s: e.entry("main")(s, x=np.zeros((2, 10, 6), np.float32), rows=ROWS, start=START),
        "state holds C positions, x has S, where C = 9, S = 10",
    ),
    "a full slot": (
        lambda e, s: e.entry("main")(s, x=X, rows=ROWS, start=np.array([0, 9])),
        "append: row 1 has no room: it starts at 9, the capacity is 9",
    ),
    "a negative start": (
        lambda e, s: e.entry("main")(s, x=X, rows=ROWS, start=np.array([-1, 0])),
        "append: row 0 has no room: it starts at -1, the capacity is 9",
    ),
    "no slot": (
        lambda e, s: e.entry("main")(s, x=X, rows=np.array([0, 3]), start=START),
        "append: index 3 is outside an axis of size 3",
    ),
}


def test_state_memory_is_reported_in_numbers() -> None:
    exe: Any = compiled(product(), "numpy")
    sizes = {"R": 2**20, "C": 2**20}
    with pytest.raises(BackendError, match="not enough memory for its states") as caught:
        exe.state_kinds.new(sizes, lambda *_: np.zeros(2**60))
    report = f"{exe.state_bytes(**sizes) / 2**30:.3g} GiB, where R = 1048576, C = 1048576"
    assert caught.value.received == report
    many = Graph("many")
    b = Builder(many)
    b.outputs(**{f"y{n}": b.exp(b.state(f"a_state_{n}", "f32[2]")) for n in range(50)})
    kinds, other = StateKinds(many, "numpy"), States(exe.state_kinds, {"R": 1, "C": 1}, {})
    for given in (None, other):
        with pytest.raises(BackendError) as caught:
            kinds.check(given)
        assert caught.value.within == ", ".join(f"a_state_{n}: f32[2]" for n in range(50))[:400]


@each_backend
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, backend: str) -> None:
    exe = compiled(product(), backend)
    ask, what = REFUSED[name]
    with pytest.raises(BackendError, match=what) as caught:
        ask(exe, exe.new_states(**SIZES))
    assert str(caught.value)


@each_backend
def test_a_row_without_room_loses_nothing_of_others(backend: str) -> None:
    pair = Pair(product(), backend)
    (given,) = drawn_calls((2,), 6)
    pair.call("main", **given)
    before = as_numbers(pair.states["k"]).copy()
    with pytest.raises(BackendError, match="row 1 has no room"):
        pair.exe.entry("main")(pair.states, x=X, rows=np.array([2, 1]), start=np.array([0, 9]))
    after = as_numbers(pair.states["k"])
    np.testing.assert_array_equal(after[:2], before[:2])
    np.testing.assert_array_equal(after[2, :, 1:], before[2, :, 1:])
    rows, start = np.array([1, 0]), np.array([2, 2])
    pair.meant = {"k": after.copy()}
    pair.call("main", x=X, rows=rows, start=start)


def test_states_of_other_types_and_backends_are_refused() -> None:
    exe, other = compiled(product(), "numpy"), compiled(product("f16"), "numpy")
    call = {"x": X, "rows": ROWS, "start": START}
    exe.entry("main")(compiled(product(ring=True), "numpy").new_states(**SIZES), **call)  # states of the same types
    with pytest.raises(BackendError, match="these are not states of product for the numpy backend"):
        exe.entry("main")(other.new_states(**SIZES), **call)
    with pytest.raises(BackendError, match="these are not states of product for the numpy backend"):
        exe.entry("main")(compiled(product(), "tvm").new_states(**SIZES), **call)


@each_backend
def test_a_backend_of_ours_offers_entries(backend: str) -> None:
    exe = compiled(blocks(), backend)
    assert isinstance(exe, StatefulExecutable)
    assert exe.entries == ("prefill", "step")
    step = exe.entry("step")
    assert [str(p) for p in step.inputs] == ["x: f32[B, 1, 4]", "rows: i64[B]", "start: i64[B]"]
    assert [p.name for p in step.outputs] == ["y", "seen"] == [p.name for p in exe.outputs]
    assert repr(step).startswith("<entry step(x: f32[B, 1, 4]")
    assert "append" in exe.source


def test_an_onnx_file_holds_no_states(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from treadle.backends.onnx.exporter import export_onnx

    with pytest.raises(BackendError, match="product has states, which an ONNX file cannot hold"):
        export_onnx(product(), weights_of(product()), tmp_path / "p.onnx")
    assert not (tmp_path / "p.onnx").exists()
