"""Plans of the TVM backend: the argument words that hold addresses from the start, and those that each call fills
in.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of
from treadle.backends.registry import find_backend
from treadle.backends.tvm import host_machine
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernel_abilities import capabilities, planning
from treadle.backends.tvm.kernels.host.calling import POINTER, address
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.backends.tvm.lowering.routine_writer import lower
from treadle.backends.tvm.lowering.rules import RULES, keeps
from treadle.backends.tvm.planning import Plan
from treadle.backends.tvm.profiling import time_calls
from treadle.backends.tvm.spaces import Arena, Input, Output
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.legalize import Legalize

PLAN = planning(capabilities(ISAS["x86-64-v3"]))

Array = np.ndarray[Any, Any]
WEIGHT = np.arange(15, dtype=np.float32).reshape(5, 3)


@pytest.fixture
def looked_up() -> KernelExecutable:
    """Return rows of a table at indices, times a weight, twice: the plan has a local, a weight, a constant and a
    status.
    """
    b = Builder(Graph("looked_up"))
    rows = b.gather(b.input("table", "f32[T, 3]"), b.input("indices", "i64[N]"), axis=0)
    scaled = b.softmax(rows * b.constant(np.array([1.0, 2.0, 3.0], np.float32)))
    b.outputs(y=b.softmax(scaled + b.reduce_sum(b.parameter("weight", "f32[5, 3]"), axes=(0,))))
    made = find_backend("tvm").compile(b.graph, Target("cpu"), {"weight": WEIGHT})
    assert isinstance(made, KernelExecutable)
    return made


def given(indices: list[int], rows: int = 4) -> dict[str, Array]:
    return {"table": np.ones((rows, 3), np.float32), "indices": np.array(indices)}


def the_plan(executable: KernelExecutable) -> Plan:
    (plan,) = executable.machine.plans.values()
    return plan


def test_a_call_fills_in_what_moves_and_nothing_else(looked_up: KernelExecutable) -> None:
    looked_up(**given([0, 1]))
    plan = the_plan(looked_up)
    assert set(plan.moves) == {Arena(), Input("table"), Input("indices"), Output("y")}
    before = plan.words[:, 1].copy()
    held = [given([2, 3]) for _ in range(3)]  # at other addresses
    looked_up(**held[-1])
    filled = np.concatenate([at for space, (at, _) in plan.moves.items() if space != Arena()])
    stays = np.setdiff1d(np.arange(len(before)), filled)
    assert np.array_equal(plan.words[stays, 1], before[stays])
    moved = {space: plan.words[at, 1] - offsets for space, (at, offsets) in plan.moves.items()}
    assert set(moved[Input("table")]) == {address(held[-1]["table"])}
    assert set(moved[Input("indices")]) == {address(held[-1]["indices"])}


def test_persistent_values_are_addresses_in_the_plan(looked_up: KernelExecutable) -> None:
    looked_up(**given([0, 1]))
    plan = the_plan(looked_up)
    moving = np.concatenate([at for at, _ in plan.moves.values()])
    pointers = np.flatnonzero(plan.words[:, 0] == POINTER)
    stays = set(plan.words[np.setdiff1d(pointers, moving), 1])
    arrays = [*looked_up.machine.weights.values(), *looked_up.machine.constants, plan.status]
    assert stays == {address(array) for array in arrays}


def test_each_plan_tells_of_its_own_indices(looked_up: KernelExecutable) -> None:
    """Each plan has its own status, also between calls at other sizes."""
    for indices, rows in (([0, 4], 4), ([0, 4, 1], 5), ([9], 4), ([0, 7], 4)):
        outside = [i for i in indices if i >= rows]
        if outside:
            with pytest.raises(BackendError, match=f"index {outside[0]} is outside an axis of size {rows}"):
                looked_up(**given(indices, rows))
        else:
            assert looked_up(**given(indices, rows))["y"].shape == (len(indices), 3)
    assert looked_up(**given([0, 3]))["y"].shape == (2, 3)


def test_a_kernel_that_needs_what_the_plan_has_dead_is_found() -> None:
    b = Builder(Graph("short"))
    x = b.softmax(b.input("x", "f32[S, 4]"), name="kept")
    b.outputs(y=b.softmax(x @ b.softmax(b.rearrange(x, pattern="s d -> d s"))))
    lowered = PassManager((Legalize(Capabilities(keeps=keeps)), PLAN)).run(b.graph)
    assert lowered.plan is not None
    isa = ISAS["x86-64-v3"]
    lower(lowered.graph, lowered.plan, isa, RULES)
    main = lowered.plan.functions["main"]
    lives = [replace(life, last=1) if life.storage.name == "kept" else life for life in main.lives]
    plan = replace(lowered.plan, functions={"main": replace(main, lives=tuple(lives))})
    with pytest.raises(BackendError, match="a kernel needs a storage that the plan has already freed"):
        lower(lowered.graph, plan, isa, RULES)


def test_a_timed_call_takes_what_the_clock_says_and_the_first_run_counts_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by 1, 2, 3, ... at each reading: three runs of two calls."""
    x = np.ones((2, 4), np.float32)
    graph = graph_of(lambda b: b.softmax(b.exp(b.input("x", "f32[B, 4]")), axis=-1))
    exe = find_backend("tvm").compile(graph, Target("cpu", threads=1), {})
    assert isinstance(exe, KernelExecutable)
    read = accumulate(count(1))
    monkeypatch.setattr(host_machine, "time", SimpleNamespace(perf_counter=lambda: next(read)))
    first, second = time_calls(exe, {"x": x}, rounds=2)
    assert (first.seconds, second.seconds, first.sizes) == ((6 + 10) / 2, (8 + 12) / 2, {"B": 2})
