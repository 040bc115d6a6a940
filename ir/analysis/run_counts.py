"""The number of calls of each function, and of ops of each name, in one run of a graph."""

from __future__ import annotations

from collections import Counter

from treadle.ir.graph import Graph


def count_calls(graph: Graph) -> dict[str, int]:
    """Return the number of times that one run calls each function. The functions are in the graph's order."""
    calls = dict.fromkeys(graph.functions, 0)
    calls |= dict.fromkeys(graph.entry_names, 1)
    for function in reversed(graph.functions.values()):
        for node in function.nodes:
            if node.op.callee is not None:
                calls[node.op.callee] += calls[function.name]
    return calls


def count_run_ops(graph: Graph) -> Counter[str]:
    """Return the number of ops of each name that one run computes, including the ops in called functions."""
    calls = count_calls(graph)
    ops: Counter[str] = Counter()
    for function, node in graph.walk():
        if node.op.callee is None:
            ops[node.op.name] += calls[function.name]
    return ops
