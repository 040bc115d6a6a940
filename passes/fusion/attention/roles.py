"""Roles of the axes in attention, and terms with the operands from which they are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import BooleanMask, MaskTerm, Term
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.types import DType
from treadle.passes.fusion.attention.core import Placed
from treadle.passes.fusion.axis_tracking import Axes, Layout


@dataclass(frozen=True)
class Roles:
    """The atoms of each axis of attention, and the bounds of the sizes. An axis without atoms has size 1.

    groups      the atoms of each axis at the time of the match; later steps may split them, so call `atoms`
    by_offset   a cache, shared by all sites of a function: for each index into a table of biases, its numbers for each
                offset j - i; None if the index depends on more than j - i
    """

    axes: Axes
    groups: dict[str, tuple[int, ...]]
    symbols: dict[str, Bounds]
    by_offset: dict[Value, np.ndarray[Any, Any] | None]

    def atoms(self, name: str) -> tuple[int, ...]:
        """Return the current atoms of an axis. A mask of windows, for example, splits the rows that the windows are a
        part of.
        """
        return self.axes.flat(self.groups[name])

    def held(self, layout: Layout) -> str:
        """Return the names of the axes with an atom in a layout: "b t"."""
        there = {atom for dim in self.axes.resolved(layout) for atom in dim}
        return " ".join(name for name in self.groups if there.intersection(self.atoms(name)))

    def size(self, name: str) -> Size:
        return self.axes.size(self.groups[name])

    def place(self, b: Builder, x: Expr, layout: Layout, axes: str) -> Expr:
        """Rearrange x to one dimension for each of these axes. x is repeated along axes that it lacks."""
        return self.axes.place(b, x, layout, [self.groups[name] for name in axes.split()])


@dataclass(frozen=True)
class PlacedOperand:
    """An operand of a term: a value, its axes in the term, and the changes that are applied to the value first.

    negated   for a condition: True to negate it
    factor    for a bias: multiply the bias by this number
    plus      for lengths: add this number to the lengths
    to        the dtype to which the value is cast
    fill      for a condition as a bias: the number added where the condition is false; 0 is added where it is true
    """

    placed: Placed
    axes: str
    negated: bool = False
    factor: float = 1.0
    plus: Size = ZERO
    to: DType | None = None
    fill: float | None = None

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """The float dtypes whose numbers attention's dtype must hold."""
        dtype = self.placed.value.type.dtype
        return (dtype,) if dtype.is_float and self.fill is None else ()

    def fits(self, dtype: DType) -> bool:
        """Return True if a dtype can hold the operand's `fill`."""
        return self.fill is None or dtype.holds(self.fill)

    def build(self, b: Builder, roles: Roles, dtype: DType) -> Expr:
        """Build the operand in the form that attention in this dtype accepts."""
        x = b.expr(self.placed.value)
        if self.to is not None:
            x = x.cast(self.to)
        if self.negated:
            x = b.logical_not(x)
        if self.factor != 1.0:
            x = x * self.factor
        if self.plus != ZERO:
            x = x + (self.plus.constant if self.plus.constant is not None else b.size(value=self.plus, dtype=x.dtype))
        if self.fill is not None:
            x = b.where(x, b.constant(0, dtype), b.constant(self.fill, dtype))
        if x.dtype.is_float:
            x = x.cast(dtype)
        return roles.place(b, x, self.placed.layout, self.axes)


@dataclass(frozen=True)
class Fused:
    """A term with its operands. `diagonal`: True if the term keeps the key j = i, whatever its operands hold; `first`:
    True if it keeps the key j = 0.
    """

    term: Term
    operands: tuple[PlacedOperand, ...] = ()
    diagonal: bool = False
    first: bool = False


@dataclass(frozen=True)
class Note:
    """The reason why something stayed a tensor, and the node that shows the reason. `hint`: the change that would
    make it a term.
    """

    reason: str
    node: Node
    hint: str = ""


@dataclass
class Reading:
    """The result of reading conditions: terms in order, and notes on parts that stayed tensors."""

    terms: list[Fused] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def structural(self) -> bool:
        """True if some term is by position."""
        return any(not isinstance(f.term, BooleanMask) for f in self.terms)


def never_empty(terms: Sequence[Fused], roles: Roles) -> bool:
    """Return True if the terms together keep a key for every query, whatever their operands hold."""
    masks = [f for f in terms if isinstance(f.term, MaskTerm)]
    square = roles.size("s") == roles.size("t")
    return all(f.first for f in masks) or (square and all(f.diagonal for f in masks))


@dataclass(frozen=True)
class WholeOperand(PlacedOperand):
    """An operand that is passed unchanged."""

    def build(self, b: Builder, roles: Roles, dtype: DType) -> Expr:
        x = b.expr(self.placed.value)
        return x.cast(dtype) if x.dtype.is_float else x


@dataclass(frozen=True)
class Said:
    """The attributes of an attention op, other than masks and biases that are tensors.

    dtype   the dtype of the attention
    scale   the scale; None: 1/sqrt(d)
    terms   the terms by position
    heads   the layout of the axis along which keys may be repeated
    """

    dtype: DType
    scale: float | None
    terms: tuple[Fused, ...]
    heads: Layout
