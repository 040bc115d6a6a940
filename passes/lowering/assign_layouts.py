"""Layouts of weights: a product reads its weight in the order in which its kernel takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from treadle.ir.analysis.weight_only import values_of_weights
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.layouts import Layout
from treadle.ir.ops.layout import Relayout
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


class Reads(Enum):
    """How a node reads an operand where it wants no layout of its own."""

    ROW_MAJOR = "row-major"
    ANY = "any layout"


Wants = Callable[[Node, int], Layout | Reads]
"""How a node reads the operand at a position, if weights alone decide that operand."""


@dataclass(frozen=True)
class AssignLayouts(Pass):
    """linear(x, w)   -->   linear(x, relayout(w, to=panels(16)))     where weights alone decide w

    wants  how a node of the backend reads an operand
    alone  only where all who read w want it in one layout, and it is no output: elsewhere w would be there twice

    Two readers that want two layouts have two relayouts; one that reads any layout has the first. A weight that a
    function is given counts where every call gives it what weights alone decide: what varies is laid out by the kernel
    that reads it. `HoistWeights` then does the relayouts once.
    """

    rewrites: ClassVar[bool] = False
    wants: Wants = field(repr=False)
    alone: bool = False

    @property
    def options(self) -> str:
        return "alone" if self.alone else ""

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        fixed = values_of_weights(graph)
        log.touched = set()
        changes = 0
        for function in graph.functions.values():
            made = self._assign(function, fixed, log)
            changes += made
            if made:
                log.touched.add(function.name)
        return changes

    def _assign(self, function: Function, fixed: set[Value], log: PassRecord) -> int:
        outputs = set(function.results)
        made: dict[tuple[Value, Layout], Node] = {}
        for value, uses in function.uses().items():
            if value not in fixed or value.type.rank != 2:
                continue
            reads = [(node, at, self._read(node, at)) for node, at in uses]
            wanted = list(dict.fromkeys(r for _, _, r in reads if isinstance(r, Layout)))
            others = value in outputs or any(r is Reads.ROW_MAJOR for _, _, r in reads)
            if not wanted or (self.alone and (others or len(wanted) > 1)):
                continue
            for node, at, read in reads:
                if read is Reads.ROW_MAJOR:
                    continue
                layout = read if isinstance(read, Layout) else wanted[0]
                relayout = made.get((value, layout))
                if relayout is None:
                    relayout = made[value, layout] = _relayout(value, layout, node)
                operands = list(node.operands)
                operands[at] = relayout.result
                node.operands = tuple(operands)
                place = describe_source(node.source, node.scope) or function.name
                log.notes.append(f"{value.name} in {layout}: {node.op.name} reads it, {place}")
        _insert(function, list(made.values()))
        return len(made)

    def _read(self, node: Node, at: int) -> Layout | Reads:
        """A callee lays its weight out itself."""
        return Reads.ROW_MAJOR if node.op.callee is not None else self.wants(node, at)


def _relayout(value: Value, layout: Layout, reader: Node) -> Node:
    name = f"{value.name.rpartition('.')[2]}_{layout.kind}"
    return Node(Relayout(to=layout), [value], [value.type], name, scope=reader.scope, source=reader.source)


def _insert(function: Function, made: list[Node]) -> None:
    """Put each relayout where its operand is there: after the node that makes it, or first."""
    after: dict[Node | None, list[Node]] = {}
    for node in made:
        (value,) = node.inputs
        after.setdefault(value.node, []).append(node)
    nodes = after.get(None, [])
    for node in function.nodes:
        nodes += [node, *after.get(node, ())]
    function.nodes = nodes
