"""Softmax and the normalizations: ops that read a whole axis, which their result has too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Demand, Grads, Operand
from treadle.ir.ops.along_axes import not_empty, rule_along, wide_array, widened
from treadle.ir.ops.arithmetic import unbroadcast
from treadle.ir.samples import S
from treadle.ir.types import Type, f32


@op("softmax", dtypes="f -> f")
class Softmax(Composite):
    """y = e^(x - m) / sum of e^(x - m) over `axis`, where m = max of x

    A row that is -inf throughout becomes NaN; in attention, such a row becomes zeros. 16-bit floats are computed in
    f32, and the result is rounded.
    """

    x = Operand()
    axis: int = -1
    accumulates = f32

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (self.axis,), "softmax")

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return rule_along([self.axis], ranks[0] or 0, "[{}]", "[{}]")

    def body(self, b: Builder, x: Expr) -> Any:
        wide = widened(x)
        weights = b.exp(wide - b.reduce_max(wide, axes=(self.axis,), keep=True))
        return (weights / b.reduce_sum(weights, axes=(self.axis,), keep=True)).cast(x.dtype)

    def reference(self, x: Any) -> Any:
        wide = wide_array(x)
        weights = np.exp(wide - np.max(wide, self.axis, keepdims=True))
        return (weights / np.sum(weights, self.axis, keepdims=True)).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (y,) = grads, outputs
        return [_through_softmax(b, g, y, self.axis)]

    samples = [S("f32[2,3,5]"), S("f32[4,3]", axis=0), S("f32[2,3,4]", axis=1)]
    errors = [
        (S("f32[2,3]", axis=2), "there is no axis 2"),
        (S("f32[2,0]"), "an axis of size 0 has no softmax"),
        (S("i64[2]"), "x must be a float, is i64"),
    ]


@op("log_softmax", dtypes="f -> f")
class LogSoftmax(Composite):
    """y = x - m - ln(sum of e^(x - m) over `axis`), where m = max of x

    16-bit floats are computed in f32, and the result is rounded.
    """

    x = Operand()
    axis: int = -1
    accumulates = f32

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (self.axis,), "softmax")

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return rule_along([self.axis], ranks[0] or 0, "[{}]", "[{}]")

    def body(self, b: Builder, x: Expr) -> Any:
        wide = widened(x)
        shifted = wide - b.reduce_max(wide, axes=(self.axis,), keep=True)
        return (shifted - b.log(b.reduce_sum(b.exp(shifted), axes=(self.axis,), keep=True))).cast(x.dtype)

    def reference(self, x: Any) -> Any:
        wide = wide_array(x)
        shifted = wide - np.max(wide, self.axis, keepdims=True)
        return (shifted - np.log(np.sum(np.exp(shifted), self.axis, keepdims=True))).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (y,) = grads, outputs
        g_wide = widened(g)
        total = b.reduce_sum(g_wide, axes=(self.axis,), keep=True)
        return [(g_wide - b.exp(widened(y)) * total).cast(y.dtype)]

    samples = [S("f32[2,3,5]"), S("f32[4,3]", axis=0)]
    errors = [
        (S("f32[2,3]", axis=2), "there is no axis 2"),
        (S("f32[2,0]"), "an axis of size 0 has no softmax"),
        (S("i64[2]"), "x must be a float, is i64"),
    ]


@op("masked_softmax", axes="... [n] -> ... [n]", dtypes="f -> f")
class MaskedSoftmax(Composite):
    """softmax over the last axis, and zeros for a row that is -inf throughout

    The result is the probabilities of attention, in which a query may see no key. If attention is lowered by its body,
    this is one op for which a backend may have a kernel. 16-bit floats are computed in f32, and the result is rounded.
    """

    x = Operand()
    accumulates = f32

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (-1,), "softmax")

    def body(self, b: Builder, x: Expr) -> Any:
        wide = widened(x)
        zero, one = (b.constant(v, wide.dtype) for v in (0, 1))
        last = (x.rank - 1,)
        peak = b.reduce_max(wide, axes=last, keep=True)
        weights = b.exp(wide - b.where(peak > -math.inf, peak, zero))
        total = b.reduce_sum(weights, axes=last, keep=True)
        return (weights / b.where(total > 0, total, one)).cast(x.dtype)

    def reference(self, x: Any) -> Any:
        wide = wide_array(x)
        peak = np.max(wide, -1, keepdims=True)
        weights = np.exp(wide - np.where(peak > -np.inf, peak, 0))
        total = np.sum(weights, -1, keepdims=True)
        return (weights / np.where(total > 0, total, 1)).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (y,) = grads, outputs
        return [_through_softmax(b, g, y, -1)]

    samples = [S("f32[2,3,5]"), S("f32[4]")]
    errors = [
        (S("f32[]"), "x must have rank 1 or more"),
        (S("f32[2,0]"), "an axis of size 0 has no softmax"),
        (S("i64[2]"), "x must be a float, is i64"),
    ]


def refuse_eps(eps: float) -> None:
    """Raise RuleError if eps is NaN, since every result would be NaN. An infinite eps is allowed, and gives zeros."""
    if math.isnan(eps):
        raise RuleError("eps must be a number, is nan", hint="eps=1e-5")


def _through_softmax(b: Builder, g: Expr, y: Expr, axis: int) -> Expr:
    """Build the gradient of a softmax y: dL/dx = y (g - sum of g y along the axis)"""
    g_wide, wide = widened(g), widened(y)
    made: Expr = (wide * (g_wide - b.reduce_sum(g_wide * wide, axes=(axis,), keep=True))).cast(y.dtype)
    return made


@op("layer_norm", axes="... [d], d, d -> ... [d]", dtypes="f, f, f -> f")
class LayerNorm(Composite):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba, Kiros & Hinton 2016)

    Mean and variance are over the last axis, the variance divided by its size; 16-bit floats are computed in f32, and
    the result is rounded. With n the normalized x, r = 1/sqrt(...) and h = weight * dL/dy: dL/dx = r (h - mean(h) - n
    mean(h n))
    """

    x = Operand()
    weight = Operand(optional=True)
    bias = Operand(optional=True)
    eps: float = 1e-5
    accumulates = f32

    def check(self, types: Sequence[Type | None]) -> None:
        refuse_eps(self.eps)

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (-1,), "mean")

    def body(self, b: Builder, x: Expr, weight: Expr | None, bias: Expr | None) -> Expr:
        y, _ = self.normalized(b, x)
        y = y if weight is None else y * widened(weight)
        return (y if bias is None else y + widened(bias)).cast(x.dtype)

    def normalized(self, b: Builder, x: Expr) -> tuple[Expr, Expr]:
        """Build (x - mean(x)) / sqrt(var(x) + eps), and the factor 1 / sqrt(var(x) + eps), both `widened`."""
        x = widened(x)
        centered = x - b.reduce_mean(x, axes=(-1,), keep=True)
        factor = b.rsqrt(b.reduce_mean(centered * centered, axes=(-1,), keep=True) + self.eps)
        return centered * factor, factor

    def reference(self, x: Any, weight: Any, bias: Any) -> Any:
        wide = wide_array(x)
        centered = wide - np.mean(wide, -1, keepdims=True)
        y = centered / np.sqrt(np.mean(centered * centered, -1, keepdims=True) + self.eps)
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, weight, bias) = grads, inputs
        n, factor = self.normalized(b, x)
        g = widened(g)
        h = g if weight is None else g * widened(weight)
        mean_h, mean_hn = (b.reduce_mean(v, axes=(-1,), keep=True) for v in (h, h * n))
        return [
            (factor * (h - mean_h - n * mean_hn)).cast(x.dtype),
            None if weight is None else unbroadcast(b, g * n, weight.type).cast(x.dtype),
            None if bias is None else unbroadcast(b, g, bias.type).cast(x.dtype),
        ]

    samples = [
        S("f32[2,3,8]", "f32[8]", "f32[8]"),
        S("f32[3,8]", "f32[8]", None, eps=1e-3),
        S("f32[3,8]", None, "f32[8]"),
        S("f32[8]", None, None),
    ]
    errors = [
        (S("f32[2,8]", "f32[7]", "f32[8]"), "axis d sizes disagree: 8 in x, 7 in weight"),
        (S("f32[2,8]", "f32[8]", "f32[2,8]"), "bias must have rank 1"),
        (S("f32[2,0]", None, None), "an axis of size 0 has no mean"),
        (S("f32[]", None, None), "x must have rank 1 or more"),
        (S("f32[8]", None, None, eps=math.nan), "eps must be a number, is nan"),
    ]


@op("rms_norm", axes="... [d], d -> ... [d]", dtypes="f, f -> f", linear="weight")
class RMSNorm(Composite):
    """y = x / sqrt(mean(x^2) + eps) * weight        (Zhang & Sennrich 2019)

    The mean is over the last axis; 16-bit floats are computed in f32, and the result is rounded. With n the
    normalized x, r = 1/sqrt(...) and h = weight * dL/dy:   dL/dx = r (h - n mean(h n))
    """

    x = Operand()
    weight = Operand(optional=True)
    eps: float = 1e-6
    accumulates = f32

    def check(self, types: Sequence[Type | None]) -> None:
        refuse_eps(self.eps)

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[0], (-1,), "mean")

    def body(self, b: Builder, x: Expr, weight: Expr | None) -> Expr:
        y, _ = self.normalized(b, x)
        return (y if weight is None else y * widened(weight)).cast(x.dtype)

    def normalized(self, b: Builder, x: Expr) -> tuple[Expr, Expr]:
        """Build x / sqrt(mean(x^2) + eps), and the factor 1 / sqrt(mean(x^2) + eps), both `widened`."""
        x = widened(x)
        factor = b.rsqrt(b.reduce_mean(x * x, axes=(-1,), keep=True) + self.eps)
        return x * factor, factor

    def reference(self, x: Any, weight: Any) -> Any:
        wide = wide_array(x)
        y = wide / np.sqrt(np.mean(wide * wide, -1, keepdims=True) + self.eps)
        return (y if weight is None else y * weight).astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, weight) = grads, inputs
        n, factor = self.normalized(b, x)
        g = widened(g)
        h = g if weight is None else g * widened(weight)
        return [
            (factor * (h - n * b.reduce_mean(h * n, axes=(-1,), keep=True))).cast(x.dtype),
            None if weight is None else unbroadcast(b, g * n, weight.type).cast(x.dtype),
        ]

    samples = [S("f32[2,3,8]", "f32[8]"), S("f32[3,8]", None, eps=1e-5), S("f32[8]", "f32[8]")]
    errors = [
        (S("f32[2,8]", "f32[7]"), "axis d sizes disagree: 8 in x, 7 in weight"),
        (S("f32[2,0]", None), "an axis of size 0 has no mean"),
        (S("f32[8]", None, eps=math.nan), "eps must be a number, is nan"),
    ]
