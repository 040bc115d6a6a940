"""Regions computed in parts: each part is a call of a function on slices, and the results of the parts are joined.

    y = f(x)   -->   y = concat(f_part(x[0:c]), f_part(x[c:2 c]), ...)

A part has a copy of every node of the region, on operands of the part's types. The copy has the same op, or the op with
the part's size in place of the axis's size. If the op reads positions, the copy has the op at the start position of the
part (`Op.on_part`). Parts with equal functions share one function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from treadle.ir.analysis.axis_places import Place
from treadle.ir.errors import RuleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hashing import function_key
from treadle.ir.naming import free_name
from treadle.ir.operation import Op
from treadle.ir.ops.call import Call
from treadle.ir.ops.parts import Concat, Slice
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.source_lines import SourceLine
from treadle.ir.transforms.clone import clone_value
from treadle.ir.types import Dim, Factor, Type
from treadle.passes.budget.regions import CutRegion, dims_along


class NoPart(Exception):
    """The error for an op that cannot be computed on a part. It is caught within this folder."""


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a region.

    call    the call that computes the part
    slices  slices of the region's inputs along the axis, by input
    """

    call: Node
    slices: Mapping[Value, Node]


@dataclass(frozen=True, eq=False)
class Parted:
    """A region that is computed in parts.

    joined  the node that joins the results of the parts, for each output of the region
    """

    region: CutRegion
    parts: tuple[Part, ...]
    joined: Mapping[Value, Node]


def cuts(size: Size, parts: int) -> list[Size]:
    """Return the start of each part of an axis, and the end of the axis. For any size of the axis, the sizes of parts
    differ by at most one element.
    """
    return [ZERO, *(size * k // parts for k in range(1, parts)), size]


def compute_in_parts(graph: Graph, region: CutRegion, parts: int) -> Parted:
    """Replace a region's nodes by parts. Return the parts. Raises NoPart if an op cannot be computed on a part."""
    function, builder = region.function, _PartBuilder(graph, region)
    edges = cuts(region.size, parts)
    made: list[Part] = []
    nodes: list[Node] = []
    for start, stop in pairwise(edges):
        slices = {v: _slice(v, region.dims[v], start, stop, region.nodes[0]) for v in region.inputs if v in region.dims}
        callee = builder.of_region({v: node.result.type for v, node in slices.items()}, start, stop - start)
        passed = {v: slices[v].result if v in slices else v for v in region.inputs}
        operands = [passed[v] for v in _in_order(region.inputs)]
        call = Node(Call.of(callee), operands, [v.type for v in callee.results], None, _scope(region), _source(region))
        for value, result in zip(region.outputs, call.results, strict=True):
            result.name = value.name
        made.append(Part(call, slices))
        nodes += [*slices.values(), call]
    joined = {}
    for at, value in enumerate(region.outputs):
        op = Concat(axis=region.dims[value])
        operands = [part.call.results[at] for part in made]
        assert value.node is not None
        node = Node(op, operands, op.infer([v.type for v in operands]), value.name, value.node.scope, value.node.source)
        joined[value] = node
    _replace(function, region, [*nodes, *joined.values()], {v: node.result for v, node in joined.items()})
    return Parted(region, tuple(made), joined)


def _in_order(inputs: Sequence[Value]) -> list[Value]:
    """Return values in the order of a function's arguments: inputs, then parameters."""
    return [v for v in inputs if v.kind != "parameter"] + [v for v in inputs if v.kind == "parameter"]


def _slice(value: Value, dim: int, start: Size, stop: Size, at: Node) -> Node:
    op = Slice(axis=dim, start=start, stop=stop)
    return Node(op, [value], op.infer([value.type]), value.name, at.scope, at.source)


def _scope(region: CutRegion) -> str:
    return region.nodes[-1].scope


def _source(region: CutRegion) -> SourceLine | None:
    return region.nodes[-1].source


def _replace(function: Function, region: CutRegion, nodes: Sequence[Node], by: Mapping[Value, Value]) -> None:
    inside = set(region.nodes)
    left: list[Node] = []
    for node in function.nodes:
        if node is region.nodes[0]:
            left += nodes
        if node not in inside:
            node.operands = tuple([None if v is None else by.get(v, v) for v in node.operands])
            left.append(node)
    function.nodes = left
    function.replace_results(lambda v: by.get(v, v))


class _PartBuilder:
    """A builder of a function for each part of a region. It inserts the functions into the graph before the function
    that calls them.
    """

    def __init__(self, graph: Graph, region: CutRegion) -> None:
        self.graph, self.region = graph, region
        self.symbol = region.size.as_symbol
        self.known: dict[str, Function] = {}

    def of_region(self, types: Mapping[Value, Type], start: Size, size: Size) -> Function:
        region = self.region
        given = {v: types.get(v, v.type) for v in _in_order(region.inputs)}
        return self._function(region.function, region.nodes, given, region.outputs, region.dims, start, size)

    def _function(
        self,
        of: Function,
        nodes: Sequence[Node],
        given: Mapping[Value, Type],
        outputs: Sequence[Value],
        dims: Mapping[Value, int],
        start: Size,
        size: Size,
    ) -> Function:
        made = Function(free_name(f"{of.name}_part", self.graph.functions))
        values: dict[Value, Value] = {}
        for value, type in given.items():
            values[value] = copy = clone_value(value)
            copy.type = type
            if value.kind == "parameter":
                made.parameters[free_name(value.name, made.parameters)] = copy
            else:
                copy.kind, copy.name = "input", free_name(value.name, [v.name for v in made.inputs])
                made.inputs.append(copy)
        for name, copy in made.parameters.items():
            copy.name = name
        for node in nodes:
            operands = [v if v is None or v.literal is not None else values[v] for v in node.operands]
            if node.op.callee is not None:
                op: Op = Call.of(self._callee(node, dims, start, size))
            else:
                op = self._on_part(node, [None if v is None else v.type for v in operands], dims, start, size)
            copied = Node(op, operands, op.infer_for(operands), None, node.scope, node.source)
            for old, new in zip(node.results, copied.results, strict=True):
                new.name = old.name
                values[old] = new
            made.nodes.append(copied)
        for value in outputs:
            made.outputs[free_name(value.name, made.outputs)] = values[value]
        key = function_key(made)
        if key not in self.known:
            self.known[key] = made
            self._add(made)
        return self.known[key]

    def _callee(self, node: Node, dims: Mapping[Value, int], start: Size, size: Size) -> Function:
        """Return the function that a call of the region calls in a part."""
        callee = self.graph.callee(node)
        assert callee is not None
        pairs = [*zip(node.operands, callee.arguments, strict=True), *zip(node.results, callee.results, strict=True)]
        seeds = [
            Place(formal, dims[v], ONE, formal.type.shape[dims[v]])
            for v, formal in pairs
            if v is not None and v in dims
        ]
        inside = dims_along(self.graph, callee, seeds)
        if inside is None or callee.states:
            raise NoPart
        if not inside:
            return callee
        types = {v: part_type(v.type, inside.get(v), size) for v in callee.arguments}
        return self._function(callee, callee.nodes, types, list(callee.results), inside, start, size)

    def _on_part(
        self, node: Node, types: Sequence[Type | None], dims: Mapping[Value, int], start: Size, size: Size
    ) -> Op:
        """Return the op that computes a part of a node's results, from operands of these types."""
        op = node.op
        if op.positional:
            for name in _factors(node, dims) & op.positional:
                shifted = op.on_part(name, start)
                if shifted is None:
                    raise NoPart
                op = shifted
        wanted = [part_type(v.type, dims.get(v), size) for v in node.results]
        forms = [op] if self.symbol is None else [op, op.substitute({self.symbol: size})]
        for form in forms:
            try:
                if all(t.is_held_like(w) for t, w in zip(form.infer(types), wanted, strict=True)):
                    return form
            except RuleError:
                continue
        raise NoPart

    def _add(self, made: Function) -> None:
        if self.region.function in self.graph.entries:
            self.graph.add_function(made)
            return
        functions: dict[str, Function] = {}
        for name, each in self.graph.functions.items():
            if each is self.region.function:
                functions[made.name] = made
            functions[name] = each
        self.graph.functions = functions


def _factors(node: Node, dims: Mapping[Value, int]) -> set[str]:
    """Return the factors of a node's axis rule that are along the split axis."""
    application = node.op.apply([None if v is None else v.type for v in node.operands])
    slots = [
        *zip(node.operands, application.operands, strict=True),
        *zip(node.results, application.results, strict=True),
    ]
    return {n for v, held in slots if v is not None and held is not None and v in dims for n in held[dims[v]].factors}


def part_type(type: Type, dim: int | None, size: Size) -> Type:
    """Return a type with another size in one dimension, or the type itself if `dim` is None. Raises NoPart for the
    axis of the blocks of an encoded type.
    """
    if dim is None:
        return type
    if type.encoding is not None and dim == type.encoding.axis % type.rank:
        raise NoPart
    label = type.dims[dim].factors[0].label if type.dims[dim].factors else None
    dims = [Dim([Factor(size, label)]) if i == dim else each for i, each in enumerate(type.dims)]
    return Type(type.dtype, tuple(dims), type.encoding)
