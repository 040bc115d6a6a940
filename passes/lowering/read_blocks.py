"""Weights that kernels read as blocks: the blocks get a layout, and each kernel decodes the blocks that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.analysis.weight_only import values_of_weights
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.layouts import Layout
from treadle.ir.ops.layout import Relayout
from treadle.ir.transforms.clone import clone_node
from treadle.passes.capabilities import PRIMITIVES, Capabilities
from treadle.passes.framework.facts import UNBOUND, UNPLANNED, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


def unpacking(value: Value | None) -> Node | None:
    """Return the node that decodes a value from blocks with a layout, which the reading kernel does in registers.

    Return None for any other value, such as a value decoded from blocks that ranks gather, which are decoded at every
    call.
    """
    made = None if value is None else value.node
    return made if made is not None and made.op.decodes and made.inputs[0].layout is not None else None


def in_blocks(node: Node, position: int) -> bool:
    """Return True if a node reads an operand as blocks."""
    return unpacking(node.operands[position]) is not None


@dataclass(frozen=True)
class ReadBlocks(Pass):
    """linear(x, decode(w))   -->   linear(x, decode(relayout(w, to=panels(32))))     if w depends on weights alone

    backend  the backend, some of whose nodes read blocks, or encoded operands that are not decoded for them

    `HoistWeights` then computes the relayout of the blocks once. Refuses: a decode with a reader that reads numbers, or
    that requires another layout: blocks and numbers of one weight would be stored twice.
    """

    rewrites: ClassVar[bool] = False
    requires: ClassVar[Facts] = frozenset({UNBOUND, UNPLANNED})
    backend: Capabilities = PRIMITIVES

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        log.touched = set()
        if not any(node.op.decodes for _, node in graph.walk()):
            return 0
        fixed = values_of_weights(graph)
        for function in graph.functions.values():
            if self._read(function, fixed, log):
                log.touched.add(function.name)
        return len(log.touched)

    def _read(self, function: Function, fixed: set[Value], log: PassRecord) -> bool:
        uses, nodes = function.uses(), list[Node]()
        laid: dict[tuple[Value, Layout], Node] = {}
        for node in function.nodes:
            layout = self._layout(node, uses, function, log) if node.op.decodes else None
            if layout is not None and node.inputs[0] in fixed:
                (blocks,) = node.inputs
                if (blocks, layout) not in laid:
                    name = f"{blocks.name.rpartition('.')[2]}_{layout.kind}"
                    made = Node(Relayout(to=layout), [blocks], [blocks.type], name, node.scope, node.source)
                    laid[blocks, layout] = made
                    nodes.append(made)
                node.operands = (laid[blocks, layout].result,)
                what = f"{blocks.name} is read in {blocks.type.encoding} blocks, {layout}"
                log.notes.append(f"{what}: {_readers_text(uses, node)}")
            nodes.append(node)
        function.nodes = nodes
        return bool(laid)

    def _layout(
        self, node: Node, uses: dict[Value, list[tuple[Node, int]]], function: Function, log: PassRecord
    ) -> Layout | None:
        """Return the one layout in which all readers read the blocks. If there is none, log a note and return None."""
        beside = self._beside(node, uses)
        wanted = [self.backend.blocks(reader, at, beside) for reader, at in uses.get(node.result, ())]
        layouts = {each for each in wanted if isinstance(each, Layout)}
        whys = [each for each in wanted if isinstance(each, str)]
        if node.result in function.results:
            whys.append("it is an output")
        if not whys and len(layouts) == 1:
            (layout,) = layouts
            return layout
        if not whys and layouts:
            whys.append(f"it is read in {' and '.join(sorted(map(str, layouts)))}")
        if whys:
            place = describe_source(node.source, node.scope) or function.name
            reasons = "; ".join(dict.fromkeys(whys))
            log.notes.append(f"{node.inputs[0].name} is not read in blocks: {reasons}, {place}")
        return None

    def _beside(self, node: Node, uses: dict[Value, list[tuple[Node, int]]]) -> Layout | None:
        """Return the layout in which other nodes multiply the blocks that a node decodes: as blocks, or decoded to a
        narrower dtype. Return None if there are no such nodes.
        """
        found: list[Layout | str | None] = []
        for reader, at in uses.get(node.inputs[0], ()):
            if reader.op.decodes and reader.results[0].type != node.result.type:
                found += [self.backend.blocks(each, place, None) for each, place in uses.get(reader.result, ())]
            elif not reader.op.decodes:
                found.append(self.backend.multiplies(reader, at))
        return next((each for each in found if isinstance(each, Layout)), None)


@dataclass(frozen=True)
class DecodeWhereRead(Pass):
    """w = decode(b); y = linear(x, w); z = gather(w, i)   -->   y = linear(x, decode(b)); z = gather(decode(b), i)

    The pass applies to blocks with a layout, since each reader's kernel decodes them in registers. It is the last pass
    before storage is planned, because common subexpressions would merge the decodes again.
    """

    rewrites: ClassVar[bool] = False

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        log.touched = set()
        for function in graph.functions.values():
            if self._split(function):
                log.touched.add(function.name)
        return len(log.touched)

    def _split(self, function: Function) -> int:
        nodes: list[Node] = []
        split = 0
        for node in function.nodes:
            operands = list(node.operands)
            for at, value in enumerate(operands):
                if value is not None and value.node is not None and in_blocks(node, at):
                    (blocks,) = value.node.inputs
                    copy = clone_node(value.node, {blocks: blocks}, function)
                    nodes.append(copy)
                    operands[at] = copy.result
                    split += 1
            node.operands = tuple(operands)
            nodes.append(node)
        function.nodes = needed_nodes(nodes, function.results)
        return split


def _readers_text(uses: dict[Value, list[tuple[Node, int]]], node: Node) -> str:
    names = ", ".join(dict.fromkeys(reader.op.name for reader, _ in uses[node.result]))
    return f"{names}, {describe_source(node.source, node.scope) or 'of main'}"
