"""Equations of `where`: of constant, repeated and nested conditions, and of conditions as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from treadle.ir.builder import Builder
from treadle.ir.graph import Node, Value
from treadle.ir.ops.logic import LogicalNot, Where
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Rewrite


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
class WhereAlike(Rewrite):
    """where(condition, x, x)   -->   x"""

    def pattern(self, p: Vocabulary, condition: Any, x: Any) -> Any:
        return p.where(condition, x, x)

    def fits(self, m: Match) -> bool:
        return bool(m.x.type == m.result.type)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return m.x
