"""Layouts of weights: each weight is stored in the order that the kernel of its product reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.analysis.weight_only import values_of_weights
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.layouts import Layout
from treadle.ir.ops.layout import Relayout
from treadle.passes.capabilities import PRIMITIVES, Capabilities, Reads
from treadle.passes.framework.facts import UNBOUND, UNPLANNED, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


@dataclass(frozen=True)
class AssignLayouts(Pass):
    """linear(x, w)   -->   linear(x, relayout(w, to=panels(16)))     if w depends on weights alone

    backend  the backend, whose nodes read operands in layouts
    alone   True to change a layout only if all readers of w require the same layout and w is not an output: otherwise w
            would be stored twice

    Two readers that require two layouts get two relayouts; a reader of any layout gets the first. A weight that is an
    argument of a function counts if every call passes a value that depends on weights alone; the kernel changes the
    layout of a value that varies. `HoistWeights` then computes the relayouts once.
    """

    rewrites: ClassVar[bool] = False
    requires: ClassVar[Facts] = frozenset({UNBOUND, UNPLANNED})
    backend: Capabilities = PRIMITIVES
    alone: bool = False

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
        """Return the way in which a node reads an operand. A call reads it row-major, since the callee changes the
        layout itself.
        """
        return Reads.ROW_MAJOR if node.op.callee is not None else self.backend.layouts(node, at)


def _relayout(value: Value, layout: Layout, reader: Node) -> Node:
    name = f"{value.name.rpartition('.')[2]}_{layout.kind}"
    return Node(Relayout(to=layout), [value], [value.type], name, scope=reader.scope, source=reader.source)


def _insert(function: Function, made: list[Node]) -> None:
    """Insert each relayout directly after the node that computes its operand, or at the start of the function."""
    after: dict[Node | None, list[Node]] = {}
    for node in made:
        (value,) = node.inputs
        after.setdefault(value.node, []).append(node)
    nodes = after.get(None, [])
    for node in function.nodes:
        nodes += [node, *after.get(node, ())]
    function.nodes = nodes
