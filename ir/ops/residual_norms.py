"""A residual addition and its norm in one op: fused add + norm.

The ops have two results, as a residual stream needs: y, for the next layer, and the sum, which continues the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Demand, Grads, Operand
from treadle.ir.ops.normalization import LayerNorm, RMSNorm
from treadle.ir.samples import S
from treadle.ir.types import Type, f32


class _AddNorm(Composite):
    """Base of both ops. A subclass defines `norm`, the norm of the sum."""

    accumulates = f32

    def check(self, types: Sequence[Type | None]) -> None:
        self.norm.check(types[:1])
        x, residual = types[:2]
        assert x is not None
        assert residual is not None
        if x.shape != residual.shape:
            raise RuleError(
                "x and residual must have one shape", hint="expand the operand that is broadcast, or use add and a norm"
            )

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return self.norm.demands(types[:1])

    @property
    def norm(self) -> LayerNorm | RMSNorm:
        """The op that computes y from the sum."""
        raise GraphError(f"op {self.name} does not define `norm`")

    def body(self, b: Builder, x: Expr, residual: Expr, *vectors: Expr | None) -> tuple[Expr, Expr]:
        total = x + residual
        return b.apply(type(self.norm), total, *vectors, **self.norm.attributes), total

    def reference(self, x: Any, residual: Any, *vectors: Any) -> Any:
        total = x + residual
        return self.norm.reference(total, *vectors), total

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Build the gradient: both addends get the gradient of the sum, which is the gradient through the norm plus the
        gradient of the result `sum`.
        """
        (g_y, g_sum), (_, _, *vectors), (y, total) = grads, inputs, outputs
        if g_y is None:
            return [g_sum, g_sum, *[None] * len(vectors)]
        through, *others = self.norm.gradient(b, [g_y], [total, *vectors], [y])
        both = through if g_sum is None else through + g_sum
        return [both, both, *others]


@op("add_layer_norm", axes="... [d], ... d, d, d -> ... [d], ... d", dtypes="f, f, f, f -> f, f")
class AddLayerNorm(_AddNorm):
    """sum = x + residual,   y = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias

    Results: y, then the sum. The op is `layer_norm` (Ba, Kiros & Hinton 2016) of a residual sum, as
    SkipLayerNormalization in ONNX Runtime. The sum is rounded to its dtype before it is normalized.
    """

    x = Operand()
    residual = Operand()
    weight = Operand(optional=True)
    bias = Operand(optional=True)
    eps: float = 1e-5

    @property
    def norm(self) -> LayerNorm:
        return LayerNorm(eps=self.eps)

    samples = [
        S("f32[2,3,8]", "f32[2,3,8]", "f32[8]", "f32[8]"),
        S("f32[3,8]", "f32[3,8]", "f32[8]", None, eps=1e-3),
        S("f32[3,8]", "f32[3,8]", None, "f32[8]"),
        S("f32[8]", "f32[8]", None, None),
    ]
    errors = [
        (S("f32[2,3,8]", "f32[3,8]", "f32[8]", "f32[8]"), "x and residual must have one shape"),
        (S("f32[2,8]", "f32[1,8]", None, None), "x and residual must have one shape"),
        (S("f32[2,8]", "f32[2,8]", "f32[7]", None), "axis d sizes disagree: 8 in x, 7 in weight"),
        (S("f32[2,8]", "f16[2,8]", None, None), "dtypes disagree: x is f32, residual is f16"),
        (S("f32[2,0]", "f32[2,0]", None, None), "an axis of size 0 has no mean"),
        (S("f32[]", "f32[]", None, None), "x must have rank 1 or more"),
    ]


@op("add_rms_norm", axes="... [d], ... d, d -> ... [d], ... d", dtypes="f, f, f -> f, f")
class AddRMSNorm(_AddNorm):
    """sum = x + residual,   y = sum / sqrt(mean(sum^2) + eps) * weight

    Results: y, then the sum. The op is `rms_norm` (Zhang & Sennrich 2019) of a residual sum, as fused_add_rms_norm in
    vLLM. The sum is rounded to its dtype before it is normalized.
    """

    x = Operand()
    residual = Operand()
    weight = Operand(optional=True)
    eps: float = 1e-6

    @property
    def norm(self) -> RMSNorm:
        return RMSNorm(eps=self.eps)

    samples = [
        S("f32[2,3,8]", "f32[2,3,8]", "f32[8]"),
        S("f32[3,8]", "f32[3,8]", None, eps=1e-5),
        S("f32[8]", "f32[8]", "f32[8]"),
    ]
    errors = [
        (S("f32[2,3,8]", "f32[8]", "f32[8]"), "x and residual must have one shape"),
        (S("f32[2,8]", "f32[2,8]", "f32[7]"), "axis d sizes disagree: 8 in x, 7 in weight"),
        (S("f32[2,0]", "f32[2,0]", None), "an axis of size 0 has no mean"),
    ]
