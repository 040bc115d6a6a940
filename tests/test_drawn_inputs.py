"""Drawn inputs for graphs: the sizes, and the exact numbers of the arrays."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.ir.analysis.drawn_inputs import Range, draw_inputs, held, index_ranges, small_sizes
from treadle.ir.builder import Builder
from treadle.ir.errors import SizeError, UsageError
from treadle.ir.graph import Graph, Value
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.types import parse_type


def inputs(*types: str) -> Graph:
    b = Builder(Graph("g"))
    for n, type in enumerate(types):
        b.input(f"x{n}", type)
    return b.graph


def test_small_sizes_are_the_least_and_then_ones_that_are_apart() -> None:
    graph = inputs("f32[B, S, T]", "f32[C, S]", "f32[]")
    assert small_sizes(graph) == [
        {"B": 1, "S": 1, "T": 1, "C": 1},
        {"B": 2, "S": 7, "T": 8, "C": 2},
        {"B": 3, "S": 18, "T": 19, "C": 3},
    ]
    graph.symbols |= {"B": Bounds(2, 2), "S": Bounds(3, 10), "T": Bounds(1, 1)}
    assert small_sizes(graph) == [
        {"B": 2, "S": 3, "T": 1, "C": 1},
        {"B": 2, "S": 7, "T": 1, "C": 2},
        {"B": 2, "S": 10, "T": 1, "C": 3},
    ]
    assert small_sizes(inputs("f32[2]")) == [{}]


def test_sizes_at_which_a_dimension_would_be_negative_are_left_out() -> None:
    graph = inputs("f32[B, S]")
    Builder(graph).slice(Builder(graph).expr(graph.main.inputs[0]), axis=1, start=7)
    assert small_sizes(graph) == [{"B": 2, "S": 7}, {"B": 3, "S": 18}]
    graph.bound("S", Bounds(1, 6))
    with pytest.raises(UsageError) as caught:
        small_sizes(graph)
    assert (caught.value.what, caught.value.received) == ("no small sizes fit the model", "B, S")
    assert str(caught.value.hint) == "sizes=[{'B': N, 'S': N}], with sizes that fit"


def test_drawn_values() -> None:
    graph = inputs("f32[B]", "i64[B]", "bool[B]", "i8[B]", "bf16[B]", "f16[B]")
    drawn = draw_inputs(graph, {"B": 4000}, [3])
    again, other = draw_inputs(graph, {"B": 4000}, [3]), draw_inputs(graph, {"B": 4000}, [4])
    assert all(np.array_equal(again[name], array) for name, array in drawn.items())
    assert not any(np.array_equal(other[name], array) for name, array in drawn.items())
    assert [a.dtype.name for a in drawn.values()] == ["float32", "int64", "bool", "int8", "float32", "float16"]
    assert abs(drawn["x0"].mean()) < 0.1 and abs(drawn["x0"].std() - 1) < 0.1
    assert abs(drawn["x2"].mean() - 0.75) < 0.04  # six standard deviations of a mean over this many numbers
    assert (drawn["x3"].min(), drawn["x3"].max()) == (1, 127)
    small = draw_inputs(graph, {"B": 5}, [0])["x1"]
    wide = np.concatenate([draw_inputs(graph, {"B": 5}, [n])["x1"] for n in range(40)])
    assert small.shape == (5,) and (wide.min(), wide.max()) == (1, 5), "drawn like lengths"
    assert np.array_equal(drawn["x4"], held(drawn["x4"], Value("input", parse_type("bf16[B]"), "x")))


def indexing(*shifts: int) -> Graph:
    """Two tables that are indexed by one input, shifted by different amounts."""
    b = Builder(Graph("g"))
    i = b.input("i", "i64[B]")
    tables = [b.input("t", "f32[5, 2]"), b.input("u", "f32[9, 2]")]
    b.outputs(**{f"y{n}": b.gather(t, i + by, axis=0) for n, (t, by) in enumerate(zip(tables, shifts, strict=True))})
    return b.graph


def test_an_index_points_inside_every_axis() -> None:
    graph = indexing(2, 1)
    assert index_ranges(graph, {"B": 3}) == {"i": Range(-1, 2)}
    seen = np.concatenate([draw_inputs(graph, {"B": 3}, [n])["i"] for n in range(40)])
    assert set(seen.tolist()) == {0, 1, 2}, "negative ones are not drawn"
    assert index_ranges(indexing(-3, -3), {"B": 3}) == {"i": Range(3, 7)}
    with pytest.raises(UsageError, match="no value of input i is a valid index for every axis that it indexes"):
        draw_inputs(indexing(5, 0), {"B": 3}, [0])


def test_a_negative_size_of_an_input_is_refused() -> None:
    b = Builder(Graph("g"))
    b.outputs(y=b.concat(b.input("x", "f32[S]"), b.input("rest", "f32[S-600]"), axis=0))
    with pytest.raises(SizeError, match="input rest has a negative size, where S = 128") as caught:
        draw_inputs(b.graph, {"S": 128}, [0])
    assert caught.value.hint == "sizes for which S-600 is 0 or more"
    assert draw_inputs(b.graph, {"S": 600}, [0])["rest"].shape == (0,)


def test_ranges_meet() -> None:
    assert Range(0, 5).intersect(Range(3, 9)) == Range(3, 5)
    assert Range(0, 5).intersect(None) == Range(0, 5)
    assert Range(0, 5).shift(-2) == Range(-2, 3)
