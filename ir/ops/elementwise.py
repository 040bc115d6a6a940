"""Elementwise functions of one operand, and the cast between dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Grads, Operand, Primitive
from treadle.ir.ops.along_axes import wide_array
from treadle.ir.ops.error_function import erf
from treadle.ir.samples import S
from treadle.ir.storage.views import View
from treadle.ir.types import DType, Type


class _Elementwise(Primitive):
    """y = f(x). A subclass defines `derivative`, which returns dy/dx in terms of x and y."""

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        raise NotImplementedError

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,), (y,) = grads, inputs, outputs
        return [g * self.derivative(b, x, y)]


@op("neg", axes="... -> ...", dtypes="n -> n", linear="x")
class Neg(Primitive):
    """y = -x"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.negative(x)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,) = grads
        return [-g]

    samples = [S("f32[2,3]"), S("i64[4]")]
    errors = [(S("bool[2]"), "x must be a number, is bool")]


@op("exp", axes="... -> ...", dtypes="f -> f")
class Exp(_Elementwise):
    """y = e^x"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.exp(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return y

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("log", axes="... -> ...", dtypes="f -> f")
class Log(_Elementwise):
    """y = ln x; -inf at 0, NaN below"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.log(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return b.reciprocal(x)

    samples = [S("f32[2,3] > 0")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("expm1", axes="... -> ...", dtypes="f -> f")
class Expm1(_Elementwise):
    """y = e^x - 1, to full precision near 0, where e^x rounds to 1"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.expm1(wide_array(x)).astype(x.dtype)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return b.exp(x)

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("log1p", axes="... -> ...", dtypes="f -> f")
class Log1p(_Elementwise):
    """y = ln(1 + x), to full precision near 0, where 1 + x rounds to 1; -inf at -1, NaN below"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.log1p(wide_array(x)).astype(x.dtype)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return b.reciprocal(x + 1.0)

    samples = [S("f32[2,3] > 0")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("sqrt", axes="... -> ...", dtypes="f -> f")
class Sqrt(_Elementwise):
    """y = x^(1/2); NaN below 0"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.sqrt(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return 0.5 / y

    samples = [S("f32[2,3] > 0")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("rsqrt", axes="... -> ...", dtypes="f -> f")
class Rsqrt(_Elementwise):
    """y = x^(-1/2); inf at 0, NaN below"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.reciprocal(np.sqrt(wide_array(x))).astype(x.dtype)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return -0.5 * y / x

    samples = [S("f32[2,3] > 0")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("reciprocal", axes="... -> ...", dtypes="f -> f")
class Reciprocal(_Elementwise):
    """y = 1 / x"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.reciprocal(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return -y * y

    samples = [S("f32[2,3] > 0")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("tanh", axes="... -> ...", dtypes="f -> f")
class Tanh(_Elementwise):
    """y = tanh x"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.tanh(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return 1.0 - y * y

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("erf", axes="... -> ...", dtypes="f -> f")
class Erf(_Elementwise):
    """y = 2/sqrt(pi) * integral from 0 to x of e^(-t^2) dt        (see treadle.ir.ops.error_function)"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return erf(wide_array(x)).astype(x.dtype)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return 2.0 / math.sqrt(math.pi) * b.exp(-x * x)

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("sigmoid", axes="... -> ...", dtypes="f -> f")
class Sigmoid(_Elementwise):
    """y = 1 / (1 + e^(-x))"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.reciprocal(1 + np.exp(np.negative(wide_array(x)))).astype(x.dtype)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return y * (1.0 - y)

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("sin", axes="... -> ...", dtypes="f -> f")
class Sin(_Elementwise):
    """y = sin x, x in radians"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.sin(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return b.cos(x)

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("cos", axes="... -> ...", dtypes="f -> f")
class Cos(_Elementwise):
    """y = cos x, x in radians"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.cos(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return -b.sin(x)

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("abs", axes="... -> ...", dtypes="n -> n")
class Abs(_Elementwise):
    """y = |x|; the gradient at 0 is 0"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.abs(x)

    def derivative(self, b: Builder, x: Expr, y: Expr) -> Any:
        return b.sign(x)

    samples = [S("f32[2,3]"), S("i64[4]")]
    errors = [(S("bool[2]"), "x must be a number, is bool")]


@op("sign", axes="... -> ...", dtypes="n -> n")
class Sign(Primitive):
    """y = 1, 0 or -1 where x is positive, zero or negative; no gradient flows"""

    x = Operand()
    stops_gradient = True

    def reference(self, x: Any) -> Any:
        return np.sign(x)

    samples = [S("f32[2,3]"), S("i64[4]")]
    errors = [(S("bool[2]"), "x must be a number, is bool")]


@op("floor", axes="... -> ...", dtypes="f -> f")
class Floor(Primitive):
    """y = the greatest integer that is not above x; no gradient flows"""

    x = Operand()
    stops_gradient = True

    def reference(self, x: Any) -> Any:
        return np.floor(x)

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("relu", axes="... -> ...", dtypes="f -> f")
class Relu(Primitive):
    """y = max(x, 0); the gradient at 0 is 0        (Nair & Hinton 2010)"""

    x = Operand()

    def reference(self, x: Any) -> Any:
        return np.maximum(x, 0)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        return [b.where(x > 0.0, g, b.constant(0.0, g.dtype))]

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("stop_gradient", axes="... -> ...", dtypes="f -> f", linear="x", flops=0)
class StopGradient(Composite):
    """y = x, and no gradient flows, as through tensor.detach() in PyTorch

    If a graph is not differentiated, the default passes remove the op.
    """

    x = Operand()

    def body(self, b: Builder, x: Expr) -> Any:
        return x

    def reference(self, x: Any) -> Any:
        return np.asarray(x)

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        return x

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        return [None]

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("cast", axes="... -> ...", flops=0)
class Cast(Primitive):
    """y = x in the dtype `to`

    Float to float rounds to nearest, ties to even. Float to integer drops the fraction; the result is undefined if the
    integer cannot hold it. A bool is 0 or 1, and a number is true unless it is 0. NumPy has no bf16: the reference
    rounds to bf16 and holds it in float32. A cast to a float dtype is linear up to rounding, so it may be applied to
    partial sums; a cast to an integer dtype may not.
    """

    x = Operand()
    to: DType

    def dtypes(self) -> str:
        return f"t -> {self.to}"

    @property
    def linear(self) -> tuple[frozenset[str], ...]:
        return (frozenset({"x"}),) if self.to.is_float else ()

    def reference(self, x: Any) -> Any:
        return np.asarray(x).astype(self.to.numpy) if self.to.numpy is not None else _round_to_bf16(x)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        return [g.cast(x.dtype) if x.dtype.is_float and g.dtype.is_float else None]

    samples = [
        S("f32[2,3]", to="f64"),
        S("f32[2,3]", to="f16"),
        S("f32[2,3]", to="bf16"),
        S("f32[4]", to="i64"),
        S("i64[4]", to="f32"),
        S("i64[4]", to="i32"),
        S("bool[4]", to="f32"),
        S("i64[4]", to="bool"),
    ]
    errors = [(S("f32[2]", to="float32"), "unknown dtype 'float32'")]


def _round_to_bf16(x: Any) -> Any:
    """Round x to bf16's 8 significant bits. Return float32, whose upper half holds the bf16."""
    single = np.asarray(x, np.float32)
    bits = single.view(np.uint32)
    rounded = np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    unordered = np.isnan(single)
    return np.where(unordered, single, rounded) if np.any(unordered) else rounded
