"""`graph_record`: a graph as plain data for JSON. docs/graph.schema.json is its schema.

A function is listed once, with the number of times that a run calls it. A reference to the result of a node consists of
the node and the index of the result. A reference to an input, a weight or a state consists of its kind and its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.exporting.node_facts import NodeFacts
from treadle.ir.analysis.run_counts import count_calls
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.text.printer import value_names
from treadle.ir.types import Type

FORMAT, VERSION = "treadle-graph", 1


def graph_record(graph: Graph, facts: NodeFacts, stage: str = "optimized") -> dict[str, Any]:
    """Return a graph as plain data.

    facts   the facts of this graph's nodes
    stage   "declared", "optimized", or the name of a pass
    """
    calls = count_calls(graph)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": graph.name,
        "stage": stage,
        "symbols": {name: {"lower": b.lower, "upper": b.upper} for name, b in graph.symbols.items()},
        "sizes": dict(facts.sizes),
        "entries": list(graph.entry_names),
        "parameters": _values(graph.parameters),
        "states": _values(graph.states),
        "functions": [_function(graph, f, calls[f.name], facts) for f in graph.functions.values()],
    }


def node_id(function: Function, index: int) -> str:
    """Return the identifier of a node: the function's name and the node's position in it, `h/3`."""
    return f"{function.name}/{index}"


def _function(graph: Graph, function: Function, calls: int, facts: NodeFacts) -> dict[str, Any]:
    ids = {node: node_id(function, index) for index, node in enumerate(function.nodes)}
    names = value_names(graph, function)
    return {
        "name": function.name,
        "calls": calls,
        "inputs": _values({v.name: v for v in function.inputs}),
        "parameters": _values(function.parameters),
        "states": _values(function.states),
        "nodes": [_node(node, ids, names, facts) for node in function.nodes],
        "outputs": [{"name": name, "value": _reference(v, ids)} for name, v in function.outputs.items()],
        "updated": [{"name": name, "value": _reference(v, ids)} for name, v in function.updated.items()],
    }


def _node(node: Node, ids: Mapping[Node, str], names: Mapping[Value, str], facts: NodeFacts) -> dict[str, Any]:
    cost = facts.cost(node)
    results = [
        {"name": names.get(v, v.name), **_type(v.type), "layout": _layout(v), "storage": facts.storage(v) or None}
        for v in node.results
    ]
    return {
        "id": ids[node],
        "op": node.op.name,
        "callee": node.op.callee,
        "attributes": facts.attributes(node),
        "rule": facts.rule(node) or None,
        "operands": [None if v is None else _reference(v, ids) for v in node.operands],
        "results": results,
        "scope": node.scope,
        "line": None if node.source is None else str(node.source),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "kernel": facts.kernel(node) or None,
    }


def _reference(value: Value, ids: Mapping[Node, str]) -> dict[str, Any]:
    if value.node is not None:
        return {"kind": "result", "node": ids[value.node], "index": value.index}
    if value.literal is not None:
        return {"kind": "constant", "type": str(value.type), "value": _constant(value.literal)}
    return {"kind": value.kind, "name": value.name}


def _constant(literal: Literal) -> float | int | bool | str | None:
    """Return a scalar constant as a JSON value, with NaN and infinity as text; None for an array."""
    if literal.shape != ():
        return None
    number = literal.scalar
    return str(number) if isinstance(number, float) and number - number != 0 else number


def _values(values: Mapping[str, Value]) -> list[dict[str, Any]]:
    return [{"name": name, **_type(v.type), "layout": _layout(v)} for name, v in values.items()]


def _layout(value: Value) -> str | None:
    return None if value.layout is None else str(value.layout)


def _type(type: Type) -> dict[str, Any]:
    return {
        "dtype": str(type.dtype),
        "shape": [size if (size := each.constant) is not None else str(each) for each in type.shape],
        "axes": [str(dim) for dim in type.dims],
        "encoding": None if type.encoding is None else str(type.encoding),
    }
