"""Reductions along axes, and other ops along an axis: cumsum, argmax and top-k."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Demand, Grads, Op, Operand, Primitive
from treadle.ir.ops.along_axes import not_empty, places, rule_along, wide_array, widened, with_ones
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.shapes import zeros
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import Size, product
from treadle.ir.stepping import Held, Kept, Stepping
from treadle.ir.types import DType, Type, f32, i64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reduction(Op):
    """A reduction of the elements along some axes. If `monoid` is None, the axes are whole in the axis rule.

    axes   the axes to reduce; a negative one counts from the end
    keep   keep each axis as a dimension of size 1
    """

    monoid: ClassVar[str | None] = None
    axes: tuple[int, ...]
    keep: bool = False

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        read = f"{{}}:{self.monoid}" if self.monoid else "[{}]"
        return rule_along(self.axes, ranks[0] or 0, read, "1" if self.keep else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Extremum(_Reduction, Primitive):
    """The greatest or the least element.

    ties   the gradient among equal elements: "even" shares it, as torch.amax does; "first" gives it all to the element
           that `argmax` selects, as torch.max along an axis does
    """

    ties: str = "even"

    def check(self, types: Sequence[Type | None]) -> None:
        if self.ties not in ("even", "first"):
            raise RuleError(f"ties must be 'even' or 'first', not {self.ties!r}")
        if self.ties == "first" and len(self.axes) != 1:
            raise RuleError(f"ties=first needs exactly one axis, received {len(self.axes)}")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], self.axes, str(self.monoid))

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,), (y,) = grads, inputs, outputs
        g, y = (with_ones(b, v, self.axes, x.rank) for v in (g, y))
        if self.ties == "first":
            (axis,) = places(self.axes, x.rank)
            chosen = b.argmax(x if self.monoid == "max" else -x, axis=axis, keep=True)
            ones = " ".join("1" * (x.rank - 1 - axis))
            here = b.rearrange(b.iota(size=x.shape[axis]), pattern=f"n -> n {ones}")
            return [b.where(b.equal(here, chosen), g, b.constant(0, x.dtype))]
        chosen = widened(b.equal(x, y).cast(x.dtype))
        share = widened(g) / b.reduce_sum(chosen, axes=self.axes, keep=True)
        return [(chosen * share).cast(x.dtype)]

    samples = [
        S("f32[2,3,5] distinct", axes=(-1,)),
        S("f32[2,3,5] distinct", axes=(0, 2), keep=True),
        S("f32[2,3,5] distinct", axes=(1,)),
        S("f32[2,3] distinct", axes=(0, 1)),
        S("f32[2,3]", axes=()),
        S("i64[4,3]", axes=(0,)),
        S("f32[2,3,5] distinct", axes=(1,), ties="first"),
        S("f32[2,3] distinct", axes=(-1,), keep=True, ties="first"),
    ]
    errors = [
        (S("f32[2,3]", axes=(2,)), "there is no axis 2 in a tensor of rank 2"),
        (S("f32[2,3]", axes=(1, -1)), "axis 1 is named twice"),
        (S("f32[2,0]", axes=(1,)), "an axis of size 0 has no"),
        (S("f32[2,3]", axes=(0, 1), ties="first"), "ties=first needs exactly one axis, received 2"),
        (S("f32[2,3]", axes=(0,), ties="last"), "ties must be 'even' or 'first', not 'last'"),
        (S("bool[2]", axes=(0,)), "x must be a number, is bool"),
    ]


@op("reduce_sum", dtypes="n -> n", linear="x")
class ReduceSum(_Reduction, Primitive):
    """y = sum of x over `axes`, accumulated in x's dtype, for 16-bit floats in f32"""

    x = Operand()
    monoid = "sum"
    accumulates = f32

    def reference(self, x: Any) -> Any:
        wide = wide_array(x)
        return np.sum(wide, axis=self.axes, keepdims=self.keep, dtype=wide.dtype).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        return [b.expand(with_ones(b, g, self.axes, x.rank), shape=x.shape)]

    samples = [
        S("f32[2,3,5]", axes=(-1,)),
        S("f32[2,3,5]", axes=(0, 2), keep=True),
        S("f32[2,3,5]", axes=(1,)),
        S("f32[2,3]", axes=(0, 1)),
        S("f32[]", axes=()),
        S("i64[4,3]", axes=(0,)),
    ]
    errors = [
        (S("f32[2,3]", axes=(2,)), "there is no axis 2 in a tensor of rank 2"),
        (S("f32[2,3]", axes=(1, -1)), "axis 1 is named twice"),
        (S("bool[2]", axes=(0,)), "x must be a number, is bool"),
    ]


@op("reduce_max", dtypes="n -> n")
class ReduceMax(_Extremum):
    """y = max of x over `axes`; a NaN gives NaN

    The gradient is divided evenly among equal maxima, as in torch.amax; `ties` can give it to the first.
    """

    x = Operand()
    monoid = "max"

    def reference(self, x: Any) -> Any:
        return np.max(x, axis=self.axes, keepdims=self.keep)


@op("reduce_min", dtypes="n -> n")
class ReduceMin(_Extremum):
    """y = min of x over `axes`; a NaN gives NaN

    The gradient is divided evenly among equal minima, as in torch.amin; `ties` can give it to the first.
    """

    x = Operand()
    monoid = "min"

    def reference(self, x: Any) -> Any:
        return np.min(x, axis=self.axes, keepdims=self.keep)


@op("reduce_mean", dtypes="f -> f", linear="x")
class ReduceMean(_Reduction, Composite):
    """y = (sum of x over `axes`) / (number of its terms)

    The mean of two parts together cannot be computed from their two means alone, so the axes are whole. The body
    contains the sum, for 16-bit floats in f32.
    """

    x = Operand()
    accumulates = f32

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], self.axes, "mean")

    def body(self, b: Builder, x: Expr) -> Any:
        wide = widened(x)
        return (b.reduce_sum(wide, axes=self.axes, keep=self.keep) / self.terms(b, wide)).cast(x.dtype)

    def reference(self, x: Any) -> Any:
        return np.mean(wide_array(x), axis=self.axes, keepdims=self.keep).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        share = (widened(g) / self.terms(b, widened(x))).cast(x.dtype)
        return [b.expand(with_ones(b, share, self.axes, x.rank), shape=x.shape)]

    def terms(self, b: Builder, x: Expr) -> Expr:
        """Return the number of elements of x for each element of y, as a scalar of x's dtype."""
        count = product(x.shape[i] for i in places(self.axes, x.rank))
        if count.constant is not None:
            return b.constant(count.constant, x.dtype)
        return b.size(value=count, dtype=x.dtype)

    samples = [
        S("f32[2,3,5]", axes=(-1,)),
        S("f32[2,3,5]", axes=(0, 2), keep=True),
        S("f32[2,3]", axes=(0, 1)),
    ]
    errors = [
        (S("f32[2,3]", axes=(2,)), "there is no axis 2 in a tensor of rank 2"),
        (S("f32[2,0]", axes=(1,)), "an axis of size 0 has no mean"),
        (S("i64[2]", axes=(0,)), "x must be a float, is i64"),
    ]


@op("size", axes="->", flops=0)
class SizeOf(Primitive):
    """y = the value of a size expression, a scalar: for example the divisor of a mean over a symbolic axis

    dtype   the dtype of y
    """

    value: Size
    dtype: DType = i64
    stops_gradient = True

    def dtypes(self) -> str:
        return f"-> {self.dtype}"

    def check(self, types: Sequence[Type | None]) -> None:
        if self.dtype.kind == "bool":
            raise RuleError("a size is a number, not a bool")

    def reference(self) -> Any:
        return np.asarray(self.value.evaluate({}), self.dtype.numpy or np.float32)

    samples = [S(value=12), S(value="2*3+1", dtype="f32")]
    errors = [(S(value=3, dtype="bool"), "a size is a number")]


@op("cumsum", dtypes="n -> n", linear="x")
class CumSum(Primitive):
    """y[i] = sum of x[j] over j <= i, along `axis`, for 16-bit floats accumulated in f32

    exclusive   sum over j < i: the result starts at 0
    reverse     sum over j >= i (or j > i): from the end. The result at i then reads elements after i, so the
                axis is whole and not scanned.
    """

    x = Operand()
    axis: int
    exclusive: bool = False
    reverse: bool = False
    step = "carries the running sum"
    accumulates = f32

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        mark = "[{}]" if self.reverse else ">{}"
        return rule_along([self.axis], ranks[0] or 0, mark, mark)

    def reference(self, x: Any) -> Any:
        terms = np.moveaxis(wide_array(x), self.axis, 0)
        if self.reverse:
            terms = terms[::-1]
        if self.exclusive:
            terms = np.concatenate([np.zeros_like(terms[:1]), terms[:-1]])
        sums = np.cumsum(terms, axis=0, dtype=terms.dtype).astype(x.dtype)
        return np.moveaxis(sums[::-1] if self.reverse else sums, 0, self.axis)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,) = grads
        return [b.cumsum(g, axis=self.axis, exclusive=self.exclusive, reverse=not self.reverse)]

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], held: Held) -> Any:
        """Build the step, with the sum so far as the first element: the sums of ([carried, x]), without the first.

        Elements after a row's last real token count as 0, and a row at position 0 starts at 0 again.
        """
        (x,) = operands
        if not isinstance(x, Expr) or self.reverse:
            return None
        b, axis, dtype = step.b, place(self.axis, x.rank), x.dtype
        x = x.cast(self.sums_in(dtype))
        size = x.shape[axis]
        if size.constant != 1:
            real = b.iota(size=size, dtype=i64) < b.rearrange(step.count(), pattern="b -> b 1")
            x = b.where(step.beside(real, x, (0, axis)), x, b.constant(0, x.dtype))
        begins = step.beside(b.equal(step.start, 0), x, (0,))
        carried = b.where(begins, b.constant(0, x.dtype), step.carried("sum", x, axis))
        sums = b.cumsum(b.concat(carried, x, axis=axis), axis=axis)
        step.carry("sum", b.slice(sums, axis=axis, start=size, stop=size + 1), axis)
        first = 0 if self.exclusive else 1
        return b.slice(sums, axis=axis, start=first, stop=size + first).cast(dtype)

    samples = [
        S("f32[2,5]", axis=-1),
        S("f32[4,2]", axis=0, exclusive=True),
        S("f32[2,3,4]", axis=1, reverse=True),
        S("f32[5]", axis=0, exclusive=True, reverse=True),
        S("i64[2,3]", axis=1),
    ]
    errors = [(S("f32[2,3]", axis=2), "there is no axis 2"), (S("f32[]", axis=0), "there is no axis 0")]


@op("argmax", dtypes="n -> i64")
class ArgMax(Primitive):
    """y = the position of the greatest element along `axis`; the first position if several elements are equal

    keep   keep the axis as a dimension of size 1
    """

    x = Operand()
    stops_gradient = True
    axis: int
    keep: bool = False

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return rule_along([self.axis], ranks[0] or 0, "[{}]", "1" if self.keep else "")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (self.axis,), "greatest element")

    def reference(self, x: Any) -> Any:
        return np.argmax(x, axis=self.axis, keepdims=self.keep)

    samples = [
        S("f32[2,5] distinct", axis=-1),
        S("f32[4,2,3] distinct", axis=0),
        S("f32[4,3] distinct", axis=1, keep=True),
        S("i64[4,6] < 3", axis=1),
    ]
    errors = [(S("f32[2,3]", axis=2), "there is no axis 2"), (S("f32[0]", axis=0), "an axis of size 0")]


@op("top_k", dtypes="n -> n, i64")
class TopK(Primitive):
    """values, indices = the k greatest elements along `axis`, greatest first, and their positions

    Equal elements are ordered by index, lower first. A NaN counts as greater than any number.
    """

    x = Operand()
    k: int
    axis: int = -1

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return rule_along([self.axis], ranks[0] or 0, "[{}]", f"^k={self.k}", f"^k={self.k}")

    def check(self, types: Sequence[Type | None]) -> None:
        if self.k < 1:
            raise RuleError(f"k must be 1 or more, is {self.k}")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        (x,) = types
        assert x is not None
        size = x.shape[place(self.axis, x.rank)]
        return [(size - self.k, f"k is {self.k}, but axis {self.axis} has {size} elements")]

    def reference(self, x: Any) -> Any:
        # A stable ascending sort of the reversed axis, read backwards, is a descending sort with lower indices first.
        backwards = np.flip(x, self.axis)
        order = np.flip(np.argsort(backwards, axis=self.axis, kind="stable"), self.axis)
        indices = x.shape[self.axis] - 1 - np.take(order, np.arange(self.k), self.axis)
        return np.take_along_axis(x, indices, self.axis), indices

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g, _), (x,), (_, indices) = grads, inputs, outputs
        return [None if g is None else b.scatter_add(zeros(b, x.type), indices, g, axis=self.axis)]

    samples = [
        S("f32[2,5] distinct", k=3),
        S("f32[4,2] distinct", k=4, axis=0),
        S("f32[2,5,3] distinct", k=1, axis=1),
        S("i64[3,6] < 3", k=4),
    ]
    errors = [
        (S("f32[2,3]", k=4), "k is 4, but axis -1 has 3 elements"),
        (S("f32[2,3]", k=0), "k must be 1 or more"),
        (S("f32[2,3]", k=1, axis=2), "there is no axis 2"),
    ]
