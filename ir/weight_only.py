"""What a function computes from weights and constants alone: the same at every call, so that it need be done once."""

from __future__ import annotations

from treadle.ir.graph import Function, Node, Value


def weight_only_nodes(function: Function) -> dict[Node, None]:
    """The nodes that read weights and constants and nothing else, in program order.

    What is made of constants alone belongs to them only as far as they read it: folding is there for the rest. Calls
    do not, nor do results whose size is known only at the call.
    """
    fixed: set[Value] = set(function.parameters.values())
    weighty = set(fixed)
    nodes: list[Node] = []
    for node in function.nodes:
        if node.op.callee is not None or any(v.type.symbols for v in node.results):
            continue
        if all(v in fixed or v.literal is not None for v in node.inputs):
            nodes.append(node)
            fixed.update(node.results)
            if any(v in weighty for v in node.inputs):
                weighty.update(node.results)
    needed: set[Value] = set()
    found: list[Node] = []
    for node in reversed(nodes):
        if node.results[0] in weighty or needed.intersection(node.results):
            found.append(node)
            needed.update(node.inputs)
    return dict.fromkeys(reversed(found))
