"""Poison mode: dead memory is filled with NaN. This changes no result of a right plan, and shows in the result of a
wrong plan.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.backend_checks import block_model, compiled, each_backend, graph_of, needs_torch, needs_tvm, python_backends
from tests.op_checks import BACKENDS
from tests.test_models import ZOO, in_turns
from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.host.calling import address
from treadle.ir.analysis.drawn_inputs import draw_inputs, small_sizes
from treadle.ir.builder import Builder, Expr
from treadle.ir.storage.views import StorageKind
from treadle.ir.target import Target
from treadle.passes.memory.frames import ALIGNMENT, aligned

Array = np.ndarray[Any, Any]


def bits(outputs: Any) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in outputs.items()}


def run(made: treadle.Compiled, given: dict[str, Array], poison: bool) -> dict[str, bytes]:
    backend, lowered = find_backend(made.backend), made.optimized.last
    assert isinstance(backend, StagedBackend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREADLE_POISON", "1" if poison else "0")
        executable = backend.emit(lowered.graph, made.target, made.weights, made.graph, lowered.plan)
        executable(**given)
        return bits(executable(**given))  # in the second run, memory holds the first run's values


@pytest.mark.parametrize(("name", "backend"), in_turns(BACKENDS))
def test_no_model_of_the_zoo_reads_what_is_dead(name: str, backend: str) -> None:
    if reason := find_backend(backend).available():
        pytest.skip(reason)
    graph = ZOO[name][0].graph()
    given = draw_inputs(graph, small_sizes(graph)[-1], [0])
    made = treadle.compile(graph, backend=backend, seed=1)
    assert run(made, given, True) == run(made, given, False)


def chained(b: Builder) -> Expr:
    x = b.softmax(b.input("x", "f32[S, 64]"), name="kept")
    return b.softmax(b.softmax(b.softmax(x)) + x)


@needs_tvm
def test_a_kernel_that_reads_what_is_dead_computes_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    executable = compiled("tvm", graph_of(chained))
    assert isinstance(executable, KernelExecutable)
    given = {"x": np.ones((3, 64), np.float32)}
    right = executable(**given)["y"]
    monkeypatch.setenv("TREADLE_POISON", "1")
    assert np.array_equal(executable(**given)["y"], right)
    (plan,) = executable.machine.plans.values()
    first = min(plan.freed, key=lambda freed: freed[1])
    plan.freed = [(1, *first[1:]), *plan.freed]
    assert np.isnan(executable(**given)["y"]).all()


@python_backends
def test_a_line_that_reads_what_is_dead_computes_with_nan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this plan, a storage dies before a view of it is read."""
    monkeypatch.setenv("TREADLE_POISON", "1")
    chosen, target = find_backend(backend), Target("cpu")
    assert isinstance(chosen, StagedBackend)
    lowered = chosen.lower(
        graph_of(
            lambda b: b.softmax(b.rearrange(b.softmax(b.input("x", "f32[S, 4]"), name="kept"), pattern="s d -> d s"))
        ),
        target,
    )
    plan = lowered.plan
    assert plan is not None
    main = plan.functions["main"]
    lives = tuple(replace(life, last=1) if life.storage.name == "kept" else life for life in main.lives)
    wrong = replace(plan, functions={"main": replace(main, lives=lives)})
    given = {"x": np.ones((3, 4), np.float32)}
    for each, is_right in ((plan, True), (wrong, False)):
        made = chosen.emit(lowered.graph, target, {}, lowered.graph, each)(**given)["y"]
        assert np.isfinite(made).all() == is_right


@needs_torch
def test_library_memory_is_poisoned_when_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is a norm: PyTorch cannot write its result into a given destination."""
    monkeypatch.setenv("TREADLE_POISON", "1")
    backend, target = find_backend("torch"), Target("cpu")
    assert isinstance(backend, StagedBackend)

    def normed(b: Builder) -> Expr:
        kept = b.layer_norm(b.input("x", "f32[S, 4]"), None, None, name="kept")
        return b.softmax(b.softmax(b.rearrange(kept, pattern="s d -> d s")))

    lowered = backend.lower(graph_of(normed), target)
    assert lowered.plan is not None
    main = lowered.plan.functions["main"]
    lives = tuple(replace(life, last=1) if life.storage.name == "kept" else life for life in main.lives)
    assert lives != main.lives and any(life.storage.kind is StorageKind.FOREIGN for life in lives)
    wrong = replace(lowered.plan, functions={"main": replace(main, lives=lives)})
    given = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    for each, is_right in ((lowered.plan, True), (wrong, False)):
        made = backend.emit(lowered.graph, target, {}, lowered.graph, each)(**given)["y"]
        assert np.isfinite(made).all() == is_right


@each_backend
def test_arrays_of_the_caller_stay_unchanged(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_POISON", "1")
    graph, weights = block_model()
    held = {name: array.copy() for name, array in weights.items()}
    given = {"tokens": np.array([[1, 2, 3]])}
    executable = find_backend(backend).compile(graph, Target("cpu"), weights)
    once, again = executable(**given), executable(**given)
    assert bits(once) == bits(again)
    assert all(np.array_equal(weights[name], array) for name, array in held.items())
    assert np.array_equal(given["tokens"], [[1, 2, 3]])


# -- the arena -----------------------------------------------------------------------------------------------------


@needs_tvm
@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "clip"])
def test_a_run_touches_the_arena_up_to_what_was_planned(name: str) -> None:
    """Memory is filled with two patterns: a written byte differs from at least one of them."""
    graph = ZOO[name][0].graph()
    executable = treadle.compile(graph, backend="tvm", seed=1)
    machine = executable.executable.machine
    for number, sizes in enumerate(small_sizes(graph)):
        given = draw_inputs(graph, sizes, [number])
        executable(**given)
        plan = list(machine.plans.values())[-1]
        assert plan.arena == plan.least
        first, last = plan.arena, -1
        for pattern in (0x55, 0xAA):
            machine._arena = np.full(plan.arena + 64 * ALIGNMENT, pattern, np.uint8)
            executable(**given)
            touched = machine._arena != pattern
            begin = -address(machine._arena) % ALIGNMENT
            first = min(first, int(np.argmax(touched)) - begin)
            last = max(last, len(touched) - 1 - int(np.argmax(touched[::-1])) - begin)
        assert first >= 0
        assert aligned(last + 1, ALIGNMENT) == plan.arena


@needs_tvm
@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "clip"])
def test_no_kernel_allocates_for_itself(name: str) -> None:
    """No kernel refers to the allocators of TVM or of the C library, so no memory is outside the plan."""
    machine = treadle.compile(ZOO[name][0].graph(), backend="tvm", seed=1).executable.machine
    files = [machine.cache.path(kernel) for kernel in machine._entries]
    found = [file.read_bytes() for file in files if file is not None and file.is_file()]
    assert found
    assert not any(b"AllocWorkspace" in code or b"malloc" in code for code in found)


@needs_tvm
def test_a_run_allocates_its_outputs_and_nothing_else() -> None:
    executable = treadle.compile("gpt2", backend="tvm", layers=2, dim=64, heads=4, vocab=4000, seed=1)
    given = {"tokens": np.ones((2, 64), np.int64)}
    executable(**given)
    held = executable(**given)
    made = sum(np.asarray(array).nbytes for array in held.values())
    assert made <= _traced(lambda: executable(**given)) < made + 64_000
    assert _traced(lambda: executable(**given)) < 64_000  # the result is stored in the memory of an unreferenced one


def _traced(run: Callable[[], Any]) -> int:
    """Return the peak number of bytes that a call has allocated."""
    tracemalloc.start()
    try:
        made = run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del made
    return peak
