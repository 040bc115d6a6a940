"""Ops that join and split tensors: concat, slice and pad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError, SizeError
from treadle.ir.op_registry import op
from treadle.ir.operation import Demand, Grads, Op, Operand, Primitive
from treadle.ir.ops.axis_names import axis_letters, place, resized, sized, symbols_in
from treadle.ir.ops.shapes import zeros
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.storage.views import View
from treadle.ir.types import Type


@op("concat", dtypes="t* -> t", linear="parts", flops=0)
class Concat(Primitive):
    """The parts concatenated along one axis. All parts have the same sizes along the other axes."""

    moves_blocks = True
    parts = Operand(variadic=True)
    axis: int = -1

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        rank = ranks[0] or 0
        names = axis_letters(rank + len(ranks) - 1)
        axis = place(self.axis, rank)
        joined = [names[axis], *names[rank:]]
        before, after = names[:axis], names[axis + 1 : rank]
        sides = [" ".join([*before, f"[{n}]", *after]) for n in joined]
        total = f"[{'+'.join(joined)}]" if len(joined) > 1 else sized(Size.of(joined[0]))
        return f"{', '.join(sides)} -> {' '.join([*before, total, *after])}"

    def lookahead(self, types: Sequence[Type | None]) -> Sequence[int | None]:
        sizes = [t.shape[place(self.axis, t.rank)] for t in types if t is not None]
        before = [sum(sizes[:position], ZERO).constant for position in range(len(sizes))]
        return [None if size is None else -size for size in before]

    def reference(self, *parts: Any) -> Any:
        return np.concatenate(parts, axis=self.axis)

    def part_of(self, y: View, types: Sequence[Type | None], position: int) -> View | None:
        axis = place(self.axis, y.rank)
        sizes = [t.shape[axis] for t in types if t is not None]
        return y.sliced(axis, sum(sizes[:position], ZERO), sizes[position])

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,) = grads
        made, start = [], ZERO
        for x in inputs:
            stop = start + x.shape[self.axis]
            made.append(b.slice(g, axis=self.axis, start=start, stop=stop))
            start = stop
        return made

    samples = [
        S("f32[2,3]", "f32[2,1]", "f32[2,2]"),
        S("f32[2,3]", "f32[4,3]", axis=0),
        S("i64[2,3,2]", "i64[2,1,2]", axis=1),
        S("f32[3]"),
    ]
    errors = [
        (S("f32[2,3]", "f32[3,3]"), "sizes disagree: 2 in parts0, 3 in parts1"),
        (S("f32[2,3]", "f32[2]"), "parts1 must have rank 2"),
        (S("f32[2,3]", axis=2), "there is no axis 2"),
    ]


@op("slice", dtypes="t -> t", linear="x", flops=0)
class Slice(Primitive):
    """y[..., i, ...] = x[..., start + i stride, ...] while start + i stride < stop

    start, stop   positions within the axis; a negative constant counts from the end, and a stop of None is
                  the end. They are not clamped: positions outside raise RuleError.
    stride        1 or more
    """

    moves_blocks = True
    x = Operand()
    axis: int
    start: Size = ZERO
    stop: Size | None = None
    stride: int = 1

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        names = axis_letters(ranks[0] or 0, symbols_in([self.start, self.stop]))
        axis = place(self.axis, len(names))
        start, stop = self.span(Size.symbol(names[axis]))
        left, right = resized(names, axis, (stop - start + self.stride - 1) // self.stride)
        return f"{left} -> {right}"

    def lookahead(self, types: Sequence[Type | None]) -> Sequence[int | None]:
        start = self.start.constant
        return [start if self.stride == 1 and start is not None and start >= 0 else None]

    def span(self, size: Size) -> tuple[Size, Size]:
        """Return start and stop on an axis of this size."""
        start, stop = (
            size + edge if edge.constant is not None and edge.constant < 0 else edge
            for edge in (self.start, size if self.stop is None else self.stop)
        )
        return start, stop

    def check(self, types: Sequence[Type | None]) -> None:
        if self.stride < 1:
            raise RuleError(f"stride must be 1 or more, is {self.stride}")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        (x,) = types
        assert x is not None
        size = x.shape[place(self.axis, x.rank)]
        start, stop = self.span(size)
        otherwise = f"from {start} to {stop} is outside an axis of size {size}"
        return [(inside, otherwise) for inside in (start, stop - start, size - stop)]

    def at(self, values: Mapping[str, int]) -> Op:
        for edge in (self.start, self.stop):
            if edge is not None and edge.constant is None and edge.evaluate(values) < 0:
                raise SizeError(f"slice: {edge} is negative", received=f"{dict(values)}")
        return super().at(values)

    def reference(self, x: Any) -> Any:
        start, stop = self.span(Size.of(x.shape[self.axis]))
        return x[_along(x.ndim, self.axis, slice(start.evaluate({}), stop.evaluate({}), self.stride))]

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        (y,), axis = self.infer(types), place(self.axis, x.rank)
        start, _ = self.span(x.shape[axis])
        return x.sliced(axis, start, y.shape[axis], Size.of(self.stride))

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        axis = place(self.axis, x.rank)
        size, taken = x.shape[axis], g.shape[axis]
        if taken.constant == 0:
            return [zeros(b, x.type)]
        start, _ = self.span(size)
        reach = (taken - 1) * self.stride + 1
        spread = g if self.stride == 1 else _spread(b, g, axis, self.stride, reach)
        return [b.pad(spread, axis=axis, before=start, after=size - start - reach)]

    samples = [
        S("f32[2,5]", axis=1, start=1, stop=4),
        S("f32[5,2]", axis=0, start=-3),
        S("f32[7]", axis=0, start=1, stop=-1, stride=3),
        S("f32[2,6,3]", axis=-2, stride=2),
        S("i64[4]", axis=0, stop=2),
    ]
    errors = [
        (S("f32[3]", axis=0, stop=4), "from 0 to 4 is outside an axis of size 3"),
        (S("f32[3]", axis=0, start=-4), "outside an axis of size 3"),
        (S("f32[3]", axis=0, start=2, stop=1), "from 2 to 1"),
        (S("f32[3]", axis=0, stride=0), "stride must be 1 or more"),
        (S("f32[3]", axis=1), "there is no axis 1"),
    ]


def _along(rank: int, axis: int, part: slice) -> tuple[slice, ...]:
    index = [slice(None)] * rank
    index[axis] = part
    return tuple(index)


def _spread(b: Builder, x: Expr, axis: int, stride: int, size: Size) -> Expr:
    """Return an axis of `size` elements, in which the elements of x are `stride` apart, with zeros between them."""
    names = axis_letters(x.rank + 1)
    gap, before, name, after = names[-1], names[:axis], names[axis], names[axis + 1 : -1]
    single = " ".join([*before, name, *after])
    apart = b.rearrange(x, pattern=f"{single} -> {' '.join([*before, name, '1', *after])}")
    padded = b.pad(apart, axis=axis + 1, after=stride - 1)
    split = " ".join([*before, name, gap, *after])
    merged = b.rearrange(padded, pattern=f"{split} -> {' '.join([*before, f'({name} {gap})', *after])}")
    return b.slice(merged, axis=axis, stop=size)


@op("pad", dtypes="t -> t", linear="x", flops=0)
class Pad(Primitive):
    """x with `before` elements of `value` before it along one axis, and `after` elements after it

    value   a number that x's dtype can hold
    """

    x = Operand()
    axis: int
    before: Size = ZERO
    after: Size = ZERO
    value: float = 0.0

    def lookahead(self, types: Sequence[Type | None]) -> Sequence[int | None]:
        before = self.before.constant
        return [None if before is None else -before]

    @property
    def linear(self) -> tuple[frozenset[str], ...]:
        """The op is linear in x if it pads with zeros."""
        return super().linear if self.value == 0 else ()

    @property
    def moved_operands(self) -> frozenset[str]:
        return frozenset(("x",))

    @property
    def only_moves(self) -> bool:
        """False: the margins hold a number that is not an element of x."""
        return False

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        names = axis_letters(ranks[0] or 0, symbols_in([self.before, self.after]))
        axis = place(self.axis, len(names))
        left, right = resized(names, axis, self.before + Size.symbol(names[axis]) + self.after)
        return f"{left} -> {right}"

    def check(self, types: Sequence[Type | None]) -> None:
        (x,) = types
        assert x is not None
        if not x.dtype.holds(self.value):
            raise RuleError(f"value must be a number that {x.dtype} can hold, is {self.value}")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return [(size, f"cannot pad by {size}") for size in (self.before, self.after)]

    def reference(self, x: Any) -> Any:
        widths = [(0, 0)] * x.ndim
        widths[self.axis] = (self.before.evaluate({}), self.after.evaluate({}))
        return np.pad(x, widths, constant_values=self.value)

    def part_of(self, y: View, types: Sequence[Type | None], position: int) -> View | None:
        (x,) = types
        assert x is not None
        axis = place(self.axis, x.rank)
        return y.sliced(axis, self.before, x.shape[axis])

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        stop = self.before + x.shape[self.axis]
        return [b.slice(g, axis=self.axis, start=self.before, stop=stop)]

    samples = [
        S("f32[2,3]", axis=1, before=1, after=2),
        S("f32[2,3]", axis=0, after=1, value=-1.5),
        S("f32[2,3,2]", axis=-2, before=2),
        S("i64[3]", axis=0, before=1),
        S("bool[3]", axis=0, after=1),
    ]
    errors = [
        (S("f32[3]", axis=0, before=-1), "cannot pad by -1"),
        (S("i8[3]", axis=0, after=1, value=300.0), "value must be a number that i8 can hold, is 300.0"),
        (S("i64[3]", axis=0, after=1, value=2.0**63), "value must be a number that i64 can hold"),
        (S("i64[3]", axis=0, after=1, value=float("nan")), "value must be a number that i64 can hold, is nan"),
        (S("u8[3]", axis=0, after=1, value=0.5), "value must be a number that u8 can hold, is 0.5"),
        (S("f32[3]", axis=0, after=1, value=1e39), "value must be a number that f32 can hold, is 1e+39"),
        (S("f32[3]", axis=2), "there is no axis 2"),
    ]
