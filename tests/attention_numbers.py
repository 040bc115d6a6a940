"""Numbers that a graph computes on drawn inputs, some of which have rows without keys; and a comparison of outputs as
expressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hashing import literal_key, op_key
from treadle.ir.interpreter import interpret
from treadle.passes.cleanup.rearrange_forms import form_of

Array = np.ndarray[Any, Any]

DRAWN_SIZES = ({"B": 3, "S": 5, "T": 7}, {"B": 2, "S": 6, "T": 3}, {"B": 1, "S": 1, "T": 2})


def draw(graph: Graph, sizes: Mapping[str, int], seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return drawn inputs and weights. The first row of a mask has no key; the first length is 0."""
    rng = np.random.default_rng(seed)

    def drawn(value: Value) -> Array:
        shape = value.type.evaluate(sizes)
        if value.type.dtype.kind == "bool" or value.name == "ones":
            made = rng.random(shape) < 0.6
            made[0] = False
            return made if value.type.dtype.kind == "bool" else made.astype(np.int64)
        if value.type.dtype.is_int:
            made = rng.integers(0, 4, shape)
            if value.name == "lengths":
                made[0] = 0
            return made
        return rng.standard_normal(shape) * 1.5

    return {v.name: drawn(v) for v in graph.main.inputs}, {n: drawn(v) for n, v in graph.parameters.items()}


def assert_equal_everywhere(before: Graph, after: Graph, tolerance: float) -> bool:
    """Compare two graphs in float64 for all drawn sizes, NaN included; return True if a NaN occurred."""
    with_nan = False
    for seed, sizes in enumerate(DRAWN_SIZES):
        inputs, weights = draw(before, sizes, seed)
        with np.errstate(all="ignore"):
            wanted = interpret(before, inputs, weights, float64=True)["y"]
            got = interpret(after, inputs, weights, float64=True)["y"]
        finite = np.where(np.isnan(wanted), 0, wanted)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * (1 + np.abs(finite).max()), equal_nan=True)
        with_nan |= bool(np.isnan(wanted).any())
    return with_nan


# -- identity --------------------------------------------------------------------------------------------------


def computed(graph: Graph) -> dict[str, dict[str, str]]:
    """Return the expression of each output of each function. Expressions include ops, attributes and constants, but
    neither the order of nodes nor the names that rearranges give to axes. Terms of attention are compared in any order,
    each with its operands.
    """
    return {name: _outputs(function) for name, function in graph.functions.items()}


def _outputs(function: Function) -> dict[str, str]:
    known: dict[Value, str] = {v: f"{v.kind} {v.name}" for v in function.arguments}

    def key(value: Value | None) -> str:
        if value is None:
            return "-"
        return literal_key(value.literal) if value.literal is not None else known[value]

    for node in function.nodes:
        text = _spelled(node, [key(v) for v in node.operands])
        known |= {v: str(hash((text, v.index))) for v in node.results}
    return {name: key(v) for name, v in function.outputs.items()}


def _spelled(node: Node, operands: list[str]) -> str:
    op: Any = node.op
    if op.name == "rearrange":
        form = form_of(op.pattern, node.inputs[0].type)
        return f"rearrange {form.before} {form.after} {', '.join(map(str, form.sizes))} {operands}"
    if op.name == "attention":
        rest = iter(operands[3:])
        terms = sorted((term.text, *(next(rest) for _ in term.operands)) for term in op.terms)
        return f"attention {op.scale} {op.softcap} {terms} {operands[:3]}"
    return f"{op_key(op)} {operands}"
