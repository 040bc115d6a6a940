"""`follow(graph, axis)`: where one axis goes, and what every op on its way does with it.

An axis starts at a symbol ("S"), a label ("heads") or a dimension of an input or parameter ("wte.weight[0]"). Through
each op's axis rule it reaches the dimensions that the rule maps to it, forwards and backwards, into the functions of
repeated blocks and out again. What an op does with it other than map it is an **encounter**
(`treadle.ir.analysis.encounters`). From these follow three answers, each with its reasons:

    step    may the axis be computed a piece at a time, as in generation?
    pack    may rows of different lengths be laid end to end along it?
    split   may devices hold a part of it each, and where must partial results be combined?

The axis is not its size: two axes of size S stay apart unless some op maps one to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import assert_never

from treadle.ir.analysis.encounters import (
    Combination,
    Encounter,
    Generated,
    Indexed,
    Kind,
    Paired,
    Reduced,
    Reordered,
    Resized,
    Scanned,
    SelfAttention,
    Verdict,
    Whole,
)
from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.axis_splitting import common_pieces
from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, Op
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.text.attributes import attribute_symbols
from treadle.ir.types import Factor


@dataclass(frozen=True, slots=True)
class Place:
    """Where the axis lies in a value: in dimension `dim`, `size` steps of stride `inner` elements of that dimension.

    A whole dimension has inner 1; the heads of a merged [heads * 64] have inner 64.
    """

    value: Value
    dim: int
    inner: Size
    size: Size


@dataclass(frozen=True)
class Following:
    """One axis, followed through a graph.

    places      its places in `main`
    encounters  what ops do with it, callees' included, in program order
    """

    axis: str
    graph: Graph
    places: tuple[Place, ...]
    encounters: tuple[Encounter, ...]

    @property
    def parameters(self) -> dict[str, int]:
        """Which weights hold the axis, by full name, in which dimension."""
        return {p.value.name: p.dim for p in self.places if p.value.kind == "parameter"}

    @property
    def outputs(self) -> dict[str, int]:
        """Which outputs hold the axis, in which dimension."""
        found = {p.value: p.dim for p in self.places}
        return {name: found[v] for name, v in self.graph.main.outputs.items() if v in found}

    def step(self) -> Verdict:
        """May a piece of the axis be computed from that piece and a state? Every op maps it, is self-attention
        causal in it, or scans or generates it with a declared step."""
        against = tuple(e for e in self.encounters if not e.steps)
        return Verdict("stepped", self.axis, against)

    def pack(self) -> Verdict:
        """May rows of different lengths lie end to end along the axis? Reductions, scans and indexing then mean a row's
        own tokens, and self-attention runs row by row. Other pairs of positions, and an op that needs the whole axis in
        another way than by reducing it, have no such form."""
        against = []
        for e in self.encounters:
            if not isinstance(e.kind, SelfAttention) or not e.kind.aligned:
                opened = [e] if e.node.op.pairs is not None else list(_opened(e))
                against += [inner for inner in opened if not inner.packs]
        return Verdict("packed", self.axis, tuple(against))

    def split(self) -> Verdict:
        """May the axis be divided among devices? A reduction leaves partial results to combine by its monoid, a lookup
        in a divided table a sum, a scan an offset from the parts before. Composites are opened where they need the
        whole axis; self-attention along it needs every pair, and is against."""
        against: list[Encounter] = []
        combine: list[Combination] = []
        for e in self.encounters:
            for opened in [e] if isinstance(e.kind, SelfAttention) else _opened(e):
                match opened.kind:
                    case Reduced(monoid=monoid):
                        combine.append(Combination(opened, monoid))
                    case Indexed(kept=False):
                        combine.append(Combination(opened, "sum"))
                    case Scanned():
                        combine.append(Combination(opened, "scan"))
                    case Indexed() | Reordered():
                        pass
                    case Generated() if opened.steps:
                        pass
                    case Whole() | Generated() | Resized() | Paired():
                        against.append(opened)
                    case _:
                        assert_never(opened.kind)
        return Verdict("split", self.axis, tuple(against), tuple(combine))

    def __repr__(self) -> str:
        places, met = len(self.places), len(self.encounters)
        return (
            f"<axis {self.axis} of {self.graph.name}: in {places} value{'s' * (places != 1)}, "
            f"{met} encounter{'s' * (met != 1)}; .step(), .pack() and .split() say what it may>"
        )

    def __str__(self) -> str:
        held = ", ".join(f"{n}[{d}]" for n, d in {**self.parameters, **self.outputs}.items())
        return "\n".join([f"{self.axis}: in {held or 'no weight or output'}", *(f"  {e}" for e in self.encounters)])


def follow(graph: Graph, axis: str) -> Following:
    """Follow an axis of a graph.

    axis is a symbol (`"S"`), a label (`"heads"`), or a dimension of an input or parameter of `main`
    (`"tokens[1]"`, `"wte.weight[0]"`). A compiled model stands for its graph. Raises GraphError where there is no such
    axis.
    """
    graph = getattr(graph, "graph", graph)
    tracer = _Tracer(graph, axis)
    seeds = set(tracer.seeds())
    closure = tracer.close(graph.main, frozenset(seeds))
    if not closure.places:
        known = sorted(graph.symbols) + sorted({f.label for v in _values(graph) for f in _factors(v) if f.label})
        raise GraphError(f"there is no axis {axis!r}", hint="one of " + ", ".join(known) + ", or a dimension as x[0]")
    order = {v: i for i, v in enumerate(_ordered(graph.main))}
    places = sorted(closure.places, key=lambda p: (order[p.value], p.dim, str(p.inner)))
    outputs = [v for v in graph.main.outputs.values() if v.node is not None and _dims_held(v, places) > 1]
    finals = [Encounter(v.node, Paired(in_output=True), v.node.scope) for v in outputs if v.node]
    return Following(axis, graph, tuple(places), (*_counted(closure.encounters), *finals))


# -- encounters ------------------------------------------------------------------------------------------------


def _opened(e: Encounter) -> Iterator[Encounter]:
    """The encounter, or those in the body of a composite that needs the whole axis."""
    op, kind = e.node.op, e.kind
    if not isinstance(kind, Whole) or not isinstance(op, Composite):
        yield e
        return
    types = [None if v is None else v.type for v in e.node.operands]
    body = body_of(op, types)
    application = op.apply(types)
    seeds: set[Place] = set()
    formals = iter(body.inputs)
    for dims in application.operands:
        if dims is None:
            continue
        formal = next(formals)
        seeds.update(_places_of(application, formal, dims, kind.factor, ONE, application.dims[kind.factor].size))
    inner = _Tracer(Graph(op.name), "").close(body, frozenset(seeds))
    for found in _counted(inner.encounters):
        for deeper in _opened(found):
            yield replace(deeper, within=e.node, scope=e.scope, count=e.count)


def _counted(encounters: Sequence[Encounter]) -> tuple[Encounter, ...]:
    """The same op met in several calls of its function counts as one encounter."""
    groups: dict[tuple[Node, Kind, Node | None], list[Encounter]] = {}
    for e in encounters:
        groups.setdefault((e.node, e.kind, e.within), []).append(e)
    return tuple(replace(group[0], count=len({e.scope for e in group})) for group in groups.values())


# -- propagation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Closure:
    places: frozenset[Place]
    encounters: tuple[Encounter, ...]


class _Tracer:
    """Closes sets of places under the rules of a function's nodes; calls are closed in their own context."""

    def __init__(self, graph: Graph, axis: str) -> None:
        self.graph = graph
        self.axis = axis
        self.symbol = axis if axis in graph.symbols else None
        self.memo: dict[tuple[str, frozenset[Place]], _Closure] = {}

    def seeds(self) -> Iterator[Place]:
        """The places at which the axis starts in `main`; labels start inside every function, see `label_seeds`."""
        main = self.graph.main
        match = re.fullmatch(r"(.+)\[(\d+)\]", self.axis)
        if match is not None:
            name, dim = match[1], int(match[2])
            for value in main.arguments:
                if value.name == name and dim < value.type.rank:
                    yield Place(value, dim, ONE, value.type.shape[dim])
        elif self.symbol is not None:
            for value in main.inputs:
                for dim, size in enumerate(value.type.shape):
                    if size.as_symbol == self.symbol:
                        yield Place(value, dim, ONE, size)

    def label_seeds(self, function: Function) -> Iterator[Place]:
        if self.symbol is not None or not self.axis.isidentifier():
            return
        for value in _ordered(function):
            for dim, d in enumerate(value.type.dims):
                inner = ONE
                for factor in reversed(d.factors):
                    if factor.label == self.axis:
                        yield Place(value, dim, inner, factor.size)
                    inner = inner * factor.size

    def generated_seeds(self, function: Function) -> Iterator[Place]:
        """Where a symbol's axis is generated: `iota(size=S)` counts along it."""
        for node in function.nodes if self.symbol is not None else ():
            if node.op.callee is not None or self.symbol not in attribute_symbols(node.op):
                continue
            application = node.op.apply([None if v is None else v.type for v in node.operands])
            for name, factor in application.factors.items():
                size = application.dims[name].size
                if factor.role is Role.GENERATED and size.as_symbol == self.symbol:
                    for value, dims in zip(node.results, application.results, strict=True):
                        yield from _places_of(application, value, dims, name, ONE, size)

    def close(self, function: Function, seeds: frozenset[Place]) -> _Closure:
        key = (function.name, seeds)
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = self._close(function, seeds)
        return found

    def _close(self, function: Function, seeds: frozenset[Place]) -> _Closure:
        places: dict[Value, set[Place]] = {}
        touching: dict[Value, list[Node]] = {}
        for node in function.nodes:
            for value in {*node.inputs, *node.results}:
                touching.setdefault(value, []).append(node)
        pending: dict[Node, None] = {}

        def add(found: Iterable[Place]) -> None:
            for place in found:
                held = places.setdefault(place.value, set())
                if place not in held and place.value.literal is None:
                    held.add(place)
                    pending.update(dict.fromkeys(touching.get(place.value, ())))

        add(seeds)
        add(self.label_seeds(function))
        add(self.generated_seeds(function))
        if self.symbol is not None or self.axis.isidentifier():  # it may start anew in a callee
            pending.update(dict.fromkeys(n for n in function.nodes if n.op.callee is not None))
        met: dict[Node, list[Encounter]] = {}
        while pending:
            node = next(iter(pending))
            del pending[node]
            here = [p for v in (*node.inputs, *node.results) for p in places.get(v, ())]
            if node.op.callee is not None:
                reached, encounters = self.enter(node, here)
            else:
                reached, encounters = _visit(node, here)
            met[node] = encounters
            add(reached)
        if self.symbol is not None:
            for node in function.nodes:
                if node not in met and node.op.callee is None and self.symbol in attribute_symbols(node.op):
                    # It computes with the length, but not along the axis: 2*S numbers, or S itself.
                    met[node] = [Encounter(node, Resized(), node.scope)]
        flat = tuple(e for node in function.nodes for e in met.get(node, ()))
        return _Closure(frozenset(p for held in places.values() for p in held), flat)

    def enter(self, node: Node, here: Sequence[Place]) -> tuple[list[Place], list[Encounter]]:
        """Close the callee with the places that the call's operands and results hold."""
        callee = self.graph.callee(node)
        assert callee is not None
        pairs = [*zip(node.operands, callee.arguments, strict=True)]
        pairs += zip(node.results, callee.outputs.values(), strict=True)
        inside = {_moved(p, formal) for p in here for actual, formal in pairs if actual is p.value}
        closure = self.close(callee, frozenset(inside))
        reached = [
            _moved(p, actual)
            for p in closure.places
            for actual, formal in pairs
            if formal is p.value and actual is not None
        ]
        scoped = [replace(e, scope=_join(node.scope, e.scope)) for e in closure.encounters]
        return reached, scoped


def _visit(node: Node, here: Sequence[Place]) -> tuple[list[Place], list[Encounter]]:
    """Carry places across one node by its axis rule."""
    application = node.op.apply([None if v is None else v.type for v in node.operands])
    slots: list[tuple[Value, tuple[AxisDim, ...]]] = [
        (v, dims)
        for v, dims in zip(node.operands, application.operands, strict=True)
        if v is not None and dims is not None
    ]
    slots += zip(node.results, application.results, strict=True)
    coordinates: dict[tuple[str, Size, Size], None] = {}
    resized = reordered = False
    for place in here:
        for value, dims in slots:
            if value is place.value:
                dim = dims[place.dim]
                resized |= dim.size is not None
                pieces = list(_locate(application, dim, place))
                reordered |= len(pieces) > 1 and not _side_by_side([name for name, _, _ in reversed(pieces)], slots)
                coordinates.update(dict.fromkeys(pieces))
    reached = [p for c in coordinates for value, dims in slots for p in _places_of(application, value, dims, *c)]
    names = {name for name, _, _ in coordinates}
    filled = {n for n, offset, size in coordinates if offset == 1 and size == application.dims[n].size}
    held = {v: _dims_held(v, (*here, *reached)) for v in (*node.inputs, *node.results)}
    pairs_given = any(held[v] > 1 for v in node.inputs)
    kinds = [
        kind
        for name in sorted(names, key=list(application.factors).index)
        if (kind := _kind(node.op, application, name, names, filled, pairs_given)) is not None
    ]
    if resized and not any(isinstance(kind, Resized) for kind in kinds):
        kinds.append(Resized())
    if reordered:
        kinds.append(Reordered())
    elif any(held[v] > 1 for v in node.results) and not pairs_given:
        kinds.append(Paired())
    return reached, [Encounter(node, kind, node.scope) for kind in kinds]


def _kind(
    op: Op, application: Application, name: str, names: Set[str], filled: Set[str], pairs_given: bool
) -> Kind | None:
    """What an op does with the axis in one factor of its rule; None where it maps it.

    names        the factors in which the axis lies
    filled       those that it is all of
    pairs_given  whether an operand has it in two dimensions, so that no position is known to be one's own
    """
    factor = application.factors[name]
    kept = any(name in d.factors for dims in application.results for d in dims)
    match factor.role:
        case Role.MAPPED:
            return None
        case Role.REDUCED:
            return Reduced(name, factor.monoid or "sum")
        case Role.INDEXED:
            return Indexed(name, kept)
        case Role.GENERATED:
            return Generated(name)
        case Role.SCANNED:
            # Order along a factor is order along the axis only where the axis is all of the factor.
            return Scanned(name) if name in filled else Whole(name)
        case Role.WHOLE:
            causal = {name, factor.limit} <= filled and not pairs_given
            if op.pairs is not None and names >= set(op.pairs):
                return SelfAttention(name, causal, aligned=filled >= set(op.pairs) and not pairs_given)
            sized = any(d.size is not None for dims in application.results for d in dims)
            return Resized(name) if sized and not kept and not _partners(application, name) else Whole(name, causal)
        case _:
            assert_never(factor.role)


def _side_by_side(names: Sequence[str], slots: Sequence[tuple[Value, Sequence[AxisDim]]]) -> bool:
    """Whether factors, wherever a value holds one of them, stand together in one dimension in this order."""
    for _, dims in slots:
        for dim in dims:
            if set(names) & set(dim.factors):
                at = dim.factors.index(names[0]) if names[0] in dim.factors else 0
                if list(dim.factors[at : at + len(names)]) != list(names):
                    return False
    return True


def _dims_held(value: Value, places: Sequence[Place]) -> int:
    return len({p.dim for p in places if p.value is value})


def _partners(application: Application, name: str) -> bool:
    """Whether a factor lies in more than one operand (attention's keys and values)."""
    return sum(any(name in d.factors for d in dims) for dims in application.operands if dims is not None) > 1


def _locate(application: Application, dim: AxisDim, place: Place) -> Iterator[tuple[str, Size, Size]]:
    """The factors of a dimension in which a place lies, innermost first: (factor, stride within it, size).

    A place that spans several factors is given piece by piece; one that cuts across them is not given.
    """
    sizes = [application.dims[name].size for name in dim.factors]
    if place.size == ONE:
        yield from _located_point(dim, sizes, place)
        return
    outer = product(sizes).divide(place.inner * place.size)
    found = common_pieces(sizes, (outer, place.size, place.inner)) if outer is not None else None
    if found is None:
        return
    inside = found.after[1]
    for name, pieces in zip(reversed(dim.factors), reversed(found.before), strict=True):
        held = [p for p in pieces if p in inside]
        if held:
            within = [p for p in pieces if p > held[-1]]
            yield name, product(found.sizes[p] for p in within), product(found.sizes[p] for p in held)


def _located_point(dim: AxisDim, sizes: Sequence[Size], place: Place) -> Iterator[tuple[str, Size, Size]]:
    """The factor of size 1 that a place of size 1 is, which no product tells."""
    inner = ONE
    for name, size in zip(reversed(dim.factors), reversed(sizes), strict=True):
        if size == ONE and inner == place.inner:
            yield name, ONE, ONE
            return
        inner = inner * size


def _places_of(
    application: Application, value: Value, dims: Sequence[AxisDim], name: str, offset: Size, size: Size
) -> Iterator[Place]:
    for j, dim in enumerate(dims):
        inner = ONE
        for factor in reversed(dim.factors):
            if factor == name:
                yield Place(value, j, inner * offset, size)
            inner = inner * application.dims[factor].size


def _moved(place: Place, value: Value) -> Place:
    return Place(value, place.dim, place.inner, place.size)


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner


def _ordered(function: Function) -> Iterator[Value]:
    yield from function.arguments
    for node in function.nodes:
        yield from node.results


def _values(graph: Graph) -> Iterator[Value]:
    for function in graph.functions.values():
        yield from _ordered(function)


def _factors(value: Value) -> Iterator[Factor]:
    for dim in value.type.dims:
        yield from dim.factors
