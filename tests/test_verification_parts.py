"""Parts of verification: the tolerance, the report of a difference, and the origin of NaN and infinite values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.types import boolean, f32, i64
from treadle.runtime import roundings
from treadle.runtime.not_finite import FiniteWatch
from treadle.runtime.roundings import Moved, changed, moved_by_rounding
from treadle.runtime.verification import compare
from treadle.runtime.verification_report import (
    LOOSEST,
    BackendReport,
    Difference,
    NotFinite,
    OpFault,
    ReportLayout,
    VerificationReport,
)

NEAR, FAR, LOOSE = Difference(1e-7, 1e-5), Difference(0.1, 1e-5), Difference(0.1, 0.6)


@pytest.mark.parametrize(
    ("value", "tolerance", "exceeds", "shows_nothing"),
    [
        (0.0, 0.0, False, False),
        (1e-5, 1e-5, False, False),
        (1.1e-5, 1e-5, True, False),
        (math.nan, 1.0, True, False),
        (math.inf, math.inf, False, True),
        (0.1, 0.5, False, False),
        (0.1, 0.5000001, False, True),
        (0.0625, 0.7, False, False),
        (0.0, math.inf, False, True),
        (0.6, 0.55, True, False),
    ],
)
def test_how_far_is_too_far(value: float, tolerance: float, exceeds: bool, shows_nothing: bool) -> None:
    found = Difference(value, tolerance)
    assert (found.exceeds, found.shows_nothing) == (exceeds, shows_nothing)
    assert LOOSEST == 0.5


def test_the_worse_of_two_is_further_past_its_tolerance() -> None:
    assert NEAR.worse(FAR) == FAR.worse(NEAR) == FAR
    half, tenth = Difference(1e-6, 2e-6), Difference(1e-3, 1e-2)
    assert half.worse(tenth) == tenth.worse(half) == half
    exact = Difference(0.7, 0.0)  # for integers, the fraction of them that differ
    assert exact.worse(Difference(0.3, 0.0)) == exact
    assert Difference().worse(Difference(0.0, 1.0)) == Difference(0.0, 1.0), "the one that is known later"
    assert str(half) == "1e-06 (at most 2e-06)"


def test_explanation_of_an_op() -> None:
    fault = OpFault("gelu", "h.0", "m.py:7", FAR, None, {"B": 2})
    assert str(fault) == "gelu differs by 0.1 (at most 1e-05)    m.py:7, scope h.0"
    facts = {"op": "gelu", "scope": "h.0", "source": "m.py:7", "failure": None, "sizes": {"B": 2}}
    assert fault.as_dict() == {**facts, "difference": 0.1, "tolerance": 1e-5}
    fails = OpFault("gelu", "", "", None, "failed: no memory", {})
    assert str(fails) == "gelu failed: no memory"
    assert "tolerance" not in fails.as_dict()
    endless = OpFault("gelu", "h", "", Difference(math.inf, 1e-5), None, {}).as_dict()
    assert (endless["difference"], endless["tolerance"]) == (None, 1e-5), "which JSON can say"


@pytest.mark.parametrize(
    ("kind", "count", "weight", "fatal"),
    [("NaN", 4, False, True), ("NaN", 3, False, False), ("NaN", 3, True, True), ("infinite", 3, True, False)],
)
def test_a_model_is_at_fault_where_nothing_is_left_or_a_weight_is_none(
    kind: str, count: int, weight: bool, fatal: bool
) -> None:
    found = NotFinite("y", kind, count, 4, "log", "h.0", "m.py:7", {"B": 2}, from_a_weight=weight)
    assert found.is_fatal == fatal
    many = "all 4" if count == 4 else "3 of 4"
    assert str(found) == f"output y: {many} are {kind}, from log    m.py:7, scope h.0"
    report = VerificationReport("m", "cpu", 0, (), (found,), NEAR, (BackendReport("a", difference=NEAR),))
    assert report.passed != fatal
    assert not NotFinite("y", kind, 3, 4, "log", "", "", {}).from_a_weight


@pytest.mark.parametrize(
    ("report", "passed", "expected"),
    [
        (BackendReport("a", difference=NEAR), True, "ok     1e-07 (at most 1e-05)"),
        (BackendReport("a"), True, "ok     0 (at most 0)"),
        (BackendReport("a", refused="no torch", difference=FAR), None, "-      not run: no torch"),
        (BackendReport("a", failure="no memory"), False, "WRONG  failed: no memory"),
        (BackendReport("a", difference=FAR), False, "WRONG  0.1 (at most 1e-05)"),
        (BackendReport("a", difference=LOOSE), None, "-      inconclusive: a change of the last bits"),
        (BackendReport("a", difference=Difference(0.0, math.inf)), None, "-      inconclusive: no output is finite"),
        (
            BackendReport("a", difference=NEAR, fault=OpFault("gelu", "", "", FAR, None, {})),
            False,
            "WRONG  1e-07 (at most 1e-05)",
        ),
    ],
)
def test_the_lines_of_a_backend(report: BackendReport, passed: bool | None, expected: str) -> None:
    first, *rest = ReportLayout(["a"]).backend(report)
    assert report.passed is passed
    assert first.startswith(f"  a         {expected}")
    last = "every op alone is correct: the error is in their composition"
    if report.fault:
        last = f"first op: {report.fault}"
    assert rest == ([f"{' ' * 19}{last}"] if passed is False else [])
    facts = report.as_dict()
    assert facts["passed"] is passed
    assert ("difference" in facts) == (report.refused is None)


@pytest.mark.parametrize(
    ("rewrites", "backends", "passed"),
    [
        (NEAR, [NEAR], True),
        (NEAR, [NEAR, LOOSE], True),
        (NEAR, [NEAR, FAR], False),
        (NEAR, [LOOSE], False),
        (NEAR, [], False),
        (FAR, [NEAR], False),
    ],
)
def test_a_model_is_right_where_one_backend_was_shown_to_be(
    rewrites: Difference, backends: list[Difference], passed: bool
) -> None:
    reports = tuple([BackendReport("a", difference=each) for each in backends])
    assert VerificationReport("m", "cpu", 0, (), (), rewrites, reports).passed == passed


def test_a_report_begins_with_what_was_run() -> None:
    layout = ReportLayout(["a"])
    assert (
        layout.heading("m", "cpu", 3, [{"B": 2, "S": 5}, {}, {"B": 1, "S": 1}])
        == "m on cpu, seed 3, at B=2, S=5; B=1, S=1"
    )
    assert layout.heading("m", "cpu", 3, [{}]) == "m on cpu, seed 3"
    assert layout.rewrites(FAR) == ["  rewrites  WRONG  0.1 (at most 1e-05)"]
    assert ReportLayout(["a" * 11]).rewrites(NEAR) == ["  rewrites     ok     1e-07 (at most 1e-05)"]


# -- comparing ---------------------------------------------------------------------------------------------------------


def still(expected: Any) -> Moved:
    return Moved.between(expected, [expected])


def test_results_of_another_shape_or_kind_are_endlessly_far() -> None:
    one, none = np.ones(2), np.full(2, np.nan)
    assert compare(np.ones(3), one, still(one), 0.1, 1.0, f32[(2,)]) == Difference(math.inf)
    assert compare(one, np.array([np.nan, 1.0]), still(one), 0.1, 1.0, f32[(2,)]) == Difference(math.inf)
    assert compare(np.array([np.nan, 1.0]), one, still(one), 0.1, 1.0, f32[(2,)]).exceeds
    assert compare(none, none, still(none), 0.1, 1.0, f32[(2,)]) == Difference(0.0, math.inf)
    empty = np.ones(0)
    assert not compare(empty, empty, still(empty), 0.1, 1.0, f32[(0,)]).exceeds


def test_of_whole_numbers_a_share_is_wrong() -> None:
    expected = np.array([1, 2, 3, 4])
    moved = Moved.between(expected, [np.array([1, 2, 3, 9])])
    assert moved.undecided.tolist() == [False, False, False, True]
    assert compare(np.array([7, 2, 3, 7]), expected, moved, 0.1, 1.0, i64[(4,)]) == Difference(0.25)
    empty = np.ones(0, bool)
    assert compare(empty, empty, still(empty), 0.1, 1.0, boolean[(0,)]) == Difference(0.0)


# -- roundings ---------------------------------------------------------------------------------------------------------


def test_a_number_moves_by_the_most_of_all_runs() -> None:
    expected = np.array([1.0, 2.0, np.inf, np.nan, 5.0])
    others = [np.array([1.5, 2.0, np.inf, np.nan, np.inf]), np.array([0.75, 2.0, 3.0, 1.0, 5.0])]
    moved = Moved.between(expected, others)
    assert moved.by.tolist() == [0.5, 0.0, 0.0, 0.0, np.inf]
    assert moved.undecided.tolist() == [True, False, True, True, True]
    whole = Moved.between(np.array([1, 2]), [np.array([1, 3])])
    assert (whole.by.tolist(), whole.undecided.tolist()) == ([0, 0], [False, True])


def test_numbers_are_changed_up_or_down_by_a_spacing() -> None:
    array = np.arange(1.0, 18.0)
    found = changed(array, 0.25, np.random.default_rng(1)) / array
    assert set(found) == {0.75, 1.25}
    assert np.array_equal(found * array, changed(array, 0.25, np.random.default_rng(1)))
    assert changed(array, 0.0, np.random.default_rng(1)) is array
    whole = np.arange(3)
    assert changed(whole, 0.25, np.random.default_rng(1)) is whole
    least = changed(np.array([0.0, *[1.0] * 30]), 0.25, np.random.default_rng(1), least=1e-3)
    assert least[0] == 0
    assert set(least[1:]) == {0.75 - 1e-3, 1.25 + 1e-3}
    tiny = changed(np.ones(30), 0.25, np.random.default_rng(1), least=1e-31)
    assert set(tiny) == {0.75, 1.25}
    assert roundings._NO_NUMBER == 1e-30


def test_each_op_rounds_what_it_computes_and_no_constant() -> None:
    b = Builder(Graph("rounds"))
    x = b.input("x", "f32[2]")
    b.outputs(moved=b.rearrange(x, pattern="a -> a"), doubled=x * 2.0)
    arrays = {"x": np.array([1.0, 4.0])}
    expected = interpret(b.graph, arrays, {}, float64=True)
    found = moved_by_rounding(b.graph, arrays, {}, expected)
    assert found["moved"].by.tolist() == [0, 0], "it only moves"
    eps = f32.spacing
    assert np.all(found["doubled"].by <= 2 * expected["doubled"] * eps * 1.01)
    assert np.all(found["doubled"].by > 0) or roundings.ROUNDS == 1
    assert roundings.ROUNDS == 2
    alone = moved_by_rounding(b.graph, arrays, {}, expected, rounds=1)
    assert np.all(alone["doubled"].by <= found["doubled"].by)


def test_numbers_that_are_rounded_to_blocks_change_by_half_a_step() -> None:
    b = Builder(Graph("rounds"))
    x, encoding = b.input("x", "f32[2, 8]"), Encoding("int8_rows")
    b.outputs(y=b.decode(b.encode(x, None, to=encoding), of=encoding), alone=x + 0.0)
    arrays = {"x": np.linspace(-3, 127, 16).reshape(2, 8)}
    found = moved_by_rounding(b.graph, arrays, {}, interpret(b.graph, arrays, {}, float64=True))
    steps = np.abs(arrays["x"]).max(axis=1, keepdims=True) / 127
    most = np.max(found["y"].in_blocks, axis=1, keepdims=True) / steps
    assert np.all((most > 0.4) & (most < 1.5)), "a change by half a step rounds to the next step, and moves the steps"
    assert not np.any(found["alone"].in_blocks)


# -- NaN and infinite values -------------------------------------------------------------------------------------------


def origins(graph: Graph, inputs: dict[str, Any], weights: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    watch = FiniteWatch(graph, inputs, weights or {})
    with np.errstate(all="ignore"):
        outputs = interpret(graph, inputs, weights or {}, float64=True, watch=watch)
    found = watch.found(outputs, {"B": 2})
    assert all(each.sizes == {"B": 2} for each in found)
    return [(each.output, each.kind, each.count, each.of, each.origin, each.from_a_weight) for each in found]


def test_sources_of_nan() -> None:
    b = Builder(Graph("none"))
    x, w = b.input("x", "f32[3]"), b.parameter("w", "f32[3]")
    b.outputs(y=b.tanh(b.log(x)), z=x * w, c=x + float("inf"), i=b.cast(x > 0.0, to=i64))
    fine, none = np.ones(3), np.array([1.0, np.nan, np.nan])
    inputs = {"x": np.array([1.0, 0.0, -1.0])}
    assert origins(b.graph, inputs, {"w": fine}) == [
        ("y", "NaN", 1, 3, "log", False), ("c", "infinite", 3, 3, "a constant", False)
    ]  # fmt: skip
    assert origins(b.graph, {"x": none}, {"w": fine})[0] == ("y", "NaN", 2, 3, "input x", False)
    assert origins(b.graph, {"x": fine}, {"w": none})[0] == ("z", "NaN", 2, 3, "weight w", True)


def test_nan_of_infinite_numbers_is_told_so() -> None:
    b = Builder(Graph("none"))
    x = b.input("x", "f32[2]")
    y = b.log(x)
    b.outputs(d=y - y)
    assert origins(b.graph, {"x": np.array([0.0, 1.0])}) == [("d", "NaN", 1, 2, "sub of infinite numbers", False)]
