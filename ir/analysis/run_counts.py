"""What one run of a graph enters and computes: calls of each function, ops of each name."""

from __future__ import annotations

from collections import Counter

from treadle.ir.graph import Graph


def count_calls(graph: Graph) -> dict[str, int]:
    """How often one run enters each function, in the graph's order."""
    calls = dict.fromkeys(graph.functions, 0)
    calls |= dict.fromkeys(graph.entry_names, 1)
    for function in reversed(graph.functions.values()):
        for node in function.nodes:
            if node.op.callee is not None:
                calls[node.op.callee] += calls[function.name]
    return calls


def count_run_ops(graph: Graph) -> Counter[str]:
    """How many ops of each name one run computes, calls of functions opened."""
    calls = count_calls(graph)
    ops: Counter[str] = Counter()
    for function, node in graph.walk():
        if node.op.callee is None:
            ops[node.op.name] += calls[function.name]
    return ops
