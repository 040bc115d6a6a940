"""Inputs for the two graphs of a certificate's claim: the cases, and the drawn numbers of each case."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from treadle.ir.builder import Builder
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph
from treadle.passes.certificates.drawn_cases import MASKED, cases_of, draw_inputs

SIZES = {"R": 3000, "T": 40}
THIRD = pytest.approx(1 / 3, abs=0.04)  # the fraction of 3000 rows; only one seed in a thousand is further off


def sides(*types: str, over: str = "exp") -> tuple[Graph, Graph]:
    """Return two copies of a graph that applies an op to the sum of the inputs."""
    b = Builder(Graph("g"))
    x, *others = [b.input(name, type) for name, type in zip("xyz", types, strict=False)]
    for other in others:
        x = x + other
    b.outputs(y=b.linear(x, b.parameter("w", "f32[4, T]")) if over == "linear" else getattr(b, over)(x))
    return b.graph, b.graph


def drawn(pair: tuple[Graph, Graph], case: str = "plain", seed: int = 0, name: str = "x") -> np.ndarray[Any, Any]:
    return draw_inputs(pair, SIZES, case, [seed], frozenset())[name]


def share(truths: Any) -> float:
    return float(np.mean(truths))


def test_cases_are_those_that_could_tell_something() -> None:
    added = ("plain", "masked", "extreme", "masked by -1e4", "masked by -1e30", "masked by the least")
    assert cases_of(sides("f32[R, T]", over="neg"), frozenset()) == ("plain", "masked")
    assert cases_of(sides("f32[R, T]"), frozenset()) == ("plain", "masked", "extreme")
    two = sides("f32[R, T]", "f32[R, T]")
    assert cases_of(two, frozenset()) == added
    assert cases_of(two, frozenset("x")) == added
    assert cases_of(two, frozenset("xy")) == added[:3]


def test_plain_numbers_are_normal() -> None:
    found = drawn(sides("f32[R, T]"))
    assert abs(found.mean()) < 0.02 and found.std() == pytest.approx(1, abs=0.02)
    others = [drawn(sides("f32[R, T]"), seed=1), drawn(sides("f32[R, T]"), "extreme")]
    others.append(drawn(sides("f32[R, T]", "f32[R, T]"), name="y"))
    assert all(not np.array_equal(found, other) for other in others)
    assert np.array_equal(found, drawn(sides("f32[R, T]")))


@pytest.mark.parametrize(("over", "most"), [("exp", 30.0), ("linear", 3.0)])
def test_extreme_numbers_are_zero_level_or_wide(over: str, most: float) -> None:
    found = drawn(sides("f32[R, T]", over=over), "extreme")
    zero = np.all(found == 0, axis=1)
    level = np.all(found == found[:, :1], axis=1) & ~zero
    wide = found[~zero & ~level]
    assert (share(zero), share(level)) == (THIRD, THIRD)
    assert (wide.min(), wide.max()) == (-most, most)
    assert np.median(np.abs(wide)) == pytest.approx(0.6745 * most / 2, rel=0.03)
    assert found[level].std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [("f32", [-1e9, -1e4, -1e30, -float(np.finfo(np.float32).max)]), ("f16", [-65504.0, -1e4, -65504.0, -65504.0])],
)
def test_addends_of_an_exponential_mask_by_finite_numbers(dtype: str, numbers: list[float]) -> None:
    """All keys of a row, half of them, or none are masked."""
    pair = sides(f"{dtype}[R, T]", f"{dtype}[R, T]")
    for case, number in zip(MASKED, numbers, strict=True):
        found = drawn(pair, case) == number
        every, none = np.all(found, axis=1), ~np.any(found, axis=1)
        assert (share(every), share(none)) == (THIRD, THIRD)
        assert share(found[~every & ~none]) == pytest.approx(0.5, abs=0.02)
        assert not np.any(drawn(pair, "plain") == number)


def test_operands_of_an_exponential_are_masked_by_infinity() -> None:
    assert share(np.all(drawn(sides("f32[R, T]"), "masked") == -math.inf, axis=1)) == THIRD
    assert np.all(np.isfinite(drawn(sides("f32[R, T]", over="neg"), "masked")))
    assert np.all(np.isfinite(draw_inputs(sides("f32[R, T]"), SIZES, "masked", [0], frozenset("x"))["x"]))


def test_three_of_four_truths_hold_and_rows_of_them_none_or_all() -> None:
    pair = sides("bool[R, T]", over="logical_not")
    assert share(drawn(pair)) == pytest.approx(0.75, abs=0.01)
    found = drawn(pair, "masked")
    every, none = np.all(found, axis=1), ~np.any(found, axis=1)
    assert (share(every), share(none)) == (THIRD, THIRD)
    assert share(found[~every & ~none]) == pytest.approx(0.75, abs=0.02)


def test_whole_numbers_go_past_every_size_and_mask_by_zero() -> None:
    pair = sides("i64[R, T]", over="neg")
    found = drawn(pair)
    assert found.min() == 0 and found.max() == 3001
    masked = drawn(pair, "masked")
    zero = np.all(masked == 0, axis=1)
    assert share(zero) == THIRD
    assert share(masked[~zero] < 2) == pytest.approx(0.5, abs=0.02)
    small = drawn(sides("u8[R, T]", over="abs"))
    assert small.dtype == np.uint8 and (small.min(), small.max()) == (0, 255)


def looked_up(rows: int, others: int) -> tuple[Graph, Graph]:
    """Two tables indexed by the same indices"""
    made = []
    for count in (rows, others):
        b = Builder(Graph("g"))
        b.outputs(y=b.embedding(b.input("w", f"f32[{count}, 4]"), b.input("i", "i64[R, T]")))
        made.append(b.graph)
    return made[0], made[1]


def test_indices_point_inside_on_both_sides() -> None:
    found = drawn(looked_up(7, 9), name="i")
    assert (found.min(), found.max()) == (0, 6)
    assert (drawn(looked_up(9, 7), "masked", name="i")).max() == 6
    with pytest.raises(TreadleError, match="no index is valid for all of its uses"):
        drawn(looked_up(7, 0), name="i")


def test_a_size_is_told_by_an_input_of_nothing_but_zeros() -> None:
    b = Builder(Graph("g"))
    b.outputs(y=b.exp(b.input("x", "f32[R]")), s=b.logical_not(b.input("size T", "bool[T]")))
    assert not drawn((b.graph, b.graph), name="size T").any()
