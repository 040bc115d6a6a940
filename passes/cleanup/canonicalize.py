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
from treadle.ir.graph import Function, Graph
from treadle.ir.sizing.sizes import ZERO
from treadle.ir.types import DType
from treadle.passes.cleanup.moved_numbers import move_numbers
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
from treadle.passes.cleanup.where_rules import WhereAlike, WhereConstant, WhereOfSame, WhereOfTruth, WhereTimesTruth
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
class StopGradient(Rewrite):
    """stop_gradient(x)   -->   x        if the graph is not differentiated"""

    def pattern(self, p: Vocabulary, x: Any) -> Any:
        return p.stop_gradient(x)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class Canonicalize(RewriteSet):
    """Many small equations, applied until none matches.

     0. constants move to the right, and through elementwise ops: see `moved_numbers`
     1. x + 0, x - 0, x * 1, x / 1, x^1  -->  x
     2. x / 2^k  -->  x * 2^-k;   x^2  -->  x * x;   1 / x  -->  reciprocal(x)
     3. -(-x), not not x, x and true, x or false  -->  x
     4. where of a constant, repeated or nested condition: see `where_rules`
     5. cast to the same dtype, cast of a lossless cast
     6. two of rearrange, reshape or expand in a row  -->  one;  reshape of whole axes  -->  rearrange
     7. rearrange, reshape, expand, slice, pad, concat that change nothing, and concat(x, an empty y)  -->  x
     8. slice(concat(x, y)) that is one of them; gather of the whole axis; where(i < 0, y, i) of positions  -->  x;
        gather of one position  -->  slice;  running sums of a number  -->  positions
     9. slice of a table that is computed from positions  -->  the smaller table
    10. stop_gradient(x)  -->  x, if the graph is not differentiated

    Results stay bitwise identical, except that the sign of a zero may change (x + 0, and where(c, n, 0) times a
    condition), and that numbers are computed here instead of by a kernel. Not applied, since they would change
    numbers: x * 0 (NaN and infinity), (x * a) * b, x / c for other c, x^0.5.
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
        changes = move_numbers(function, log)
        changes += sweep(rules, function, graph, log)
        while moved := move_numbers(function, log):
            changes += moved + sweep(rules, function, graph, log)
        return changes
