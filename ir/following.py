"""`follow(graph, axis)`: where one axis goes, and what every op on its way does with it.

An axis starts at a symbol ("S"), a label ("heads") or a dimension of an input or parameter ("wte.weight[0]"). Through
each op's axis rule it reaches the dimensions that the rule maps to it, forwards and backwards, into the functions of
repeated blocks and out again. What an op does with it other than map it is an **encounter**. From these follow three
answers, each with its reasons:

    step    may the axis be computed a piece at a time, as in generation?
    pack    may rows of different lengths be laid end to end along it?
    split   may devices hold a part of it each, and where must partial results be combined?

The axis is not its size: two axes of size S stay apart unless some op maps one to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.axis_splitting import common_pieces
from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite
from treadle.ir.sizes import ONE, Size, product
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
class Encounter:
    """An op that does more with the axis than map it.

    role     what it does (see `treadle.ir.axes`)
    factor   the factor of its rule in which the axis lies
    monoid   what combines a reduced factor
    limited  the axis is whole here, but each of its positions reads only positions up to itself (causal)
    paired   attention's keys and queries both lie along the axis
    aligned  and the axis is all of each, so that a query's own position is known
    resized  the axis is cut, padded, joined or strided over: the result has another one
    squared  a result holds the axis in two dimensions: it is about pairs of positions
    kept     the result has the axis too (a scatter writes along it; a lookup reads it away)
    reordered  the axis is divided, and its parts do not stay side by side in their order
    final    it is an output of the graph that is meant
    scope    the full scope of the first place where this happens; `count` places in all
    within   the composite whose body was opened to find this, if any
    """

    node: Node
    role: Role
    scope: str
    factor: str = ""
    monoid: str | None = None
    limited: bool = False
    paired: bool = False
    aligned: bool = False
    resized: bool = False
    squared: bool = False
    kept: bool = False
    reordered: bool = False
    final: bool = False
    count: int = 1
    within: Node | None = None

    @property
    def line(self) -> str:
        """The user's line, `gpt2.py:41`, or an empty text."""
        return str((self.within or self.node).source or "")

    @property
    def op(self) -> str:
        """The op's name, and that of the composite in whose body it was found."""
        return self.node.op.name if self.within is None else f"{self.within.op.name} ({self.node.op.name} inside)"

    @property
    def place(self) -> str:
        """`  (gpt2.py:41, scope h.0.attn, 12 times)`, or what is known of it."""
        scope = f"scope {self.scope}" if self.scope else ""
        times = f"{self.count} times" if self.count > 1 else ""
        known = ", ".join(part for part in (self.line, scope, times) if part)
        return f"  ({known})" if known else ""

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        what = "cut, padded, joined or strided over" if self.resized else self.role.value
        what = "paired with itself" if self.squared else "reordered" if self.reordered else what
        what += " in an output" if self.final else ""
        detail = f" by {self.monoid}" if self.monoid else " up to each position" if self.limited else ""
        return f"{self.op}: the axis is {what}{detail}{self.place}"


@dataclass(frozen=True)
class Verdict:
    """An answer: true if nothing stands against it.

    against  encounters that forbid it
    combine  encounters at which partial results must be combined (for `split`)
    """

    question: str
    axis: str
    against: tuple[Encounter, ...]
    combine: tuple[Encounter, ...] = ()

    def __bool__(self) -> bool:
        return not self.against

    def __repr__(self) -> str:
        head, *reasons = str(self).splitlines()
        told = f": {len(reasons)} reason{'s' * (len(reasons) > 1)}, which print() shows" if reasons else ""
        return f"<{head}{told}>"

    def __str__(self) -> str:
        lines = [f"{self.axis} may {'' if self else 'not '}be {self.question}"]
        lines += [f"  {e}" for e in self.against]
        lines += [f"  combine by {e.monoid} at {e.op}{e.place}" for e in self.combine]
        return "\n".join(lines)


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
        against = tuple(e for e in self.encounters if not _steps(e))
        return Verdict("stepped", self.axis, against)

    def pack(self) -> Verdict:
        """May rows of different lengths lie end to end along the axis? Reductions, scans and indexing then mean a row's
        own tokens, and self-attention runs row by row. Other pairs of positions, and an op that needs the whole axis in
        another way than by reducing it, have no such form."""
        against = []
        for e in self.encounters:
            if not e.aligned:
                opened = [e] if e.node.op.pairs is not None else list(_opened(e))
                against += [inner for inner in opened if not _packs(inner)]
        return Verdict("packed", self.axis, tuple(against))

    def split(self) -> Verdict:
        """May the axis be divided among devices? A reduction leaves partial results to combine by its monoid, a lookup
        in a divided table a sum, a scan an offset from the parts before. Composites are opened where they need the
        whole axis; self-attention along it needs every pair, and is against."""
        against, combine = [], []
        for e in self.encounters:
            for opened in [e] if e.paired else _opened(e):
                if opened.role is Role.REDUCED:
                    combine.append(opened)
                elif opened.role is Role.INDEXED:
                    combine += [] if opened.kept else [_with(opened, monoid="sum")]
                elif opened.role is Role.SCANNED:
                    combine.append(_with(opened, monoid="scan"))
                elif not opened.reordered and not (opened.role is Role.GENERATED and _steps(opened)):
                    against.append(opened)
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
    finals = [Encounter(v.node, Role.MAPPED, v.node.scope, squared=True, final=True) for v in outputs if v.node]
    return Following(axis, graph, tuple(places), (*_counted(closure.encounters), *finals))


# -- verdicts --------------------------------------------------------------------------------------------------


def _steps(e: Encounter) -> bool:
    if e.squared:
        return not e.final  # else what reads the pairs decides
    if e.resized or e.reordered:
        return False
    if e.role is Role.WHOLE:
        return e.limited
    return e.role in (Role.SCANNED, Role.GENERATED) and e.node.op.step is not None


def _packs(e: Encounter) -> bool:
    if e.squared or e.resized or e.reordered or e.role is Role.WHOLE:
        return False
    return e.role is not Role.GENERATED or e.node.op.step is not None


def _opened(e: Encounter) -> Iterator[Encounter]:
    """The encounter, or those in the body of a composite that needs the whole axis."""
    op = e.node.op
    if e.role is not Role.WHOLE or e.resized or not isinstance(op, Composite):
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
        seeds.update(_places_of(application, formal, dims, e.factor, ONE, application.dims[e.factor].size))
    inner = _Tracer(Graph(op.name), "").close(body, frozenset(seeds))
    for found in _counted(inner.encounters):
        for deeper in _opened(found):
            yield _with(deeper, within=e.node, scope=e.scope, count=e.count)


def _with(e: Encounter, **changes: object) -> Encounter:
    return replace(e, **changes)  # type: ignore[arg-type]


def _counted(encounters: Sequence[Encounter]) -> tuple[Encounter, ...]:
    """The same op met in several calls of its function counts as one encounter."""
    groups: dict[tuple[object, ...], list[Encounter]] = {}
    for e in encounters:
        key = tuple(getattr(e, f.name) for f in fields(e) if f.name not in ("scope", "count"))
        groups.setdefault(key, []).append(e)
    return tuple(_with(group[0], count=len({e.scope for e in group})) for group in groups.values())


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
                    met[node] = [Encounter(node, Role.GENERATED, node.scope, resized=True)]
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
        scoped = [_with(e, scope=_join(node.scope, e.scope)) for e in closure.encounters]
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
    encounters = []
    for name in sorted(names, key=list(application.factors).index):
        factor = application.factors[name]
        if factor.role is Role.MAPPED:
            continue
        kept = any(name in d.factors for dims in application.results for d in dims)
        grown = factor.role is Role.WHOLE and not kept
        partners = _partners(application, name)
        # Order along a factor is order along the axis only where the axis is all of the factor.
        role = Role.WHOLE if factor.role is Role.SCANNED and name not in filled else factor.role
        paired = role is Role.WHOLE and node.op.pairs is not None and set(node.op.pairs) <= names
        encounters.append(
            Encounter(
                node,
                role,
                node.scope,
                name,
                factor.monoid,
                limited={name, factor.limit} <= filled and not pairs_given,
                paired=paired,
                aligned=paired and set(node.op.pairs or ()) <= filled and not pairs_given,
                kept=kept,
                resized=grown
                and not partners
                and any(d.size is not None for dims in application.results for d in dims),
            )
        )
    if resized and not any(e.resized for e in encounters):
        encounters.append(Encounter(node, Role.WHOLE, node.scope, resized=True))
    if reordered:
        encounters.append(Encounter(node, Role.MAPPED, node.scope, reordered=True))
    if any(held[v] > 1 for v in node.results) and not pairs_given and not reordered:
        encounters.append(Encounter(node, Role.MAPPED, node.scope, squared=True))
    return reached, encounters


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
