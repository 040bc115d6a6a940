"""The part of each value of a function that is read: a range of positions along one axis, or positions for each row.

A slice reads a part, and so does a lookup: at constant positions, or at positions of each row of a batch. If an op maps
the axis, it needs only that part of its operands that is read of its results. This is propagated upwards, into calls,
up to ops that mix positions, such as attention, which reads all keys. (Per-row positions are not propagated through ops
that depend on the position itself, such as a causal mask.)

    found = PartsRead(graph).of(function, [None])      # all of its output is read
    found.parts[value]                                 # the part that is read of a value; absent: all of it
    found.cut[node]                                    # the form of a node that computes only the part that is read
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from treadle.ir.axes import Application, Role
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.indexing import Gather, TakeAlongAxis
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.shapes import Expand
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.source_lines import SourceLine


@dataclass(frozen=True)
class Picked:
    """A value that holds positions for each row: dimension `rows` is the rows, dimension `dim` the positions of a row.
    All other dimensions have size 1.
    """

    value: Value
    rows: int
    dim: int


@dataclass(frozen=True)
class PartRead:
    """A range of positions along one axis of a value: `size` of them, from `start` along dimension `dim`.

    source   the line that reads the part
    picked   positions that are not a range, `size` for each row; None: the range from `start`
    rows     the dimension of the rows of `picked`
    """

    dim: int
    start: Size
    size: Size
    source: SourceLine | None = field(default=None, compare=False)
    picked: Picked | None = None
    rows: int = 0


@dataclass(frozen=True)
class CutNode:
    """A node that computes only the part of its result that is read.

    op        the op on parts; None for a call (it calls another function) and for a slice that is a part of its operand
    operands  the part that the op reads of each operand; None for all of it
    results   the part that the op computes of each result
    """

    op: Op | None
    operands: tuple[PartRead | None, ...]
    results: tuple[PartRead | None, ...]


@dataclass
class FoundParts:
    """The parts of values that a function reads, if only given parts of its outputs are needed.

    parts     the part of a value that is read; absent if all of it is read
    cut       the nodes that need not compute all of their results
    refused   nodes that map the axis but compute all of their result, although only a part is read: the function, the
              node, and the reason
    computes  True if some of the cut nodes compute something: moving fewer elements alone is not worth a change
    """

    parts: dict[Value, PartRead] = field(default_factory=dict)
    cut: dict[Node, CutNode] = field(default_factory=dict)
    refused: list[tuple[Function, Node, str]] = field(default_factory=list)
    computes: bool = False

    def of(self, values: Sequence[Value | None]) -> tuple[PartRead | None, ...]:
        return tuple([None if v is None else self.parts.get(v) for v in values])


def part_taken(node: Node) -> PartRead | None:
    """Return the part of its first operand that a slice or a lookup reads, if the part is small, else None."""
    op = node.op
    if isinstance(op, Slice) and op.stride == 1:
        dim = place(op.axis, node.inputs[0].type.rank)
        start, stop = op.span(node.inputs[0].type.shape[dim])
        found = PartRead(dim, start, stop - start, node.source)
    elif isinstance(op, Gather) and node.inputs[1].literal is not None and node.inputs[1].literal.array.size:
        at = node.inputs[1].literal.array
        first, last = int(at.min()), int(at.max())
        dim = place(op.axis, node.inputs[0].type.rank)
        size = node.inputs[0].type.shape[dim].constant
        if first < 0 or (size is not None and last >= size):
            return None  # fails at run time
        found = PartRead(dim, Size.of(first), Size.of(last - first + 1), node.source)
    elif isinstance(op, TakeAlongAxis) and (picked := _picked(node, place(op.axis, node.result.type.rank))) is not None:
        found = PartRead(picked.dim, ZERO, node.result.type.shape[picked.dim], node.source, picked, picked.rows)
    else:
        return None
    return found if _is_small(found, node.inputs[0]) else None


def _picked(node: Node, dim: int) -> Picked | None:
    """Return the positions at which elements are taken, if all elements of a row are taken at the same positions."""
    x, indices = node.inputs
    if indices.node is None or not isinstance(indices.node.op, Expand):
        return None
    value = indices.node.inputs[0]
    sizes = value.type.shape
    rows = [i for i, size in enumerate(sizes) if i != dim and size != ONE]
    if value.type.rank != x.type.rank or len(rows) != 1 or sizes[rows[0]] != x.type.shape[rows[0]]:
        return None
    return Picked(value, rows[0], dim)


def _is_small(part: PartRead, value: Value) -> bool:
    """Return True if it pays to compute only this part: a fixed number of positions, at most half of a fixed size.

    The number of positions that the caller passes may be symbolic: a caller that passes positions wants only these.
    """
    size, whole = part.size.constant, value.type.shape[part.dim].constant
    if size is None and part.picked is not None:
        return _is_given(part.picked.value)
    return size is not None and size > 0 and (whole is None or 2 * size <= whole)


def _is_given(value: Value) -> bool:
    """Return True if a value is an input, or a view of an input."""
    while value.node is not None and value.node.op.is_view:
        value = value.node.inputs[0]
    return value.kind == "input"


class PartsRead:
    """A search for the parts that are read in the functions of a graph, once for each combination of parts read of the
    outputs.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: dict[tuple[str, tuple[PartRead | None, ...]], FoundParts] = {}
        self._computing: dict[Value, set[Node]] = {}

    def of(self, function: Function, outputs: Sequence[PartRead | None]) -> FoundParts:
        """Return the parts that are read in a function if `outputs` are the parts read of its outputs (None: all), and
        all final states are read.
        """
        key = (function.name, tuple(outputs))
        if key not in self._known:
            self._known[key] = self._found(function, outputs)
        return self._known[key]

    def _found(self, function: Function, outputs: Sequence[PartRead | None]) -> FoundParts:
        found = FoundParts()
        all_read: set[Value] = set()

        def read(value: Value | None, part: PartRead | None) -> None:
            if value is None or value.literal is not None or value in all_read:
                return
            known = found.parts.get(value)
            if part is not None and known is not None and known != part:
                part = _joined(known, part, value)
            if part is None or value.kind not in ("input", "result"):
                all_read.add(value)
                found.parts.pop(value, None)
            else:
                found.parts[value] = part

        for number, value in enumerate(function.results):
            read(value, outputs[number] if number < len(outputs) else None)
        for node in reversed(function.nodes):
            wanted = found.of(node.results)
            cut = self._cut(function, node, wanted, found) if any(wanted) else None
            if cut is None:
                for value in node.results:
                    found.parts.pop(value, None)
                taken = (part_taken(node), *[None] * len(node.operands))
            else:
                found.cut[node], taken = cut, cut.operands
            for operand, part in zip(node.operands, taken, strict=False):
                read(operand, part)
        known = {None, *[part.picked for part in outputs if part is not None]}
        for value in function.inputs:
            if value in found.parts and found.parts[value].picked not in known:
                del found.parts[value]  # the caller does not know positions that this function computes
        return found

    def _above(self, value: Value) -> set[Node]:
        """Return the nodes from which a value is computed."""
        if value not in self._computing:
            found, pending = set[Node](), [value.node]
            while pending:
                node = pending.pop()
                if node is not None and node not in found:
                    found.add(node)
                    pending += [v.node for v in node.inputs]
            self._computing[value] = found
        return self._computing[value]

    def _cut(
        self, function: Function, node: Node, wanted: tuple[PartRead | None, ...], found: FoundParts
    ) -> CutNode | None:
        if node.op.updates or node.op.meets_ranks or any(v.kind == "state" for v in node.inputs):
            return None
        callee = self.graph.callee(node)
        if callee is not None:
            inner = self.of(callee, wanted)
            found.refused += [event for event in inner.refused if event not in found.refused]
            made = [v.node for v, part in zip(callee.results, wanted, strict=True) if part is not None]
            if any(made_by not in inner.cut for made_by in made):
                return None
            picked = {part.picked.value for part in wanted if part is not None and part.picked is not None}
            if any(node in self._above(value) for value in picked):
                reason = f"{callee.name} computes the positions at which its results are read"
                found.refused.append((function, node, reason))
                return None
            found.computes |= inner.computes
            return CutNode(None, inner.of(callee.arguments), wanted)
        if None in wanted:
            return None
        if (within := _within_slice(node, wanted[0])) is not None:
            return CutNode(None, (within,), wanted)
        application = node.op.apply([None if v is None else v.type for v in node.operands])
        parts = [part for part in wanted if part is not None]
        part = parts[0]
        factors = {_mapped(application, n, p.dim) for n, p in enumerate(parts)}
        rows = {_mapped(application, n, p.rows) if p.picked is not None else None for n, p in enumerate(parts)}
        if len(factors) > 1 or len(rows) > 1 or any(replace(p, dim=part.dim, rows=part.rows) != part for p in parts):
            return None
        (factor,), (row,) = factors, rows
        if factor is None or (row is None and part.picked is not None):
            return None
        operands = _operand_parts(node, application, factor, row, part)
        if operands is None:
            return None
        op = on_part(node, factor, part)
        if op is None:
            whole = application.dims[factor].size
            reason = f"{node.op.name} cannot compute {part.size} of {whole} positions, though only these are read"
            if part.picked is not None and factor in node.op.positional:
                reason = f"{node.op.name} depends on positions, and each row is read at its own positions"
            found.refused.append((function, node, reason))
            return None
        found.computes |= not op.only_moves
        return CutNode(op, operands, wanted)


def _joined(a: PartRead, b: PartRead, value: Value) -> PartRead | None:
    """Return a small part that contains both parts, or None if there is none."""
    edges = [s.constant for s in (a.start, a.start + a.size, b.start, b.start + b.size)]
    known = [edge for edge in edges if edge is not None]
    if a.dim != b.dim or len(known) < len(edges) or a.picked is not None or b.picked is not None:
        return None
    both = PartRead(a.dim, Size.of(min(known)), Size.of(max(known) - min(known)), a.source)
    return both if _is_small(both, value) else None


def _mapped(application: Application, result: int, dim: int) -> str | None:
    """Return the factor that a dimension of a result consists of, if it is a single factor and the op maps it, else
    None.
    """
    held = application.results[result][dim]
    if len(held.factors) != 1 or held.size is not None:
        return None
    (factor,) = held.factors
    return factor if application.factors[factor].role is Role.MAPPED else None


def _within_slice(node: Node, part: PartRead | None) -> PartRead | None:
    """Return the part of a slice's operand that corresponds to a part of the slice. Return None if the part is along
    another axis.
    """
    op = node.op
    if part is None or part.picked is not None or not isinstance(op, Slice) or op.stride != 1:
        return None
    if place(op.axis, node.result.type.rank) != part.dim:
        return None
    start, _ = op.span(node.inputs[0].type.shape[part.dim])
    return replace(part, start=start + part.start)


def _operand_parts(
    node: Node, application: Application, factor: str, row: str | None, part: PartRead
) -> tuple[PartRead | None, ...] | None:
    """Return the part that a node reads of each operand, if its results hold a part along a factor. Return None if the
    node cannot be split.

    row   the factor of rows with per-row positions: operands that hold these positions must have this factor

    A product with weights is not split along an axis of the weights: parts of them would be stored next to the whole.
    """
    parts: list[PartRead | None] = []
    for value, dims in zip(node.operands, application.operands, strict=True):
        held = [i for i, dim in enumerate(dims or ()) if factor in dim.factors]
        if value is None or not held:
            parts.append(None)
            continue
        if len(held) > 1 or dims is None or dims[held[0]].factors != (factor,):
            return None
        if value.weight is not None and (
            not node.op.is_elementwise([None if v is None else v.type.rank for v in node.operands])
            or value.type.encoding is not None
        ):
            return None
        rows = [i for i, dim in enumerate(dims) if dim.factors == (row,)]
        if row is not None and len(rows) != 1:
            return None
        parts.append(replace(part, dim=held[0], rows=rows[0] if rows else 0))
    return tuple(parts) if any(parts) else None


def on_part(node: Node, factor: str, part: PartRead) -> Op | None:
    """Return the op of a node, resized to a part of one mapped axis. Return None if the op cannot compute that part
    alone.

    factor  the name of the axis in the op's rule
    """
    op: Op | None = node.op
    assert op is not None
    if factor in op.positional:
        op = None if part.picked is not None else op.on_part(factor, part.start)
    types = [None if v is None else v.type for v in node.operands]
    return None if op is None else op.resized({factor: part.size}, types)
