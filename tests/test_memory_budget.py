"""Runs within a memory budget: results are the same, smaller sizes fit as well, and an error is raised if nothing
fits.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from tests.error_texts import raises_freely
from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.compiled import Compiled
from treadle.explaining.memory import explain_memory
from treadle.ir.errors import BackendError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.budget import fitted_pipeline, fitting
from treadle.passes.budget.candidates import Candidate, Variant, few_of
from treadle.passes.budget.fitted_pipeline import MemoryLimit, check_limit
from treadle.passes.memory.frame_placement import place_frames
from treadle.program.budgets import parse_bytes

pytest.importorskip("tvm")

ALONE = Target("cpu", 1)
SMALL = {"layers": 2, "dim": 64, "heads": 4, "vocab": 50}
CASES = {"bert": {"B": 8, "S": 24}, "gpt2": {"B": 1, "S": 256}}


@cache
def peak_of(family: str) -> int:
    return explain_memory(family, backend="tvm", target=ALONE, sizes=CASES[family], **SMALL).peak


@cache
def within(family: str, memory: int) -> Compiled:
    """Return a model compiled within a budget; all tests share it, because the search takes a second."""
    return t.compile(family, backend="tvm", target=ALONE, memory=memory, sizes=CASES[family], **SMALL)


def arena(exe: Compiled, **sizes: int) -> int:
    """Return the size of the arena of a run at these sizes, as the backend plans it."""
    backend, lowered = find_backend("tvm"), exe.optimized.lowered
    assert isinstance(backend, StagedBackend) and lowered is not None and lowered.plan is not None
    frames = backend.frames(lowered.graph, exe.target, lowered.plan)
    return place_frames(frames, sizes)[lowered.graph.main.name].size


def tokens(**sizes: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 50, (sizes["B"], sizes["S"]))


def test_a_run_that_needs_nothing_fits_at_once() -> None:
    @t.model
    def doubled(x: Annotated[t.Tensor, t.f32["B 8"]]) -> t.Tensor:
        return x + x

    exe = t.compile(doubled, backend="tvm", target=ALONE, memory=1, sizes={"B": 4})
    assert exe.memory_fit is not None and exe.memory_fit.peak == 0 and not exe.memory_fit.chunks
    (made,) = exe(x=np.ones((3, 8), np.float32)).values()
    assert np.array_equal(made, np.full((3, 8), 2))


def test_a_compiled_model_reports_the_memory_of_a_call() -> None:
    exe = t.compile("gpt2", backend="tvm", target=ALONE, **SMALL)
    assert exe.memory(**CASES["gpt2"]).peak == peak_of("gpt2")
    assert exe.memory().sizes == {"B": 1, "S": 128}
    with raises_freely(UsageError):
        exe.memory(layers=2)


def test_the_result_is_checked_against_the_budget() -> None:
    """The executable itself is checked against the budget, because passes that run afterwards may change the predicted
    graph.
    """
    exe, backend = within("bert", peak_of("bert")), find_backend("tvm")
    assert isinstance(backend, StagedBackend) and exe.optimized.lowered is not None
    peak = arena(exe, **CASES["bert"])
    check_limit(backend, exe.optimized.lowered, ALONE, MemoryLimit(peak, CASES["bert"]))
    with pytest.raises(BackendError, match="more memory than the search for a plan predicted"):
        check_limit(backend, exe.optimized.lowered, ALONE, MemoryLimit(peak - 1, CASES["bert"]))


@pytest.mark.parametrize("share", [0.8, 0.6])
@pytest.mark.parametrize("family", CASES)
def test_a_run_keeps_to_its_budget_with_the_same_bits(family: str, share: float) -> None:
    budget, most = int(peak_of(family) * share), CASES[family]
    free, kept = t.compile(family, backend="tvm", target=ALONE, **SMALL), within(family, budget)
    assert kept.memory_fit is not None and kept.memory_fit.chunks
    assert kept.memory_fit.peak == arena(kept, **most) <= budget
    others = [most, {n: max(1, size - 3) for n, size in most.items()}, {"B": 1, "S": 5}, {"B": 1, "S": 1}]
    for sizes in others:
        given = tokens(**sizes)
        wanted, made = free(tokens=given), kept(tokens=given)
        assert all(np.array_equal(wanted[name], made[name]) for name in wanted)
    assert kept.executable.machine.plans  # type: ignore[attr-defined]
    placed = [plan.arena for plan in kept.executable.machine.plans.values()]  # type: ignore[attr-defined]
    assert max(placed) == kept.memory_fit.peak  # the plan that was searched is the plan that runs


@pytest.mark.parametrize("family", CASES)
def test_every_smaller_size_fits_as_well(family: str) -> None:
    budget, most = int(peak_of(family) * 0.6), CASES[family]
    kept = within(family, budget)
    for b in range(1, most["B"] + 1):
        for s in sorted({*range(1, most["S"] + 1, 9), most["S"] - 1, most["S"]}):
            assert arena(kept, B=b, S=s) <= budget, (b, s)


def test_sizes_beyond_the_budget_are_refused() -> None:
    kept = within("bert", peak_of("bert"))
    with pytest.raises(BackendError, match="B"):
        kept(tokens=tokens(B=9, S=24))
    assert kept(tokens=tokens(B=2, S=24))  # the executable still works


def test_less_memory_never_takes_less_time_nor_more_memory_more() -> None:
    peak, times = peak_of("gpt2"), []
    for share in (1.2, 1.0, 0.9, 0.8, 0.7, 0.6):
        fit = within("gpt2", int(peak * share)).memory_fit
        assert fit is not None and fit.peak <= fit.budget
        times.append(fit.ratio)
    assert times == sorted(times)
    assert times[0] == 1.0 < times[-1]


def test_budget_refusals_report_the_smallest_peak() -> None:
    peak = peak_of("gpt2")
    with pytest.raises(BackendError, match="does not fit") as refused:
        within("gpt2", peak // 5)
    error = refused.value
    least = int(str(error.hint).partition("memory=")[2].partition(",")[0])
    bound = int(str(error.within).rpartition("than ")[2].replace(",", ""))
    assert f"{peak:,}" in str(error.within) and f"{peak // 5:,}" in str(error.received)
    assert peak // 5 < bound <= least < peak
    kept = within("gpt2", least)  # the suggested budget works
    assert kept.memory_fit is not None and kept.memory_fit.peak <= least
    with pytest.raises(BackendError, match="does not fit"):
        within("gpt2", least - 1)


def test_a_bound_of_nothing_is_not_told() -> None:
    small = {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "hidden": 128, "vocab": 100}
    with raises_freely(BackendError, match="does not fit") as refused:  # on a busy machine the message is longer
        t.compile("llama", backend="tvm", memory=1, sizes={"B": 2, "S": 40}, **small)
    assert "the least that was reached is" in str(refused.value.within)
    assert "no plan" not in str(refused.value.within)


@t.model
def fixed(image: Annotated[t.Tensor, t.f32["4 8"]]):  # type: ignore[no-untyped-def]
    return {"y": t.softmax(t.linear(image, 8, name="proj"), axis=-1)}


def test_a_model_of_fixed_sizes_cannot_be_run_at_smaller_ones() -> None:
    with raises_freely(BackendError, match="does not fit") as refused:
        t.compile(fixed, backend="tvm", memory=1)
    name, _, least = str(refused.value.hint).partition("=")
    assert name == "memory"
    t.compile(fixed, backend="tvm", memory=int(least))


def test_the_plan_says_what_is_computed_in_parts_and_its_price() -> None:
    kept = within("gpt2", int(peak_of("gpt2") * 0.6))
    assert kept.memory_fit is not None
    text = str(kept.memory_fit)
    assert "B=1, S=256 and below" in text and "parts of S  models/gpt2.py" in text and "predicted time" in text
    record = next(r for r in kept.log if r.name == "fit-memory")
    assert record.notes == text.splitlines()
    assert kept.memory_fit.as_dict()["chunks"][0]["parts"] >= 2
    assert t.compile("gpt2", backend="numpy", **SMALL).memory_fit is None


def test_a_budget_on_numpy() -> None:
    free = t.compile("bert", backend="numpy", **SMALL)
    peak = explain_memory("bert", backend="numpy", sizes={"B": 8, "S": 64}, **SMALL).peak
    kept = t.compile("bert", backend="numpy", memory=int(peak * 0.6), sizes={"B": 8, "S": 64}, **SMALL)
    for sizes in ({"B": 8, "S": 64}, {"B": 3, "S": 7}):
        given = tokens(**sizes)
        wanted, made = free(tokens=given), kept(tokens=given)
        assert all(np.allclose(wanted[name], made[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize(
    ("text", "count"),
    [("300MB", 300_000_000), ("1.5 GiB", 3 << 29), ("64kB", 64_000), ("12", 12), (7, 7), (None, None)],
)
def test_sizes_of_memory(text: int | str | None, count: int | None) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "3XB", "1e9", "0", 0, -1, 2.5, True, "3 MB MB", "9" * 40])
def test_invalid_memory_sizes(text: Any) -> None:
    with pytest.raises(UsageError, match=r"^memory(= must be an integer or text| must be a number of bytes)"):
        t.compile("gpt2", memory=text, **SMALL)


def test_sizes_without_memory_and_unknown_ones() -> None:
    with pytest.raises(UsageError, match="only applies together"):
        t.compile("gpt2", sizes={"S": 3}, **SMALL)
    with pytest.raises(UsageError, match="no symbolic axis Q"):
        t.compile("gpt2", backend="tvm", memory="3MB", sizes={"Q": 3}, **SMALL)


def test_a_file_holds_no_budget_and_load_takes_one(tmp_path: Path) -> None:
    budget = int(peak_of("gpt2") * 0.6)
    kept = within("gpt2", budget)
    for save in (kept.save, partial(t.save, kept)):
        with pytest.raises(UsageError, match="a file cannot hold a memory budget"):
            save(tmp_path / "kept.treadle")
    t.compile("gpt2", backend="tvm", **SMALL).save(tmp_path / "free.treadle")
    loaded = t.load_artifact(tmp_path / "free.treadle", target=ALONE, memory=budget, sizes=CASES["gpt2"])
    assert loaded.memory_fit == kept.memory_fit
    given = tokens(B=1, S=100)
    assert np.array_equal(loaded(tokens=given)["logits"], kept(tokens=given)["logits"])


@pytest.mark.parametrize("backend", ["numpy", "tvm"])
def test_sizes_that_no_memory_holds_are_told_as_such(backend: str, tmp_path: Path) -> None:
    """The error does not blame the model file."""
    path = tmp_path / "small.treadle"
    t.compile("gpt2", backend="numpy", **SMALL).save(path)
    with pytest.raises(BackendError) as refused:
        t.load_artifact(path, backend=backend, target=Target("cpu"), memory="1MB", sizes={"B": 10**18, "S": 16})
    assert refused.value.what == "these sizes need more memory than is addressable"
    assert refused.value.received == f"B={10**18}, S=16"


def test_of_too_many_ways_those_are_tried_that_none_beats_in_time_and_memory() -> None:
    """The first alternative, the last, some between them, and others up to the limit are tried, in their original
    order.
    """
    variant = Variant(Graph("any"))
    needs = [90, 95, 80, 85, 70, 60, 65, 50, 55, 40]
    found = [Candidate(variant, (), n, float(at)) for at, n in enumerate(needs)]
    for most, kept in (
        (10, needs),
        (8, [90, 95, 80, 70, 60, 50, 55, 40]),
        (6, [90, 80, 70, 60, 50, 40]),
        (3, [90, 70, 40]),
        (1, [90]),
    ):
        assert [each.bytes for each in few_of(found, most)] == kept


def test_the_least_is_not_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for the smallest budget, and the number of partitions of the graph that are tried, are limited."""
    monkeypatch.setattr(fitted_pipeline, "SECONDS", 0.0)
    monkeypatch.setattr(fitting, "MOST_TRIED", 5)
    searched = within.__wrapped__  # so that no other test gets this result
    with pytest.raises(BackendError, match="does not fit") as refused:
        searched("gpt2", 1000)
    text = str(refused.value.within)
    assert "other ways to split it were not tried, since 0 s had passed" in text
    assert "ways were left out, since at most 5 are tried" in text
    least = int(str(refused.value.hint).partition("memory=")[2].partition(",")[0])
    kept = searched("gpt2", least)  # the suggested budget works, though a smaller one might too
    assert kept.memory_fit is not None and kept.memory_fit.peak <= least
