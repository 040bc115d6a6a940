"""Legalization: composites that a dialect does not spell are replaced by what they lower to, until it spells them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from treadle.ir.composites import lowering_of
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.types import Type

Keeps = Callable[[Op, Sequence[Type | None]], bool]
"""Whether an op on operands of these types is spelled as it is."""


def legalize(graph: Graph, keeps: Keeps) -> Graph:
    """The same program in ops that are kept, calls and primitives, as another graph with the same weights."""
    made = Graph(graph.name)
    made.symbols, made.initial = dict(graph.symbols), dict(graph.initial)
    made.functions = {name: _legalize(function, keeps) for name, function in graph.functions.items()}
    return made


def primitives(op: Op, types: Sequence[Type | None], keeps: Keeps) -> Iterator[tuple[Op, list[Type | None]]]:
    """The ops, with their operands' types, that an op on operands of these types is lowered to."""
    if not isinstance(op, Composite) or keeps(op, types):
        yield op, list(types)
        return
    for node in lowering_of(op, types).nodes:
        yield from primitives(node.op, [None if v is None else v.type for v in node.operands], keeps)


def _legalize(function: Function, keeps: Keeps) -> Function:
    made = Function(function.name)
    made.inputs, made.parameters = list(function.inputs), dict(function.parameters)
    values: dict[Value, Value] = {}
    for node in function.nodes:
        operands = [None if v is None else values.get(v, v) for v in node.operands]
        values |= zip(node.results, _lower(made, node, operands, keeps), strict=True)
    made.outputs = {name: values.get(v, v) for name, v in function.outputs.items()}
    return made


def _lower(made: Function, node: Node, operands: Sequence[Value | None], keeps: Keeps) -> Sequence[Value]:
    """Add a node, or its body under the op's name in its scope; returns what stands for its results."""
    types = [None if v is None else v.type for v in operands]
    if not isinstance(node.op, Composite) or keeps(node.op, types):
        copy = Node(node.op, operands, [r.type for r in node.results], scope=node.scope, source=node.source)
        for old, new in zip(node.results, copy.results, strict=True):
            new.name = old.name
        made.nodes.append(copy)
        return copy.results
    body = lowering_of(node.op, types)
    values: dict[Value, Value] = dict(zip(body.inputs, (v for v in operands if v is not None), strict=True))
    for inner in body.nodes:
        placed = Node(
            inner.op,
            [None if v is None else values.get(v, v) for v in inner.operands],
            [r.type for r in inner.results],
            scope=f"{node.scope}.{node.op.name}".lstrip("."),
            source=node.source,
        )
        values |= zip(placed.results, _lower(made, placed, placed.operands, keeps), strict=True)
        values |= {a: values[b] for a, b in zip(inner.results, placed.results, strict=True)}
    made_of = [values.get(v, v) for v in body.outputs.values()]
    for old, new in zip(node.results, made_of, strict=True):
        if new.node is not None and new not in operands:
            new.name = old.name
    return made_of
