"""Legalization: composites that a backend does not spell are replaced by what they lower to, until it spells them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from treadle.ir.clone import clone_graph
from treadle.ir.composites import lowering_of
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.types import Type
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord, count_ops

Keeps = Callable[[Op, Sequence[Type | None]], bool]
"""Whether a backend spells an op on operands of these types as it is."""


@dataclass(frozen=True)
class Legalize(Pass):
    """attention(q, k, v, ...)   -->   its body, where the backend does not spell attention

    keeps  which composites the backend spells

    What stands in the body of another is replaced as well, until only calls, primitives and composites that the backend
    spells are left. The parts stand in the scope of the whole, under its name, at its line.
    """

    keeps: Keeps = field(repr=False)

    @property
    def options(self) -> str:
        return ""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        def body(node: Node) -> Function | None:
            types = [None if v is None else v.type for v in node.operands]
            if not isinstance(node.op, Composite) or self.keeps(node.op, types):
                return None
            return lowering_of(node.op, types)

        opened = expand(function, body, lambda node: f"{node.scope}.{node.op.name}".lstrip("."))
        for node, made in opened:
            log.match(self.name, function, node, made=made)
        return len(opened)


def legalized(graph: Graph, keeps: Keeps) -> Graph:
    """A copy of a graph in ops that are kept, calls and primitives."""
    made, legalize = clone_graph(graph), Legalize(keeps)
    legalize.run_graph(made, PassRecord(legalize.name, "", count_ops(graph)))
    return made


def primitives(op: Op, types: Sequence[Type | None], keeps: Keeps) -> Iterator[tuple[Op, list[Type | None]]]:
    """The ops, with their operands' types, that an op on operands of these types is lowered to."""
    if not isinstance(op, Composite) or keeps(op, types):
        yield op, list(types)
        return
    for node in lowering_of(op, types).nodes:
        yield from primitives(node.op, [None if v is None else v.type for v in node.operands], keeps)


def expand(
    function: Function, body: Callable[[Node], Function | None], scope: Callable[[Node], str]
) -> list[tuple[Node, list[Node]]]:
    """Put bodies in place of nodes, until there is none for any node left; each replaced node, and what replaced it.

    body   what stands in the place of a node, a function of its operands that are present; None keeps the node
    scope  where the parts of a replaced node stand
    """
    values: dict[Value, Value] = {}
    kept: list[Node] = []
    opened: list[tuple[Node, list[Node]]] = []
    pending = function.nodes[::-1]
    while pending:
        node = pending.pop()
        if values and any(v in values for v in node.inputs):
            node.operands = tuple([v if v is None else _current(v, values) for v in node.operands])
        found = body(node)
        if found is None:
            kept.append(node)
            continue
        inner: dict[Value, Value] = dict(zip(found.inputs, node.inputs, strict=True))
        made: list[Node] = []
        for part in found.nodes:
            operands = [None if v is None else inner.get(v, v) for v in part.operands]
            copy = Node(part.op, operands, [r.type for r in part.results], scope=scope(node), source=node.source)
            for old, new in zip(part.results, copy.results, strict=True):
                new.name = old.name
                inner[old] = new
            made.append(copy)
        for result, output in zip(node.results, found.outputs.values(), strict=True):
            stands = values[result] = inner.get(output, output)
            if stands.node is not None and stands not in node.inputs:
                stands.name = result.name
        pending.extend(reversed(made))
        opened.append((node, made))
    function.nodes = kept
    function.outputs = {name: _current(v, values) for name, v in function.outputs.items()}
    return opened


def _current(value: Value, values: dict[Value, Value]) -> Value:
    while value in values:  # a body may end in a composite
        value = values[value]
    return value
