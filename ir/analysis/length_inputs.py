"""The inputs that are lengths of rows: attention masks the keys of a row from there on, as `t.padding` says."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.ir.attention.attention_terms import Padding
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.ops.attention import Attention
from treadle.ir.sizing.sizes import Size

_KEYS = 2  # the axis of keys of k [b, h, t, d]


def row_lengths(graph: Graph) -> dict[str, Size]:
    """Return the size of the axis whose positions a row's length counts, by the name of the input with the lengths."""
    found: dict[str, Size] = {}

    def visit(function: Function, inputs: Mapping[Value | None, str]) -> None:
        for node in function.nodes:
            callee = graph.callee(node)
            if callee is not None:
                given = zip(callee.arguments, node.operands, strict=True)
                visit(callee, {own: inputs[value] for own, value in given if value in inputs})
            elif isinstance(node.op, Attention) and inputs:
                _, k, _, *operands = node.operands
                for term, (first, *_) in ((t, o) for t, o in node.op.with_operands(operands) if o):
                    if isinstance(term, Padding) and first in inputs and k is not None:
                        found[inputs[first]] = k.type.shape[_KEYS]

    visit(graph.main, {value: value.name for value in graph.main.inputs})
    return found
