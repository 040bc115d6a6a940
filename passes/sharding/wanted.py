"""The requested splits: axes by name, and their places in every value of a graph.

    {"heads": "tp", "ffn": "tp", "vocab": "tp", "batch": "dp"}

A name is a label ("heads"), a symbol ("S"), a dimension of a weight or an input ("wte.weight[0]", where `*` stands for
any text), or one of these:

    batch      the symbols of inputs' first dimensions
    sequence   the symbols of their other dimensions
    heads      the labels heads and kv_heads, or the heads of attention in a graph without labels
    ffn        the label ffn, or the hidden axes of feed-forward networks
    vocab      the rows of the largest table that an input indexes, and the dimension of outputs with the same size

`follow` traces each axis through the graph. The result is wishes: a wish is a request to split a dimension of a value
that has the axis. Weights are placed by wishes. The placements of other values depend on costs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import gcd, lcm

from treadle.ir.analysis.axis_places import Place
from treadle.ir.analysis.axis_tracing import Tracer, named_axes
from treadle.ir.analysis.structural_axes import HEADS, KV_HEADS
from treadle.ir.axes import Role
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph, Value
from treadle.ir.placement.mesh import Mesh, SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement, Split, lies_between_blocks
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.types import Type


@dataclass(frozen=True)
class Wish:
    """A request to split a dimension of a value, because the dimension has an axis of this name."""

    dim: int
    split: Split
    axis: str


@dataclass(frozen=True)
class Wanted:
    """Wishes for the values of a graph, and the placements of its weights that follow from them.

    notes   descriptions of requested splits that are not possible
    """

    wishes: Mapping[Value, Sequence[Wish]] = field(default_factory=dict)
    weights: Mapping[str, MeshPlacement] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, value: Value) -> Sequence[Wish]:
        """Return the wishes for a value."""
        return self.wishes.get(value, ())


def wanted_splits(graph: Graph, mesh: Mesh, axes: Mapping[str, str], asked: Collection[str] = ()) -> Wanted:
    """Return wishes for a graph. `axes` maps each axis to the mesh axes that split it, such as "tp" or "dp tp".

    asked  the axes that the user names, in contrast to a recipe

    Raises UsageError for a name that is not an axis of the graph, for an unknown mesh axis, and for an axis that the
    user asks to split and that is too short.
    """
    wishes: dict[Value, list[Wish]] = {}
    notes: list[str] = []
    held = set(graph.parameters.values())
    for name, over in axes.items():
        parts = mesh.parts_of(over)
        if not parts:
            continue
        places = list(_places(graph, name))
        if not any(p.size != ONE for p in places):
            raise UsageError(f"{graph.name} has no axis {name!r} to split", hint=_known_axes(graph))
        notes += _wish(wishes, mesh, name, parts, places, held, is_asked=name in asked)
    weights = {name: _placed(wishes.get(v, ()), v.type.rank) for name, v in graph.parameters.items()}
    return Wanted(wishes, weights, tuple(dict.fromkeys(notes)))


def has_axis(graph: Graph, name: str) -> bool:
    """Return True if a graph has an axis of this name that can be split."""
    if any(place.size != ONE for axis in _axes_named(graph, name) for place in _starts(graph, axis)):
        return True  # nearly always true, and needs no tracing of the axis
    return any(place.size != ONE for place in _places(graph, name))


def _wish(
    wishes: dict[Value, list[Wish]],
    mesh: Mesh,
    name: str,
    parts: SubAxes,
    places: Sequence[Place],
    weights: set[Value],
    *,
    is_asked: bool = False,
) -> list[str]:
    """Add wishes for all places of an axis. The smallest place defines the units, so that all places are split in the
    same way.

    Return descriptions of requested splits that are not possible. Raises UsageError if no part of the request is
    possible.
    """
    notes = []
    places = [p for p in places if p.size != ONE and p.inner * p.size == p.value.type.shape[p.dim]]
    sizes = [p.size.constant for p in places]
    least = min([n for n in sizes if n is not None], default=None)
    step = _whole_blocks(places, least, ways(parts))
    taken = parts
    while least is not None and ways(taken) > least:
        taken = taken[:-1]
    if is_asked and not taken:
        raise UsageError(
            f"{name}: {least} cannot be split over {mesh.text_of(parts)}",
            received=f"{ways(parts)} ranks of {mesh}, each of which needs a part",
            hint=Hint(f'axes={{"{name}": "-"}}, which replicates it', f"--axis {name}=-, which replicates it"),
        )
    if ways(taken) < ways(parts):
        left = mesh.text_of(parts[len(taken) :])
        notes.append(
            f"{name}: {least} are split over {mesh.text_of(taken) or 'no part'} of {mesh.text_of(parts)}; "
            f"{left} holds copies, or splits other axes of the same values"
        )
    for place in places:
        type = place.value.type
        split = _split(place, taken, parts, least, step)
        blocked = place.dim == blocked_dim(type)
        if split is not None and blocked and not _fits_blocks(type, split):
            if place.value in weights:
                pattern = re.sub(r"[.][0-9]+(?=[.])", ".*", place.value.name)
                notes.append(f"{name}: {pattern} is stored in blocks along dimension {place.dim}, which is replicated")
            continue
        if split is not None:
            known = wishes.setdefault(place.value, [])
            wish = Wish(place.dim, split.normal(type.shape[place.dim]), name)
            if wish not in known:
                known.append(wish)
    return notes


def _whole_blocks(places: Sequence[Place], least: int | None, count: int) -> int:
    """Return the size, in steps of the axis, of the smallest unit that contains only whole quantization blocks.

    An axis is split only between units, in the same way at all its places. Return 1 if there is no such unit, or if
    units of this size would leave a rank without a part.
    """
    step = 1
    for place in places:
        type, inner = place.value.type, place.inner.constant
        if place.dim == blocked_dim(type) and type.encoding is not None and inner is not None:
            elements = type.encoding.block.elements
            more = step if elements is None else lcm(step, elements // gcd(elements, inner))
            if least is not None and place.size.constant == least and least % more == 0 and least // more >= count:
                step = more
    return step


def _fits_blocks(type: Type, split: Split) -> bool:
    """Return True if a split divides a weight only between its blocks."""
    dim = blocked_dim(type)
    elements = None if type.encoding is None else type.encoding.block.elements
    return dim is not None and elements is not None and lies_between_blocks(type.shape[dim], split, elements)


def blocked_dim(type: Type) -> int | None:
    """Return the dimension along which a value is in blocks, if these blocks cannot be split; None if there is none."""
    return None if type.encoding is None else type.encoding.axis % type.rank


def _split(place: Place, taken: SubAxes, parts: SubAxes, least: int | None, step: int) -> Split | None:
    count = place.size.constant
    shared = None if least is None else place.size.divide(Size.of(least))
    grain = place.inner if shared is None else place.inner * shared
    if least is not None and least == ways(taken) and count is not None and shared is not None:
        # if each part has one step of the smallest place, elements inside a step may be split further
        more, rest = parts[len(taken) :], count // least
        while ways(more) > rest:
            more = more[:-1]
        if more:
            return Split((*taken, *more), place.inner)
    return Split(taken, grain * Size.of(step)) if taken else None


def _placed(wishes: Sequence[Wish], rank: int) -> MeshPlacement:
    """Return a placement that fulfills wishes, earlier wishes first. No part of a mesh axis is used twice."""
    dims: list[Split | None] = [None] * rank
    used: set[object] = set()
    for wish in wishes:
        if not used.intersection(wish.split.over) and dims[wish.dim] is None:
            dims[wish.dim] = wish.split
            used.update(wish.split.over)
    return MeshPlacement(tuple(dims))


# -- names -----------------------------------------------------------------------------------------------------------


def _places(graph: Graph, name: str) -> Iterator[Place]:
    """Yield every place of an axis once, including places in functions."""
    seen: dict[Place, None] = {}
    for axis in _axes_named(graph, name):
        tracer = Tracer(graph, axis)
        tracer.close(graph.main, frozenset(tracer.seeds()))
        for closure in tracer.memo.values():
            seen.update(dict.fromkeys(sorted(closure.places, key=_place_key)))
    yield from seen


def _starts(graph: Graph, axis: str) -> Iterator[Place]:
    """Yield the places at which an axis starts, in `main` and in functions that it calls."""
    tracer = Tracer(graph, axis)
    yield from tracer.seeds()
    callees = dict.fromkeys(callee for node in graph.main.nodes if (callee := graph.callee(node)) is not None)
    for function in (graph.main, *callees):
        yield from tracer.label_seeds(function)


def _place_key(place: Place) -> tuple[str, int, str]:
    return place.value.name, place.dim, str(place.inner)


def _axes_named(graph: Graph, name: str) -> list[str]:
    """Return the axes, in the form that `follow` accepts, to which a requested name refers."""
    shapes = [v.type.shape for v in graph.main.inputs]
    if name == "batch":
        return sorted({s for shape in shapes for s in (shape[0].symbols if shape else ())})
    if name == "sequence":
        batch = {s for shape in shapes for s in (shape[0].symbols if shape else ())}
        return sorted({s for shape in shapes for size in shape[1:] for s in size.symbols} - batch)
    if name == "heads":
        return [label for label in (HEADS, KV_HEADS) if label in named_axes(graph)]
    if name == "vocab":
        return vocabulary(graph)
    pattern = re.fullmatch(r"(.+)\[(\d+)\]", name)
    if pattern is not None:
        values = [v for v in graph.main.arguments if int(pattern[2]) < v.type.rank]
        return [f"{v.name}[{pattern[2]}]" for v in values if fnmatchcase(v.name, pattern[1])]
    return [name] if name in graph.symbols or name in named_axes(graph) else []


def _known_axes(graph: Graph) -> str | None:
    """Return a hint that lists the axes that can be split, or None if there are none."""
    names = dict.fromkeys(["batch", "sequence", "heads", "vocab", *sorted(graph.symbols), *sorted(named_axes(graph))])
    known = [name for name in names if has_axis(graph, name)]
    return f"one of {', '.join(known)}" if known else None


def _weight_behind(value: Value) -> Value | None:
    """Return the weight that a value is, or from which it is derived elementwise, decoded or cast. Return None if
    there is none.
    """
    while value.weight is None and value.node is not None and len(value.node.inputs) == 1:
        (before,) = value.node.inputs
        if before.type.shape != value.type.shape:
            return None
        value = before
    return value.weight


def vocabulary(graph: Graph) -> list[str]:
    """Return the dimensions of weights that are the vocabulary, in the form that `follow` accepts: rows of the largest
    table that an input indexes, and dimensions of the same size that become the last dimension of an output.
    """
    inputs = set(graph.main.inputs)
    tables: dict[Value, int] = {}
    for node in graph.main.nodes:
        if node.op.callee is not None or not inputs.intersection(node.inputs):
            continue
        application = node.op.apply([None if v is None else v.type for v in node.operands])
        for value, dims in zip(node.operands, application.operands, strict=True):
            for d, dim in enumerate(dims or ()):
                indexed = any(application.factors[n].role is Role.INDEXED for n in dim.factors)
                weight = None if value is None else _weight_behind(value)
                if indexed and weight is not None:
                    tables[weight] = d
    rows = {v: v.type.shape[d].constant for v, d in tables.items()}
    most = max((n for n in rows.values() if n is not None), default=None)
    if most is None:
        return []
    found = [f"{v.name}[{tables[v]}]" for v, n in rows.items() if n == most]
    ends = {v.node for v in graph.main.outputs.values() if v.type.rank and v.type.shape[-1].constant == most}
    for value in [v for node in ends if node is not None and node.op.callee is None for v in node.inputs]:
        weight = _weight_behind(value)
        if weight is not None:
            long = [d for d, size in enumerate(value.type.shape) if size.constant == most]
            found += [f"{weight.name}[{d}]" for d in long[:1]]
    return list(dict.fromkeys(found))
