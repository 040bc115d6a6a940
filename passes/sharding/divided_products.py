"""Products that are sliced, such as a joined query, key and value, as one product for each slice.

    y = linear(x, $qkv, $b)                        q = linear(x, $qkv.0, $b.0)
    q, k, v = slices of y, one third each   -->    k = linear(x, $qkv.1, $b.1)
                                                   v = linear(x, $qkv.2, $b.2)

Each slice of the weight becomes a parameter, so that the heads of q, k and v, or both halves of a gated network, can be
split over ranks. Slices may follow a rearrange that makes an axis of the parts, as in `reshape(B, S, 3, heads, dim)`.
`MergeProjections` merges the products of a rank again.

    graph, divided = divide_products(graph)
    divided.of(weights)["qkv.0"]           # rows of weights["qkv"]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.naming import free_name
from treadle.ir.operation import Op
from treadle.ir.ops.arithmetic import Add
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.call import Call
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.products import Linear, MatMul
from treadle.ir.ops.shapes import Rearrange
from treadle.ir.sizing.sizes import Size
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.types import Dim, Type
from treadle.passes.cleanup.rearrange_forms import form_of

Span = tuple[int, int]
"""The first column of a part, and the column after its last one."""

_Holder = tuple[str, str]
"""A function, and a parameter of it."""

_Division = tuple[int, tuple[Span, ...]]
"""The axis of a parameter that is divided, and its parts."""


@dataclass(frozen=True)
class WeightPart:
    """A part of a weight: its elements from `start` to `stop` along `axis`."""

    whole: str
    axis: int
    start: int
    stop: int

    def of(self, array: Any) -> Any:
        """Return the part of the whole array."""
        return array[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


@dataclass(frozen=True)
class DividedWeights:
    """The parts of divided weights, by the names of the parameters that hold them.

    graph   the graph before its products were divided
    """

    parts: Mapping[str, WeightPart]
    graph: Graph

    def of(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return weights with parts in place of the divided ones. Each array is read when it is used."""
        return _Parts(self.parts, weights) if self.parts else weights


class _Parts(Mapping[str, Any]):
    def __init__(self, parts: Mapping[str, WeightPart], weights: Mapping[str, Any]) -> None:
        self._parts, self._weights = parts, weights

    def __getitem__(self, name: str) -> Any:
        part = self._parts.get(name)
        return self._weights[name] if part is None else part.of(self._weights[part.whole])

    def __iter__(self) -> Iterator[str]:
        wholes = {part.whole for part in self._parts.values()}
        yield from (name for name in self._weights if name not in wholes)
        yield from (name for name, part in self._parts.items() if part.whole in self._weights)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def divide_products(graph: Graph) -> tuple[Graph, DividedWeights]:
    """Return a copy of a recognized graph whose sliced products are divided, and the parts of their weights: none, and
    the graph itself, if it has no such product.

    A product is divided if slices of constant sizes read each of its columns, its weight is a parameter that nothing
    else reads, and so is each bias. In a function, every call must pass such a parameter.
    """
    divisions = _agreed(graph)
    if not divisions:
        return graph, DividedWeights({}, graph)
    copy = clone_graph(graph)
    made: dict[_Holder, list[Value]] = {}
    for name, function in copy.functions.items():  # callees first
        own = {parameter: division for (holder, parameter), division in divisions.items() if holder == name}
        sites = [site for site in _sites(function) if site.weight.name in own]
        parts = _divide_parameters(function, own)
        made |= {(name, parameter): values for parameter, values in parts.items()}
        for node in function.nodes:
            if isinstance(node.op, Call):
                _pass_parts(node, name, graph, copy, made)
        for site in sites:
            _replace(function, site, parts)
    found: dict[str, WeightPart] = {}
    for (name, parameter), (axis, spans) in divisions.items():
        if name == copy.main.name:
            named = [value.name for value in made[name, parameter]]
            found |= {part: WeightPart(parameter, axis, *span) for part, span in zip(named, spans, strict=True)}
            if (how := copy.initial.pop(parameter, None)) is not None:
                copy.initial |= dict.fromkeys(named, how)
    return copy, DividedWeights(found, graph)


# -- sites -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A slice of a product: the rearrange before it, if any, and its part of the product's columns."""

    node: Node
    span: Span
    rearrange: Node | None = None


@dataclass(frozen=True)
class _Site:
    """A sliced product.

    turned   the transposition of the weight before the product, if any
    adds     the additions of biases to the product, each with the position of the bias
    """

    product: Node
    weight: Value
    turned: Node | None
    adds: tuple[tuple[Node, int], ...]
    reads: tuple[_Read, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(sorted({read.span for read in self.reads}))

    @property
    def divisions(self) -> dict[str, _Division]:
        """The division of each parameter, by name."""
        rows = isinstance(self.product.op, Linear) is (self.turned is None)
        added = [node.operands[at] for node, at in self.adds]
        biases = [v for v in (*self.product.operands[2:], *added) if v is not None and v.kind == "parameter"]
        return {self.weight.name: (0 if rows else 1, self.spans)} | {v.name: (0, self.spans) for v in biases}


def _sites(function: Function) -> Iterator[_Site]:
    readers = {value: [node for node, _ in uses] for value, uses in function.uses().items()}
    for value in function.results:
        readers.setdefault(value, []).append(_RETURNED)
    for node in function.nodes:
        site = _site(node, readers)
        if site is not None and _built(site, _parts_of_types(function, site.divisions)) is not None:
            yield site


_RETURNED = Node(Add(), (), ())
"""Stands for the caller of a function, as a reader of its results."""


def _site(product: Node, readers: Mapping[Value, Sequence[Node]]) -> _Site | None:
    """Return the site at a product whose columns slices read; None for any other node."""
    if not isinstance(product.op, Linear | MatMul):
        return None
    weight, turned = product.inputs[1], None
    if weight.node is not None and isinstance(weight.node.op, Rearrange) and len(readers[weight]) == 1:
        turned = weight.node
        weight = turned.inputs[0]
        if not form_of(turned.op.attributes["pattern"], weight.type).is_transposition:
            return None
    columns = product.result.type.shape[-1].constant if product.result.type.rank else None
    biases = [v for v in product.operands[2:] if v is not None]
    if columns is None or weight.type.rank != 2 or not all(_is_own(v, readers) for v in (weight, *biases)):
        return None
    y, adds = product.result, list[tuple[Node, int]]()
    while len(reading := readers.get(y, ())) == 1 and isinstance(reading[0].op, Add) and reading[0] is not _RETURNED:
        add = reading[0]
        at = 1 if add.operands[0] is y else 0
        bias = add.inputs[at]
        is_vector = bias.type.shape == y.type.shape[-1:] and _is_own(bias, readers)
        if add.result.type != y.type or not (is_vector or all(size.constant == 1 for size in bias.type.shape)):
            return None
        adds.append((add, at))
        y = add.result
    reads = [read for node in readers.get(y, ()) for read in _reads(node, y, columns, readers)]
    spans = sorted({read.span for read in reads if read is not None})
    edges = [(0, 0), *spans, (columns, columns)]
    if None in reads or len(spans) < 2 or any(stop != start for (_, stop), (start, _) in pairwise(edges)):
        return None
    return _Site(product, weight, turned, tuple(adds), tuple([read for read in reads if read is not None]))


def _is_own(value: Value, readers: Mapping[Value, Sequence[Node]]) -> bool:
    """Return True for a parameter of numbers, in row-major order, that one node reads."""
    is_plain = value.kind == "parameter" and value.type.encoding is None and value.layout is None
    return is_plain and len(readers[value]) == 1


def _reads(node: Node, y: Value, columns: int, readers: Mapping[Value, Sequence[Node]]) -> list[_Read | None]:
    """Return the slices by which a reader of a product reads it, with None for anything else."""
    if isinstance(node.op, Slice):
        return [_read(node, y.type.rank - 1, 1)]
    if not isinstance(node.op, Rearrange) or node is _RETURNED:
        return [None]
    form = form_of(node.op.pattern, y.type)
    first = form.before[-1][0] if form.before[-1] else None
    count = None if first is None else form.sizes[first].constant
    axes = [axis for axis, atoms in enumerate(form.after) if atoms == (first,)]
    if count is None or len(axes) != 1:
        return [None]
    found = [_read(each, axes[0], columns // count) for each in readers.get(node.result, ())]
    return [None if read is None else replace(read, rearrange=node) for read in found]


def _read(node: Node, axis: int, width: int) -> _Read | None:
    """Return the columns that a slice along an axis reads; None for any other node.

    width  the number of columns of each position on the axis
    """
    if not isinstance(node.op, Slice) or node.op.stride != 1 or node is _RETURNED:
        return None
    type = node.inputs[0].type
    start, stop = (edge.constant for edge in node.op.span(type.shape[axis]))
    if place(node.op.axis, type.rank) != axis or start is None or stop is None:
        return None
    return _Read(node, (start * width, stop * width))


# -- agreement of functions and their calls ----------------------------------------------------------------------------


def _agreed(graph: Graph) -> dict[_Holder, _Division]:
    """Return the parameters to divide: those of sites whose callers, up to `main`, pass parameters that only such sites
    read.
    """
    if len(graph.entry_names) != 1:
        return {}
    sites = {(name, site.weight.name): site.divisions for name, f in graph.functions.items() for site in _sites(f)}
    while sites:
        divisions: dict[_Holder, _Division] = {
            (name, parameter): division for (name, _), own in sites.items() for parameter, division in own.items()
        }
        below: dict[_Holder, set[_Holder]] = {}
        wrong = [
            formal
            for name, function in graph.functions.items()
            for formal in _disagreeing(graph, name, function, divisions, below)
        ]
        if not wrong:
            return divisions
        dropped = {*wrong}
        while wrong:
            wrong = [each for holder in wrong for each in below.get(holder, ()) if each not in dropped]
            dropped |= {*wrong}
        sites = {key: own for key, own in sites.items() if not any((key[0], each) in dropped for each in own)}
    return {}


def _disagreeing(
    graph: Graph,
    name: str,
    function: Function,
    divisions: dict[_Holder, _Division],
    below: dict[_Holder, set[_Holder]],
) -> Iterator[_Holder]:
    """Yield the parameters of called functions that cannot be divided, since a call passes another value. Add the
    parameters that calls pass to `divisions`, and the parameters of the called functions to `below`.
    """
    returned = {*function.results}
    for value, uses in function.uses().items():
        formals: list[_Holder | None] = []
        for node, at in uses:
            callee = graph.callee(node)
            formals.append(None if callee is None else (callee.name, callee.arguments[at].name))
        asked = {None if formal is None else divisions.get(formal) for formal in formals}
        if asked == {None}:
            continue
        own = [formal for formal in formals if formal is not None and formal in divisions]
        if len(asked) > 1 or value.kind != "parameter" or value in returned:
            yield from own
        else:
            divisions[name, value.name] = divisions[own[0]]
            below.setdefault((name, value.name), set()).update(own)


# -- replacement -------------------------------------------------------------------------------------------------------


def _parts_of_types(function: Function, divisions: Mapping[str, _Division]) -> dict[str, list[Value]]:
    """Return new parameters for the parts of a function's parameters."""
    taken = set(function.parameters)
    made: dict[str, list[Value]] = {}
    for parameter, (axis, spans) in divisions.items():
        type = function.parameters[parameter].type
        made[parameter] = []
        for number, (start, stop) in enumerate(spans):
            name = free_name(f"{parameter}.{number}", taken)
            taken.add(name)
            dims = (*type.dims[:axis], Dim.of(stop - start), *type.dims[axis + 1 :])
            made[parameter].append(Value("parameter", Type(type.dtype, dims), name))
    return made


def _divide_parameters(function: Function, divisions: Mapping[str, _Division]) -> dict[str, list[Value]]:
    """Replace parameters of a function by their parts, and return these."""
    made = _parts_of_types(function, divisions)
    values = [part for name, value in function.parameters.items() for part in made.get(name, [value])]
    function.parameters = {value.name: value for value in values}
    return made


def _pass_parts(node: Node, caller: str, graph: Graph, copy: Graph, parts: Mapping[_Holder, list[Value]]) -> None:
    """Pass parts to a function whose parameters are divided."""
    callee = graph.functions[node.op.attributes["function"]]
    operands: list[Value | None] = []
    for formal, value in zip(callee.arguments, node.operands, strict=True):
        is_divided = (callee.name, formal.name) in parts and formal.kind == "parameter" and value is not None
        operands += parts[caller, value.name] if is_divided and value is not None else [value]
    node.operands, node.op = tuple(operands), Call.of(copy.functions[callee.name])


def _built(site: _Site, parts: Mapping[str, Sequence[Value]]) -> tuple[list[Node], dict[Value, Value]] | None:
    """Return the products of a site's parts with what follows them, and the value that replaces each slice; None if the
    types differ.
    """
    nodes: list[Node] = []

    def apply(like: Node, operands: Sequence[Value | None], op: Op | None = None) -> Value:
        op = like.op if op is None else op
        name = like.results[0].name
        nodes.append(Node(op, operands, op.infer_for(operands), name, like.scope, like.source))
        return nodes[-1].result

    def part_of(value: Value | None, number: int) -> Value | None:
        return parts[value.name][number] if value is not None and value.name in parts else value

    products: dict[Span, Value] = {}
    for number, span in enumerate(site.spans):
        weight = parts[site.weight.name][number]
        weight = weight if site.turned is None else apply(site.turned, [weight])
        biases = [part_of(value, number) for value in site.product.operands[2:]]
        y = apply(site.product, [site.product.operands[0], weight, *biases])
        for node, at in site.adds:
            bias = part_of(node.operands[at], number)
            y = apply(node, [y, bias] if at else [bias, y])
        products[span] = y
    rearranged: dict[tuple[Node, Span], Value] = {}
    replaced: dict[Value, Value] = {}
    for read in site.reads:
        value = products[read.span]
        if read.rearrange is not None:
            if (read.rearrange, read.span) not in rearranged:
                op = _rearrange_of_part(read, value)
                rearranged[read.rearrange, read.span] = apply(read.rearrange, [value], op)
            value = rearranged[read.rearrange, read.span]
        if value.type != read.node.result.type:
            return None
        replaced[read.node.result] = value
    return nodes, replaced


def _rearrange_of_part(read: _Read, part: Value) -> Rearrange:
    """Return the rearrange of a part: the first factor of the columns has the number of positions that are sliced."""
    assert read.rearrange is not None
    assert isinstance(read.rearrange.op, Rearrange)
    whole = read.rearrange.inputs[0].type
    form = form_of(read.rearrange.op.pattern, whole)
    first, columns = form.before[-1][0], whole.shape[-1].constant
    positions, size = form.sizes[first].constant or 0, part.type.shape[-1].constant or 0
    sizes = list(form.sizes)
    sizes[first] = Size.of(size * positions // (columns or 1))
    given = form.given | {atom for atom in form.before[-1] if sizes[atom].constant is not None}
    return Rearrange(pattern=replace(form, sizes=tuple(sizes), given=frozenset(given)).pattern)


def _replace(function: Function, site: _Site, parts: Mapping[str, Sequence[Value]]) -> None:
    """Replace a site by the products of its parts."""
    built = _built(site, parts)
    assert built is not None
    nodes, replaced = built
    removed = {site.product, *[node for node, _ in site.adds], *[read.node for read in site.reads]}
    removed |= {each for read in site.reads for each in [read.rearrange] if each is not None}
    removed |= {site.turned} if site.turned is not None else set()
    kept: list[Node] = []
    for node in function.nodes:
        kept += nodes if node is site.product else []
        if node not in removed:
            node.operands = tuple([v if v is None else replaced.get(v, v) for v in node.operands])
            kept.append(node)
    function.nodes = kept
    function.replace_results(lambda value: replaced.get(value, value))
