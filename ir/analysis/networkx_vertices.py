"""A function of a graph as a networkx graph, for dominators, cuts, intervals and layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.ir.errors import GraphError
from treadle.ir.graph import Graph

if TYPE_CHECKING:
    import networkx


def networkx_graph(graph: Graph, function: str) -> networkx.MultiDiGraph:
    """Return one function of a graph as a networkx graph; see `Graph.to_networkx`. Raises GraphError for an unknown
    function.
    """
    import networkx

    if function not in graph.functions:
        raise GraphError(f"the graph has no function {function!r}", hint="one of " + ", ".join(graph.functions))
    body = graph.functions[function]
    out = networkx.MultiDiGraph(name=f"{graph.name}.{function}")
    ids: dict[object, int] = {}

    def vertex(key: object, **notes: object) -> None:
        ids[key] = len(ids)
        out.add_node(ids[key], **notes)

    for value in body.arguments:
        vertex(value, label=value.name, kind=value.kind, type=str(value.type))
    for node in body.nodes:
        for value in node.inputs:
            if value.literal is not None and value not in ids:
                vertex(value, label="constant", kind="constant", type=str(value.type))
        vertex(
            node,
            label=node.op.name,
            op=node.op.name,
            type=", ".join(str(v.type) for v in node.results),
            scope=node.scope,
            source=str(node.source or ""),
        )
        for position, operand in enumerate(node.operands):
            if operand is not None:
                origin = ids[operand.node if operand.node is not None else operand]
                out.add_edge(origin, ids[node], value=str(operand.type), result=operand.index, operand=position)
    for kind, results in ("output", body.outputs), ("updated", body.updated):
        for name, value in results.items():
            if value.literal is not None and value not in ids:
                vertex(value, label="constant", kind="constant", type=str(value.type))
            vertex((kind, name), label=name, kind=kind, type=str(value.type))
            origin = ids[value.node if value.node is not None else value]
            out.add_edge(origin, ids[kind, name], value=str(value.type), result=value.index, operand=0)
    return out
