"""The tolerance that verification, certificates and the fuzzer share, and the quantity that it is relative to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from treadle.ir.analysis.tolerances import ROUNDINGS, Distance, coarsest_spacing, room, spacing_of
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.types import DTYPES


@pytest.mark.parametrize(("dtype", "spacing"), [("f64", 2**-52), ("f32", 2**-23), ("f16", 2**-10), ("bf16", 2**-7)])
def test_the_spacing_is_the_dtypes(dtype: str, spacing: float) -> None:
    assert spacing_of(DTYPES[dtype]) == spacing


def test_whole_numbers_have_no_spacing() -> None:
    assert {spacing_of(DTYPES[name]) for name in ("i64", "i8", "u8", "bool")} == {0.0}


def graph(dtypes: list[str]) -> Graph:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[3]")
    b.outputs(**{dtype: b.cast(x, to=dtype) for dtype in dtypes})
    return b.graph


def test_the_coarsest_dtype_of_a_graph_tells_its_spacing() -> None:
    assert coarsest_spacing(graph(["f32", "i64"])) == 2**-23
    assert coarsest_spacing(graph(["f32", "bf16", "f16"])) == 2**-7


def test_graphs_without_computation_round_nothing() -> None:
    b = Builder(Graph("g"))
    b.outputs(y=b.input("x", "f32[3]"))
    assert coarsest_spacing(b.graph) == 0.0


def test_room_is_eight_roundings_of_the_numbers_and_of_what_they_move_by() -> None:
    assert room(2**-23, 4.0, 0.0) == ROUNDINGS * 2**-21
    assert room(2**-23, 4.0, 1.0, growth=math.sqrt(9)) == ROUNDINGS * (2**-21 + 3)
    rows = room(0.5, np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    assert rows.tolist() == [4.0, 16.0]


def test_a_distance_is_of_plain_numbers_alone() -> None:
    wanted = np.array([1.0, -4.0, -1e30, math.inf, math.nan])
    got = np.array([1.5, -4.0, -0.6e30, 1e38, 7.0])
    off = Distance.between(got, wanted, huge=1e30)
    assert off.plain.tolist() == [True, True, False, False, False]
    assert (off.scale, off.most, off.lost) == (4.0, 0.5, False)


@pytest.mark.parametrize("got", [0.0, 1e30, -0.4e30, math.nan])
def test_a_huge_number_that_becomes_another_is_lost(got: float) -> None:
    assert Distance.between(np.array([got]), np.array([-1e30]), huge=1e30).lost


def test_the_scale_of_zeros_is_one() -> None:
    assert Distance.between(np.zeros(3), np.zeros(3), huge=1e30).scale == 1.0
    assert Distance.between(np.zeros(0), np.zeros(0), huge=1e30).most == 0.0


def test_an_unwanted_nan_is_no_agreement() -> None:
    assert math.isnan(Distance.between(np.array([math.nan, 1.0]), np.ones(2), huge=1e30).most)
