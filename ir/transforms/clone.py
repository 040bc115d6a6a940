"""Copies of graphs: new values and nodes. Immutable parts are shared: ops, types, contents of constants, source
lines.
"""

from __future__ import annotations

from collections.abc import Mapping

from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value


def clone_graph(graph: Graph, known: Mapping[str, Function] | None = None) -> Graph:
    """Return a graph that equals this one, including names, scopes and source lines. No mutable object is shared.

    known   copies of some of the graph's functions, by name, which are used unchanged

    Raises GraphError if a function uses a value before its definition.
    """
    copy = Graph(graph.name)
    copy.symbols = dict(graph.symbols)
    copy.initial, copy.entry_names = dict(graph.initial), graph.entry_names
    copy.generated = dict(graph.generated)
    known = known or {}
    copy.functions = {name: known.get(name) or clone_function(f) for name, f in graph.functions.items()}
    return copy


def clone_function(function: Function, name: str | None = None) -> Function:
    """Return a copy of one function, optionally under another name. Raises GraphError as `clone_graph` does."""
    copy = Function(function.name if name is None else name)
    values: dict[Value | None, Value | None] = {None: None}
    for value in function.inputs:
        values[value] = made = clone_value(value)
        copy.inputs.append(made)
    for parameter, value in function.parameters.items():
        values[value] = copy.parameters[parameter] = clone_value(value)
    for state, value in function.states.items():
        values[value] = copy.states[state] = clone_value(value)
    for node in function.nodes:
        copy.nodes.append(clone_node(node, values, function))
    for output, value in function.outputs.items():
        copy.outputs[output] = copied_value(value, values, function)
    copy.updated = {state: copied_value(value, values, function) for state, value in function.updated.items()}
    return copy


def clone_value(value: Value) -> Value:
    """Return a value of the same kind, type, name, layout and constant content that belongs to no node."""
    copy = Value(value.kind, value.type, value.name, value.literal)
    if value.lies_in is not None:
        copy.lies_in = value.lies_in
    return copy


def clone_node(node: Node, values: dict[Value | None, Value | None], function: Function) -> Node:
    """Return a copy of the node. `values` maps operands to their copies; the node's results, and its constants, are
    added to it.
    """
    operands = [v if v is None else values.get(v) or copied_value(v, values, function) for v in node.operands]
    copy = Node(node.op, operands, [v.type for v in node.results], scope=node.scope, source=node.source)
    for old, new in zip(node.results, copy.results, strict=True):
        new.name = old.name
        values[old] = new
    return copy


def copied_value(value: Value, values: dict[Value | None, Value | None], function: Function) -> Value:
    """Return the copy of a value from `values`. A constant is copied on first use. Raises GraphError for an unknown
    value.
    """
    found = values.get(value)
    if found is None:
        if value.literal is None:
            raise GraphError(f"{function.name} uses {value.name} before its definition", received=repr(value))
        found = values[value] = clone_value(value)
    return found
