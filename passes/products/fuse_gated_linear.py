"""Gated feed-forward networks as one op: two products of one value, one of which is activated and gates the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.activated_products import ACTIVATIONS
from treadle.passes.framework.facts import UNMERGED, Facts
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite, RewriteSet
from treadle.passes.products.product_patterns import is_product, product_with, weight_axes


@dataclass(frozen=True)
class GatedLinear(Rewrite):
    """act(linear(x, g)) * linear(x, u)   -->   gated_linear(x, g, u, act)        matmul(x, w) + bias, likewise

    Refuses: products of two values; one weight as [out, in] and the other as [in, out]; a product, its activation or
    its sum with the bias that is used elsewhere as well.
    """

    def pattern(self, p: Vocabulary, x: Any, z: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> Any:
        gating = product_with(p, "gating", x, gate, gate_bias)
        activated = [getattr(p, name)(gating) for name in ACTIVATIONS]
        return p.either(*activated, gating) * product_with(p, "gated", z, up, up_bias)

    def fits(self, m: Match) -> bool:
        if m.gating.value is m.gated.value or not m.gating.type == m.gated.type == m.result.type:
            return False
        if self._activation(m) == "none" and m.x.value is not m.z.value:
            return False  # two products must be multiplied
        return is_product(m.gating, m.gate, m.gate_bias) and is_product(m.gated, m.up, m.up_bias)

    def check(self, m: Match) -> Refusal | None:
        if m.x.value is not m.z.value:
            reason = f"the gate is a product of {_named(m.x)}, but the gated value is a product of {_named(m.z)}"
            return Refusal(reason, m.gating)
        if weight_axes(m.gating) != weight_axes(m.gated):
            transposed = "the gate's" if weight_axes(m.gating) == "k n" else "the gated product's"
            reason = f"one weight, {transposed}, has layout [in, out], but the other [out, in]"
            return Refusal(reason, m.gated, "one layout for both weights")
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        operands = (m.x, m.gate, m.up, m.gate_bias, m.up_bias)
        return b.gated_linear(*operands, activation=self._activation(m), weight_axes=weight_axes(m.gating))

    @staticmethod
    def _activation(m: Match) -> str:
        """Return the op between the gate's product and the multiplication."""
        between = [node.op.name for node in m.nodes[1:] if m.gating.value in node.inputs]
        return between[0] if between else "none"


@dataclass(frozen=True)
class MergedGate(Rewrite):
    """act(y[..., :n]) * y[..., n:]   -->   gated_linear(x, w[:n], w[n:], act)        for a product y = linear(x, w)

    Phi-3 and GLM have this form. The halves of the weight depend only on a weight, so a backend computes them once.
    Refuses: a computed weight, whose halves would be sliced in every run.
    """

    def pattern(self, p: Vocabulary, x: Any, weight: Any, bias: Any) -> Any:
        product = product_with(p, "product", x, weight, bias)
        gate = p.slice(
            product, axis=p.attribute("gate_axis"), start=p.attribute("gate_start"), stop=p.attribute("gate_stop")
        )
        up = p.slice(product, axis=p.attribute("up_axis"), start=p.attribute("up_start"), stop=p.attribute("up_stop"))
        return p.named("activated", p.either(*[getattr(p, name)(gate) for name in ACTIVATIONS])) * up

    def fits(self, m: Match) -> bool:
        rank, width = m.product.rank, m.product.shape[-1]
        along = {axis % rank for axis in (m.gate_axis, m.up_axis)} == {rank - 1}
        halves = m.gate_start != m.up_start and m.result.type.shape[-1] * 2 == width
        return along and halves and is_product(m.product, m.weight, m.bias)

    def check(self, m: Match) -> Refusal | None:
        if m.weight.value.weight is None or (m.bias is not None and m.bias.value.weight is None):
            return Refusal("gate and up are halves of one product, but its matrix is not a parameter", m.product)
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        axes = weight_axes(m.product)
        gate, up = {"start": m.gate_start, "stop": m.gate_stop}, {"start": m.up_start, "stop": m.up_stop}
        weights = [b.slice(m.weight, axis=axes.split().index("n"), **half) for half in (gate, up)]
        biases = [None if m.bias is None else b.slice(m.bias, axis=0, **half) for half in (gate, up)]
        return b.gated_linear(m.x, *weights, *biases, activation=m.activated.value.node.op.name, weight_axes=axes)


@dataclass(frozen=True)
class FuseGatedLinear(RewriteSet):
    """act(x g^T) * (x u^T)   -->   gated_linear(x, g, u, act)        (Shazeer 2020)

     1. act(linear(x, g, b)) * linear(x, u, c), or of matmul(x, w) + b, or without an act  -->  gated_linear
     2. act(y[..., :n]) * y[..., n:] of one product y  -->  gated_linear with the halves of its weight

    Refuses: products of two values; weights of different layouts; halves of a product with a computed matrix; a
    product, its activation or its sum with the bias that is used elsewhere as well.
    """

    ends: ClassVar[Facts] = frozenset({UNMERGED})
    rules: ClassVar[tuple[Rewrite, ...]] = (GatedLinear(), MergedGate())


def _named(x: Expr) -> str:
    value = x.value
    return f"{value.kind} {value.name}" if value.node is None else f"a {value.node.op.name}"
