"""Comparisons of numbers that are computed from positions: folded only if they are the same at every position."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.framework.manager import PassManager


def _steps(b: Builder, i: Expr, before: int) -> Expr:
    """Return the difference of each position and the one before it, where `before` comes before the first."""
    first = b.slice(i, axis=1, stop=1) + before
    joined = b.concat(first, i, axis=1)
    return i - b.slice(joined, axis=1, stop=i.shape[1])


@pytest.mark.parametrize(
    ("before", "text"),
    [(-1, "packed texts, as transformers finds them"), (-2, "a first step of two"), (0, "a first step of zero")],
)
def test_a_comparison_of_positions_is_folded_if_it_is_constant(before: int, text: str) -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, S]")
    i = b.expand(b.rearrange(b.iota(size=x.shape[1]), pattern="s -> 1 s"), shape=x.shape)
    texts = b.cumsum(b.not_equal(_steps(b, i, before), 1).cast("i64"), axis=1)
    same = b.equal(b.rearrange(texts, pattern="b s -> b s 1"), b.rearrange(texts, pattern="b s -> b 1 s"))
    b.outputs(same=same, x=x)
    array = np.zeros((2, 5), np.float32)
    expected = interpret(b.graph, {"x": array})["same"]
    made = PassManager((Canonicalize(), DeadCode())).run(b.graph).graph
    np.testing.assert_array_equal(interpret(made, {"x": array})["same"], expected)
    ops = [node.op.name for node in made.main.nodes]
    assert ("equal" in ops) == (before != -1), text
