"""NumPy within the plan: a run allocates only its outputs and scalars, and writes to the arena only as far as
planned.
"""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.array_allocations import array_allocations
from tests.backend_checks import compiled, graph_of, message
from tests.test_models import ZOO
from treadle.backends.numpy import attention_kernels, kernels
from treadle.backends.numpy.backend import NumpyBackend
from treadle.backends.python.executable import PythonExecutable
from treadle.ir.analysis.drawn_inputs import draw_inputs, small_sizes
from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Window,
)
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError
from treadle.ir.interpreter import interpret
from treadle.ir.storage.views import StorageKind, View
from treadle.ir.target import Target
from treadle.ir.types import f32
from treadle.passes.memory.frame_placement import place_frames
from treadle.passes.memory.frames import frames_of, parts_of
from treadle.passes.memory.storage_checking import check_storage
from treadle.passes.memory.storage_plan import FunctionPlan, StoragePlan

NUMBER = 16
"""Bytes of the array that NumPy allocates for a scalar argument or result."""


def arena_of(exe: Any) -> Any:
    assert isinstance(exe.executable, PythonExecutable)
    return exe.executable.arena


def planned_bytes(plan: StoragePlan, sizes: dict[str, int]) -> int:
    inside, _ = parts_of(frames_of(plan))
    return place_frames(inside, sizes)["main"].size


def beside_outputs(exe: Any, given: dict[str, Any]) -> list[tuple[int, str]]:
    """Return the size in bytes and the place of each array that a run allocates, except for outputs and scalars."""
    with array_allocations() as made:
        outputs = exe(**given)
    left = Counter(array.nbytes for array in outputs.values())
    found = []
    for count, where in made:
        if left[count]:
            left[count] -= 1
        elif count > NUMBER:
            found.append((count, where))
    return found


@pytest.mark.parametrize("name", ZOO)
def test_a_run_lies_in_the_arena_as_planned(name: str) -> None:
    """A run allocates no array except its outputs, and writes to no byte beyond the planned arena.

    The arena is filled with two patterns: a written byte differs from at least one of them.
    """
    exe = treadle.compile(ZOO[name][0].graph(), backend="numpy", seed=1)
    plan = exe.optimized.lowered.plan
    for number, sizes in enumerate(small_sizes(exe.graph)):
        given = draw_inputs(exe.graph, sizes, [number])
        exe(**given)
        assert beside_outputs(exe, given) == []
        last = -1
        for pattern in (0x55, 0xAA):
            arena_of(exe).array[...] = pattern
            exe(**given)
            last = max(last, *np.flatnonzero(arena_of(exe).array != pattern)[-1:].tolist(), -1)
        planned = planned_bytes(plan, sizes)
        assert -(-(last + 1) // 64) * 64 == planned <= arena_of(exe).nbytes


def test_by_tracemalloc_a_run_takes_its_outputs() -> None:
    """The first run also allocates the arena, whose size is planned; Python's own objects come on top."""
    exe = treadle.compile("gpt2", backend="numpy", layers=2, dim=64, heads=4, vocab=4000, seed=1)
    given = {"tokens": np.ones((2, 64), np.int64)}
    taken = []
    for _ in range(2):
        tracemalloc.start()
        try:
            logits = exe(**given)["logits"]
            taken.append(tracemalloc.get_traced_memory()[1] - logits.nbytes)
        finally:
            tracemalloc.stop()
    arena = planned_bytes(exe.optimized.lowered.plan, {"B": 2, "S": 64})
    assert arena_of(exe).nbytes == arena > 300_000
    first, again = taken
    assert arena <= first < arena + 100_000
    assert 0 <= again < 40_000


def test_attention_is_done_in_parts_that_the_plan_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(b: Builder) -> Expr:
        q, k, v = (b.input(name, "f32[B, 2, S, 4]") for name in "qkv")
        return b.tanh(b.attention(q, k, v, terms=(Causal(),)))

    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((3, 2, 11, 4)).astype(np.float32) for name in "qkv"}
    whole = compiled("numpy", graph_of(build))(**given)["y"]
    held = []
    for scores in (1, 50, 2 * 11 * 11 * 2, 1000):
        monkeypatch.setattr(attention_kernels, "SCORES", scores)
        exe: Any = compiled("numpy", graph_of(build))
        np.testing.assert_allclose(exe(**given)["y"], whole, rtol=1e-5)
        (beside,) = exe.arena.plan.functions["main"].workspaces.values()
        held.append(beside["scores"].storage.elements.evaluate({"B": 3, "S": 11}))
    assert held == [2 * 11, 2 * 3 * 11, 2 * 11 * 11 * 2, 3 * 2 * 11 * 11]


def test_masks_and_biases_have_a_place() -> None:
    """One attention with masks and biases of every kind."""
    operands = {
        "lengths": "i64[B]",
        **{"query_segments": "i64[B, S]", "key_segments": "i64[B, T]", "mask": "bool[B, S, T]", "bias": "f32[S, T]"},
        **{"table": "f32[8, 4]", "slopes": "f32[4]"},
    }
    terms = (
        Causal(),
        Window(3),
        Padding(),
        Segments(),
        BooleanMask("b s t"),
        TensorBias("s t"),
        T5Relative(8, 9),
        Alibi(),
    )

    def build(b: Builder) -> Expr:
        q, k, v = (
            b.input(name, f"f32[B, {heads}, {n}, 4]")
            for name, heads, n in (("q", 4, "S"), *(("k", 2, "T"), ("v", 2, "T")))
        )
        others = [b.input(name, type) for name, type in operands.items()]
        return b.tanh(b.attention(q, k, v, *others, terms=terms, softcap=3.0))

    graph = graph_of(build)
    given = draw_inputs(graph, {"B": 2, "S": 5, "T": 7}, [0]) | {"lengths": np.array([7, 4])}
    exe = compiled("numpy", graph)
    exe(**given)
    assert beside_outputs(exe, given) == []
    np.testing.assert_allclose(exe(**given)["y"], interpret(graph, given, float64=True)["y"], rtol=1e-4, atol=1e-6)


def gapped(b: Builder) -> dict[str, Expr]:
    x = b.exp(b.input("x", "f32[S, 10]"))
    part = b.slice(x, axis=1, start=2, stop=7)
    return {"y": b.exp(b.gelu(part)), "z": b.exp(b.gelu_tanh(part))}


def test_strided_rows_are_activated_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 7)
    graph, x = graph_of(gapped), np.random.default_rng(0).standard_normal((9, 10)).astype(np.float32)
    exe = compiled("numpy", graph)
    exe(x=x)
    assert beside_outputs(exe, {"x": x}) == []
    for name, wanted in interpret(graph, {"x": x}, float64=True).items():
        np.testing.assert_allclose(exe(x=x)[name], wanted, rtol=1e-5)


def test_views_without_strides_are_copied() -> None:
    """A view that strides cannot express is copied, also at sizes at which it could be a view. Results for the caller
    are never in the arena.
    """

    def build(b: Builder) -> dict[str, Expr]:
        x = b.exp(b.input("x", "f32[B, 3, S]"))
        joined = b.rearrange(x, pattern="b c s -> b (s c)")
        return {"joined": joined, "more": b.tanh(b.rearrange(b.exp(joined), pattern="b (s c=3) -> (c b) s"))}

    exe = compiled("numpy", graph_of(build))
    kept, copies = [], []
    for shape in ((2, 3, 4), (1, 3, 1), (2, 3, 4)):
        given = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        exe(**given)
        assert beside_outputs(exe, given) == []
        kept.append(exe(**given))
        copies.append({name: array.copy() for name, array in kept[-1].items()})
        for name, wanted in interpret(graph_of(build), given).items():
            np.testing.assert_allclose(kept[-1][name], wanted, rtol=1e-6)
    exe(x=np.zeros((2, 3, 4), np.float32))
    for outputs, wanted in zip(kept, copies, strict=True):
        assert all(np.array_equal(outputs[name], array) for name, array in wanted.items())


def test_foreign_memory_is_reported() -> None:
    """For ops that run by their references, and for float16, a library allocates the result, and the plan counts it."""

    def build(b: Builder) -> Expr:
        x = b.softmax(b.input("x", "f16[S, 8]"), name="half")
        wide = b.cast(x, to=f32, name="wide")
        return b.tanh(b.index_add(wide, b.input("rows", "i64[N]"), b.input("y", "f32[N, 8]"), axis=0, name="added"))

    plan = NumpyBackend().lower(graph_of(build), Target("cpu")).plan
    assert plan is not None
    kinds = {life.storage.name: life.storage.kind for life in plan.functions["main"].lives if life.storage.kind.is_own}
    local, foreign = StorageKind.LOCAL, StorageKind.FOREIGN
    assert kinds == {"half": foreign, "wide": local, "added": foreign, "tanh": foreign}


def test_threads_take_turns() -> None:
    exe = treadle.compile("gpt2", backend="numpy", layers=1, dim=16, heads=2, vocab=50, seed=1)
    given = [{"tokens": np.random.default_rng(n).integers(0, 50, (1 + n % 3, 1 + n))} for n in range(40)]
    right = [exe(**each)["logits"] for each in given]
    wrong: list[int] = []

    def run(part: int) -> None:
        for n in range(part, len(given), 4):
            if not np.array_equal(exe(**given[n])["logits"], right[n]):
                wrong.append(n)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_memory_for_the_arena_it_says_so() -> None:
    exe = compiled(
        "numpy", graph_of(lambda b: b.exp(b.softmax(b.expand(b.input("x", "f32[S, 1]"), shape=(None, 2**48)))))
    )
    assert "there is not enough memory" in message(lambda: exe(x=np.ones((1, 1), np.float32)))


# -- wrong plans ---------------------------------------------------------------------------------------------------


def normed(b: Builder) -> Expr:
    x = b.softmax(b.input("x", "f32[S, 4]"), name="kept")
    return b.exp(b.layer_norm(b.layer_norm(x, None, None, name="first"), None, None, name="second"))


def a_workspace_that_lives_on(plan: FunctionPlan) -> FunctionPlan:
    row = plan.workspaces[1]["row"].storage
    return replace(plan, lives=tuple(replace(x, last=2) if x.storage is row else x for x in plan.lives))


def a_workspace_of_two_steps(plan: FunctionPlan) -> FunctionPlan:
    return replace(plan, workspaces={**plan.workspaces, 2: plan.workspaces[1]})


def a_workspace_in_which_a_value_lies(plan: FunctionPlan) -> FunctionPlan:
    first = next(place for value, place in plan.places.items() if plan.names[value] == "first")
    assert first.storage is not None
    view = View.contiguous(first.storage, (first.storage.elements,))
    return replace(plan, workspaces={**plan.workspaces, 1: {"row": view}})


@pytest.mark.parametrize(
    "fault", [a_workspace_that_lives_on, a_workspace_of_two_steps, a_workspace_in_which_a_value_lies]
)
def test_a_workspace_that_is_not_of_its_step_alone_is_refused(fault: Callable[[FunctionPlan], FunctionPlan]) -> None:
    lowered = NumpyBackend().lower(graph_of(normed), Target("cpu"))
    plan = lowered.plan
    assert plan is not None
    check_storage(lowered.graph, plan)
    with pytest.raises(PassError, match="a workspace does not belong to step"):
        check_storage(lowered.graph, replace(plan, functions={"main": fault(plan.functions["main"])}))


def test_a_kernel_that_reads_a_workspace_of_another_computes_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison mode fills the workspace of a call with NaN after the call."""
    monkeypatch.setenv("TREADLE_POISON", "1")
    exe: Any = compiled("numpy", graph_of(normed))
    exe(x=np.ones((3, 4), np.float32))
    (memory,) = exe.arena._memories.values()
    assert all(np.isnan(each).all() for each in vars(memory.first_work).values())
