"""Donated inputs: a run may write over the inputs that its caller donates, and over no other input."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import treadle
from tests.backend_checks import assert_near, each_backend, graph_of, message, needs_torch, needs_tvm
from tests.test_reused_arguments import residual as block
from tests.test_reused_arguments import stacked
from treadle.backends.donation import meeting
from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend, build
from treadle.explaining.memory import explain_memory
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.passes.memory.storage_checking import check_storage

CPU = Target("cpu")
Array = np.ndarray[Any, Any]


def residual(b: Builder) -> dict[str, Expr]:
    """Build a graph in which a norm reads x first, and the addition at the end reads x again."""
    x, y = b.input("x", "f32[S, 8]"), b.input("y", "f32[S, 8]")
    return {"out": x + b.softmax(x * y)}


def donating(backend: str, graph: Graph, *names: str) -> Any:
    return build(find_backend(backend), graph, CPU, {}, donate=names)[0]


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@each_backend
def test_the_result_lies_where_the_donated_input_did(backend: str) -> None:
    graph = graph_of(residual)
    exe = donating(backend, graph, "x")
    for number in range(3):
        x, y = drawn(5, 8, seed=number), drawn(5, 8, seed=9)
        wanted, kept = interpret(graph, {"x": x, "y": y})["out"], y.copy()
        out = exe(x=x, y=y)["out"]
        assert_near(out, wanted)
        assert np.shares_memory(out, x) and np.array_equal(y, kept)


@each_backend
def test_nothing_is_written_over_unless_it_is_donated(backend: str) -> None:
    graph = graph_of(residual)
    x, y = drawn(5, 8), drawn(5, 8, seed=1)
    for exe in (find_backend(backend).compile(graph, CPU, {}), donating(backend, graph, "y")):
        kept = x.copy()
        out = exe(x=x, y=y.copy())["out"]
        assert np.array_equal(x, kept) and not np.shares_memory(out, x)


@each_backend
def test_values_with_later_readers_are_not_overwritten(backend: str) -> None:
    def later(b: Builder) -> dict[str, Expr]:
        x = b.input("x", "f32[S, 8]")
        first = x + 1.0
        return {"out": b.matmul(first, b.rearrange(x, pattern="s d -> d s")), "first": first}

    graph, x = graph_of(later), drawn(5, 8)
    wanted = interpret(graph, {"x": x})
    made = donating(backend, graph, "x")(x=x)
    for name, array in wanted.items():
        assert_near(made[name], array)


@needs_torch
def test_a_donated_tensor_comes_back() -> None:
    import torch

    exe = donating("torch", graph_of(residual), "x")
    x, y = torch.from_numpy(drawn(5, 8)), torch.from_numpy(drawn(5, 8, seed=1))
    wanted = x + torch.softmax(x * y, -1)
    out = exe(x=x, y=y)["out"]
    torch.testing.assert_close(out, wanted)
    assert out.data_ptr() == x.data_ptr()
    refused = message(lambda: exe(x=drawn(5, 8), y=y) and exe(x=torch.ones(5, 8).requires_grad_(), y=y))
    assert "it needs a gradient" in refused


def read_only() -> Array:
    array = drawn(5, 8)
    array.flags.writeable = False
    return array


SHARED = drawn(6, 8)
UNFIT: dict[str, tuple[Any, Any, str]] = {
    "read-only": (read_only(), drawn(5, 8), "it is read-only"),
    "turned": (drawn(8, 5).T, drawn(5, 8), "it is not contiguous"),
    "every second": (drawn(5, 16)[:, ::2], drawn(5, 8), "it is not contiguous"),
    "another dtype": (drawn(5, 8).astype(np.float16), drawn(5, 8), "it would be converted"),
    "a list": ([[0.0] * 8] * 5, drawn(5, 8), "it is not an array"),
    "the same array": (SHARED[:5], SHARED[:5], "it shares memory with input y"),
    "an overlap": (SHARED[:5], SHARED[1:], "it shares memory with input y"),
}


@each_backend
@pytest.mark.parametrize("kind", UNFIT)
def test_unwritable_targets_are_refused_before_writing(backend: str, kind: str) -> None:
    exe = donating(backend, graph_of(residual), "x")
    x, y, why = UNFIT[kind]
    before = np.array(x)
    said = message(lambda: exe(x=x, y=y))
    assert "input x is donated, and cannot be overwritten" in said and why in said
    assert np.array_equal(np.array(x), before)


@each_backend
def test_a_donated_weight_is_refused(backend: str) -> None:
    def scaled(b: Builder) -> Expr:
        return b.input("x", "f32[4, 8]") * b.parameter("w", "f32[4, 8]")

    w = drawn(4, 8)
    exe = build(find_backend(backend), graph_of(scaled), CPU, {"w": w}, donate=("x",))[0]
    assert "it shares memory with a weight" in message(lambda: exe(x=w))
    assert_near(exe(x=w.copy())["y"], w * w)


@example([(0, 9), (1, 1), (5, 1)])  # the last span touches the first, with another span in between
@given(st.lists(st.none() | st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=9))
def test_spans_that_meet_are_found_as_by_asking_each_pair(drawn: list[tuple[int, int] | None]) -> None:
    spans = [None if each is None else (each[0], each[0] + each[1]) for each in drawn]
    bytes_of = [set() if span is None else set(range(*span)) for span in spans]
    pairs = itertools.combinations(range(len(spans)), 2)
    assert meeting(spans) == {at for pair in pairs if bytes_of[pair[0]] & bytes_of[pair[1]] for at in pair}


@each_backend
def test_a_name_that_is_no_input_is_refused(backend: str) -> None:
    assert "donate= must be names of inputs" in message(lambda: donating(backend, graph_of(residual), "z"))
    assert "donate= must be names of inputs" in message(
        lambda: treadle.compile(graph_of(residual), backend=backend, donate="x")  # type: ignore[arg-type]
    )


@each_backend
def test_compile_takes_it_and_a_chain_runs_in_one_array(backend: str) -> None:
    graph = graph_of(residual)
    exe = treadle.compile(graph, backend=backend, donate=("x",))
    plain = treadle.compile(graph, backend=backend)
    x, y = drawn(5, 8), drawn(5, 8, seed=1)
    wanted, begin = x.copy(), x.__array_interface__["data"][0]
    for _ in range(4):
        wanted = plain(x=wanted, y=y)["out"]
        x = exe(x=x, y=y)["out"]
    assert np.array_equal(x, wanted)
    assert x.__array_interface__["data"][0] == begin
    assert "x donated" in str(exe.optimized.lowered.plan)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("numpy", "array"),
        pytest.param("torch", "array", marks=needs_torch),
        pytest.param("torch", "tensor", marks=needs_torch),
        pytest.param("tvm", "array", marks=needs_tvm),
        pytest.param("tvm", "tensor", marks=[needs_tvm, needs_torch]),
    ],
)
def test_a_loop_of_calls_keeps_no_views_of_earlier_calls(backend: str, kind: str) -> None:
    """The call returns the caller's own array. A view of that array would refer to the view of the preceding call, and
    so on.
    """
    exe = treadle.compile(graph_of(residual), backend=backend, donate=("x",))
    x, y = drawn(5, 8), drawn(5, 8, seed=1)
    if kind == "tensor":
        import torch

        x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert exe(x=x, y=y)["out"] is x


@needs_tvm
def test_a_stream_through_blocks_lies_in_what_was_donated() -> None:
    """Blocks that overwrite their argument overwrite the model's input."""
    graph = stacked(block)
    x = graph.main.inputs[0]
    shape = tuple(size.evaluate(dict.fromkeys(size.symbols, 3)) for size in x.type.shape)
    weights = {n: drawn(*(v.type.static_shape or ()), seed=1) for n, v in graph.parameters.items()}
    given = drawn(*shape)
    wanted = find_backend("tvm").compile(graph, CPU, weights)(**{x.name: given.copy()})
    exe, lowered = build(find_backend("tvm"), graph, CPU, weights, donate=(x.name,))
    assert lowered.plan is not None and lowered.plan.functions["main"].reuses
    made = exe(**{x.name: given})
    ((name, array),) = made.items()
    assert np.array_equal(array, wanted[name]) and np.shares_memory(array, given)


@each_backend
def test_a_plan_that_writes_over_what_is_not_donated_is_refused(backend: str) -> None:
    chosen = find_backend(backend)
    assert isinstance(chosen, StagedBackend)
    lowered = chosen.lower(graph_of(residual), CPU, donate=("x",))
    assert lowered.plan is not None
    main = lowered.plan.functions["main"]
    lent = replace(lowered.plan, functions={"main": replace(main, donated=())})
    with pytest.raises(PassError, match="a step writes to"):
        check_storage(lowered.graph, lent)


@each_backend
def test_readers_of_donated_inputs_come_first(backend: str) -> None:
    """In program order, x is read after the step that could overwrite x. Its readers are moved before that step."""

    def early(b: Builder) -> dict[str, Expr]:
        x = b.input("x", "f32[S, 64]")
        moved = b.exp(x, name="moved")
        small = b.reduce_max(b.softmax(x, name="soft"), axes=(1,), name="small")
        return {"y": b.reduce_max(b.softmax(moved), axes=(1,)) + small}

    graph, x = graph_of(early), drawn(5, 64)
    wanted = interpret(graph, {"x": x})["y"]
    exe, lowered = build(find_backend(backend), graph, CPU, {}, donate=("x",))
    assert lowered.plan is not None
    main = lowered.plan.functions["main"]
    reads = {node.op.name: at for at, step in enumerate(main.steps) for node in step.nodes if graph_input(node)}
    assert reads["exp"] > reads["softmax"] and main.reordered is not None
    assert_near(exe(x=x)["y"], wanted)


def graph_input(node: Any) -> bool:
    return any(v.node is None and v.literal is None for v in node.inputs)


@each_backend
def test_poison_leaves_what_was_donated_to_the_run(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_POISON", "1")
    x, y = drawn(5, 8), drawn(5, 8, seed=1)
    wanted = interpret(graph_of(residual), {"x": x, "y": y})["out"]
    assert_near(donating(backend, graph_of(residual), "x")(x=x, y=y)["out"], wanted)


@each_backend
def test_explain_says_what_is_written_over_it(backend: str) -> None:
    report = explain_memory(graph_of(residual), backend=backend, donate=("x",))
    (line,) = report.donated
    assert line.startswith("input x is donated: ") and "written over it" in line and line in str(report)
    assert ("it is returned as output out" in line) == (backend == "tvm")
    (nothing,) = explain_memory(
        graph_of(lambda b: b.softmax(b.input("x", "f32[S]"))), backend=backend, donate=("x",)
    ).donated
    assert backend == "tvm" or nothing == "input x is donated: nothing is written over it"


def test_a_file_is_loaded_with_inputs_to_donate(tmp_path: Path) -> None:
    path = tmp_path / "residual.treadle"
    treadle.compile(graph_of(residual)).save(path)
    x, y = drawn(5, 8), drawn(5, 8, seed=1)
    assert not np.shares_memory(treadle.load_artifact(path)(x=x, y=y)["out"], x)
    assert np.shares_memory(treadle.load_artifact(path, donate=("x",))(x=x, y=y)["out"], x)
