"""Programs for the tests of passes: texts, numbers, and decomposed functions that passes should recognise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np

from treadle.ir.graph import Graph, Value
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import Type
from treadle.passes.framework.manager import Optimized, Pass, PassManager

SIZES = {"B": 2, "S": 3, "N": 2}


def program(takes: str, gives: str, *lines: str, weights: Sequence[str] = ()) -> str:
    """Return the text of a graph with one function; the last line names its outputs."""
    parameters = ["  parameters {", *[f"    {w}" for w in weights], "  }"] if weights else []
    body = [f"    {line}" for line in lines]
    return "\n".join(
        ["graph g {", "  symbols B, S", *parameters, f"  main({takes}) -> ({gives}) {{", *body, "  }", "}"]
    )


def optimize(text: str, *passes: Pass) -> Optimized:
    return PassManager(passes).run(parse_graph(text))


def draw(type: Type, rng: np.random.Generator) -> Any:
    shape = type.evaluate(SIZES)
    if type.dtype.kind == "bool":
        return rng.random(shape) < 0.5
    if type.dtype.is_int:
        return rng.integers(0, 5, shape).astype(type.dtype.numpy)
    return rng.standard_normal(shape)


def numbers(graph: Graph) -> dict[str, Any]:
    """Return the graph's outputs in float64, for inputs and weights that are determined by their names."""

    def drawn(name: str, value: Value) -> Any:
        return draw(value.type, np.random.default_rng(crc32(repr(name).encode())))

    inputs = {v.name: drawn(v.name, v) for v in graph.main.inputs}
    weights = {name: drawn(name, v) for name, v in graph.parameters.items()}
    with np.errstate(invalid="ignore"):  # a signalling NaN, widened
        return interpret(graph, inputs, weights, float64=True)


def assert_same_numbers(before: Graph, after: Graph) -> None:
    """Assert that results are equal within float32's rounding.

    The arithmetic is in float64, but a constant such as sqrt(1/2) was written into the graph in float32, while the op
    that replaces it computes it exactly. There are few such constants, and no cancellation.
    """
    wanted, got = numbers(before), numbers(after)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(
            got[name], array, rtol=0, atol=4 * np.finfo(np.float32).eps * (1 + np.abs(array).max())
        )


GELU = ["a = mul(x, 0.5)", "b = mul(x, 0.70710678)", "c = erf(b)", "d = add(c, 1.0)", "e = mul(a, d)", "return y = e"]
LAYER_NORM = [
    "m = reduce_mean(x, axes=[-1], keep=true)",
    "c = sub(x, m)",
    "s = mul(c, c)",
    "v = reduce_mean(s, axes=[-1], keep=true)",
    "e = add(v, 1e-05)",
]
