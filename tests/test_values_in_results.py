"""Values that die before a result is written are stored in the result's memory. The arena is smaller, and results are
unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.backend_checks import graph_of, needs_tvm
from treadle.backends.tvm import backend
from treadle.backends.tvm.kernels.host.calling import address
from treadle.explaining.memory import explain_memory
from treadle.explaining.memory_drawing import draw_memory
from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage, StorageKind
from treadle.ir.types import f32
from treadle.passes.memory.frame_placement import place_frames
from treadle.passes.memory.frames import Frame
from treadle.passes.memory.storage_plan import Life

WIDE = {"layers": 2, "dim": 64, "heads": 4, "vocab": 4000}
TOKENS = np.random.default_rng(0).integers(0, 4000, (2, 13))


def storage(name: str, elements: int) -> Storage:
    return Storage(name, f32, Size.of(elements), StorageKind.LOCAL)


def frame_of(result: int, *lives: tuple[int, int, int], first: int = 2) -> Frame:
    """Return a frame of four steps: storages with their sizes and lifetimes, and a result that is written from step
    `first` on.
    """
    own = tuple([Life(storage(f"s{n}", size), begin, end) for n, (size, begin, end) in enumerate(lives)])
    made = Storage("out", f32, Size.of(result), StorageKind.RESULT)
    return Frame("main", (None,) * 4, own, {}, (Life(made, first, 4),))


def test_early_temporaries_are_stored_in_the_result() -> None:
    frame = frame_of(1000, (320, 0, 1), (320, 1, 1), (160, 1, 2), (16, 3, 3))
    placed = place_frames({"main": frame}, {})["main"]
    early, again, late, last = (life.storage for life in frame.lives)
    assert placed.host is frame.handed_out[0].storage and placed.hosted == {early, again}
    assert sorted((placed.offsets[early], placed.offsets[again])) == [0, 1280]
    assert (placed.offsets[late], placed.offsets[last]) == (0, 0)
    assert placed.size == placed.bound == 640


@pytest.mark.parametrize(
    "frame",
    [
        frame_of(100, (320, 0, 1), (16, 3, 3)),  # the earlier values are larger than the result
        frame_of(1000, (320, 0, 2), (16, 3, 3)),  # it is read when the result is written
        frame_of(1000, (320, 0, 1), first=0),
        frame_of(1000, (160, 0, 1), (160, 2, 3)),  # the arena would not be smaller
    ],
)
def test_outputs_hold_temporaries_only_if_they_fit_and_help(frame: Frame) -> None:
    placed = place_frames({"main": frame}, {})["main"]
    assert placed.host is None and not placed.hosted
    assert placed.size == place_frames({"main": replace(frame, handed_out=())}, {})["main"].size


@needs_tvm
def test_a_model_over_a_vocabulary_runs_in_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    exe = treadle.compile("gpt2", backend="tvm", seed=1, **WIDE)
    report = explain_memory("gpt2", backend="tvm", sizes={"B": 2, "S": 13}, **WIDE)
    logits = exe(tokens=TOKENS)["logits"]
    (plan,) = exe.executable.machine.plans.values()
    assert report.arena == plan.arena == plan.least < report.peak
    assert report.host == plan.host == "logits" and "share the memory of logits" in str(report)
    assert "</svg>" in draw_memory(report)
    assert address(logits) % 64 == 0
    again = logits.copy()
    monkeypatch.setenv("TREADLE_POISON", "1")
    assert np.array_equal(exe(tokens=TOKENS)["logits"], again)
    assert np.array_equal(logits, again), "a later run leaves what was handed out"


@needs_tvm
def test_the_same_bits_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = treadle.compile("gpt2", backend="tvm", seed=1, **WIDE)
    made = wide(tokens=TOKENS)["logits"]
    planning = backend.planning
    monkeypatch.setattr(backend, "planning", lambda mine: replace(planning(mine), in_results=False))
    apart = treadle.compile("gpt2", backend="tvm", seed=1, **WIDE)
    assert np.array_equal(made, apart(tokens=TOKENS)["logits"])
    arenas = [[plan.arena for plan in exe.executable.machine.plans.values()] for exe in (wide, apart)]
    assert arenas[0] < arenas[1]


@needs_tvm
def test_a_kernel_that_reads_what_died_in_a_result_computes_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def widened(b: Builder) -> Expr:
        x = b.softmax(b.softmax(b.input("x", "f32[S, 8]"), name="kept"))
        return b.matmul(b.softmax(x), b.parameter("w", "f32[8, 640]"))

    weights = {"w": np.ones((8, 640), np.float32)}
    exe: Any = treadle.compile(graph_of(widened), backend="tvm", weights=weights).executable
    given = {"x": np.ones((3, 8), np.float32)}
    right = exe(**given)["y"].copy()
    monkeypatch.setenv("TREADLE_POISON", "1")
    assert np.array_equal(exe(**given)["y"], right)
    (plan,) = exe.machine.plans.values()
    assert plan.host == "y"
    inside = next(freed for freed in plan.freed if freed[1].space != plan.freed[-1][1].space)
    plan.freed = [(1, *inside[1:]), *plan.freed]
    assert np.isnan(exe(**given)["y"]).all()
