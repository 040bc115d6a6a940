"""Elementwise arithmetic on two operands, broadcasting dimensions of constant size 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Grads, Operand, Primitive
from treadle.ir.samples import S
from treadle.ir.types import Type


def unbroadcast(b: Builder, grad: Expr, like: Type) -> Expr:
    """Sum a gradient over the axes along which an operand of type `like` was broadcast."""
    extra = grad.rank - like.rank
    held = zip(like.dims, grad.type.dims[extra:], strict=True)
    stretched = [extra + i for i, (own, full) in enumerate(held) if own.is_one and not full.is_one]
    if stretched:
        grad = b.reduce_sum(grad, axes=tuple(stretched), keep=True)
    return b.reduce_sum(grad, axes=tuple(range(extra))) if extra else grad


@op("add", axes="..., ... -> ...", dtypes="n, n -> n", linear="x y")
class Add(Primitive):
    """z = x + y"""

    x = Operand()
    y = Operand()
    commutes = True

    def reference(self, x: Any, y: Any) -> Any:
        return np.add(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y) = grads, inputs
        return [unbroadcast(b, g, x.type), unbroadcast(b, g, y.type)]

    samples = [S("f32[2,3]", "f32[2,3]"), S("f32[2,1,4]", "f32[3,1]"), S("i64[4]", "i64[]")]
    errors = [
        (S("f32[2,3]", "f32[4]"), "sizes disagree: 3 in x, 4 in y"),
        (S("f32[2]", "i64[2]"), "dtypes disagree"),
    ]


@op("sub", axes="..., ... -> ...", dtypes="n, n -> n", linear="x y")
class Sub(Primitive):
    """z = x - y"""

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.subtract(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y) = grads, inputs
        return [unbroadcast(b, g, x.type), unbroadcast(b, -g, y.type)]

    samples = [S("f32[2,3]", "f32[2,3]"), S("f32[3,1]", "f32[2,1,4]"), S("i64[]", "i64[4]")]
    errors = [(S("f32[2,3]", "f32[2]"), "sizes disagree"), (S("bool[2]", "bool[2]"), "x must be a number")]


@op("mul", axes="..., ... -> ...", dtypes="n, n -> n", linear="x | y")
class Mul(Primitive):
    """z = x * y"""

    x = Operand()
    y = Operand()
    commutes = True

    def reference(self, x: Any, y: Any) -> Any:
        return np.multiply(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y) = grads, inputs
        return [unbroadcast(b, g * y, x.type), unbroadcast(b, g * x, y.type)]

    samples = [S("f32[2,3]", "f32[2,3]"), S("f32[2,1,4]", "f32[3,1]"), S("i64[4]", "i64[]")]
    errors = [(S("f32[2,3]", "f32[4]"), "sizes disagree")]


@op("div", axes="..., ... -> ...", dtypes="f, f -> f", linear="x")
class Div(Primitive):
    """z = x / y

    Floats only; for integers use `floor_divide`, or cast first.
    """

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.divide(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y), (z,) = grads, inputs, outputs
        share = g / y
        return [unbroadcast(b, share, x.type), unbroadcast(b, -share * z, y.type)]

    samples = [S("f32[2,3]", "f32[2,3] > 0"), S("f32[2,1,4]", "f32[3,1] > 0"), S("f32[]", "f32[4] > 0")]
    errors = [(S("f32[2,3]", "f32[4]"), "sizes disagree"), (S("i64[2]", "i64[2]"), "x must be a float")]


@op("pow", axes="..., ... -> ...", dtypes="f, f -> f", linear="")
class Pow(Primitive):
    """z = x^y: NaN for a negative x unless y is an integer

    dz/dx = y x^(y-1), and 0 where y = 0. dz/dy = x^y ln x; where x <= 0, ln x has no real value, and dz/dy is 0.
    """

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.power(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y), (z,) = grads, inputs, outputs
        zero, one = b.constant(0.0, g.dtype), b.constant(1.0, g.dtype)
        by_x = b.where(b.equal(y, zero), zero, y * x ** (y - one))
        if y.value.literal is not None:
            return [unbroadcast(b, g * by_x, x.type), None]
        # where x <= 0, ln is taken of 1, so that a backend that traps on NaN does not trap
        by_y = b.where(x > zero, z * b.log(b.where(x > zero, x, one)), zero)
        return [unbroadcast(b, g * by_x, x.type), unbroadcast(b, g * by_y, y.type)]

    samples = [S("f32[2,3] > 0", "f32[2,3]"), S("f32[2,1,4] > 0", "f32[3,1]"), S("f32[4] > 0", "f32[]")]
    errors = [(S("f32[2,3]", "f32[4]"), "sizes disagree"), (S("i64[2]", "i64[2]"), "x must be a float")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Choice(Primitive):
    """An op whose result is one of two numbers.

    ties   the gradient where x = y: "even" gives half to each, as torch.maximum does; "x" or "y" gives all to one of
           them. An imported clamp gives it to the clamped value, hardtanh to its bound
    """

    ties: str = "even"

    def check(self, types: Sequence[Type | None]) -> None:
        if self.ties not in ("even", "x", "y"):
            raise RuleError(f"ties must be 'even', 'x' or 'y', not {self.ties!r}")

    @property
    def commutes(self) -> bool:  # type: ignore[override]  # ops are frozen
        return self.ties == "even"

    def shared(self, b: Builder, g: Expr, x: Expr, y: Expr, x_wins: Expr) -> list[Expr | None]:
        """Return the gradients of x and y: g for the selected operand, which is x where `x_wins`. Where both are equal,
        `ties` decides.
        """
        zero = b.constant(0.0, g.dtype)
        if self.ties == "even":
            to_x = b.where(b.equal(x, y), g * 0.5, b.where(x_wins, g, zero))
        else:
            to_x = b.where(x_wins | b.equal(x, y) if self.ties == "x" else x_wins, g, zero)
        return [unbroadcast(b, to_x, x.type), unbroadcast(b, g - to_x, y.type)]

    samples = [
        S("f32[2,3]", "f32[2,3]"),
        S("f32[2,1,4]", "f32[3,1]"),
        S("i64[4]", "i64[]"),
        S("f32[2,3]", "f32[]", ties="x"),
        S("f32[3]", "f32[2,3]", ties="y"),
    ]
    errors = [
        (S("f32[2,3]", "f32[4]"), "sizes disagree"),
        (S("f32[2]", "i64[2]"), "dtypes disagree"),
        (S("f32[2]", "f32[2]", ties="z"), "ties must be 'even', 'x' or 'y', not 'z'"),
    ]


@op("maximum", axes="..., ... -> ...", dtypes="n, n -> n", linear="")
class Maximum(_Choice):
    """z = max(x, y); a NaN in either gives NaN

    Where x = y, each operand gets half of the gradient, as in torch.maximum; `ties` can give all of it to one operand.
    """

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.maximum(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y) = grads, inputs
        return self.shared(b, g, x, y, x > y)


@op("minimum", axes="..., ... -> ...", dtypes="n, n -> n", linear="")
class Minimum(_Choice):
    """z = min(x, y); a NaN in either gives NaN

    Where x = y, each operand gets half of the gradient, as in torch.minimum; `ties` can give all of it to one operand.
    """

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.minimum(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y) = grads, inputs
        return self.shared(b, g, x, y, x < y)


@op("floor_divide", axes="..., ... -> ...", dtypes="n, n -> n", linear="")
class FloorDivide(Primitive):
    """z = floor(x / y)

    Rounds towards minus infinity, also for integers, as NumPy, Python and torch.floor_divide do (C truncates). An
    integer divided by zero is undefined. The result is piecewise constant, so no gradient flows.
    """

    x = Operand()
    y = Operand()
    stops_gradient = True

    def reference(self, x: Any, y: Any) -> Any:
        return np.floor_divide(x, y)

    samples = [S("f32[2,3]", "f32[2,3] > 0"), S("f32[2,1,4]", "f32[3,1] > 0"), S("i64[4] < 50", "i64[4] > 0")]
    errors = [(S("f32[2,3]", "f32[4]"), "sizes disagree"), (S("f32[2]", "i64[2]"), "dtypes disagree")]


@op("mod", axes="..., ... -> ...", dtypes="n, n -> n", linear="")
class Mod(Primitive):
    """z = x - floor(x / y) y

    The remainder of `floor_divide`. It has the sign of y, as in NumPy, Python and torch.remainder; in C it has the sign
    of x. An integer modulo zero is undefined.
    """

    x = Operand()
    y = Operand()

    def reference(self, x: Any, y: Any) -> Any:
        return np.mod(x, y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, y) = grads, inputs
        return [unbroadcast(b, g, x.type), unbroadcast(b, -g * b.floor_divide(x, y), y.type)]

    samples = [S("f32[2,3]", "f32[2,3] > 0"), S("f32[2,1,4]", "f32[3,1] > 0"), S("i64[4] < 50", "i64[4] > 0")]
    errors = [(S("f32[2,3]", "f32[4]"), "sizes disagree"), (S("f32[2]", "i64[2]"), "dtypes disagree")]
