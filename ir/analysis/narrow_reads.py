"""Weights that a graph reads in a narrower dtype only: every reader rounds them first."""

from __future__ import annotations

from treadle.ir.graph import Graph, Value
from treadle.ir.ops.elementwise import Cast
from treadle.ir.types import DType


def read_only_in(dtype: DType, graph: Graph) -> frozenset[str]:
    """Return the names of weights that are cast to `dtype` wherever they are read, so that rounding them first changes
    no bit of any result.

    Elements may be moved before the cast. An unused weight is not included.
    """
    wide: set[Value] = set()
    read: set[Value] = set()
    for function in graph.functions.values():  # callees first
        wide.update(function.outputs.values())
        for node in reversed(function.nodes):
            callee = graph.callee(node)
            for place, value in enumerate(node.operands):
                if value is None:
                    continue
                read.add(value)
                if callee is not None:
                    rounds = callee.arguments[place] not in wide
                elif isinstance(node.op, Cast):
                    rounds = node.op.to is dtype
                else:
                    rounds = node.op.only_moves and wide.isdisjoint(node.results)
                if not rounds:
                    wide.add(value)
    values = [each for entry in graph.entries for each in entry.parameters.items()]
    unfit = {name for name, value in values if value in wide}
    return frozenset(name for name, value in values if value in read and name not in unfit)
