"""Graphs as facts: parameters, costs, ports, functions. Also the comment lines before a graph's text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from treadle.backends.protocol import Port
from treadle.ir.analysis.cost import graph_cost, parameter_bytes, parameter_count, state_bytes
from treadle.ir.analysis.run_counts import count_calls
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.program.backend_choice import choose_backend
from treadle.reporting import Facts
from treadle.reporting.counts import counted, human, sizes_text


def graph_facts(graph: Graph, sizes: Mapping[str, int]) -> Facts:
    """Return facts of a graph as data: the parameters; the inputs, outputs and cost of a run of the last entry at these
    sizes; and the number of calls of each function. States are included if there are any, and entries if there are
    several.
    """
    cost = graph_cost(graph, sizes)
    main = graph.main
    facts: Facts = {
        "model": graph.name,
        "parameters": parameter_count(graph),
        "parameter_bytes": parameter_bytes(graph),
        "sizes": dict(sizes),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "inputs": [port_facts(Port(v.name, v.type)) for v in main.inputs],
        "outputs": [port_facts(Port(name, v.type)) for name, v in main.outputs.items()],
        "functions": [
            {"name": f.name, "ops": len(f.nodes), "calls": calls}
            for f, calls in zip(graph.functions.values(), count_calls(graph).values(), strict=True)
        ],
    }
    if graph.entry_names != ("main",):
        facts["entries"] = list(graph.entry_names)
    if graph.states:
        facts["states"] = [
            {**port_facts(Port(name, v.type)), "bytes": v.type.bytes_at(sizes)} for name, v in graph.states.items()
        ]
        facts["state_bytes"] = state_bytes(graph, sizes)
    return facts


def port_facts(port: Port) -> Facts:
    return {"name": port.name, "dtype": str(port.dtype), "axes": list(port.axes)}


def graph_header(facts: Facts, stage: str) -> str:
    """Return facts of a graph as comment lines that can precede the graph's text."""
    functions = [f for f in facts["functions"] if f["name"] not in facts.get("entries", ["main"])]
    ops = sum(f["ops"] for f in facts["functions"])
    blocks = ", ".join(f"{f['name']} is called {counted(f['calls'], 'time')}" for f in functions)
    lines = [
        f"{facts['model']} {stage}: {counted(ops, 'op')}" + (f"; {blocks}" if blocks else ""),
        f"{counted(facts['parameters'], 'parameter')}, {human(facts['parameter_bytes'], 'B')}",
        f"a run {'at ' + sizes_text(facts['sizes']) if facts['sizes'] else ''}".strip()
        + f": {human(facts['flops'], 'FLOPs')}, {human(facts['bytes'], 'B')} read and written",
    ]
    if "states" in facts:
        lines.append(f"{counted(len(facts['states']), 'state')}, {human(facts['state_bytes'], 'B')}")
    return "".join(f"# {line}\n" for line in lines)


def backend_source(graph: Graph, backend: str, target: Target) -> str:
    """Return the source that a backend emits for a graph and a target. The source does not depend on the weights, so
    zeros are used.
    """
    weights = {
        name: np.zeros(value.type.storage_type.evaluate({}), value.type.storage_type.dtype.numpy)
        for name, value in graph.parameters.items()
    }
    return choose_backend(backend, graph, target).backend.compile(graph, target, weights).source
