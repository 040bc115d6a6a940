"""Prefetching of weights that are stored in parts: gather a layer's weights while the previous layer computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from treadle.ir.builder import Builder
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.collectives import AllGather, PassOn, StartGather, StartPass
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


@dataclass(frozen=True)
class GatherAhead(Pass):
    """a = h(x, u); b = h(a, v)   -->   start_gather(u); start_gather(v); a = h(x, u); b = h(a, v)

    The pass applies to a function h that gathers its weight: h then waits for the gather that was started
    (`ahead=True`). So the gathers of a call run while the previous call computes. Gathers are in flight for at most one
    call, since gathered weights take memory. The gathers of the first call start after the last collective before it.

    Refuses: gathers of values that are not derived from one weight alone; quantized weights; functions that are called
    by functions other than `main`.
    """

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        main = graph.main
        called = {node.op.callee for f in graph.functions.values() if f is not main for node in f.nodes}
        functions = [f for f in graph.functions.values() if f is not main and f.name not in called]
        gathers = {f.name: list(_gathers(f)) for f in functions}
        calls = [node for node in main.nodes if gathers.get(node.op.callee or "")]
        if any(actual.kind != "parameter" for call in calls for actual in _weights(call, graph, gathers)):
            return 0
        for call in calls:
            for node, _ in gathers[call.op.callee or ""]:
                assert isinstance(node.op, AllGather)
                node.op = dataclasses.replace(node.op, ahead=True)
        begun = 0
        for at, call in enumerate(calls):
            before = main.nodes.index(calls[at - 1]) if at else _last_meeting(main, main.nodes.index(call))
            started = list(_started(graph, call, gathers[call.op.callee or ""]))
            main.nodes[before:before] = started
            begun += sum(isinstance(node.op, StartGather) for node in started)
        return begun


def bytes_ahead(program: Graph, sizes: Mapping[str, int]) -> int:
    """Return the peak number of bytes of weights prefetched for one call, plus the peak of keys and values that a rank
    sends and receives at once in ring attention.
    """
    functions = program.functions.values()
    gathered = [
        sum(n.results[0].type.bytes_at(sizes) for n in f.nodes if isinstance(n.op, AllGather) and n.op.ahead)
        for f in functions
    ]
    return max(gathered, default=0) + max((_most_passed(f, sizes) for f in functions), default=0)


def _most_passed(function: Function, sizes: Mapping[str, int]) -> int:
    """Return the peak number of bytes that a rank sends and receives at once in ring attention."""
    passed = [n for n in function.nodes if isinstance(n.op, PassOn) and n.op.ahead]
    there = {node.inputs[0]: sum(v.type.bytes_at(sizes) for v in (*node.inputs, *node.results)) for node in passed}
    most = now = 0
    for node in function.nodes:
        if isinstance(node.op, StartPass):
            now += there[node.inputs[0]]
        elif node in passed:
            now -= there[node.inputs[0]]
        most = max(most, now)
    return most


_Gather = tuple[Node, list[Node]]
"""A gather in a function, and the nodes that derive its operand from a weight."""


def _gathers(function: Function) -> Iterator[_Gather]:
    weights = set(function.parameters.values())
    for node in function.nodes:
        if not isinstance(node.op, AllGather) or node.results[0].type.encoding is not None:
            continue
        chain: list[Node] = []
        value = node.inputs[0]
        while value.node is not None and len(value.node.inputs) == 1 and not value.node.op.meets_ranks:
            chain.insert(0, value.node)
            value = value.node.inputs[0]
        if value in weights and all(each.op.callee is None for each in chain):
            yield node, chain


def _source(gather: _Gather) -> Value:
    node, chain = gather
    return (chain[0] if chain else node).inputs[0]


def _weights(call: Node, graph: Graph, gathers: dict[str, list[_Gather]]) -> Iterator[Value]:
    """Yield the arguments of a call that are the weights that its function gathers."""
    callee = graph.callee(call)
    assert callee is not None
    passed = dict(zip(callee.arguments, call.inputs, strict=True))
    for gather in gathers[callee.name]:
        yield passed[_source(gather)]


def _last_meeting(main: Function, before: int) -> int:
    """Return the index after the last collective before index `before`."""
    met = [at for at, node in enumerate(main.nodes[:before]) if node.op.meets_ranks]
    return met[-1] + 1 if met else 0


def _started(graph: Graph, call: Node, gathers: list[_Gather]) -> Iterator[Node]:
    """Yield the nodes that start the gathers of a call, in the order in which the gathers are awaited."""
    main, b = graph.main, Builder(graph)
    count = len(main.nodes)
    for gather, weight in zip(gathers, _weights(call, graph, {call.op.callee or "": gathers}), strict=True):
        node, chain = gather
        assert isinstance(node.op, AllGather)
        value = weight
        with b.placed_as(call):
            for each in chain:
                value = b.emit(each.op, [value], each.results[0].name).result
            op = StartGather(**node.op.group, axis=node.op.axis, size=node.op.size)
            b.emit(op, [value], f"{node.results[0].name}_begun")
    made = main.nodes[count:]
    del main.nodes[count:]
    yield from made
