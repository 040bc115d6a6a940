"""Places of an axis in values, and the transfer function of one node, derived from its axis rule.

An axis is located in a `Place` of a value. `visit(node, places)` takes the places in a node's operands and results. It
returns the places that the node's rule maps them to, and every use of the axis other than mapping it. All analyses that
follow an axis through a graph are based on `visit` (`treadle.ir.analysis.axis_tracing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import assert_never

from treadle.ir.analysis.encounters import (
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
    Whole,
)
from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Op
from treadle.ir.rules.axis_splitting import common_pieces
from treadle.ir.sizing.sizes import ONE, Size, product


@dataclass(frozen=True, slots=True)
class Place:
    """The location of the axis in a value: dimension `dim`, `size` steps of stride `inner` elements of that dimension.

    A whole dimension has inner 1; the heads of a merged [heads * 64] have inner 64.
    """

    value: Value
    dim: int
    inner: Size
    size: Size


def visit(node: Node, here: Sequence[Place]) -> tuple[list[Place], list[Encounter]]:
    """Carry the places of an axis across one node by the node's axis rule. Return all places in the node's operands and
    results, and the encounters.
    """
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
    reached = [p for c in coordinates for value, dims in slots for p in places_of(application, value, dims, *c)]
    names = {name for name, _, _ in coordinates}
    filled = {n for n, offset, size in coordinates if offset == 1 and size == application.dims[n].size}
    held = {v: dims_held(v, (*here, *reached)) for v in (*node.inputs, *node.results)}
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
    """Return the kind of encounter for one factor of the op's rule, or None if the rule maps the factor.

    names        the factors that the axis is located in
    filled       the factors that consist of the axis alone
    pairs_given  True if an operand has the axis in two dimensions, so that a query's own position is unknown
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
            # The order along a factor is the order along the axis only if the factor consists of the axis alone.
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
    """Return True if every value that has one of the factors has all of them, adjacent and in this order in one
    dimension.
    """
    for _, dims in slots:
        for dim in dims:
            if set(names) & set(dim.factors):
                at = dim.factors.index(names[0]) if names[0] in dim.factors else 0
                if list(dim.factors[at : at + len(names)]) != list(names):
                    return False
    return True


def dims_held(value: Value, places: Sequence[Place]) -> int:
    return len({p.dim for p in places if p.value is value})


def _partners(application: Application, name: str) -> bool:
    """Return True if a factor occurs in more than one operand (attention's keys and values)."""
    return sum(any(name in d.factors for d in dims) for dims in application.operands if dims is not None) > 1


def _locate(application: Application, dim: AxisDim, place: Place) -> Iterator[tuple[str, Size, Size]]:
    """Yield the factors of a dimension that a place covers, innermost first: (factor, stride within the factor, size).

    A place that spans several factors is yielded factor by factor. A place that covers a part of a factor, and of its
    neighbour, is not yielded.
    """
    sizes = [application.dims[name].size for name in dim.factors]
    if place.size == ONE:
        yield from _located_point(dim, sizes, place)
        return
    if sizes == [place.size] and place.inner == ONE:  # most places are a whole dimension of one factor
        yield dim.factors[0], ONE, place.size
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
    """Yield the factor of size 1 for a place of size 1, which strides cannot determine."""
    inner = ONE
    for name, size in zip(reversed(dim.factors), reversed(sizes), strict=True):
        if size == ONE and inner == place.inner:
            yield name, ONE, ONE
            return
        inner = inner * size


def places_of(
    application: Application, value: Value, dims: Sequence[AxisDim], name: str, offset: Size, size: Size
) -> Iterator[Place]:
    for j, dim in enumerate(dims):
        inner = ONE
        for factor in reversed(dim.factors):
            if factor == name:
                yield Place(value, j, inner * offset, size)
            inner = inner * application.dims[factor].size


def moved(place: Place, value: Value) -> Place:
    return Place(value, place.dim, place.inner, place.size)
