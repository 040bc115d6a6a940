"""`model_explorer_record`: the stages of a build as graphs of Google's Model Explorer.

    model-explorer gpt2.json

A file is one collection, with a graph for each pass that changed something. Scopes become namespaces. Calls are
expanded, so every layer has its own nodes. Facts become attributes. The format is defined by `graph_builder.py` in the
package ai-edge-model-explorer. `node_data` makes a file with a number for each node, which the application shows as
colors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.comparing.builds import Build
from treadle.comparing.run_nodes import Read, RunNode, parts_of, run_of
from treadle.exporting.node_facts import NodeFacts, stages_of
from treadle.files.shown_names import printable
from treadle.ir.graph import Graph, Value

_Attributes = list[dict[str, str]]


def model_explorer_record(build: Build, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the stages of a build for Model Explorer.

    sizes  the sizes of symbolic axes for FLOPs and bytes
    """
    graphs = [
        {"id": f"{number} {stage}", "nodes": _nodes(graph, NodeFacts(graph, sizes, build))}
        for number, (stage, graph) in enumerate(stages_of(build))
    ]
    return {"label": _text(build.name), "graphs": graphs, "graphSorting": "name_asc"}


def node_data(graph_id: str, values: Mapping[int, float], name: str = "milliseconds") -> dict[str, Any]:
    """Return node data for one graph of a file: numbers by the number of a node in a run. `name` is displayed above
    them.
    """
    results = {str(number): {"value": value} for number, value in sorted(values.items())}
    gradient = [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#d62728"}]
    return {graph_id: {"name": name, "results": results, "gradient": gradient}}


def _nodes(graph: Graph, facts: NodeFacts) -> list[dict[str, Any]]:
    run = run_of(graph)
    found: list[dict[str, Any]] = []
    sources: dict[Read, str] = {}
    for entry in graph.entries:
        values = {("input", v.name, 0): v for v in entry.inputs}
        values |= {("parameter", n, 0): v for n, v in entry.parameters.items() if n not in graph.derived_weights}
        values |= {("state", name, 0): v for name, v in entry.states.items()}
        for read, value in values.items():
            if read not in sources:
                sources[read] = f"v{len(sources)}"
                found.append(_source(sources[read], read, value))
    found += [_node(each, sources, facts) for each in run.nodes]
    return found


def _source(identifier: str, read: Read, value: Value) -> dict[str, Any]:
    """Return the node of an input, a weight or a state. A weight is in the namespace of its scope."""
    kind, name = read[0], str(read[1])
    scope, _, last = name.rpartition(".") if kind != "input" else ("", "", name)
    return {
        "id": identifier,
        "label": _text(last),
        "namespace": _namespace(scope),
        "attrs": _pairs({"kind": {"parameter": "weight"}.get(kind, kind), "name": name, "type": str(value.type)}),
        "incomingEdges": [],
        "outputsMetadata": [{"id": "0", "attrs": _pairs({"shape": str(value.type)})}],
    }


def _node(each: RunNode, sources: Mapping[Read, str], facts: NodeFacts) -> dict[str, Any]:
    node = each.node
    names = node.op.operand_names(len(node.operands))
    edges, constants, inputs = [], {}, []
    for at, (read, value) in enumerate(zip(each.reads, node.operands, strict=True)):
        if value is None:
            continue
        inputs.append({"id": str(at), "attrs": _pairs({"__tensor_tag": names[at], "type": str(value.type)})})
        if read[0] == "constant":
            scalar = value.literal is not None and value.literal.shape == ()
            constants[names[at]] = str(value.literal.scalar) if scalar and value.literal else str(value.type)
            continue
        source = str(read[1]) if read[0] == "result" else sources.get((read[0], read[1], 0))
        if source is not None:
            edges.append({"sourceNodeId": source, "sourceNodeOutputId": str(read[2]), "targetNodeInputId": str(at)})
    cost = facts.cost(node)
    attributes = {
        **facts.attributes(node),
        **constants,
        "axis rule": facts.rule(node),
        "line": each.line,
        "scope": each.scope,
        "function": each.function,
        "FLOPs": f"{cost.flops:,}",
        "bytes": f"{cost.bytes:,}",
        "kernel": facts.kernel(node),
    }
    results = [
        {
            "id": str(v.index),
            "attrs": _pairs(
                {"shape": str(v.type), "layout": "" if v.layout is None else str(v.layout), "storage": facts.storage(v)}
            ),
        }
        for v in node.results
    ]
    return {
        "id": str(each.number),
        "label": each.op,
        "namespace": _namespace(each.scope),
        "attrs": _pairs(attributes),
        "incomingEdges": edges,
        "inputsMetadata": inputs,
        "outputsMetadata": results,
    }


def _namespace(scope: str) -> str:
    """Return a scope as a path. Slashes in names are replaced, since they would open further levels."""
    return "/".join(_text(part).replace("/", "|") for part in parts_of(scope) if part)


def _pairs(facts: Mapping[str, str]) -> _Attributes:
    return [{"key": key, "value": _text(value)} for key, value in facts.items() if value]


def _text(text: str) -> str:
    """Return text for display: control characters escaped, long text truncated."""
    return printable(text, 1_000) if text else ""
