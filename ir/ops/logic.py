"""Comparisons, boolean logic and selection, broadcasting dimensions of constant size 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.op_registry import op
from treadle.ir.operation import Grads, Operand, Primitive
from treadle.ir.ops.arithmetic import unbroadcast
from treadle.ir.samples import S


class Comparison(Primitive):
    """A comparison of two numbers."""

    stops_gradient = True
    samples = [S("f32[2,3]", "f32[2,3]"), S("i64[2,1,4]", "i64[3,1]"), S("f32[4]", "f32[]")]
    errors = [(S("f32[2,3]", "f32[4]"), "sizes disagree"), (S("f32[2]", "i64[2]"), "dtypes disagree")]


@op("equal", axes="..., ... -> ...", dtypes="t, t -> bool")
class Equal(Comparison):
    """z = (x = y); false where either is NaN"""

    x = Operand()
    y = Operand()
    commutes = True

    def reference(self, x: Any, y: Any) -> Any:
        return np.equal(x, y)


@op("not_equal", axes="..., ... -> ...", dtypes="t, t -> bool")
class NotEqual(Comparison):
    """z = (x != y); true where either is NaN"""

    x = Operand()
    y = Operand()
    commutes = True

    def reference(self, x: Any, y: Any) -> Any:
        return np.not_equal(x, y)


@op("less", axes="..., ... -> ...", dtypes="n, n -> bool")
class Less(Comparison):
    """z = (x < y); false where either is NaN"""

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.less(x, y)


@op("less_equal", axes="..., ... -> ...", dtypes="n, n -> bool")
class LessEqual(Comparison):
    """z = (x <= y); false where either is NaN"""

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.less_equal(x, y)


@op("greater", axes="..., ... -> ...", dtypes="n, n -> bool")
class Greater(Comparison):
    """z = (x > y); false where either is NaN"""

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.greater(x, y)


@op("greater_equal", axes="..., ... -> ...", dtypes="n, n -> bool")
class GreaterEqual(Comparison):
    """z = (x >= y); false where either is NaN"""

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.greater_equal(x, y)


@op("logical_and", axes="..., ... -> ...", dtypes="bool, bool -> bool")
class LogicalAnd(Primitive):
    """z = x and y"""

    x = Operand()
    y = Operand()
    commutes = True
    stops_gradient = True

    def reference(self, x: Any, y: Any) -> Any:
        return np.logical_and(x, y)

    samples = [S("bool[2,3]", "bool[2,3]"), S("bool[2,1,4]", "bool[3,1]")]
    errors = [(S("bool[2]", "f32[2]"), "y must be bool, is f32")]


@op("logical_or", axes="..., ... -> ...", dtypes="bool, bool -> bool")
class LogicalOr(Primitive):
    """z = x or y"""

    x = Operand()
    y = Operand()
    commutes = True
    stops_gradient = True

    def reference(self, x: Any, y: Any) -> Any:
        return np.logical_or(x, y)

    samples = [S("bool[2,3]", "bool[2,3]"), S("bool[2,1,4]", "bool[3,1]")]
    errors = [(S("bool[2]", "f32[2]"), "y must be bool, is f32")]


@op("logical_not", axes="... -> ...", dtypes="bool -> bool")
class LogicalNot(Primitive):
    """y = not x"""

    x = Operand()
    stops_gradient = True

    def reference(self, x: Any) -> Any:
        return np.logical_not(x)

    samples = [S("bool[2,3]")]
    errors = [(S("f32[2]"), "x must be bool, is f32")]


@op("where", axes="..., ..., ... -> ...", dtypes="bool, t, t -> t", linear="x y")
class Where(Primitive):
    """z = x where the condition is true, else y

    The operand that is not selected has gradient zero, even if it is NaN.
    """

    condition = Operand()
    x = Operand()
    y = Operand()

    @property
    def moved_operands(self) -> frozenset[str]:
        return frozenset(("x", "y"))

    def reference(self, condition: Any, x: Any, y: Any) -> Any:
        return np.where(condition, x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (condition, x, y) = grads, inputs
        zero = b.constant(0, g.dtype)
        return [
            None,
            unbroadcast(b, b.where(condition, g, zero), x.type),
            unbroadcast(b, b.where(condition, zero, g), y.type),
        ]

    samples = [
        S("bool[2,3]", "f32[2,3]", "f32[2,3]"),
        S("bool[3,1]", "f32[2,1,4]", "f32[]"),
        S("bool[4]", "i64[]", "i64[4]"),
    ]
    errors = [
        (S("bool[2,3]", "f32[2,3]", "f32[4]"), "sizes disagree: 3 in condition, 4 in y"),
        (S("f32[2]", "f32[2]", "f32[2]"), "condition must be bool, is f32"),
        (S("bool[2]", "f32[2]", "i64[2]"), "dtypes disagree"),
    ]
