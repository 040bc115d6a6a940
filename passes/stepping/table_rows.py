"""The greatest number of positions of a model, from the tables that it reads at its positions.

A table of learned positions has N rows. If a graph reads row n at position n, an axis has at most N positions; if it
reads row n + 2, as OPT does, at most N - 2.
"""

from __future__ import annotations

from treadle.ir.graph import Graph, Node, Value
from treadle.ir.ops.arithmetic import Add
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.embedding_sums import EmbeddingSum
from treadle.ir.ops.indexing import Embedding, Gather, Iota
from treadle.ir.sizing.sizes import Size
from treadle.passes.fusion.attention.core import number_of


def context_of(graph: Graph, axis: str) -> int | None:
    """Return the greatest size of an axis, by its bounds and by the tables of an optimized graph. Return None if there
    is no limit.
    """
    return min((n for n in (graph.symbols[axis].upper, most_positions(graph, axis)) if n is not None), default=None)


def most_positions(graph: Graph, axis: str) -> int | None:
    """Return the greatest size of an axis at which every index of a table, counted along the axis, is a row of the
    table. Return None if the graph has no such table.
    """
    counted: dict[Value, int] = {}  # numbers from n to n + size of the axis - 1: n
    sizes = []
    for function in graph.functions.values():
        for node in function.nodes:
            first = _first_number(node, counted, Size.symbol(axis))
            if first is not None:
                counted[node.result] = first
            sizes += [rows - counted[indices] for rows, indices in _reads(node) if indices in counted]
    return min(sizes, default=None)


def _first_number(node: Node, counted: dict[Value, int], size: Size) -> int | None:
    """Return n if a node's result has the numbers n to n + size - 1 along an axis, else None."""
    if isinstance(node.op, Iota):
        return 0 if node.op.size == size else None
    values = [value for value in node.inputs if value in counted]
    if len(values) != 1 or size not in node.result.type.shape:  # a part of the numbers may lack the last one
        return None
    others = [number_of(value) for value in node.inputs if value not in counted]
    if isinstance(node.op, Add) and others[0] is not None:
        return counted[values[0]] + int(others[0])
    return counted[values[0]] if isinstance(node.op, Cast) or (node.op.only_moves and not others) else None


def _reads(node: Node) -> list[tuple[int, Value]]:
    """Return the tables that a node reads, as their constant number of rows and the indices."""
    inputs, axis = node.inputs, 0
    if isinstance(node.op, EmbeddingSum):
        pairs = list(zip(inputs[: node.op.tables], inputs[node.op.tables :], strict=True))
    elif isinstance(node.op, Embedding | Gather):
        pairs, axis = [(inputs[0], inputs[1])], node.op.axis if isinstance(node.op, Gather) else 0
    else:
        return []
    rows = [(table.type.shape[axis].constant, indices) for table, indices in pairs]
    return [(count, indices) for count, indices in rows if count is not None]
