"""Elementwise activations, composed of simpler functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Grads, Operand
from treadle.ir.ops.along_axes import wide_array, widened
from treadle.ir.ops.error_function import erf
from treadle.ir.samples import S

_SQRT_HALF = math.sqrt(0.5)
_NORMAL_PEAK = 1.0 / math.sqrt(2.0 * math.pi)
_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715


@op("gelu", axes="... -> ...", dtypes="f -> f")
class Gelu(Composite):
    """y = x Phi(x) = x/2 (1 + erf(x / sqrt 2)), Phi the normal distribution        (Hendrycks & Gimpel 2016)

    dy/dx = Phi(x) + x phi(x), phi the normal density
    """

    x = Operand()

    def body(self, b: Builder, x: Expr) -> Any:
        return 0.5 * x * (1.0 + b.erf(x * _SQRT_HALF))

    def reference(self, x: Any) -> Any:
        return 0.5 * x * (1 + erf(x * _SQRT_HALF))

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        distribution = 0.5 * (1.0 + b.erf(x * _SQRT_HALF))
        density = _NORMAL_PEAK * b.exp(-0.5 * x * x)
        return [g * (distribution + x * density)]

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("gelu_tanh", axes="... -> ...", dtypes="f -> f")
class GeluTanh(Composite):
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        (Hendrycks & Gimpel 2016)"""

    x = Operand()

    def body(self, b: Builder, x: Expr) -> Any:
        return 0.5 * x * (1.0 + b.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x * x * x)))

    def reference(self, x: Any) -> Any:
        return 0.5 * x * (1 + np.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x * x * x)))

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        t = b.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x * x * x))
        inner_slope = _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBIC * x * x)
        return [g * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner_slope)]

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("silu", axes="... -> ...", dtypes="f -> f")
class Silu(Composite):
    """y = x sigmoid(x)        (Hendrycks & Gimpel 2016; as swish, Ramachandran, Zoph & Le 2017)"""

    x = Operand()

    def body(self, b: Builder, x: Expr) -> Any:
        return x * b.sigmoid(x)

    def reference(self, x: Any) -> Any:
        return x * _sigmoid(x)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        s = b.sigmoid(x)
        return [g * s * (1.0 + x * (1.0 - s))]

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("quick_gelu", axes="... -> ...", dtypes="f -> f")
class QuickGelu(Composite):
    """y = x sigmoid(1.702 x)        (Hendrycks & Gimpel 2016; the activation of CLIP, Radford et al. 2021)"""

    x = Operand()

    def body(self, b: Builder, x: Expr) -> Any:
        return x * b.sigmoid(1.702 * x)

    def reference(self, x: Any) -> Any:
        return x * _sigmoid(1.702 * x)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        s = b.sigmoid(1.702 * x)
        return [g * s * (1.0 + 1.702 * x * (1.0 - s))]

    samples = [S("f32[2,3]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("softplus", axes="... -> ...", dtypes="f -> f")
class Softplus(Composite):
    """y = ln(1 + e^x)        (Dugas et al. 2001)

    Computed as max(x, 0) + ln(1 + e^-|x|), which does not overflow. dy/dx = sigmoid(x), at 0 as well.
    """

    x = Operand()

    def body(self, b: Builder, x: Expr) -> Any:
        wide = widened(x)
        return (b.maximum(wide, 0.0) + b.log1p(b.exp(-b.abs(wide)))).cast(x.dtype)

    def reference(self, x: Any) -> Any:
        return np.logaddexp(wide_array(x), 0).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        return [g * b.sigmoid(x)]

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


def _sigmoid(x: Any) -> Any:
    return np.reciprocal(1 + np.exp(np.negative(x)))
