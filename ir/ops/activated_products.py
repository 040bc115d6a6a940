"""Products of an input and a weight. `activated_linear` also applies an activation; `gated_linear` also multiplies by a
second product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import find_op, op
from treadle.ir.operation import Composite, Operand
from treadle.ir.ops.products import MixedProduct
from treadle.ir.ops.weight_layouts import multiplied, refuse_weight_axes, rows_of
from treadle.ir.samples import S
from treadle.ir.types import DType, Type, f32

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "tanh", "sigmoid")
"""Names of ops that may be fused with a product."""


class _ActivatedProduct(MixedProduct, Composite):
    """Base of both ops: an activation by name, and weights in either order of axes."""

    activation: str
    weight_axes: str
    activations: ClassVar[tuple[str, ...]] = ACTIVATIONS
    accumulates = f32

    def check(self, types: Sequence[Type | None]) -> None:
        if self.activation not in self.activations:
            raise RuleError(f"unknown activation {self.activation!r}", hint="one of " + ", ".join(self.activations))
        refuse_weight_axes(self.weight_axes)

    @property
    def _rows(self) -> str:
        return rows_of(self.weight_axes)

    @property
    def _weight(self) -> str:
        return "n [k]" if self.weight_axes == "n k" else "[k] n"

    def _product(self, b: Builder, x: Expr, weight: Expr, bias: Expr | None) -> Any:
        return multiplied(b, x, weight, bias, self.weight_axes, self.to)

    def _activated(self, b: Builder, x: Any) -> Any:
        return b.apply(find_op(self.activation), x)


@op("activated_linear")
class ActivatedLinear(_ActivatedProduct):
    """y[..., n] = act(sum_k x[..., k] weight[n, k] + bias[n])

    The first half of a feed-forward network (Vaswani et al. 2017, 3.3), a pooler, the first layer of a head.

    activation   act: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "tanh" or "sigmoid", as the op of that name
    weight_axes  "n k", as the weight of linear, or "k n", as the weight of matmul and in most ONNX files
    to           the dtype of the result and the bias, in which products are summed; None: the dtype of x and the weight
    """

    x = Operand()
    weight = Operand()
    bias = Operand(optional=True)
    activation: str = "gelu"
    weight_axes: str = "n k"
    to: DType | None = None

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return f"{self._rows} [k], {self._weight}, n -> {self._rows} n"

    def dtypes(self) -> str:
        return self.dtype_rule(2, 1)

    def body(self, b: Builder, x: Expr, weight: Expr, bias: Expr | None) -> Any:
        return self._activated(b, self._product(b, x, weight, bias))

    samples = [
        S("f32[2,3,4]", "f32[5,4]", "f32[5]"),
        S("f32[3,4]", "f32[5,4]", None, activation="relu"),
        S("f32[4]", "f32[5,4]", "f32[5]", activation="gelu_tanh"),
        S("f32[2,3,4]", "f32[4,5]", "f32[5]", activation="silu", weight_axes="k n"),
        S("f32[3,4]", "f32[4,5]", None, activation="tanh", weight_axes="k n"),
        S("f32[3,4]", "f32[5,4]", "f32[5]", activation="quick_gelu"),
        S("f32[3,4]", "f32[5,4]", "f32[5]", activation="sigmoid"),
        S("f16[3,4]", "f16[4,5]", "f32[5]", weight_axes="k n", to="f32"),
    ]
    errors = [
        (S("f32[2,3]", "f32[3,4]", None), "axis k sizes disagree: 3 in x, 4 in weight"),
        (S("f32[2,3]", "f32[4,3]", "f32[3]"), "axis n sizes disagree: 4 in weight, 3 in bias"),
        (S("f32[3]", "f32[3,4]", None, weight_axes="k n"), "x must have rank 2 or more"),
        (S("f32[2,3]", "f32[4,3]", None, activation="exp"), "unknown activation 'exp'"),
        (S("f32[2,3]", "f32[4,3]", None, weight_axes="k, n"), "unknown weight_axes 'k, n'"),
    ]


@op("gated_linear")
class GatedLinear(_ActivatedProduct):
    """y[..., n] = act(sum_k x[..., k] gate[n, k] + gate_bias[n]) * (sum_k x[..., k] up[n, k] + up_bias[n])

    Gated linear units: with "sigmoid" GLU (Dauphin et al. 2017), with "relu", "gelu", "silu" and "none" (the identity)
    ReGLU, GEGLU, SwiGLU and the bilinear layer (Shazeer 2020).

    activation   act: an activation that activated_linear accepts, or "none"
    weight_axes  of both weights: "n k", as the weight of linear, or "k n", as the weight of matmul
    to           the dtype of the result and the biases, in which products are summed; None: the dtype of x and the
                 weights
    """

    x = Operand()
    gate = Operand()
    up = Operand()
    gate_bias = Operand(optional=True)
    up_bias = Operand(optional=True)
    activation: str = "silu"
    weight_axes: str = "n k"
    to: DType | None = None
    activations = (*ACTIVATIONS, "none")

    def multiplies(self, count: int) -> tuple[int, ...]:
        return (1, 2)

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return f"{self._rows} [k], {self._weight}, {self._weight}, n, n -> {self._rows} n"

    def dtypes(self) -> str:
        return self.dtype_rule(3, 2)

    def body(self, b: Builder, x: Expr, gate: Expr, up: Expr, gate_bias: Expr | None, up_bias: Expr | None) -> Any:
        gating = self._product(b, x, gate, gate_bias)
        gating = gating if self.activation == "none" else self._activated(b, gating)
        return gating * self._product(b, x, up, up_bias)

    samples = [
        S("f32[2,3,4]", "f32[5,4]", "f32[5,4]", None, None),
        S("f32[3,4]", "f32[5,4]", "f32[5,4]", "f32[5]", "f32[5]", activation="sigmoid"),
        S("f32[4]", "f32[5,4]", "f32[5,4]", None, "f32[5]", activation="none"),
        S("f32[2,3,4]", "f32[4,5]", "f32[4,5]", "f32[5]", None, activation="gelu_tanh", weight_axes="k n"),
        S("f32[3,4]", "f32[4,5]", "f32[4,5]", None, None, activation="relu", weight_axes="k n"),
        S("f16[3,4]", "f16[5,4]", "f16[5,4]", None, "f32[5]", to="f32"),
    ]
    errors = [
        (S("f32[2,3]", "f32[4,3]", "f32[5,3]", None, None), "axis n sizes disagree: 4 in gate, 5 in up"),
        (S("f32[2,3]", "f32[4,3]", "f32[4,2]", None, None), "axis k sizes disagree"),
        (S("f32[2,3]", "f32[4,3]", "f32[4,3]", None, None, activation="exp"), "unknown activation 'exp'"),
        (S("f32[3]", "f32[3,4]", "f32[3,4]", None, None, weight_axes="k n"), "x must have rank 2 or more"),
    ]
