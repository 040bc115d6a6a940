"""Canonicalize: one form for expressions that can be written in several ways, so that later patterns need only one
form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from treadle.ir.builder import Builder
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.logic import Comparison, LogicalNot, Where
from treadle.ir.ops.shapes import Expand, Rearrange, Reshape
from treadle.ir.sizing.sizes import ZERO
from treadle.ir.types import DType, boolean
from treadle.passes.cleanup.position_indices import (
    EqualPositions,
    GatherOfAll,
    GatherOfOne,
    SliceOfConcat,
    SumOfNumber,
    WhereNegative,
)
from treadle.passes.cleanup.position_slices import RowsOfTable, SliceOfPositions
from treadle.passes.cleanup.rearrange_forms import composed, form_of, reshaping_pattern
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Rewrite, RewriteSet, sweep


@dataclass(frozen=True)
class AddZero(Rewrite):
    """x + 0   -->   x        (for x = -0.0, the left side is 0.0 and the right side -0.0)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return x + 0

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class SubZero(Rewrite):
    """x - 0   -->   x        (but not x - (-0.0): for x = -0.0 this is 0.0)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return x - p.constant("zero")

    def fits(self, m: Match) -> bool:
        return bool(m.zero == 0 and math.copysign(1, m.zero) > 0)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class MulOne(Rewrite):
    """x * 1   -->   x"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return x * 1

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class DivByPowerOfTwo(Rewrite):
    """x / 2^k   -->   x * 2^-k;   x / 1   -->   x        (exact: both are scalings of the exponent)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return x / p.constant("divisor")

    def fits(self, m: Match) -> bool:
        dtype = m.x.dtype.numpy
        if dtype is None or not math.isfinite(m.divisor) or abs(math.frexp(m.divisor)[0]) != 0.5:
            return False
        return bool(np.finfo(dtype).tiny <= abs(1 / m.divisor) <= np.finfo(dtype).max)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x if m.divisor == 1 else m.x * (1 / m.divisor)


@dataclass(frozen=True)
class OneOver(Rewrite):
    """1 / x   -->   reciprocal(x)"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return p.constant("one") / x

    def fits(self, m: Match) -> bool:
        return bool(m.one == 1)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.reciprocal(m.x)


@dataclass(frozen=True)
class PowOne(Rewrite):
    """x^1   -->   x"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return x**1

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class PowTwo(Rewrite):
    """x^2   -->   x * x"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return x**2

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x * m.x


@dataclass(frozen=True)
class NegNeg(Rewrite):
    """-(-x)   -->   x"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return -p.shared(-x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class NotNot(Rewrite):
    """not not x   -->   x"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return p.logical_not(p.shared(p.logical_not(x)))

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class AndTrue(Rewrite):
    """x and true, x or false   -->   x"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return p.either(x & True, x | False)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class RepeatedNeutral(Rewrite):
    """x + expand(0), x and expand(true)   -->   expand(x)"""

    def pattern(self, p: Vocabulary, x: Any, shape: Any) -> Any:
        repeated = p.shared(p.expand(p.constant("n"), shape=shape))
        return p.either(x + repeated, x & repeated)

    def fits(self, m: Match) -> bool:
        return bool(m.n == (0 if m.x.dtype.kind != "bool" else 1))

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.expand(m.x, shape=m.result.type.shape)


@dataclass(frozen=True)
class WhereConstant(Rewrite):
    """where(true, x, y)   -->   x;   where(false, x, y)   -->   y        (expanded if the other operand was larger)"""

    def pattern(self, p: Vocabulary, x: Any, y: Any) -> Any:
        return p.where(p.constant("condition"), x, y)

    def rewrite(self, b: Builder, m: Match) -> Any:
        chosen = m.x if m.condition else m.y
        return chosen if chosen.type == m.result.type else b.expand(chosen, shape=m.result.type.shape)


@dataclass(frozen=True)
class WhereOfTruth(Rewrite):
    """where(c, true, false)   -->   c;   where(c, false, true)   -->   not c"""

    def pattern(self, p: Vocabulary, c: Any) -> Any:
        return p.where(c, p.constant("x"), p.constant("y"))

    def fits(self, m: Match) -> bool:
        return bool(m.c.type == m.result.type and m.x != m.y)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.c if m.x else b.logical_not(m.c)


@dataclass(frozen=True)
class WhereOfSame(Rewrite):
    """where(c, x, where(c, y, z))   -->   where(c, x, z);   where(c, x, where(not c, y, z))   -->   where(c, x, y)"""

    def pattern(self, p: Vocabulary, c: Any, x: Any, y: Any) -> Any:
        return p.where(c, x, y)

    def fits(self, m: Match) -> bool:
        return bool(m.c.shape == m.result.type.shape) and self._chosen(m) is not None

    def _chosen(self, m: Match) -> Value | None:
        """Return the operand of the inner where that is selected if c is false, or None if this is not known."""
        inner: Node | None = m.y.value.node
        if inner is None or not isinstance(inner.op, Where):
            return None
        condition, y, z = inner.inputs
        known: Value = m.c.value
        if condition is known:
            return z
        opposite = condition.node
        negates = opposite is not None and isinstance(opposite.op, LogicalNot) and opposite.inputs[0] is known
        return y if negates else None

    def rewrite(self, b: Builder, m: Match) -> Any:
        chosen = self._chosen(m)
        return m.result if chosen is None else b.where(m.c, m.x, chosen)


@dataclass(frozen=True)
class WhereTimesTruth(Rewrite):
    """where(c, n, 0) * cast(d)   -->   where(c and d, n, 0)        for a finite number n and a condition d"""

    def pattern(self, p: Vocabulary, c: Any, d: Any, to: Any) -> Any:
        return p.mul(p.where(c, p.constant("n"), 0), p.cast(d, to=to))

    def fits(self, m: Match) -> bool:
        whole, parts = m.result.type.shape, (m.c.shape, m.d.shape)
        return m.d.dtype.kind == "bool" and whole in parts and math.isfinite(m.n)

    def rewrite(self, b: Builder, m: Match) -> Any:
        dtype = m.result.type.dtype
        return b.where(b.logical_and(m.c, m.d), b.constant(m.n, dtype), b.constant(0, dtype))


@dataclass(frozen=True)
class CastToItself(Rewrite):
    """cast(x, the dtype of x)   -->   x"""

    def pattern(self, p: Vocabulary, x: Any, to: Any) -> Any:
        return p.cast(x, to=to)

    def fits(self, m: Match) -> bool:
        return bool(m.x.dtype == m.to)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


LOSSLESS: Mapping[str, tuple[str, ...]] = {
    "bool": ("u8", "i8", "i16", "i32", "i64", "bf16", "f16", "f32", "f64"),
    "u8": ("i16", "i32", "i64", "bf16", "f16", "f32", "f64"),
    "i8": ("i16", "i32", "i64", "bf16", "f16", "f32", "f64"),
    "i16": ("i32", "i64", "f32", "f64"),
    "i32": ("i64", "f64"),
    "bf16": ("f32", "f64"),
    "f16": ("f32", "f64"),
    "f32": ("f64",),
}
"""For each dtype, the dtypes that hold all of its values exactly."""


def is_lossless(source: DType, to: DType) -> bool:
    """Return True if a cast from `source` to `to` keeps every value."""
    return source == to or to.name in LOSSLESS.get(source.name, ())


@dataclass(frozen=True)
class CastOfCast(Rewrite):
    """cast(cast(x, wide), to)   -->   cast(x, to)        where `wide` holds every value of x"""

    def pattern(self, p: Vocabulary, x: Any, wide: Any, to: Any) -> Any:
        return p.cast(p.shared(p.cast(x, to=wide)), to=to)

    def fits(self, m: Match) -> bool:
        return is_lossless(m.x.dtype, m.wide)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x.cast(m.to)


@dataclass(frozen=True)
class IdentityRearrange(Rewrite):
    """rearrange(x, "a b -> a b")   -->   x"""

    def pattern(self, p: Vocabulary, x: Any, pattern: Any) -> Any:
        return p.rearrange(x, pattern=pattern)

    def fits(self, m: Match) -> bool:
        return bool(m.x.type == m.result.type) and form_of(m.pattern, m.x.type).is_identity

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class RearrangeOfRearrange(Rewrite):
    """rearrange(rearrange(x, p), q)   -->   rearrange(x, q after p)

    Not applied if p joins axes that q splits at other positions (a product 2*3 read as 3*2): no single pattern
    expresses both.
    """

    def pattern(self, p: Vocabulary, x: Any, first: Any, second: Any) -> Any:
        return p.rearrange(p.shared(p.rearrange(x, pattern=first)), pattern=second)

    def fits(self, m: Match) -> bool:
        return composed(m.first, m.second, m.x.type) is not None

    def rewrite(self, b: Builder, m: Match) -> Any:
        form = composed(m.first, m.second, m.x.type)
        assert form is not None
        identity = form.is_identity and m.x.type == m.result.type
        return m.x if identity else b.rearrange(m.x, pattern=form.pattern)


@dataclass(frozen=True)
class Unchanging(Rewrite):
    """expand, reshape, slice or pad to the shape that x already has, or concat of x alone   -->   x"""

    def pattern(self, p: Vocabulary, x: Any, shape: Any, axis: Any, start: Any, stop: Any, value: Any) -> Any:
        return p.either(
            p.expand(x, shape=shape),
            p.reshape(x, shape=shape),
            p.slice(x, axis=axis, start=start, stop=stop, stride=1),
            p.pad(x, axis=axis, before=start, after=stop, value=value),
            p.concat(x, axis=axis),
        )

    def fits(self, m: Match) -> bool:
        return bool(m.x.type == m.result.type) and m.start in (None, ZERO)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class ConcatOfEmpty(Rewrite):
    """concat(x, y)   -->   x        for a y that has no elements"""

    def pattern(self, p: Vocabulary, x: Any, y: Any, axis: Any) -> Any:
        return p.either(p.concat(x, y, axis=axis), p.concat(y, x, axis=axis))

    def fits(self, m: Match) -> bool:
        return bool(m.y.shape[m.axis] == ZERO and m.x.type == m.result.type)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class ReshapeOfReshape(Rewrite):
    """reshape(reshape(x, s), t)   -->   reshape(x, t)"""

    def pattern(self, p: Vocabulary, x: Any, first: Any, second: Any) -> Any:
        return p.reshape(p.shared(p.reshape(x, shape=first)), shape=second)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.reshape(m.x, shape=m.second)


@dataclass(frozen=True)
class ReshapeByAxes(Rewrite):
    """reshape(x, s)   -->   rearrange(x, ...)        if it splits and joins whole axes

    [B, S, 768] -> [B, S, 12, 64] is "a b (c d=64) -> a b c d"; [4, 6] -> [3, 8] does not split whole axes, and is
    unchanged.
    """

    def pattern(self, p: Vocabulary, x: Any, shape: Any) -> Any:
        return p.reshape(x, shape=shape)

    def fits(self, m: Match) -> bool:
        return reshaping_pattern(m.x.type, m.shape) is not None

    def rewrite(self, b: Builder, m: Match) -> Any:
        pattern = reshaping_pattern(m.x.type, m.shape)
        assert pattern is not None  # checked by `fits`
        return b.rearrange(m.x, pattern=pattern)


@dataclass(frozen=True)
class ExpandOfExpand(Rewrite):
    """expand(expand(x, s), t)   -->   expand(x, t)"""

    def pattern(self, p: Vocabulary, x: Any, first: Any, second: Any) -> Any:
        return p.expand(p.shared(p.expand(x, shape=first)), shape=second)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.expand(m.x, shape=m.result.type.shape)


@dataclass(frozen=True)
class TidyLayout(RewriteSet):
    """A cleanup of rearranges between a replacement and its neighbours."""

    rules: ClassVar[tuple[Rewrite, ...]] = (IdentityRearrange(), RearrangeOfRearrange())


@dataclass(frozen=True)
class WhereAlike(Rewrite):
    """where(condition, x, x)   -->   x"""

    def pattern(self, p: Vocabulary, condition: Any, x: Any) -> Any:
        return p.where(condition, x, x)

    def fits(self, m: Match) -> bool:
        return bool(m.x.type == m.result.type)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class StopGradient(Rewrite):
    """stop_gradient(x)   -->   x        if the graph is not differentiated"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return p.stop_gradient(x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class Canonicalize(RewriteSet):
    """Many small equations, applied until none matches; the classes of this file are the list:

     0. c + x  -->  x + c, for each commutative op and constant c;  x + [[c]], x + expand(c)  -->  x + c, of one element
     1. x + 0, x - 0, x * 1, x / 1, x^1  -->  x
     2. x / 2^k  -->  x * 2^-k;   x^2  -->  x * x;   1 / x  -->  reciprocal(x)
     3. -(-x), not not x, x and true, x or false  -->  x
     4. where of a constant condition  -->  the selected side;  where(c, x, x)  -->  x
     5. cast to the same dtype, cast of a lossless cast
     6. two of rearrange, reshape or expand in a row  -->  one;  reshape of whole axes  -->  rearrange
     7. rearrange, reshape, expand, slice, pad, concat that change nothing, and concat(x, an empty y)  -->  x
     8. slice(concat(x, y)) that is one of them; gather of the whole axis; where(i < 0, y, i) of positions  -->  x
     9. slice of a table that is computed from positions  -->  the smaller table
    10. stop_gradient(x)  -->  x, if the graph is not differentiated

    Results stay bitwise identical with one exception: x + 0 turns -0.0 into 0.0, and x does not. These are not applied,
    since they would change numbers: x * 0 (NaN and infinity), (x * a) * b, x / c for other c, x^0.5.
    """

    rules: ClassVar[tuple[Rewrite, ...]] = (
        AddZero(),
        SubZero(),
        MulOne(),
        DivByPowerOfTwo(),
        OneOver(),
        PowOne(),
        PowTwo(),
        NegNeg(),
        NotNot(),
        AndTrue(),
        RepeatedNeutral(),
        WhereConstant(),
        WhereOfTruth(),
        WhereOfSame(),
        WhereTimesTruth(),
        WhereAlike(),
        CastToItself(),
        CastOfCast(),
        IdentityRearrange(),
        RearrangeOfRearrange(),
        Unchanging(),
        ReshapeOfReshape(),
        ReshapeByAxes(),
        ExpandOfExpand(),
        WhereNegative(),
        SliceOfConcat(),
        ConcatOfEmpty(),
        SliceOfPositions(),
        GatherOfAll(),
        GatherOfOne(),
        RowsOfTable(),
        EqualPositions(),
        SumOfNumber(),
    )

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        rules = self.rules if log.differentiated else (*self.rules, StopGradient())
        changes = _move_numbers(function, log)
        changes += sweep(rules, function, graph, log)
        while moved := _move_numbers(function, log):
            changes += moved + sweep(rules, function, graph, log)
        return changes


def _move_numbers(function: Function, log: PassRecord) -> int:
    return constants_to_scalars(function, log) + constants_to_the_right(function, log) + numbers_through(function, log)


def constants_to_scalars(function: Function, log: PassRecord) -> int:
    """x + [[c]]   -->   x + c        for a constant of one element and an operand of the same or higher rank

    x + expand(c)   -->   x + c        for an operand that has the result's shape

    The rules apply to all elementwise ops, since their operands broadcast.
    """
    changed = 0
    for node in function.nodes:
        if len(node.operands) < 2 or node.op.callee is not None:  # a call has many operands, and is not elementwise
            continue
        numbers = {i: literal for i, v in enumerate(node.inputs) if v.type.rank and (literal := _repeated_number(v))}
        if not numbers or not node.is_elementwise:
            continue
        for position, literal in numbers.items():
            value = node.inputs[position]
            others = [v for v in node.inputs if v is not value and v.literal is None]
            whole = node.results[0].type.dims
            if any(v.type.rank >= value.type.rank if value.node is None else v.type.dims == whole for v in others):
                operands = list(node.operands)
                operands[position] = Value.constant(Literal(literal.dtype, (), literal.data))
                node.operands = tuple(operands)
                log.match("constants-to-scalars", function, node)
                changed += 1
    return changed


def numbers_through(function: Function, log: PassRecord) -> int:
    """f(expand(n))        -->   expand(f(n))              for an elementwise f, or a move, and numbers n, m

    f(where(c, n, m))      -->   where(c, f(n), f(m))      for an elementwise f, also of a moved where(c, n, m)
    f(cast(c))             -->   where(c, f(1), f(0))      for a comparison f

    Further operands of f may be numbers, too.
    """
    made: list[Node] = []
    conditions: dict[tuple[Op, Value], Value] = {}
    changed = 0
    for node in function.nodes:
        replaced = _through(node, conditions)
        if replaced is not None:
            *before, (node.op, node.operands) = replaced
            made += before
            log.match("numbers-through", function, node)
            changed += 1
        made.append(node)
    function.nodes = made
    return changed


def _through(node: Node, conditions: dict[tuple[Op, Value], Value]) -> list[Any] | None:
    """Return the op and the operands that replace a node's, by the equations of `numbers_through`, after the nodes that
    must come before it. Return None if no equation applies.

    conditions  conditions that were moved for earlier nodes, by move and condition; new ones are added
    """
    values = {v for v in node.inputs if v.literal is None or v.literal.shape}
    if len(values) != 1 or len(node.results) != 1 or node.op.callee is not None:
        return None
    (value,), result = values, node.results[0].type
    above, moves = value.node, list[Node]()
    if above is not None and isinstance(above.op, Expand) and _is_number(above.inputs[0]):
        number: Value | None = above.inputs[0]
        if node.is_elementwise and value.type.dims == result.dims and not isinstance(node.op, Where):
            number = _applied(node, value, above.inputs[0])
        elif isinstance(node.op, Expand) or not (node.op.only_moves and len(node.operands) == 1):
            return None
        expand = Expand(shape=result.shape)
        same = number is not None and expand.infer_for([number]) == (result,)
        return [(expand, (number,))] if same else None
    if not node.is_elementwise or isinstance(node.op, Where) or value.type.dims != result.dims:
        return None
    while above is not None and isinstance(above.op, Rearrange | Expand):
        moves.append(above)
        above = above.inputs[0].node
    if above is None:
        return None
    if isinstance(above.op, Where) and all(map(_is_number, above.inputs[1:])):
        condition, *numbers = above.inputs
    elif isinstance(above.op, Cast) and isinstance(node.op, Comparison) and above.inputs[0].type.dtype is boolean:
        condition, dtype = above.inputs[0], above.results[0].type.dtype
        numbers = [Value.constant(Literal.of(n, dtype)) for n in (1, 0)]
    else:
        return None
    if condition.type.dims != above.results[0].type.dims:
        return None
    applied = [x for x in (_applied(node, value, number) for number in numbers) if x is not None]
    if len(applied) < len(numbers):
        return None
    if applied[0].literal == applied[1].literal:
        return [(Expand(shape=result.shape), (applied[0],))]
    made: list[Any] = []
    for move in reversed(moves):
        key = move.op, condition
        if key not in conditions:
            types = move.op.infer_for([condition])
            made.append(Node(move.op, [condition], types, scope=move.scope, source=move.source))
            conditions[key] = made[-1].result
        condition = conditions[key]
    return [*made, (Where(), (condition, *applied))]


def _is_number(value: Value) -> bool:
    return value.literal is not None and value.literal.shape == ()


def _applied(node: Node, value: Value, number: Value) -> Value | None:
    """Return an elementwise op's result if a value is a number, as its other operands are; None if there is none."""
    dtype = node.results[0].type.dtype
    operands = [number if v is value else v for v in node.inputs]
    if dtype.numpy is None or any(v.type.dtype.numpy is None for v in operands):
        return None
    try:
        with np.errstate(all="ignore"):
            made = node.op.reference(*[v.literal.array for v in operands if v.literal is not None])
        return Value.constant(Literal.of(np.asarray(made), dtype))
    except (TreadleError, ArithmeticError, TypeError, ValueError):
        return None


def _repeated_number(value: Value) -> Literal | None:
    """Return the constant of one element whose number a value repeats or reshapes, or which the value is. Return None
    for any other value.
    """
    while value.node is not None and isinstance(value.node.op, (Expand, Rearrange, Reshape)):
        value = value.node.inputs[0]
    literal = value.literal
    return literal if literal is not None and math.prod(literal.shape) == 1 else None


def constants_to_the_right(function: Function, log: PassRecord) -> int:
    """c + x   -->   x + c        for each commutative op; not a pattern, since patterns match in both orders"""
    swapped = 0
    for node in function.nodes:
        if node.op.commutes:
            left, right = node.inputs
            if left.literal is not None and right.literal is None:
                node.operands = (right, left)
                log.match("constants-to-the-right", function, node)
                swapped += 1
    return swapped
