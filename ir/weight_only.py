"""What a function computes from weights and constants alone: the same at every call, so that it need be done once."""

from __future__ import annotations

from treadle.ir.graph import Function, Node, Value, needed_nodes
from treadle.ir.text.attributes import attribute_symbols


def weight_only_nodes(function: Function) -> dict[Node, None]:
    """The nodes that read weights and constants and nothing else, in program order.

    What is made of constants alone belongs to them only as far as they read it: folding is there for the rest. Calls
    do not, nor does what depends on a size that is known only at the call.
    """
    fixed: set[Value] = set(function.parameters.values())
    weighty = set(fixed)
    nodes: list[Node] = []
    for node in function.nodes:
        if node.op.callee is not None or attribute_symbols(node.op) or any(v.type.symbols for v in node.results):
            continue
        if all(v in fixed or v.literal is not None for v in node.inputs):
            nodes.append(node)
            fixed.update(node.results)
            if any(v in weighty for v in node.inputs):
                weighty.update(node.results)
    return dict.fromkeys(needed_nodes(nodes, weighty))
