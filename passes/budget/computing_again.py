"""Reorder nodes so that fewer values are live when nodes are computed in parts, and recompute cheap values for each
reader.

    n = layer_norm(x); q = linear(n, ...); k = linear(n, ...)      -->
    n = layer_norm(x); k = linear(n, ...); n' = layer_norm(x); q = linear(n', ...)

If a node needs an operand whole, it comes before operands of which the node needs only parts: keys and values come
before queries. A view comes directly before its reader. A value is recomputed if that takes few operations, and its
operands are live anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.ir.analysis.cost import node_cost
from treadle.ir.axes import Role
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op

MOST_INTENSE = 16.0
"""Maximum operations per byte of a recomputed value. With so few, recomputing takes less time than reading from
memory.
"""


def compute_again(graph: Graph, sizes: Mapping[str, int]) -> None:
    """Change every function that users' entries call, directly or not, and that does not update states."""
    for function in graph.needed_by(*graph.later_entries):
        if not function.states:
            _repeat_cheap(function, sizes)
            function.nodes = _whole_first(function, sizes)


def _repeat_cheap(function: Function, sizes: Mapping[str, int]) -> None:
    at = {node: i for i, node in enumerate(function.nodes)}
    uses, handed = function.uses(), {*function.results}
    last_read = {v: max(at[node] for node, _ in readers) for v, readers in uses.items()}
    made: list[Node] = []
    copies: dict[tuple[Node, Value], Value] = {}
    for node in function.nodes:
        node.operands = tuple([None if v is None else copies.get((node, v), v) for v in node.operands])
        made.append(node)
        if not _is_cheap(node, sizes) or node.result in handed:
            continue
        readers = list(dict.fromkeys(reader for reader, _ in uses.get(node.result, ())))
        end = max((at[reader] for reader in readers), default=0)
        lives = [v for v in node.inputs if v.literal is None and v.kind != "parameter"]
        if len(readers) < 2 or any(v not in handed and last_read.get(v, 0) <= end for v in lives):
            continue
        for reader in readers[1:]:
            again = Node(node.op, node.operands, [node.result.type], node.result.name, node.scope, node.source)
            made.append(again)
            copies[reader, node.result] = again.result
    function.nodes = made


def _is_cheap(node: Node, sizes: Mapping[str, int]) -> bool:
    if node.op.callee is not None or node.op.updates or node.op.meets_ranks:
        return False
    if node.op.is_view or len(node.results) != 1:
        return False
    return node_cost(node, sizes).intensity <= MOST_INTENSE


def _whole_first(function: Function, sizes: Mapping[str, int]) -> list[Node]:
    """Return the nodes in an order in which operands that a reader needs whole come first, and views last."""
    done: dict[Node, None] = {}
    wanted = [v.node for v in function.results if v.node is not None] + function.nodes
    for root in wanted:
        waiting: list[tuple[Node, bool]] = [(root, False)]
        while waiting:
            node, ready = waiting.pop()
            if node in done:
                continue
            if ready:
                for v in node.inputs:
                    _emit_views(v, done)
                done[node] = None
                continue
            if node.op.is_view and node is not root:
                waiting += [(v.node, False) for v in node.inputs if v.node is not None]
                continue
            waiting.append((node, True))
            made = [v for v in _in_order(node, sizes) if v.node is not None]
            waiting += [(_base(v), False) for v in reversed(made)]
    return list(done)


def _base(value: Value) -> Node:
    """Return the node that computes the value from which a chain of views starts."""
    node = value.node
    assert node is not None
    while node.op.is_view and node.inputs[0].node is not None:
        node = node.inputs[0].node
    return node


def _emit_views(value: Value, done: dict[Node, None]) -> None:
    chain = []
    node = value.node
    while node is not None and node not in done:
        chain.append(node)
        node = node.inputs[0].node if node.op.is_view else None
    done.update(dict.fromkeys(reversed(chain)))


def _in_order(node: Node, sizes: Mapping[str, int]) -> Sequence[Value]:
    """Return a node's operands, sorted by the number of elements that the node needs at once, the largest first."""
    if node.op.callee is not None:
        return node.inputs
    op: Op = node.op
    application = op.apply([None if v is None else v.type for v in node.operands])
    needs: list[tuple[int, int, Value]] = []
    for i, (v, dims) in enumerate(zip(node.operands, application.operands, strict=True)):
        if v is None or dims is None:
            continue
        count = 1
        for dim in dims:
            for name in dim.factors:
                if application.factors[name].role is not Role.MAPPED:
                    count *= application.dims[name].size.evaluate(sizes)
        needs.append((-count, i, v))
    return [v for _, _, v in sorted(needs, key=lambda each: each[:2])]
