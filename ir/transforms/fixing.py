"""Replacement of symbols that can have only one size by numbers."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.ir.graph import Graph, Value
from treadle.ir.ops.call import Call
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.transforms.clone import clone_graph


def bounded(graph: Graph, most: Mapping[str, int]) -> Graph:
    """Return a copy of a graph whose symbols have these upper bounds. Raises GraphError if the bounds of a symbol
    allow no size.
    """
    made = clone_graph(graph)
    for symbol, size in most.items():
        made.bound(symbol, Bounds(made.symbols[symbol].lower, size))
    return made


def fix_single_sizes(graph: Graph) -> None:
    """Replace each symbol that can only be 1 by 1, so that its axis is not split."""
    fix_sizes(graph, {name: b.lower for name, b in graph.symbols.items() if b.lower == b.upper})


def fix_sizes(graph: Graph, values: Mapping[str, int]) -> None:
    """Replace symbols by numbers in every function."""
    if not values:
        return

    def fix(value: Value) -> None:
        value.type = value.type.substitute(values)

    for function in graph.functions.values():  # callees first
        for value in function.arguments:
            fix(value)
        for node in function.nodes:
            callee = graph.callee(node)
            node.op = node.op.substitute(values) if callee is None else Call.of(callee)
            types = node.op.infer_for(node.operands)
            for result, type in zip(node.results, types, strict=True):
                result.type = type
