"""Terms of attention: masks, which select the keys that a query may see, and biases, which are added to its scores.

    causal                                keys j <= i
    window(128)                           |i - j| < 128
    padding                               j < lengths[b]                            lengths: i64[b]
    segments                              query_segments[b, i] == key_segments[b, j]
    mask(b s t)                           where mask is true                        mask: bool, of these axes
    bias(h s t)                           + bias                                    bias: float, of these axes
    t5_relative(32, 128, bidirectional)   + table[bucket(j - i), h]                 table: float[32, h]
    alibi                                 + slopes[h] * (j - i)                     slopes: float[h]

i is the position of a query and j the position of a key. A position is an index along the query's or the key's own
axis, so that query 0 and key 0 have the same position, however many queries and keys there are. Masks intersect and
biases add up, in any order. A term defines its operands, with their axes in attention's (b rows, h query heads, s
queries, t keys), its meaning in NumPy and in primitives, and the range of keys that it lets a query see. The gradient
of a term is the gradient of its body. NumPy's kernels call the term's NumPy meaning; the other backends implement terms
in a `treadle.ir.attention.term_visitor.TermVisitor`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from treadle.ir.attention.distance_buckets import t5_buckets
from treadle.ir.attention.term_visitor import TermVisitor, X, Y
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError
from treadle.ir.operation import Array
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.source_lines import user_line
from treadle.ir.types import i64

AXES = ("b", "h", "s", "t")


@dataclass(frozen=True, slots=True)
class TermOperand:
    """An operand of a term: its name, its dtype (as in a dtype rule) and its axes.

    The axes b, h, s and t are attention's. Any other axis belongs to the term alone, which reads it as a whole.
    """

    name: str
    dtype: str
    axes: str

    def rule(self, keys: str = "t") -> str:
        """Return the operand's axes as in an axis rule, with heads as (g r) and the key axis as `keys`."""
        mapped = {"b": "b", "h": "(g r)", "s": "s", "t": f"[{keys}]"}
        return " ".join(mapped.get(axis, f"[{axis}]") for axis in self.axes.split())


class Term:
    """Base of all terms; derive from `MaskTerm` or `BiasTerm`.

    name        the term's name in text, before its fields in parentheses
    positional  the axes, among s and t, whose positions enter the term's formula
    relative    True if the term depends only on differences of positions, and no operand has an axis of positions
    """

    name: ClassVar[str]
    positional: ClassVar[frozenset[str]] = frozenset()
    relative: ClassVar[bool] = False

    @property
    def operands(self) -> tuple[TermOperand, ...]:
        """Operands in addition to q, k and v, in order."""
        return ()

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        """Return the term's value in NumPy, with i: [s, 1] and j: [t]. The value broadcasts against [b, h, s, t]."""
        raise GraphError(f"term {type(self).__name__} has no reference")

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        """Build the term's value in primitives, from `grid.i` and `grid.j`. The value broadcasts against [b, g, r, s,
        t].
        """
        raise GraphError(f"term {type(self).__name__} has no body")

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        """Call the visitor's method for this kind of term. Raises GraphError if the visitor has no method for it."""
        raise GraphError(
            f"attention: {type(visitor).__name__} has no case for the term {self.name}",
            received=self.text,
            hint="lower attention's body, which consists of primitives, if `is_standard` of a term is false",
        )

    @property
    def is_standard(self) -> bool:
        """True if visitors have a method for this kind of term. If one of the terms of attention has none, a backend
        lowers attention's body.

        A class derived from a standard kind is another kind, possibly with another meaning, and is not standard.
        """
        return "accept" in vars(type(self)) and type(self) is not Term

    @property
    def text(self) -> str:
        """The term in text form; `treadle.ir.attention.term_text.parse_term` parses it."""
        words = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not False:
                words.append(field.name if value is True else str(value))
        return f"{self.name}({', '.join(words)})" if words else self.name

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


class MaskTerm(Term):
    """A term that selects the keys that a query may see.

    The term's arrays are booleans: true if the query may see the key.
    """

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """The least and the greatest j - i that the mask can keep, whatever its operands hold; None means no limit."""
        return None, None


class BiasTerm(Term):
    """A term that is added to the scores."""


class Grid:
    """The context of a term's body: the positions, and operands laid out against [b, g, r, s, t].

    i   i64[s, 1], or i64[b, 1, 1, s, 1] if each row has its own
    j   i64[t], or i64[b, 1, 1, 1, t]
    """

    def __init__(self, b: Builder, groups: Size, queries: Size, keys: Size, first: Size = ZERO) -> None:
        self.b, self.groups, self.queries, self.keys = b, groups, queries, keys
        self.first = first
        """The position of the first query."""

    @cached_property
    def i(self) -> Expr:
        counted = self.b.rearrange(self.b.iota(size=self.queries, dtype=i64), pattern="s -> s 1")
        return counted if self.first == ZERO else counted + self.first

    @cached_property
    def j(self) -> Expr:
        return self.b.iota(size=self.keys, dtype=i64)

    def by_head(self, x: Expr) -> Expr:
        """Lay out a value per head for each i and j: from [s, t, h] or [b, 1, 1, s, t, h] to the layout of the other
        values.
        """
        before, after = ("b 1 1 ", "b ") if x.rank == len("bgrsth") else ("", "")
        return self.b.rearrange(x, pattern=f"{before}s t (g={self.groups} r) -> {after}g r s t")

    def spread(self, x: Expr, axes: str) -> Expr:
        """Lay out an operand of these axes as [b, g, r, s, t], with size 1 for each missing axis."""
        held = axes.split()
        left = " ".join(f"(g={self.groups} r)" if axis == "h" else axis for axis in held)
        right = " ".join(axis if axis in held else "1 1" if axis == "h" else "1" for axis in AXES)
        return self.b.rearrange(x, pattern=f"{left} -> {right.replace('h', 'g r')}")


def _spread(x: Array, axes: str) -> Array:
    """Lay out an array of these axes as [b, h, s, t], with size 1 for each missing axis."""
    sizes = dict(zip(axes.split(), x.shape, strict=True))
    return x.reshape([sizes.get(axis, 1) for axis in AXES])


# -- masks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Causal(MaskTerm):
    """j <= i: a query sees the keys up to its own position."""

    name = "causal"
    positional = frozenset({"s", "t"})
    relative = True

    @property
    def reach(self) -> tuple[int | None, int | None]:
        return None, 0

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        return j <= i

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        return grid.j <= grid.i

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.causal(self, *operands)


@dataclass(frozen=True, repr=False)
class Window(MaskTerm):
    """|i - j| < size: size - 1 keys on either side of the query's position; with causal, the last `size`."""

    size: int

    name = "window"
    positional = frozenset({"s", "t"})
    relative = True

    def __post_init__(self) -> None:
        _require_integers(self, size=self.size)
        _require(1 <= self.size < 2**31, "window: size must be 1 or more, and below 2^31", self)

    @property
    def reach(self) -> tuple[int | None, int | None]:
        return 1 - self.size, self.size - 1

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        near: Array = np.abs(i - j) < self.size
        return near

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        return (grid.j < grid.i + self.size) & (grid.i < grid.j + self.size)

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.window(self, *operands)


@dataclass(frozen=True, repr=False)
class Padding(MaskTerm):
    """j < lengths[b]: a row's first lengths[b] keys are real."""

    name = "padding"
    positional = frozenset({"t"})

    @property
    def operands(self) -> tuple[TermOperand, ...]:
        return (TermOperand("lengths", "i64", "b"),)

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        (lengths,) = operands
        return j < _spread(lengths, "b")

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        (lengths,) = operands
        return grid.j < grid.spread(lengths, "b")

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.padding(self, *operands)


@dataclass(frozen=True, repr=False)
class Segments(MaskTerm):
    """query_segments[b, i] == key_segments[b, j]: a query sees the keys of its own segment."""

    name = "segments"

    @property
    def operands(self) -> tuple[TermOperand, ...]:
        return TermOperand("query_segments", "i64", "b s"), TermOperand("key_segments", "i64", "b t")

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        query_segments, key_segments = operands
        same: Array = _spread(query_segments, "b s") == _spread(key_segments, "b t")
        return same

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        query_segments, key_segments = operands
        return grid.b.equal(grid.spread(query_segments, "b s"), grid.spread(key_segments, "b t"))

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.segments(self, *operands)


@dataclass(frozen=True, repr=False)
class BooleanMask(MaskTerm):
    """mask: true where a query may see a key; `axes` names the axes among b, h, s and t along which it varies."""

    axes: str = "b h s t"

    name = "mask"

    def __post_init__(self) -> None:
        _require_axes(self.axes, self)

    @property
    def operands(self) -> tuple[TermOperand, ...]:
        return (TermOperand("mask", "bool", self.axes),)

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        return _spread(operands[0], self.axes)

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        return grid.spread(operands[0], self.axes)

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.boolean_mask(self, *operands)


# -- biases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class TensorBias(BiasTerm):
    """+ bias, where -inf masks a key; `axes` names the axes among b, h, s and t along which it varies."""

    axes: str = "b h s t"

    name = "bias"

    def __post_init__(self) -> None:
        _require_axes(self.axes, self)

    @property
    def operands(self) -> tuple[TermOperand, ...]:
        return (TermOperand("bias", "f", self.axes),)

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        return _spread(operands[0], self.axes)

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        return grid.spread(operands[0], self.axes)

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.tensor_bias(self, *operands)


@dataclass(frozen=True, repr=False)
class T5Relative(BiasTerm):
    """+ table[bucket(j - i), h]        (Raffel et al. 2020, section 2.1; see `t5_buckets`)"""

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    name = "t5_relative"
    positional = frozenset({"s", "t"})
    relative = True

    def __post_init__(self) -> None:
        _require_integers(self, buckets=self.buckets, max_distance=self.max_distance)
        least = 4 if self.bidirectional else 2
        near = self.buckets // least
        _require(least <= self.buckets <= 1024, f"t5_relative: buckets must be {least} to 1024", self)
        fits = near < self.max_distance <= 2**20
        _require(fits, f"t5_relative: max_distance must be {near + 1} to {2**20}", self)

    @property
    def operands(self) -> tuple[TermOperand, ...]:
        # Two such terms share the buckets' axis exactly if they have the same number of buckets.
        return (TermOperand("table", "f", f"buckets{self.buckets} h"),)

    @cached_property
    def bucket_by_offset(self) -> Array:
        """Return the bucket of each offset j - i from -max_distance to max_distance. Larger offsets, in either
        direction, have the bucket of the end.
        """
        offsets = np.arange(-self.max_distance, self.max_distance + 1)
        return t5_buckets(offsets, self.buckets, self.max_distance, self.bidirectional)

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        (table,) = operands
        far = self.max_distance
        values: Array = table[self.bucket_by_offset[np.clip(j - i, -far, far) + far]]
        return np.moveaxis(values, -1, 0)

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        (table,) = operands
        b, far = grid.b, self.max_distance
        row = b.minimum(b.maximum(grid.j - grid.i, -far), far) + far
        by_offset = b.gather(table, b.constant(self.bucket_by_offset, i64), axis=0)
        return grid.by_head(b.gather(by_offset, row, axis=0))

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.t5_relative(self, *operands)


@dataclass(frozen=True, repr=False)
class Alibi(BiasTerm):
    """+ slopes[h] * (j - i)        (Press, Smith, Lewis 2022)"""

    name = "alibi"
    positional = frozenset({"s", "t"})
    relative = True

    @property
    def operands(self) -> tuple[TermOperand, ...]:
        return (TermOperand("slopes", "f", "h"),)

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        (slopes,) = operands
        product: Array = _spread(slopes, "h") * (j - i).astype(slopes.dtype)
        return product

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        (slopes,) = operands
        return grid.spread(slopes, "h") * (grid.j - grid.i).cast(slopes.dtype)

    def accept(self, visitor: TermVisitor[X, Y], *operands: X) -> Y:
        return visitor.alibi(self, *operands)


def _require(condition: bool, what: str, term: Term, hint: str | None = None) -> None:
    if not condition:
        raise GraphError(what, received=term.text, source=str(user_line() or "") or None, hint=hint)


def _require_integers(term: Term, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            is_number = isinstance(value, str) and value.strip().isdecimal()
            raise GraphError(
                f"{term.name}: {name} must be an integer",
                received=f"{name}={value!r}"[:80],
                source=str(user_line() or "") or None,
                hint=f"{name}={int(str(value))}" if is_number else None,
            )


def _require_axes(axes: str, term: Term) -> None:
    held = axes.split()
    well = bool(held) and " ".join(held) == axes and held == [axis for axis in AXES if axis in held]
    letters = {*axes.lower().replace("q", "s").replace("k", "t")} - {*" ,"}
    found = " ".join(axis for axis in AXES if axis in letters)
    hint = f'"{found}": s is the axis of queries, t of keys' if found and letters <= {*AXES} else None
    _require(well, f"{term.name}: axes must be some of b, h, s and t, once each and in that order", term, hint)
