"""PyTorch within the plan: planned values are stored in one arena, as large as planned. All other values are allocated
by PyTorch, and listed.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.backend_checks import block_model, graph_of, message
from tests.op_checks import TESTED, Case
from tests.test_models import ZOO
from treadle.backends.python.executable import PythonExecutable
from treadle.backends.registry import find_backend
from treadle.backends.torch.backend import TorchBackend
from treadle.explaining.memory import explain_memory
from treadle.explaining.memory_drawing import draw_memory
from treadle.ir.analysis.drawn_inputs import draw_inputs, small_sizes
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS
from treadle.ir.storage.views import StorageKind
from treadle.ir.target import Target
from treadle.passes.memory.frame_placement import place_frames
from treadle.passes.memory.frames import frames_of, live_at, parts_of
from treadle.passes.memory.storage_checking import check_storage
from treadle.passes.memory.storage_plan import How

torch = pytest.importorskip("torch")


def made(name: str) -> tuple[Any, PythonExecutable]:
    exe = treadle.compile(ZOO[name][0].graph(), backend="torch", seed=1)
    assert isinstance(exe.executable, PythonExecutable)
    return exe, exe.executable


def allocations(run: Any) -> list[tuple[str, int]]:
    """Return the bytes that each of PyTorch's operators allocated itself in a run, minus the bytes that the operator
    freed.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return [(e.name, e.self_cpu_memory_usage) for e in profile.events() if e.self_cpu_memory_usage > 0]


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "clip"])
def test_the_arena_is_allocated_once_and_is_as_large_as_planned(name: str) -> None:
    """According to PyTorch's profiler, the first run allocates the planned bytes in one piece, and later runs allocate
    none.
    """
    exe, executable = made(name)
    sizes = small_sizes(exe.graph)[-1]
    given = draw_inputs(exe.graph, sizes, [0])
    plan = exe.optimized.lowered.plan
    inside, _ = parts_of(frames_of(plan))
    placed = place_frames(inside, sizes)[exe.graph.main.name]
    assert placed.size == placed.bound > 0
    first = allocations(lambda: exe(**given))
    assert executable.arena is not None and executable.arena.nbytes == placed.size
    again = allocations(lambda: exe(**given))
    extra = sum(count for _, count in first) - sum(count for _, count in again)
    assert extra == placed.size


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "clip"])
def test_a_run_touches_the_arena_up_to_what_was_planned(name: str) -> None:
    """Memory is filled with two patterns: a written byte differs from at least one of them."""
    exe, executable = made(name)
    arena = executable.arena
    assert arena is not None
    for number, sizes in enumerate(small_sizes(exe.graph)):
        given = draw_inputs(exe.graph, sizes, [number])
        inside, _ = parts_of(frames_of(exe.optimized.lowered.plan))
        planned = place_frames(inside, sizes)[exe.graph.main.name].size
        exe(**given)
        touched = set()
        for pattern in (0x55, 0xAA):
            with torch.inference_mode():
                arena.array.fill_(pattern)
            exe(**given)
            touched.update(np.flatnonzero(arena.array.numpy() != pattern).tolist())
        assert -(-(max(touched) + 1) // 64) * 64 == planned <= arena.nbytes


def test_foreign_memory_matches_the_plan() -> None:
    """A run of one block allocates one array for each value that is not planned, of the value's size.

    PyTorch's operators also need memory inside: a norm's means, attention's intermediate values, checks of indices.
    """
    graph, weights = block_model(layers=1)
    lowered = TorchBackend().lower(graph, Target("cpu"))
    assert lowered.plan is not None
    exe = TorchBackend().emit(lowered.graph, Target("cpu"), weights, graph, lowered.plan)
    tokens = torch.ones((2, 7), dtype=torch.int64)
    exe(tokens=tokens)
    sizes = {"B": 2, "S": 7}
    storages = [life.storage for plan in lowered.plan.functions.values() for life in plan.lives]
    kinds = (StorageKind.FOREIGN, StorageKind.LOCAL)
    foreign, placed = ([s.name for s in storages if s.kind is kind] for kind in kinds)
    assert foreign == ["ln", "attention", "out", "logits"] and placed == ["x_1", "wte", "h"]
    wanted = Counter(s.nbytes.evaluate(sizes) for s in storages if s.kind is StorageKind.FOREIGN)
    found = Counter(count for _, count in allocations(lambda: exe(tokens=tokens)))
    assert {count: found[count] for count in wanted} == dict(wanted) == {448: 3, 616: 1}


def test_a_residual_stream_is_added_to_where_it_lies() -> None:
    exe = treadle.compile("gpt2", backend="torch", layers=2, dim=64, heads=4, vocab=100)
    assert "torch.add(x_1, down, out=x_1)" in exe.source
    report = explain_memory("gpt2", backend="torch", sizes={"B": 2, "S": 16}, layers=2, dim=64, heads=4, vocab=100)
    stream = 2 * 16 * 64 * 4
    assert report.arena == 2 * stream
    assert report.foreign > 0 and f"{report.foreign:,} bytes at once" in str(report)
    assert "</svg>" in draw_memory(report)
    frames = report.frames
    assert report.foreign == max(count for _, count in live_at(parts_of(frames)[1], "main", report.sizes))


def test_results_belong_to_the_caller() -> None:
    """Results that would be stored in the arena are new tensors, so the next run leaves them unchanged."""

    def build(b: Builder) -> dict[str, Expr]:
        x = b.exp(b.input("x", "f32[S, 4]"))
        y = b.tanh(x)
        return {"y": b.rearrange(y, pattern="s d -> d s"), "z": y + x, "x": x}

    graph = graph_of(build)
    exe = find_backend("torch").compile(graph, Target("cpu"), {})
    one, other = (np.random.default_rng(n).standard_normal((3, 4)).astype(np.float32) for n in range(2))
    kept = exe(x=one)
    copies = {name: array.copy() for name, array in kept.items()}
    exe(x=other)
    for name, array in kept.items():
        assert np.array_equal(array, copies[name])
        np.testing.assert_allclose(array, interpret(graph, {"x": one})[name], rtol=1e-6)


def test_sizes_come_and_go_and_threads_take_turns() -> None:
    exe = treadle.compile("gpt2", backend="torch", layers=2, dim=64, heads=4, vocab=100, seed=1)
    given = [{"tokens": np.random.default_rng(n).integers(0, 100, (1 + n % 3, 1 + n))} for n in range(40)]
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


def test_without_memory_for_the_arena_it_says_so_and_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    exe = find_backend("torch").compile(graph_of(lambda b: b.exp(b.exp(b.input("x", "f32[S]")))), Target("cpu"), {})
    empty = torch.empty

    def refusing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", refusing)
    x = np.ones(5, np.float32)
    assert "there is not enough memory" in message(lambda: exe(x=x))
    monkeypatch.setattr(torch, "empty", empty)
    np.testing.assert_allclose(exe(x=x)["y"], np.exp(np.exp(x)), rtol=1e-6)


@pytest.mark.parametrize("name", TESTED)
def test_copies_have_their_own_memory(name: str) -> None:
    """If the result were a view, a plan in which the operand is dead would store other values in the view's memory."""
    op = OPS[name]
    for number in range(len(op.samples)):
        case = Case.of(name, number)
        if case.op.updates or case.op.meets_ranks:
            continue
        graph = case.forward_graph()
        backend = TorchBackend()
        if any(backend.supports(node) for node in graph.main.nodes):
            continue
        lowered = backend.lower(graph, Target("cpu"))
        assert lowered.plan is not None
        exe: Any = backend.emit(lowered.graph, Target("cpu"), {}, graph, lowered.plan)
        arrays = exe.called["main"].signature.bind(case.inputs, exe.arena.arrays.take)
        held = {x.untyped_storage().data_ptr() for x in arrays if x.numel()}
        with torch.inference_mode():
            results = exe.function(*arrays, exe.weights, *exe.arena.memory("main", {}))
        places = lowered.plan.functions["main"].places
        for output, value in lowered.graph.main.outputs.items():
            storage = places[value].storage
            assert storage is not None
            if storage.kind is StorageKind.FOREIGN and results[output].numel():
                assert results[output].untyped_storage().data_ptr() not in held, (number, output)


def streamed(b: Builder) -> Expr:
    x = b.exp(b.input("x", "f32[S, 4]"), name="kept")
    return b.softmax(b.mul(b.tanh(b.softmax(x), name="first"), x, name="second"))


@pytest.mark.parametrize(
    ("value", "other", "said"),
    [
        ("first", "kept", "a step overwrites a value that it does not read element by element"),
        ("second", "softmax", "a step overwrites a value that it does not read element by element"),
        ("first", "softmax", None),
        ("second", "kept", None),
    ],
)
def test_a_plan_that_writes_over_what_is_read_is_refused(value: str, other: str, said: str | None) -> None:
    """`first` reads softmax only, and `second` is the last reader of kept. Every other plan is wrong."""
    lowered = TorchBackend().lower(graph_of(streamed), Target("cpu"))
    plan = lowered.plan
    assert plan is not None
    main = plan.functions["main"]
    named = {name: v for v, name in main.names.items()}
    lies = main.places[named[other]]
    over = replace(main.places[named[value]], storage=lies.storage, how=How.OVER, of=named[other])
    lives = tuple(replace(life, last=main.end) if life.storage is lies.storage else life for life in main.lives)
    changed = replace(main, places={**main.places, named[value]: over}, lives=lives)
    wrong = replace(plan, functions={"main": changed})
    if said is None:
        check_storage(lowered.graph, wrong)
    else:
        with pytest.raises(PassError, match=said):
            check_storage(lowered.graph, wrong)


def test_a_plan_that_writes_over_what_is_read_later_is_refused() -> None:
    def twice(b: Builder) -> Expr:
        x = b.exp(b.input("x", "f32[S, 4]"), name="kept")
        return b.softmax(b.mul(b.tanh(x, name="first"), x, name="second"))

    lowered = TorchBackend().lower(graph_of(twice), Target("cpu"))
    plan = lowered.plan
    assert plan is not None
    main = plan.functions["main"]
    named = {name: v for v, name in main.names.items()}
    lies = main.places[named["kept"]]
    over = replace(main.places[named["first"]], storage=lies.storage, how=How.OVER, of=named["kept"])
    wrong = replace(plan, functions={"main": replace(main, places={**main.places, named["first"]: over})})
    with pytest.raises(PassError, match="it overwrites kept, which is read at that step or later"):
        check_storage(lowered.graph, wrong)


def test_a_plan_that_writes_over_what_is_read_in_another_order_is_refused() -> None:
    def turned(b: Builder) -> Expr:
        x = b.exp(b.input("x", "f32[4, 4]"), name="kept")
        return b.softmax(b.add(x, b.rearrange(x, pattern="s d -> d s", name="turned"), name="both"))

    lowered = TorchBackend().lower(graph_of(turned), Target("cpu"))
    assert lowered.plan is not None
    main = lowered.plan.functions["main"]
    named = {name: v for v, name in main.names.items()}
    lies = main.places[named["kept"]]
    over = replace(main.places[named["both"]], storage=lies.storage, how=How.OVER, of=named["kept"])
    lives = tuple(replace(life, last=main.end) if life.storage is lies.storage else life for life in main.lives)
    changed = replace(main, places={**main.places, named["both"]: over}, lives=lives)
    with pytest.raises(PassError, match="it overwrites turned, which is read at that step or later"):
        check_storage(lowered.graph, replace(lowered.plan, functions={"main": changed}))


class _Counted(dict[Any, Any]):
    """A dictionary that counts look-ups."""

    asked = 0

    def __getitem__(self, key: Any) -> Any:
        self.asked += 1
        return super().__getitem__(key)


def test_a_plan_of_many_steps_in_one_storage_is_checked_in_a_time_that_grows_with_them() -> None:
    def asked(count: int) -> int:
        def chain(b: Builder) -> Expr:
            x = b.softmax(b.input("x", "f32[S, 4]"))
            for _ in range(count):
                x = b.exp(x)
            return b.softmax(x)

        lowered = TorchBackend().lower(graph_of(chain), Target("cpu"))
        assert lowered.plan is not None
        main = lowered.plan.functions["main"]
        assert sum(place.how is How.OVER for place in main.places.values()) >= count - 1
        places = _Counted(main.places)
        check_storage(lowered.graph, replace(lowered.plan, functions={"main": replace(main, places=places)}))
        return places.asked

    assert asked(80) < 2.5 * asked(40)
