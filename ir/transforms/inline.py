"""Inlining: replacing calls by the body of the function.

    x1 = h(x) with h.0   -->   ln_1 = layer_norm(x, $h.0.ln_1.weight, ...)      # scope h.0.ln_1

The call's weights and states replace the function's. The call's scope is prefixed to the scopes of the function's
nodes.
"""

from __future__ import annotations

from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.transforms.clone import clone_node, clone_value, copied_value

MOST_NODES = 1_000_000


def inline_calls(graph: Graph, *, most_nodes: int = MOST_NODES) -> Graph:
    """Return a graph without calls that computes the same. It has only the entries; weights and states keep their
    names, and scopes are joined.

    Raises GraphError if its functions would have more than `most_nodes` nodes together (a few functions that call each
    other twice can expand to any number), or for a call that does not match or precedes its function.
    """
    flat: dict[str, Function] = {}
    left = most_nodes
    for function in graph.functions.values():
        left -= _unfolded_count(function, flat)
        if left < 0:
            raise GraphError(
                f"the graph without calls is too large, in {function.name}", hint=f"at most {most_nodes} nodes"
            )
        flat[function.name] = _inlined(function, flat)
    result = Graph(graph.name)
    result.symbols = dict(graph.symbols)
    result.initial, result.generated = dict(graph.initial), dict(graph.generated)
    result.entry_names = graph.entry_names
    result.functions = {name: flat[name] for name in graph.entry_names}
    return result


def inline_function(graph: Graph, function: Function) -> Function:
    """Return a copy of one function of a graph without calls. Raises GraphError as `inline_calls` does."""
    part = Graph(graph.name)
    part.functions = {each.name: each for each in graph.needed_by(function)}
    part.entry_names = (function.name,)
    return inline_calls(part).functions[function.name]


def _unfolded_count(function: Function, flat: dict[str, Function]) -> int:
    """Return the number of nodes of the function with its calls inlined. Raises GraphError for a call that does not
    match.
    """
    count = 0
    for node in function.nodes:
        name = node.op.callee
        callee = flat.get(name) if name is not None else None
        if name is not None and callee is None:
            raise GraphError(f"{function.name} calls {name!r}, which does not come before it")
        if callee is not None and (len(callee.arguments), len(callee.results)) != (
            len(node.operands),
            len(node.results),
        ):
            raise GraphError(f"{function.name}: a call of {callee.name} does not match its signature")
        count += len(callee.nodes) if callee is not None else 1
    return count


def _inlined(function: Function, flat: dict[str, Function]) -> Function:
    """Return a copy of the function in which calls are replaced by the bodies in `flat`."""
    copy = Function(function.name)
    values: dict[Value | None, Value | None] = {None: None}
    for value in function.inputs:
        values[value] = made = clone_value(value)
        copy.inputs.append(made)
    for name, value in function.parameters.items():
        values[value] = copy.parameters[name] = clone_value(value)
    for name, value in function.states.items():
        values[value] = copy.states[name] = clone_value(value)
    for node in function.nodes:
        if node.op.callee is None:
            copy.nodes.append(clone_node(node, values, function))
            continue
        callee = flat[node.op.callee]
        inner: dict[Value | None, Value | None] = {None: None}
        for formal, actual in zip(callee.arguments, node.operands, strict=True):
            inner[formal] = copied_value(actual, values, function) if actual is not None else None
        for part in callee.nodes:
            made_node = clone_node(part, inner, callee)
            made_node.scope = ".".join(filter(None, (node.scope, part.scope)))
            copy.nodes.append(made_node)
        for old, formal in zip(node.results, callee.results, strict=True):
            values[old] = copied_value(formal, inner, callee)
    copy.outputs = {name: copied_value(value, values, function) for name, value in function.outputs.items()}
    copy.updated = {name: copied_value(value, values, function) for name, value in function.updated.items()}
    return copy
