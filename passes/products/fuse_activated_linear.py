"""Fuse a product and its activation into one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder
from treadle.ir.ops.activated_products import ACTIVATIONS
from treadle.passes.framework.facts import UNMERGED, Facts
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Rewrite
from treadle.passes.products.product_patterns import is_product, product_with, weight_axes


@dataclass(frozen=True)
class FuseActivatedLinear(Rewrite):
    """act(linear(x, w, bias))   -->   activated_linear(x, w, bias, act)        and the same for matmul(x, w) + bias

    act is gelu, gelu_tanh, quick_gelu, silu, relu, tanh or sigmoid. A weight keeps its layout, [out, in] for linear and
    [in, out] for matmul. Refuses: a product, or its sum with the bias, that is used elsewhere as well.
    """

    ends: ClassVar[Facts] = frozenset({UNMERGED})

    def pattern(self, p: Vocabulary, x: Any, weight: Any, bias: Any) -> Any:
        product = product_with(p, "product", x, weight, bias)
        return p.either(*[getattr(p, name)(product) for name in ACTIVATIONS])

    def fits(self, m: Match) -> bool:
        return is_product(m.product, m.weight, m.bias)

    def rewrite(self, b: Builder, m: Match) -> Any:
        axes = weight_axes(m.product)
        return b.activated_linear(m.x, m.weight, m.bias, activation=m.root.op.name, weight_axes=axes)
