"""Slices and lookups move before the ops whose results they slice, so that only elements that are read are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.literals import Literal
from treadle.ir.naming import free_name
from treadle.ir.operation import Op
from treadle.ir.ops.call import Call
from treadle.ir.ops.indexing import Gather, TakeAlongAxis
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.ir.sizing.sizes import Size
from treadle.ir.transforms.clone import clone_function
from treadle.ir.types import Type
from treadle.passes.cleanup.parts_read import CutNode, FoundParts, PartRead, PartsRead, Picked, part_taken
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord


@dataclass(frozen=True)
class CutSooner(Pass):
    """slice(f(x))   -->   f(slice(x))      for an f that maps the axis

    The same holds for lookups of positions: constant positions, or positions of each row of a batch. If a classifier
    reads only the first token, the last layer computes only that token's query, output and feed-forward network, but
    all keys and values: slices move into calls, which then call a different function than the other layers.

    Not applied to parts of more than half of an axis, or of a size that is not fixed; to values that are also read as a
    whole; to products with a weight along the axis. Refuses: an op that cannot be computed on a part of an axis that it
    maps; a call that computes the positions at which its other results are read.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        cutting = _Cutting(self.name, graph, log)
        for function in list(graph.functions.values()):
            refused = cutting.cut(function)
            for event in dict.fromkeys(refused):
                log.refuse(self.name, *event)
        if cutting.changes:
            _drop_uncalled(graph)
        return cutting.changes


def _drop_uncalled(graph: Graph) -> None:
    """Remove functions whose calls have all been replaced by calls of a sliced copy."""
    called: set[str | None] = set()
    for function in reversed(list(graph.functions.values())):
        if function not in graph.entries and function.name not in called:
            del graph.functions[function.name]
        else:
            called.update(node.op.callee for node in function.nodes)


def _slice(dim: int, start: Size, stop: Size, whole: Size) -> Slice:
    """Return the slice op in the form that a user would write: the last position is counted from the end."""
    if stop != whole:
        return Slice(axis=dim, start=start, stop=stop)
    return Slice(axis=dim, start=start if start.constant is not None else start - whole)


class _Cutting:
    """A rewriter that makes functions of a graph compute only the parts of their results that are read. It builds the
    sliced functions that they then call.
    """

    def __init__(self, rule: str, graph: Graph, log: PassRecord) -> None:
        self.rule, self.graph, self.log = rule, graph, log
        self.changes = 0
        self._made: dict[object, Function] = {}

    def cut(self, function: Function) -> list[tuple[Function, Node, str]]:
        """Change a function whose whole outputs are needed so that it computes only the parts of its values that are
        read. Return the refusals.

        The axes are handled one after the other: slices along the second axis may move to the position at which the
        first axis was sliced.
        """
        refused = list[tuple[Function, Node, str]]()
        while True:
            found = PartsRead(self.graph).of(function, [None] * len(function.outputs))
            refused += found.refused
            if not found.computes:
                return refused
            self.apply(function, found)

    def apply(
        self,
        function: Function,
        found: FoundParts,
        outputs: Sequence[PartRead | None] = (),
        parts: Mapping[Value, Value] = MappingProxyType({}),
        given: Mapping[Value, Value] = MappingProxyType({}),
    ) -> None:
        """Change a function in place according to `found`.

        outputs   the parts of its outputs that the function returns from now on
        parts     the new inputs that stand for parts of the old inputs
        given     the new inputs that stand for positions of the caller
        """
        body = _Body(self, function, found)
        body.whole.update(given)
        body.parts.update(parts)
        for node in list(function.nodes):
            body.add(node)
        body.finish(outputs)
        for cutter in body.cutters:
            part, x = part_taken(cutter), cutter.inputs[0]
            assert part is not None
            whole = x.type.shape[part.dim]
            reason = f"{part.size} of {whole} positions: only these are computed by {', '.join(body.sliced_ops)}"
            self.log.match(self.rule, function, cutter, reason=reason)
        self.changes += len(body.cutters)

    def callee(self, node: Node, cut: CutNode, types: Sequence[Type | None]) -> Function:
        """Return the function that a call must call on parts of its operands, which have these types."""
        whole = self.graph.callee(node)
        assert whole is not None
        key = (whole.name, cut.operands, cut.results, tuple(types))
        if key not in self._made:
            made = clone_function(whole, free_name(f"{whole.name}_cut", self.graph.functions))
            for old, new in zip(whole.nodes, made.nodes, strict=True):
                self.log.lineage.stand([new], [old])
            found = PartsRead(self.graph).of(made, cut.results)
            pairs = zip(made.inputs, types, strict=False)
            parts = {v: Value("input", type, v.name) for v, type in pairs if v in found.parts and type is not None}
            made.inputs = [parts.get(v, v) for v in made.inputs]
            self.apply(made, found, cut.results, parts, _add_inputs(made, picked_by(cut)))
            self.cut(made)
            self._add(made, whole)
            self._made[key] = made
        return self._made[key]

    def _add(self, made: Function, whole: Function) -> None:
        """Insert a function after the function that it was copied from. Its callees come before both functions, and its
        callers after both.
        """
        functions = self.graph.functions
        names = list(functions)
        at = names.index(whole.name) + 1
        names[at:at] = [made.name]
        self.graph.functions = {name: functions.get(name, made) for name in names}


def picked_by(cut: CutNode) -> list[Value]:
    """Return the per-row positions that a call reads, each once."""
    parts = (*cut.results, *cut.operands)
    return list(dict.fromkeys(part.picked.value for part in parts if part is not None and part.picked is not None))


def _add_inputs(function: Function, values: Sequence[Value]) -> dict[Value, Value]:
    """Append inputs to a function that stand for values of its caller. Return a dict from these values to the new
    inputs.
    """
    made: dict[Value, Value] = {}
    for value in values:
        name = free_name(value.name, {*(v.name for v in function.inputs), *function.parameters, *function.states})
        made[value] = Value("input", value.type, name)
        function.inputs.append(made[value])
    return made


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes in their order, but each after its operands, since positions may be computed after the values
    that they select from.
    """
    left, ordered = set(nodes), list[Node]()
    for first in nodes:
        pending = [first]
        while pending:
            node = pending[-1]
            above = [v.node for v in node.inputs if v.node is not None and v.node in left] if node in left else []
            if above:
                pending += above[::-1]
                continue
            pending.pop()
            if node in left:
                left.discard(node)
                ordered.append(node)
    return ordered


class _Body:
    """The nodes of one function while they are being replaced.

    parts       the computed part of each value of which only a part is computed
    whole       the current replacement of each value
    cutters     the slices and lookups whose part is now computed directly
    sliced_ops  the names of the ops that compute a part
    """

    def __init__(self, cutting: _Cutting, function: Function, found: FoundParts) -> None:
        self.cutting, self.function, self.found = cutting, function, found
        self.parts: dict[Value, Value] = {}
        self.whole: dict[Value, Value] = {}
        self.cutters: list[Node] = []
        self.sliced_ops: dict[str, None] = {}
        self._nodes: list[Node] = []
        self._slices: dict[tuple[Value, PartRead], Value] = {}

    def add(self, node: Node) -> None:
        """Append the replacement of a node, which is the node itself if all of its results are read."""
        cut, taken = self.found.cut.get(node), part_taken(node)
        if cut is not None:
            self._add_cut(node, cut)
        elif taken is not None and node.inputs[0] in self.parts:
            self._add_cutter(node, taken)
        else:
            node.operands = tuple([self._now(v) for v in node.operands])
            self._nodes.append(node)

    def finish(self, outputs: Sequence[PartRead | None]) -> None:
        given = [*outputs, *[None] * (len(self.function.outputs) - len(outputs))]
        pairs = zip(self.function.outputs.items(), given, strict=True)
        self.function.outputs = {name: self._part(v, part, v.node) for (name, v), part in pairs}
        self.function.updated = {name: self.whole.get(v, v) for name, v in self.function.updated.items()}
        self.function.nodes = needed_nodes(in_order(self._nodes), self.function.results)

    def _add_cut(self, node: Node, cut: CutNode) -> None:
        operands = [
            None if v is None else self._part(v, part, node)
            for v, part in zip(node.operands, cut.operands, strict=True)
        ]
        op = cut.op
        if op is None and node.op.callee is None:
            (within,) = operands
            assert within is not None
            self.parts[node.result] = within
            return
        if op is None:
            types = [None if v is None else v.type for v in operands]
            callee = self.cutting.callee(node, cut, types)
            positions = [self.whole.get(v, v) for v in picked_by(cut)]
            at = len(callee.inputs) - len(positions)
            op, operands = Call.of(callee), [*operands[:at], *positions, *operands[at:]]
        made = self._append(op, operands, node)
        for old, new, part in zip(node.results, made.results, cut.results, strict=True):
            (self.whole if part is None else self.parts)[old] = new
        if op.callee is not None or not op.only_moves:
            self.sliced_ops[op.callee or op.name] = None

    def _add_cutter(self, node: Node, taken: PartRead) -> None:
        x = node.inputs[0]
        if not isinstance(node.op, Gather):
            made = self._part(x, taken, node)
        else:
            literal, start = node.inputs[1].literal, self.found.parts[x].start.constant
            assert literal is not None
            assert start is not None, "a part that a lookup reads must begin at a constant"
            moved = Value.constant(Literal.of(literal.array - start, literal.dtype))
            made = self._append(node.op, [self.parts[x], moved], node).result
        self.whole[node.result] = made
        self.cutters.append(node)

    def _now(self, value: Value | None) -> Value | None:
        return None if value is None else self.whole.get(value, value)

    def _part(self, value: Value, part: PartRead | None, at: Node | None) -> Value:
        """Return the value that holds a part of a value, for the node that reads it. `part` is None for the whole
        value.
        """
        if part is None:
            return self.whole.get(value, value)
        known = self.found.parts[value] if value in self.parts else None
        if part == known:
            return self.parts[value]
        if (value, part) not in self._slices:
            start = part.start if known is None else part.start - known.start
            x = self.whole.get(value, value) if known is None else self.parts[value]
            scope = at.scope if at else ""
            if part.picked is None:
                op = _slice(part.dim, start, start + part.size, x.type.shape[part.dim])
                node = Node(op, [x], op.infer([x.type]), value.name, scope, part.source)
                self._nodes.append(node)
            else:
                node = self._taken(x, part, part.picked, scope)
            self._slices[value, part] = node.result
        return self._slices[value, part]

    def _taken(self, x: Value, part: PartRead, picked: Picked, scope: str) -> Node:
        """Append nodes that select each row's own positions of a value, and return the last one."""
        value = self.whole.get(picked.value, picked.value)
        rank = value.type.rank
        before = ["r" if i == picked.rows else "p" if i == picked.dim else "1" for i in range(rank)]
        after = ["r" if i == part.rows else "p" if i == part.dim else "1" for i in range(x.type.rank)]
        shape = [part.size if i == part.dim else size for i, size in enumerate(x.type.shape)]
        turn = Rearrange(pattern=f"{' '.join(before)} -> {' '.join(after)}")
        for op in [*([turn] if before != after else []), Expand(shape=tuple(shape))]:
            node = Node(op, [value], op.infer([value.type]), value.name, scope, part.source)
            self._nodes.append(node)
            value = node.result
        take = TakeAlongAxis(axis=part.dim)
        self._nodes.append(made := Node(take, [x, value], take.infer([x.type, value.type]), x.name, scope, part.source))
        return made

    def _append(self, op: Op, operands: Sequence[Value | None], node: Node) -> Node:
        """Append a node that replaces another node, and return it."""
        made = Node(op, operands, op.infer_for(operands), None, node.scope, node.source)
        for old, new in zip(node.results, made.results, strict=True):
            new.name = old.name
        self.cutting.log.lineage.stand([made], [node])
        self._nodes.append(made)
        return made
