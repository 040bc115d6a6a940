"""Values by position: integers that are sums of a query's and a key's position and of values constant over both; and
bands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Add, Sub
from treadle.ir.ops.elementwise import Cast, Neg
from treadle.ir.ops.indexing import Iota, Positions
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.reductions import SizeOf
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.types import f32, f64
from treadle.passes.cleanup.canonicalize import is_lossless
from treadle.passes.fusion.attention.core import Placed, number_of
from treadle.passes.fusion.attention.roles import Roles
from treadle.passes.fusion.axis_tracking import Axes, Layout, narrowed

MOST_PARTS = 32
"""The greatest number of levels of an expression; deeper expressions are not analyzed."""
_MOST_POSITIONS = 2**24
"""All integers up to this number are exact in f32."""


@dataclass(frozen=True)
class Affine:
    """An integer by position: s i + t j + constant + a sum of tensors, each with a sign."""

    s: int = 0
    t: int = 0
    constant: Size = ZERO
    tensors: tuple[tuple[int, Placed], ...] = ()

    def shifted(self, by: int) -> Affine:
        return dataclasses.replace(self, constant=self.constant + by)

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        """Return the sum. A tensor indexed by query positions does not cancel the same tensor indexed by key
        positions.
        """
        left = [*self.tensors]
        for n, x in other.tensors:
            opposite = (-sign * n, x)
            if opposite in left:
                left.remove(opposite)
            else:
                left.append((sign * n, x))
        constant = self.constant + (other.constant if sign > 0 else -other.constant)
        return Affine(self.s + sign * other.s, self.t + sign * other.t, constant, tuple(left))


def affine_difference(roles: Roles, x: Placed, y: Placed) -> Affine | None:
    left, right = affine(roles, x), affine(roles, y)
    return None if left is None or right is None else left.plus(right, -1)


def affine(roles: Roles, placed: Placed, depth: int = 0) -> Affine | None:
    """Return an integer value as an expression by position, or None for any other value. Floats are integers if they
    are converted positions: f32 has all integers up to 2**24, and attention has fewer positions.
    """
    value, layout = placed.value, placed.layout
    if not value.type.dtype.is_int and value.type.dtype not in (f32, f64):
        return None
    number = number_of(value)
    if number is not None:
        return Affine(constant=Size.of(int(number))) if value.type.dtype.is_int or _is_position(number) else None
    start = _counted_from(value, layout, roles)
    if start is not None:
        axis, first = start
        return Affine(int(axis == "s"), int(axis == "t"), Size.of(first))
    node = value.node
    if node is not None and depth < MOST_PARTS:
        made = _affine_op(roles, node, layout, depth + 1)
        if made is not None:
            return made
    return Affine(tensors=((1, placed),)) if value.type.dtype.is_int else None


def _is_position(number: Any) -> bool:
    """Return True for a float that is an integer of a size that positions have."""
    return abs(number) <= _MOST_POSITIONS and float(number).is_integer()


def _affine_op(roles: Roles, node: Node, layout: Layout, depth: int) -> Affine | None:
    def of(operand: Value) -> Affine | None:
        return affine(roles, Placed(operand, narrowed(operand, layout)), depth)

    match node.op:
        case Iota():
            return _position(roles, layout[0])
        case Positions():
            return _position(roles, layout[-1])
        case SizeOf():
            return Affine(constant=node.op.value)
        case Rearrange() | Expand():
            above = roles.axes.above(node, layout)
            return None if above is None else affine(roles, Placed(node.inputs[0], above), depth)
        case Cast():
            x, to = node.inputs[0], node.results[0].type.dtype
            if x.type.dtype.is_int and is_lossless(x.type.dtype, to):
                return of(x)
            made = None if to.is_int else of(x)
            return None if made is None or made.tensors else made
        case Add() | Sub():
            left, right = map(of, node.inputs)
            sign = 1 if isinstance(node.op, Add) else -1
            return None if left is None or right is None else left.plus(right, sign)
        case Neg():
            made = of(node.inputs[0])
            return None if made is None else Affine().plus(made, -1)
    return None


def _position(roles: Roles, dim: Sequence[int]) -> Affine | None:
    """Return the position along a dimension, if the dimension is the whole axis of the queries or of the keys."""
    atoms = roles.axes.flat(dim)
    for axis in ("s", "t"):
        if atoms and atoms == roles.atoms(axis):
            return Affine(int(axis == "s"), int(axis == "t"))
    return Affine() if not atoms else None


def _counted_from(value: Value, layout: Layout, roles: Roles) -> tuple[str, int] | None:
    """Return the axis, s or t, along which a table contains consecutive numbers, and the first number. Return None for
    any other table.
    """
    table = constant_over(value, roles.axes.resolved(layout), roles)
    if table is None:
        return None
    array, axes = table
    first = array.reshape(-1)[0]
    if len(axes) != 1 or not np.array_equal(array, np.arange(len(array)) + first):
        return None
    if not value.type.dtype.is_int and not _is_position(first):
        return None
    return axes[0], int(first)


def beneath(axes: Axes, placed: Placed) -> Placed:
    value, layout = placed.value, placed.layout
    while value.node is not None and isinstance(value.node.op, (Rearrange, Expand)):
        above = axes.above(value.node, layout)
        if above is None:
            break
        value, layout = value.node.inputs[0], above
    return Placed(value, layout)


# -- constants -------------------------------------------------------------------------------------------------


def constant_over(value: Value, layout: Layout, roles: Roles) -> tuple[Any, list[str]] | None:
    """Return a constant over s and t (in either order), or over one of them: its array, and its axes. Return None for
    any other value.

    For a slice from the start, the whole constant is returned: no position is beyond the slice's end.
    """
    dims = list(layout)
    while (node := value.node) is not None:
        match node.op:
            case Slice():
                op: Any = node.op
                if op.start != ZERO or op.stride != 1:
                    return None
                sliced = op.axis % value.type.rank
                if value.type.shape[sliced] == ONE and node.inputs[0].type.shape[sliced] != ONE:
                    return None
                above: Layout | None = tuple(dims)
            case Rearrange() | Expand():
                above = roles.axes.above(node, tuple(dims)) if _squeezes(node) else None
            case _:
                above = None
        if above is None:
            return None
        value, dims = node.inputs[0], list(roles.axes.resolved(above))
    if value.literal is None or value.literal.array.size > _LARGEST_TABLE:
        return None
    array, names = value.literal.array, []
    for atoms, size in zip(dims, array.shape, strict=True):
        if size == 1:
            continue
        name = next((n for n in ("s", "t") if atoms and roles.axes.flat(atoms) == roles.atoms(n)), None)
        if name is None or name in names:
            return None
        names.append(name)
    return (array.reshape([n for n in array.shape if n != 1]), names) if names else None


_LARGEST_TABLE = 1 << 24


def _squeezes(node: Node) -> bool:
    """Return True if a move keeps every dimension whole. The start of a slice then stays the start."""
    if isinstance(node.op, Expand):
        return True
    return "(" not in node.op.pattern  # type: ignore[attr-defined]


def offset_table(roles: Roles, placed: Placed) -> tuple[Any, Any] | None:
    """Return a constant over s and t as an array over queries and keys, and an array of j - i. Return None for any
    other value.
    """
    table = constant_over(placed.value, roles.axes.resolved(placed.layout), roles)
    if table is None or len(table[1]) != 2:
        return None
    array = table[0] if table[1] == ["s", "t"] else table[0].T
    rows, columns = array.shape
    return array, np.arange(columns) - np.arange(rows)[:, None]


def band_of(kept: Any) -> tuple[int | None, int | None] | None:
    """Return the lower and upper limit of j - i in a band of truth values. A limit is None if the band reaches that
    corner. Return None if the values are not a band.
    """
    rows, columns = kept.shape
    offsets = np.arange(columns) - np.arange(rows)[:, None]
    inside = offsets[kept]
    if not len(inside):
        return None
    low, high = int(inside.min()), int(inside.max())
    if not np.array_equal(kept, (offsets >= low) & (offsets <= high)):
        return None
    if low == 1 - rows and high > 0:  # no keys are below, so any lower limit is equivalent
        return (-high if -high <= low else None), (None if high == columns - 1 else high)
    if high == columns - 1 and low < 0:
        return low, (-low if -low >= high else None)
    return (None if low == 1 - rows else low), (None if high == columns - 1 else high)
