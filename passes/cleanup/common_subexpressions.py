"""Common subexpressions: compute equal expressions once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hashing import op_key
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """a = op(x, y); b = op(x, y)   -->   a = op(x, y); b = a

    Two nodes are merged if their ops, attributes and operands are equal; operands are equal if they are one value, or
    constants of equal dtype, shape and bits. The first node keeps its position, scope and source line. Calls of one
    function on the same values are merged as well. Ops that update a state and collectives are never merged. The pass
    works within a function, not across functions.
    """

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        known: dict[Any, Node] = {}
        merged: dict[Value, Value] = {}
        kept: list[Node] = []
        for node in function.nodes:
            if merged and any(v in merged for v in node.inputs):
                node.operands = tuple(v if v is None else merged.get(v, v) for v in node.operands)
            key = (op_key(node.op), *[v if v is None or v.literal is None else v.literal for v in node.operands])
            first = node if node.op.updates or node.op.meets_ranks else known.setdefault(key, node)
            if first is node:
                kept.append(node)
            else:
                merged.update(zip(node.results, first.results, strict=True))
                log.match(self.name, function, node, created=(first,))
        changes = len(function.nodes) - len(kept)
        function.nodes = kept
        function.replace_results(lambda v: merged.get(v, v))
        return changes
