"""Slices of tables: of tables that are computed from positions, they become smaller tables; of weights, lookups.

slice(tril(ones(C, C)), [:S, :S])   -->   tril(ones(S, S))
slice([0, 1, 2, ...], [:S])         -->   iota(S)
slice(w, [:S])                      -->   gather(w, iota(S))
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.axes import Role
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Value
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.indexing import Iota
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.shapes import Expand
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.types import DType
from treadle.passes.framework.rewrite import Match, Rewrite

_MOST_VALUES = 32
"""The greatest number of values from which a table may be computed; tables with more are unchanged."""


@dataclass(frozen=True)
class SliceOfPositions(Rewrite):
    """slice(x)   -->   a smaller x        for an x computed from positions and integer constants

    Integers and truth values may be computed in any way; floats may only be selected, cast and moved. Tables of cosines
    are left whole, to be computed once for all calls.
    """

    def pattern(self, p: Any, x: Any, axis: Any, start: Any, stop: Any) -> Any:
        return p.slice(x, axis=axis, start=start, stop=stop, stride=1)

    def fits(self, m: Match) -> bool:
        x = m.x.value
        if not _is_of_positions(x) or (_is_leaf(x) and _counted(x, m.axis % m.x.rank) is None):
            return False
        made = self.rewrite(Builder(m.x.builder.graph, Function("tried")), m)
        return made is not None and made.type == m.result.type

    def rewrite(self, b: Builder, m: Match) -> Any:
        axis = m.axis % m.x.rank
        op: Any = m.root.op
        start, stop = op.span(m.x.shape[axis])
        return _Cut(b, start, stop - start).of(m.x.value, axis)


def _is_leaf(value: Value) -> bool:
    """Return True if a value is sliced directly, without slicing the operands of its node. If two slices were swapped,
    the pass would not terminate.
    """
    return value.node is None or isinstance(value.node.op, Slice)


def _counted(value: Value, axis: int) -> tuple[int, int] | None:
    """Return the first number of a constant of consecutive multiples along an axis, and the step between them. Return
    None for any other value, also for one that has further elements along other axes.
    """
    literal = value.literal
    if literal is None or not value.type.dtype.is_int or math.prod(literal.shape) != literal.shape[axis]:
        return None
    numbers = literal.array.reshape(-1).astype(np.int64)
    steps = np.diff(numbers)
    return (int(numbers[0]), int(steps[0])) if len(steps) and (steps == steps[0]).all() else None


def _is_of_positions(value: Value) -> bool:
    """Return True if a value is computed only from positions, integers and single numbers."""
    pending, seen = [value], {value}
    while pending:
        x = pending.pop()
        node = x.node
        if node is None:
            if x.literal is None or (x.type.dtype.is_float and x.literal.array.size != 1):
                return False
            continue
        copied = node.op.only_moves or isinstance(node.op, (Cast, Iota))
        if len(seen) > _MOST_VALUES or node.op.callee is not None or (x.type.dtype.is_float and not copied):
            return False
        pending += [v for v in node.inputs if v not in seen]
        seen.update(node.inputs)
    return True


@dataclass
class _Cut:
    """A builder of a table with only `length` positions from `start` along an axis of the result."""

    b: Builder
    start: Size
    length: Size
    made: dict[tuple[Value, int], Expr | None] = dataclasses.field(default_factory=dict)

    def of(self, value: Value, axis: int) -> Expr | None:
        """Return the value sliced along an axis, or None if some op does more with that axis than map it."""
        key = (value, axis)
        if key not in self.made:
            try:
                self.made[key] = self._sliced(value, axis) if _is_leaf(value) else self._node(value, axis)
            except TreadleError:  # a pattern that contains the size, which has changed
                self.made[key] = None
        return self.made[key]

    def _sliced(self, value: Value, axis: int) -> Expr:
        counted = _counted(value, axis)
        if counted is not None:
            first, step = counted
            dtype, after = value.type.dtype, value.type.rank - axis - 1
            numbers = self._positions(dtype) * step + first
            return self.b.rearrange(numbers, pattern=f"n -> {'1 ' * axis}n{' 1' * after}")
        stop = self.start + self.length
        return self.b.slice(Expr(self.b, value), axis=axis, start=self.start, stop=stop)

    def _positions(self, dtype: DType) -> Expr:
        counted: Expr = self.b.iota(size=self.length, dtype=dtype)
        if self.start == ZERO:
            return counted
        first = self.start.constant
        return counted + (first if first is not None else self.b.size(value=self.start, dtype=dtype))

    def _node(self, value: Value, axis: int) -> Expr | None:
        node = value.node
        assert node is not None
        op: Any = node.op
        if isinstance(op, Iota):
            return self._positions(op.dtype)
        application = op.apply([None if v is None else v.type for v in node.operands])
        dim = application.results[value.index][axis]
        if len(dim.factors) != 1:
            return None
        (factor,) = dim.factors
        role = application.factors[factor].role
        if isinstance(op, Expand):
            op = dataclasses.replace(op, shape=(*op.shape[:axis], self.length, *op.shape[axis + 1 :]))
        elif role is not Role.MAPPED:
            return None
        operands: list[Value | None] = []
        for operand, dims in zip(node.operands, application.operands, strict=True):
            held = [i for i, each in enumerate(dims or ()) if factor in each.factors]
            if operand is None or not held:
                operands.append(operand)
                continue
            if len(held) > 1 or dims[held[0]].factors != (factor,):
                return None
            cut = self.of(operand, held[0])
            if cut is None:
                return None
            operands.append(cut.value)
        return Expr(self.b, self.b.emit(op, operands).results[value.index])


@dataclass(frozen=True)
class RowsOfTable(Rewrite):
    """slice(w, from c to c + S)   -->   gather(w, iota(S) + c)     for a weight w, such as a table of positions, and a
    symbol S

    A slice whose length is a symbol is no form that can be stepped, but rows that are read by their position are.
    """

    def pattern(self, p: Any, w: Any, axis: Any, start: Any, stop: Any) -> Any:
        return p.slice(w, axis=axis, start=start, stop=stop, stride=1)

    def fits(self, m: Match) -> bool:
        if m.w.value.kind != "parameter":
            return False
        op: Any = m.root.op
        axis = m.axis % m.w.rank
        start, _ = op.span(m.w.shape[axis])
        before, taken = m.w.shape[:axis], m.result.type.shape[axis]
        return bool(start.constant is not None and taken.as_symbol is not None and all(n == ONE for n in before))

    def rewrite(self, b: Builder, m: Match) -> Any:
        op: Any = m.root.op
        axis = m.axis % m.w.rank
        start, _ = op.span(m.w.shape[axis])
        rows = b.iota(size=m.result.type.shape[axis])
        found = b.gather(
            b.reshape(m.w, shape=m.w.shape[axis:]), rows if start == ZERO else rows + start.constant, axis=0
        )
        return b.reshape(found, shape=m.result.type.shape)
