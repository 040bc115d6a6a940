"""Masks of attention in primitives, as the terms of the op.

    iota(T) <= iota(S)                         -->   causal
    |iota(S) - iota(T)| < n                    -->   window(n)
    iota(T) < lengths[b]                       -->   padding
    a[b, s] == c[b, t]                         -->   segments
    any other condition                        -->   mask(axes)

A condition is a conjunction whose parts are read one by one. Triangles and bands may be constants as well, or numbers 0
and 1 (`treadle.passes.fusion.truth_values`). If a part stays a tensor, `notes` holds the reason, with the node, so that
a triangle that is off by one is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import BooleanMask, Causal, Padding, Segments, Window
from treadle.ir.graph import Node
from treadle.ir.operation import Op
from treadle.ir.ops.logic import Equal, Greater, GreaterEqual, Less, LessEqual, LogicalAnd, LogicalOr, NotEqual
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.ir.types import boolean, i64
from treadle.passes.fusion.attention.core import Placed, number_of
from treadle.passes.fusion.attention.positions import (
    MOST_PARTS,
    Affine,
    affine_difference,
    band_of,
    beneath,
    constant_over,
)
from treadle.passes.fusion.attention.roles import Fused, Note, PlacedOperand, Reading, Roles
from treadle.passes.fusion.axis_tracking import Axes, Layout, narrowed
from treadle.passes.fusion.truth_values import conjuncts_of


@dataclass(frozen=True)
class _Band:
    """A band of positions: low <= j - i <= high; None means no limit. `part` is the condition from which the band was
    read.
    """

    low: int | None
    high: int | None
    part: _Part


@dataclass(frozen=True)
class _Part:
    """One part of a conjunction: a value that must be true, or whose negation must be true."""

    placed: Placed
    wanted: bool


_NEGATED: Mapping[type[Op], type[Op]] = {
    Less: GreaterEqual,
    LessEqual: Greater,
    Greater: LessEqual,
    GreaterEqual: Less,
}


def read_condition(roles: Roles, placed: Placed, wanted: bool) -> Reading:
    """Return the terms that keep a key where the condition is `wanted`."""
    found: list[Fused | _Band] = []
    notes: list[Note] = []
    for part in _parts(roles.axes, _Part(placed, wanted)):
        read = _read_part(roles, part, notes)
        if read is not None:
            found.append(read)
    return Reading(_with_bands_joined(roles, found, notes), notes)


def _parts(axes: Axes, part: _Part, depth: int = 0) -> Iterator[_Part]:
    """Yield the operands of a conjunction, with the rearranges, expands and negations around each removed."""
    value, layout = part.placed.value, part.placed.layout
    node = value.node
    if node is not None and depth < MOST_PARTS:
        if isinstance(node.op, (Rearrange, Expand)) and (above := axes.above(node, layout)) is not None:
            yield from _parts(axes, _Part(Placed(node.inputs[0], above), part.wanted), depth + 1)
            return
        held = conjuncts_of(node, part.wanted)
        if held is not None:
            for operand, wanted in held:
                yield from _parts(axes, _Part(Placed(operand, narrowed(operand, layout)), wanted), depth + 1)
            return
    yield part


def _read_part(roles: Roles, part: _Part, notes: list[Note]) -> Fused | _Band | None:
    """Return a part as a band of positions or as a term, or None if it is true at all positions."""
    value, layout = part.placed.value, part.placed.layout
    if (number := number_of(value)) is not None and bool(number) == part.wanted:
        return None
    table = constant_over(value, roles.axes.resolved(layout), roles)
    if table is not None:
        return _read_table(part, table, roles, notes)
    node = value.node
    if node is not None and isinstance(node.op, LogicalOr if part.wanted else LogicalAnd):
        union = _read_union(roles, part, node)
        if union is not None:
            return union
    if node is not None and (negated := _NEGATED.get(type(node.op))) is not None:
        order = type(node.op) if part.wanted else negated
        x, y = (Placed(v, narrowed(v, layout)) for v in node.inputs)
        # For integers, x < y is y - x - 1 >= 0.
        greater, less, gap = (x, y, order is Greater) if order in (Greater, GreaterEqual) else (y, x, order is Less)
        difference = affine_difference(roles, greater, less)
        if difference is not None:
            return _read_inequality(roles, part, difference.shifted(-gap), node, notes)
    if node is not None and isinstance(node.op, Equal if part.wanted else NotEqual):
        same = _read_equality(roles, node, layout)
        if same is not None:
            return same
    return _tensor(roles, part)


def _read_union(roles: Roles, part: _Part, node: Node) -> _Band | None:
    """Return a disjunction of two bands without a lower limit as one band. Return None for any other disjunction."""
    bands = []
    for value in node.inputs:
        parts = list(_parts(roles.axes, _Part(Placed(value, narrowed(value, part.placed.layout)), part.wanted)))
        read = _read_part(roles, parts[0], []) if len(parts) == 1 else None
        if not isinstance(read, _Band) or read.low is not None or read.high is None:
            return None
        bands.append(read.high)
    return _Band(None, max(bands), part)


def _tensor(roles: Roles, part: _Part) -> Fused:
    axes = roles.held(part.placed.layout) or "t"
    return Fused(BooleanMask(axes), (PlacedOperand(part.placed, axes, negated=not part.wanted, to=boolean),))


def _with_bands_joined(roles: Roles, found: Sequence[Fused | _Band], notes: list[Note]) -> list[Fused]:
    """Replace the bands by their intersection, at the position of the first band. The intersection is causal, a window,
    both, or a boolean mask.
    """
    bands = [x for x in found if isinstance(x, _Band)]
    if not bands:
        return [x for x in found if isinstance(x, Fused)]
    lows = [x.low for x in bands if x.low is not None]
    highs = [x.high for x in bands if x.high is not None]
    low, high = max(lows, default=None), min(highs, default=None)
    terms = band_terms(low, high)
    if terms is None:
        node = bands[0].part.placed.value.node
        if node is not None:
            notes.append(Note(_unlike(low, high), node))
        terms = [_tensor(roles, band.part) for band in bands]
        diagonal = (low is None or low <= 0) and (high is None or high >= 0)
        first = low is None and (high is None or high >= 0)
        terms = [dataclasses.replace(f, diagonal=diagonal, first=first) for f in terms]
    at = next(i for i, x in enumerate(found) if isinstance(x, _Band))
    before, after = found[:at], found[at:]
    return [*(x for x in before if isinstance(x, Fused)), *terms, *(x for x in after if isinstance(x, Fused))]


def band_terms(low: int | None, high: int | None) -> list[Fused] | None:
    causal = Fused(Causal(), diagonal=True, first=True)
    if low is None:
        return [causal] if high == 0 else None
    if low > 0:
        return None
    window = Fused(Window(1 - low), diagonal=True)
    if high == 0:
        return [causal, window]
    return [window] if high == -low else None


def _unlike(low: int | None, high: int | None) -> str:
    """Return the note for a band that is not a term: the limits of the band, and the limits of the nearest terms."""
    if low is None:
        return f"stays a tensor: it keeps keys up to {_offset(high)}, but causal keeps keys up to the query itself"
    if high is None:
        return f"stays a tensor: it keeps keys from {_offset(low)} on, which no term expresses"
    wide = f"from {_offset(low)} to {_offset(high)}"
    return f"stays a tensor: it keeps keys {wide}, but a window is symmetric, or with causal ends at the query"


def _offset(n: int | None) -> str:
    if not n:
        return "the query itself"
    return f"{abs(n)} {'after' if n > 0 else 'before'} the query"


def _read_inequality(roles: Roles, part: _Part, d: Affine, node: Node, notes: list[Note]) -> Fused | _Band | None:
    """Return d >= 0 as a band or as padding, or None if it holds at all positions."""
    constant = d.constant.constant
    if not d.tensors:
        if (d.s, d.t) == (1, -1) and constant is not None:
            return _Band(None, constant, part)
        if (d.s, d.t) == (-1, 1) and constant is not None:
            return _Band(-constant, None, part)
        if (d.s, d.t) in ((1, -1), (-1, 1)):
            notes.append(Note(f"stays a tensor: positions differ by {d.constant}, but causal counts both from 0", node))
        elif d.s >= 0 and d.t >= 0 and d.constant.bounds(roles.symbols).lower >= 0:
            return None  # positions are never negative
        elif (d.s, d.t) == (0, -1) and (d.constant + 1 - roles.size("t")).bounds(roles.symbols).lower >= 0:
            return None  # positions never exceed the last key
        return _tensor(roles, part)
    if len(d.tensors) == 1 and (d.s, d.t) == (0, -1) and d.tensors[0][0] == 1:
        lengths = d.tensors[0][1]
        if roles.held(lengths.layout) in ("b", ""):
            operand = PlacedOperand(lengths, "b", plus=d.constant + 1, to=i64)
            return Fused(Padding(), (operand,))
    return _tensor(roles, part)


def _read_equality(roles: Roles, node: Node, layout: Layout) -> Fused | None:
    x, y = (Placed(v, narrowed(v, layout)) for v in node.inputs)
    if not x.value.type.dtype.is_int:
        return None
    for queries, keys in ((x, y), (y, x)):
        held = roles.held(queries.layout), roles.held(keys.layout)
        if held[0] in ("b s", "s") and held[1] in ("b t", "t"):
            mine, theirs = (beneath(roles.axes, p) for p in (queries, keys))
            operands = (PlacedOperand(mine, "b s", to=i64), PlacedOperand(theirs, "b t", to=i64))
            return Fused(Segments(), operands, diagonal=mine.value is theirs.value)
    return None


def _read_table(part: _Part, table: tuple[Any, list[str]], roles: Roles, notes: list[Note]) -> Fused | _Band | None:
    """Return a constant condition as a band, or as a tensor. Return None if it is true at all positions."""
    array, axes = table
    kept = np.asarray(array, np.bool_) == part.wanted
    if kept.all():
        return None
    if len(axes) == 2:
        kept = kept if axes == ["s", "t"] else kept.T
        band = band_of(kept)
        if band is not None:
            return _Band(*band, part)
        node = part.placed.value.node
        if node is not None:
            notes.append(Note("stays a tensor: the constant is not a band of positions", node))
        return dataclasses.replace(
            _tensor(roles, part), first=bool(kept[:, 0].all()), diagonal=bool(np.diagonal(kept).all())
        )
    return _tensor(roles, part)
