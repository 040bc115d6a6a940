"""Masks and biases of spelled-out attention, as the terms of the op.

    iota(T) <= iota(S)                         -->   causal
    |iota(S) - iota(T)| < n                    -->   window(n)
    iota(T) < lengths[b]                       -->   padding
    a[b, s] == c[b, t]                         -->   segments
    table[bucket(iota(T) - iota(S))]           -->   t5_relative
    slopes[h] * (iota(T) - iota(S))            -->   alibi
    any other condition, any other addend      -->   mask(axes), bias(axes)

A condition is a conjunction, whose parts are read one by one; triangles and bands may be constants as well. What a
part is not is told in `notes`, with the node, so that a triangle one off is seen to have stayed a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.ir.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    MaskTerm,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Node, Value
from treadle.ir.sizes import ONE, ZERO, Bounds, Size
from treadle.ir.types import DType, i64
from treadle.passes.attention_core import LEAST_FILL, Added, Chosen, Placed, number_of
from treadle.passes.axis_tracking import Axes, Layout, narrowed

_MOST_PARTS = 32


@dataclass(frozen=True)
class Roles:
    """The atoms of attention's axes, and the sizes' bounds. A group may be empty, and is then of size 1."""

    axes: Axes
    groups: dict[str, tuple[int, ...]]
    symbols: dict[str, Bounds]

    def held(self, layout: Layout) -> str:
        """The axes of which a layout holds an atom: "b t"."""
        there = {atom for dim in self.axes.resolved(layout) for atom in dim}
        return " ".join(name for name, atoms in self.groups.items() if there.intersection(atoms))

    def size(self, name: str) -> Size:
        return self.axes.size(self.groups[name])

    def place(self, b: Builder, x: Expr, layout: Layout, axes: str) -> Expr:
        """x with a dimension for each of these axes; it is repeated along what it lacks of them."""
        return self.axes.place(b, x, layout, [self.groups[name] for name in axes.split()])


@dataclass(frozen=True)
class Operand:
    """An operand of a term: a value, the axes under which the term takes it, and what is done to it first.

    negated   of a condition: where it is false
    factor    of a bias
    plus      of lengths
    to        the dtype that it is cast to
    """

    placed: Placed
    axes: str
    negated: bool = False
    factor: float = 1.0
    plus: Size = ZERO
    to: DType | None = None

    def build(self, b: Builder, roles: Roles) -> Expr:
        x = b.expr(self.placed.value)
        if self.negated:
            x = b.logical_not(x)
        if self.to is not None and x.dtype != self.to:
            x = x.cast(self.to)
        if self.factor != 1.0:
            x = x * self.factor
        if self.plus != ZERO:
            x = x + (self.plus.constant if self.plus.constant is not None else b.size(value=self.plus, dtype=x.dtype))
        return roles.place(b, x, self.placed.layout, self.axes)


@dataclass(frozen=True)
class Fused:
    """A term with its operands. `diagonal`: it keeps j = i; `first`: it keeps j = 0, whatever its operands hold."""

    term: Term
    operands: tuple[Operand, ...] = ()
    diagonal: bool = False
    first: bool = False


@dataclass(frozen=True)
class Note:
    """Why something stayed a tensor, and the node that shows it."""

    reason: str
    node: Node


@dataclass
class Reading:
    """What conditions came to: terms in order, and notes on what stayed a tensor."""

    terms: list[Fused] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def structural(self) -> bool:
        """Whether a part of it is known by position."""
        return any(not isinstance(f.term, BooleanMask) for f in self.terms)


def never_empty(terms: Sequence[Fused], roles: Roles) -> bool:
    """Whether together they leave every query a key, whatever their operands hold."""
    masks = [f for f in terms if isinstance(f.term, MaskTerm)]
    square = roles.size("s") == roles.size("t")
    return all(f.first for f in masks) or (square and all(f.diagonal for f in masks))


# -- conditions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Band:
    """low <= j - i <= high; None: no limit. `part` is the condition that said so."""

    low: int | None
    high: int | None
    part: _Part


@dataclass(frozen=True)
class _Part:
    """One part of a conjunction: where the value is, or is not, true."""

    placed: Placed
    wanted: bool


_NEGATED = {"less": "greater_equal", "less_equal": "greater", "greater": "less_equal", "greater_equal": "less"}


def read_condition(roles: Roles, placed: Placed, wanted: bool) -> Reading:
    """The terms that keep a key where the condition is `wanted`."""
    found: list[Fused | _Band] = []
    notes: list[Note] = []
    for part in _parts(roles.axes, _Part(placed, wanted)):
        read = _read_part(roles, part, notes)
        if read is not None:
            found.append(read)
    return Reading(_with_bands_joined(roles, found, notes), notes)


def _parts(axes: Axes, part: _Part, depth: int = 0) -> Iterator[_Part]:
    """The parts of a conjunction, each beneath its moves and negations."""
    value, layout = part.placed.value, part.placed.layout
    node = value.node
    if node is not None and depth < _MOST_PARTS:
        name, operands = node.op.name, node.inputs
        if name == "logical_not":
            yield from _parts(axes, _Part(Placed(operands[0], layout), not part.wanted), depth + 1)
            return
        if name == ("logical_and" if part.wanted else "logical_or"):
            for operand in operands:
                yield from _parts(axes, _Part(Placed(operand, narrowed(operand, layout)), part.wanted), depth + 1)
            return
        if name in ("rearrange", "expand") and (above := axes.above(node, layout)) is not None:
            yield from _parts(axes, _Part(Placed(operands[0], above), part.wanted), depth + 1)
            return
        if name in ("cast", "mul") and _is_of_truth(value):
            beneath = operands if name == "mul" else operands[:1]
            if name == "cast" or part.wanted:  # a product of truth values is their conjunction
                for operand in beneath:
                    yield from _parts(axes, _Part(Placed(operand, narrowed(operand, layout)), part.wanted), depth + 1)
                return
    yield part


def _is_of_truth(value: Value) -> bool:
    """Whether a value is 0 or 1 by the way it is made: a condition, cast, moved or multiplied."""
    if value.type.dtype.kind == "bool":
        node = value.node
        if node is None or node.op.name != "cast":
            return node is None or node.op.name != "mul"
        return _is_of_truth(node.inputs[0])
    node = value.node
    if node is None:
        return False
    match node.op.name:
        case "cast" | "rearrange" | "expand":
            return _is_of_truth(node.inputs[0])
        case "mul":
            return all(map(_is_of_truth, node.inputs))
    return False


def _read_part(roles: Roles, part: _Part, notes: list[Note]) -> Fused | _Band | None:
    """A part as a band of positions, as a term, or None where it is true everywhere."""
    value, layout = part.placed.value, part.placed.layout
    if (number := number_of(value)) is not None and bool(number) == part.wanted:
        return None
    table = _table(value, roles.axes.resolved(layout), roles)
    if table is not None:
        return _read_table(part, table, roles, notes)
    node = value.node
    name = node.op.name if node is not None else ""
    if node is not None and name in _NEGATED:
        name = name if part.wanted else _NEGATED[name]
        x, y = (Placed(v, narrowed(v, layout)) for v in node.inputs)
        # Integers: x < y is y - x - 1 >= 0.
        greater, less, gap = (x, y, name == "greater") if "greater" in name else (y, x, name == "less")
        difference = _affine_difference(roles, greater, less)
        if difference is not None:
            return _read_inequality(roles, part, difference.shifted(-gap), node, notes)
    if node is not None and name == ("equal" if part.wanted else "not_equal"):
        same = _read_equality(roles, node, layout)
        if same is not None:
            return same
    return _tensor(roles, part)


def _tensor(roles: Roles, part: _Part) -> Fused:
    axes = roles.held(part.placed.layout) or "t"
    to = None if part.placed.value.type.dtype.kind == "bool" else _BOOLEAN
    operand = Operand(part.placed, axes, negated=not part.wanted, to=to)
    return Fused(BooleanMask(axes), (operand,))


_BOOLEAN = DType.__call__ if False else None  # set below


def _with_bands_joined(roles: Roles, found: Sequence[Fused | _Band], notes: list[Note]) -> list[Fused]:
    """Bands intersect to one, which stands where the first of them stood: as causal, a window, both, or neither."""
    bands = [x for x in found if isinstance(x, _Band)]
    if not bands:
        return [x for x in found if isinstance(x, Fused)]
    lows = [x.low for x in bands if x.low is not None]
    highs = [x.high for x in bands if x.high is not None]
    low, high = max(lows, default=None), min(highs, default=None)
    terms = _band_terms(low, high)
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


def _band_terms(low: int | None, high: int | None) -> list[Fused] | None:
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
    """What band a condition is, and what the terms are."""
    if low is None:
        return f"stays a tensor: it keeps keys up to {_offset(high)}, causal those up to the query itself"
    if high is None:
        return f"stays a tensor: it keeps keys from {_offset(low)} on, and no term says so"
    wide = f"from {_offset(low)} to {_offset(high)}"
    return f"stays a tensor: it keeps keys {wide}, a window as many on either side, or with causal up to the query"


def _offset(n: int | None) -> str:
    if not n:
        return "the query itself"
    return f"{abs(n)} {'after' if n > 0 else 'before'} the query"


# -- integers by position --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Affine:
    """s i + t j + constant + the sum of some tensors, each with a sign; integers."""

    s: int = 0
    t: int = 0
    constant: Size = ZERO
    tensors: tuple[tuple[int, Placed], ...] = ()

    def shifted(self, by: int) -> _Affine:
        return dataclasses.replace(self, constant=self.constant + by)

    def plus(self, other: _Affine, sign: int = 1) -> _Affine:
        tensors = (*self.tensors, *((sign * n, x) for n, x in other.tensors))
        cancelled = tuple(
            (n, x) for n, x in tensors if not any(m == -n and y.value is x.value for m, y in tensors)
        )
        constant = self.constant + (other.constant if sign > 0 else -other.constant)
        return _Affine(self.s + sign * other.s, self.t + sign * other.t, constant, cancelled)


def _affine_difference(roles: Roles, x: Placed, y: Placed) -> _Affine | None:
    left, right = _affine(roles, x), _affine(roles, y)
    return None if left is None or right is None else left.plus(right, -1)


def _affine(roles: Roles, placed: Placed, depth: int = 0) -> _Affine | None:
    """An integer value by position, or None where it is no integer."""
    value, layout = placed.value, placed.layout
    if not value.type.dtype.is_int:
        return None
    number = number_of(value)
    if number is not None:
        return _Affine(constant=Size.of(int(number)))
    start = _counted_from(value, layout, roles)
    if start is not None:
        axis, first = start
        return _Affine(**{axis: 1}, constant=Size.of(first))
    node = value.node
    if node is not None and depth < _MOST_PARTS:
        made = _affine_op(roles, node, layout, depth + 1)
        if made is not None:
            return made
    return _Affine(tensors=((1, placed),))


def _affine_op(roles: Roles, node: Node, layout: Layout, depth: int) -> _Affine | None:
    def of(operand: Value) -> _Affine | None:
        return _affine(roles, Placed(operand, narrowed(operand, layout)), depth)

    match node.op.name:
        case "iota":
            return _position(roles, layout[0])
        case "positions":
            return _position(roles, layout[-1])
        case "size":
            return _Affine(constant=node.op.value)  # type: ignore[attr-defined]
        case "rearrange" | "expand":
            above = roles.axes.above(node, layout)
            return None if above is None else _affine(roles, Placed(node.inputs[0], above), depth)
        case "cast":
            x = node.inputs[0]
            wider = x.type.dtype.is_int and x.type.dtype.bytes <= node.results[0].type.dtype.bytes
            return of(x) if wider else None
        case "add" | "sub":
            left, right = map(of, node.inputs)
            sign = 1 if node.op.name == "add" else -1
            return None if left is None or right is None else left.plus(right, sign)
        case "neg":
            made = of(node.inputs[0])
            return None if made is None else _Affine().plus(made, -1)
    return None


def _position(roles: Roles, dim: Sequence[int]) -> _Affine | None:
    """The position along a dimension, if that is the queries' or the keys' axis as a whole."""
    atoms = roles.axes.flat(dim)
    for axis in ("s", "t"):
        if atoms and atoms == roles.groups[axis]:
            return _Affine(**{axis: 1})
    return _Affine() if not atoms else None


def _counted_from(value: Value, layout: Layout, roles: Roles) -> tuple[str, int] | None:
    """Which axis, s or t, a table of numbers counts along, and from what on."""
    table = _table(value, roles.axes.resolved(layout), roles)
    if table is None:
        return None
    array, axes = table
    if len(axes) != 1 or not np.array_equal(array, np.arange(len(array)) + array[0]):
        return None
    return axes[0], int(array[0])


def _read_inequality(roles: Roles, part: _Part, d: _Affine, node: Node, notes: list[Note]) -> Fused | _Band | None:
    """d >= 0 as a band, as padding, or as what holds everywhere."""
    constant = d.constant.constant
    if not d.tensors:
        if (d.s, d.t) == (1, -1) and constant is not None:
            return _Band(None, constant, part)
        if (d.s, d.t) == (-1, 1) and constant is not None:
            return _Band(-constant, None, part)
        if (d.s, d.t) in ((1, -1), (-1, 1)):
            notes.append(Note(f"stays a tensor: positions are {d.constant} apart, and causal counts both from 0", node))
        elif d.s >= 0 and d.t >= 0 and d.constant.bounds(roles.symbols).lower >= 0:
            return None  # positions are not negative
        elif (d.s, d.t) == (0, -1) and (d.constant + 1 - roles.size("t")).bounds(roles.symbols).lower >= 0:
            return None  # nor past the last key
        return _tensor(roles, part)
    if len(d.tensors) == 1 and (d.s, d.t) == (0, -1) and d.tensors[0][0] == 1:
        lengths = d.tensors[0][1]
        if roles.held(lengths.layout) in ("b", ""):
            operand = Operand(lengths, "b", plus=d.constant + 1, to=i64)
            return Fused(Padding(), (operand,))
    return _tensor(roles, part)


def _read_equality(roles: Roles, node: Node, layout: Layout) -> Fused | None:
    x, y = (Placed(v, narrowed(v, layout)) for v in node.inputs)
    if not x.value.type.dtype.is_int:
        return None
    for queries, keys in ((x, y), (y, x)):
        held = roles.held(queries.layout), roles.held(keys.layout)
        if held[0] in ("b s", "s") and held[1] in ("b t", "t"):
            mine, theirs = (_beneath(roles.axes, p) for p in (queries, keys))
            operands = (Operand(mine, "b s", to=i64), Operand(theirs, "b t", to=i64))
            return Fused(Segments(), operands, diagonal=mine.value is theirs.value)
    return None


def _beneath(axes: Axes, placed: Placed) -> Placed:
    value, layout = placed.value, placed.layout
    while value.node is not None and value.node.op.name in ("rearrange", "expand"):
        above = axes.above(value.node, layout)
        if above is None:
            break
        value, layout = value.node.inputs[0], above
    return Placed(value, layout)


# -- tables ----------------------------------------------------------------------------------------------------


def _table(value: Value, layout: Layout, roles: Roles) -> tuple[Any, list[str]] | None:
    """A constant over s and t (in this or the other order), or one of them: its array, and its axes.

    Of a slice from the start the whole: what lies past its end is at no position.
    """
    dims = list(layout)
    while (node := value.node) is not None:
        match node.op.name:
            case "slice":
                op: Any = node.op
                if op.start != ZERO or op.stride != 1:
                    return None
                sliced = op.axis % value.type.rank
                if value.type.shape[sliced] == ONE and node.inputs[0].type.shape[sliced] != ONE:
                    return None
                above: Layout | None = tuple(dims)
            case "rearrange" | "expand":
                above = roles.axes.above(node, tuple(dims)) if _squeezes(node) else None
            case _:
                above = None
        if above is None:
            return None
        value, dims = node.inputs[0], list(roles.axes.resolved(above))
    if value.literal is None or value.literal.array.size > _LARGEST_TABLE:
        return None
    array, names = value.literal.array, []
    for position, (atoms, size) in enumerate(zip(dims, array.shape, strict=True)):
        if size == 1:
            continue
        name = next((n for n in ("s", "t") if atoms and atoms == roles.groups[n]), None)
        if name is None or name in names:
            return None
        names.append(name)
        del position
    return (array.reshape([n for n in array.shape if n != 1]), names) if names else None


_LARGEST_TABLE = 1 << 24


def _squeezes(node: Node) -> bool:
    """Whether a move keeps every dimension whole, and so a slice's start at its start."""
    if node.op.name == "expand":
        return True
    return all("(" not in side for side in (node.op.pattern,))  # type: ignore[attr-defined]


def _read_table(part: _Part, table: tuple[Any, list[str]], roles: Roles, notes: list[Note]) -> Fused | _Band | None:
    """A constant condition as a band, or as a tensor."""
    array, axes = table
    kept = np.asarray(array, np.bool_) == part.wanted
    if kept.all():
        return None
    if len(axes) == 2:
        kept = kept if axes == ["s", "t"] else kept.T
        band = _band_of(kept)
        if band is not None:
            return _Band(*band, part)
        node = part.placed.value.node
        if node is not None:
            notes.append(Note("stays a tensor: the constant is no band of positions", node))
        return dataclasses.replace(
            _tensor(roles, part), first=bool(kept[:, 0].all()), diagonal=bool(np.diagonal(kept).all())
        )
    return _tensor(roles, part)


def _band_of(kept: Any) -> tuple[int | None, int | None] | None:
    """Low and high of j - i in a band of truths, with None for what reaches a corner; None if it is no band."""
    rows, columns = kept.shape
    offsets = np.arange(columns) - np.arange(rows)[:, None]
    inside = offsets[kept]
    if not len(inside):
        return None
    low, high = int(inside.min()), int(inside.max())
    if not np.array_equal(kept, (offsets >= low) & (offsets <= high)):
        return None
    return (None if low == 1 - rows else low), (None if high == columns - 1 else high)


# -- biases ----------------------------------------------------------------------------------------------------


def as_mask(axes: Axes, added: Added) -> Chosen | None:
    """An addend that is 0 where a condition holds and a large negative number elsewhere, as that condition.

    where(c, 0, -inf), (1 - c) * -1e9 for a condition c
    """
    value, layout, factor = added.placed.value, added.placed.layout, added.factor
    for _ in range(_MOST_PARTS):
        node = value.node
        if node is None:
            break
        match node.op.name:
            case "rearrange" | "expand":
                above = axes.above(node, layout)
                if above is None:
                    return None
                value, layout = node.inputs[0], above
            case "cast" if node.inputs[0].type.dtype.is_float:
                value = node.inputs[0]
            case "mul":
                scaled = next(
                    ((x, n) for x, y in (node.inputs, node.inputs[::-1]) if (n := number_of(y)) is not None), None
                )
                if scaled is None:
                    return None
                factor, value = factor * scaled[1], scaled[0]
                layout = narrowed(value, layout)
                if factor <= -LEAST_FILL and (truth := _complement(value)) is not None:
                    return Chosen(Placed(truth[0], narrowed(truth[0], layout)), truth[1], factor, added.node)
            case "where":
                condition, x, y = node.inputs
                numbers = number_of(x), number_of(y)
                for keep, (kept, fill) in ((True, numbers), (False, numbers[::-1])):
                    if kept == 0 and fill is not None and fill * factor <= -LEAST_FILL:
                        return Chosen(Placed(condition, narrowed(condition, layout)), keep, fill * factor, added.node)
                return None
            case _:
                return None
    return None


def _complement(value: Value) -> tuple[Value, bool] | None:
    """A condition, and the truth that it has where the value is 0: c, True for 1 - c; c, False for c itself."""
    node = value.node
    if node is not None and node.op.name == "sub" and number_of(node.inputs[0]) == 1 and _is_of_truth(node.inputs[1]):
        return node.inputs[1], True
    return (value, False) if _is_of_truth(value) else None


def table_mask(roles: Roles, added: Added) -> tuple[Any, list[str], float] | None:
    """A constant addend of zeros and one large negative number: what it keeps, its axes, and that number."""
    table = _table(added.placed.value, roles.axes.resolved(added.placed.layout), roles)
    if table is None or not added.placed.value.type.dtype.is_float:
        return None
    array, axes = table
    others = np.unique(array[array != 0]) if array.size else array
    if len(others) != 1 or not (fill := float(others[0]) * added.factor) <= -LEAST_FILL:
        return None
    return array == 0, axes, fill


def table_terms(roles: Roles, added: Added, kept: Any, axes: Sequence[str]) -> list[Fused] | None:
    """A constant addend's condition as terms by position, or None where no term is it."""
    if len(axes) != 2:
        return None
    band = _band_of(kept if list(axes) == ["s", "t"] else kept.T)
    return None if band is None else _band_terms(*band)


def read_bias(roles: Roles, added: Added) -> Iterator[Fused]:
    """An addend as biases: by position where it is one, and else as a tensor; a sum of unlike parts in its parts."""
    placed = _beneath(roles.axes, added.placed)
    node = placed.value.node
    if added.factor == 1.0 and node is not None:
        structural = _t5_relative(roles, placed) or _alibi(roles, placed)
        if structural is not None:
            yield structural
            return
    if node is not None and node.op.name in ("add", "sub"):
        parts = [Placed(v, narrowed(v, placed.layout)) for v in node.inputs]
        whole = roles.held(placed.layout)
        if all(len(roles.held(p.layout).split()) < len(whole.split()) for p in parts):
            sign = 1.0 if node.op.name == "add" else -1.0
            yield from read_bias(roles, dataclasses.replace(added, placed=parts[0]))
            yield from read_bias(roles, dataclasses.replace(added, placed=parts[1], factor=added.factor * sign))
            return
    axes = roles.held(placed.layout) or "t"
    yield Fused(TensorBias(axes), (Operand(placed, axes, factor=added.factor),))


def _t5_relative(roles: Roles, placed: Placed) -> Fused | None:
    """gather(gather(table, buckets), clip(j - i, -far, far) + far), where the buckets are T5's."""
    node = placed.value.node
    assert node is not None
    if node.op.name != "gather" or node.op.axis != 0 or placed.value.type.rank != 3:  # type: ignore[attr-defined]
        return None
    by_offset, row = node.inputs
    inner = by_offset.node
    if inner is None or inner.op.name != "gather" or inner.op.axis != 0 or by_offset.type.rank != 2:  # type: ignore[attr-defined]
        return None
    table, buckets = inner.inputs
    if buckets.literal is None or buckets.type.rank != 1 or len(buckets.literal.array) % 2 == 0:
        return None
    far = len(buckets.literal.array) // 2
    if not _is_clipped_offset(roles, Placed(row, placed.layout[:2]), far):
        return None
    rows = table.type.shape[0].constant
    if rows is None or roles.axes.flat(placed.layout[2]) != roles.groups["h"]:
        return None
    for bidirectional in (False, True):
        try:
            term = T5Relative(rows, far, bidirectional)
        except TreadleError:
            continue
        if np.array_equal(term.bucket_by_offset, buckets.literal.array):
            own = roles.axes.of(table)
            return Fused(term, (_Whole(Placed(table, own), ""),))
    return None


@dataclass(frozen=True)
class _Whole(Operand):
    """An operand that is taken as it is."""

    def build(self, b: Builder, roles: Roles) -> Expr:
        return b.expr(self.placed.value)


def _is_clipped_offset(roles: Roles, placed: Placed, far: int) -> bool:
    """min(max(j - i, -far), far) + far"""
    value, layout = placed.value, placed.layout
    for op, number in (("add", far), ("minimum", far), ("maximum", -far)):
        node = value.node
        if node is None or node.op.name != op or number_of(node.inputs[1]) != number:
            return False
        value = node.inputs[0]
        layout = narrowed(value, layout)
    offset = _affine(roles, Placed(value, layout))
    return offset == _Affine(-1, 1)


def _alibi(roles: Roles, placed: Placed) -> Fused | None:
    """slopes[h] * (j - i)"""
    node = placed.value.node
    assert node is not None
    if node.op.name != "mul":
        return None
    for slopes, offset in (node.inputs, node.inputs[::-1]):
        cast = offset.node
        while cast is not None and cast.op.name in ("rearrange", "expand"):
            cast = cast.inputs[0].node
        if cast is None or cast.op.name != "cast" or not cast.inputs[0].type.dtype.is_int:
            continue
        under = _beneath(roles.axes, Placed(offset, narrowed(offset, placed.layout)))
        if under.value.node is not cast:
            continue
        position = _affine(roles, Placed(cast.inputs[0], under.layout))
        own = _beneath(roles.axes, Placed(slopes, narrowed(slopes, placed.layout)))
        if position == _Affine(-1, 1) and roles.held(own.layout) in ("h", ""):
            return Fused(Alibi(), (Operand(own, "h"),))
    return None
