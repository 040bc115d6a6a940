"""Computations on weights and constants alone. Their results are the same at every call, so they need to run only
once.
"""

from __future__ import annotations

from collections.abc import Callable

from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.text.attributes import attribute_symbols


def weight_only_nodes(function: Function, calls: Callable[[Node], bool] | None = None) -> dict[Node, None]:
    """Return the nodes that read only weights and constants, in program order.

    Nodes that read only constants are included only if a node that reads weights needs them; constant folding covers
    the others. Excluded are calls for which `calls` returns False, nodes that depend on a size that is known only at
    the call, and collectives.
    """
    fixed: set[Value] = set(function.parameters.values())
    weighty = set(fixed)
    nodes: list[Node] = []
    for node in function.nodes:
        if not _is_fixed(node, fixed, calls):
            continue
        nodes.append(node)
        fixed.update(node.results)
        if any(v in weighty for v in node.inputs):
            weighty.update(node.results)
    return dict.fromkeys(needed_nodes(nodes, weighty))


def values_of_weights(graph: Graph) -> set[Value]:
    """Return the weights of all functions, and all values that are computed from weights alone.

    An argument of a called function is included if every call passes such a value.
    """
    found: set[Value] = set()
    passed: dict[Value, bool] = {}
    entries = graph.entries
    for function in reversed(graph.functions.values()):  # callers first
        found.update(
            v for v in function.parameters.values() if not v.type.symbols and (function in entries or passed.get(v))
        )
        for node in function.nodes:
            callee = graph.callee(node)
            if callee is not None:
                for formal, value in zip(callee.arguments, node.operands, strict=True):
                    passed[formal] = passed.get(formal, True) and value in found
            elif any(v in found for v in node.inputs) and _is_fixed(node, found, None):
                found.update(node.results)
    return found


def is_made_of_weights(value: Value) -> bool:
    """Return True if a value is a weight, or computed from weights alone by ops that `bind` may run.

    `bind` runs no calls, no collectives, and no ops whose attributes hold symbols.
    """
    waiting, seen = [value], {value}
    while waiting:
        each = waiting.pop()
        if each.node is None:
            if each.kind != "parameter" and each.literal is None:
                return False
        elif each.node.op.callee is not None or each.node.op.meets_ranks or attribute_symbols(each.node.op):
            return False
        else:
            waiting += [v for v in each.node.inputs if v not in seen]
            seen.update(each.node.inputs)
    return True


def _is_fixed(node: Node, fixed: set[Value], calls: Callable[[Node], bool] | None) -> bool:
    if node.op.callee is not None and (calls is None or not calls(node)):
        return False
    if node.op.meets_ranks:
        return False
    if attribute_symbols(node.op) or any(v.type.symbols for v in node.results):
        return False
    return all(v in fixed or v.literal is not None for v in node.inputs)
