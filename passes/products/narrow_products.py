"""Products with weights in a narrower dtype: both factors are rounded, and the products are summed as before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.analysis.weight_only import values_of_weights
from treadle.ir.builder import Builder
from treadle.ir.graph import Node, Value
from treadle.ir.ops.products import MixedProduct
from treadle.ir.types import DType, bf16, f32
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class NarrowProducts(SiteRewrite[Site]):
    """linear(x, w, bias)   -->   linear(cast(x, to=bf16), cast(w, to=bf16), bias, to=f32)        for a weight w

    and likewise matmul, activated_linear, gated_linear and projections. The result, the bias and the sum stay float32.
    What a cast makes of a weight is made once, when weights are bound; values that several products read are cast once.

    Refuses: a matrix that is computed or an input, as attention's are; a constant, which would be cast at every call; a
    stack of matrices; a product of what a quantizing pass rounds at every call.
    """

    tidying: ClassVar[Pass | None] = CommonSubexpressions()
    dtype: DType = bf16

    def sites(self, work: Rewriting) -> Iterator[Site]:
        of_weights = values_of_weights(work.graph)
        for node in work.walk():
            op = node.op
            if not isinstance(op, MixedProduct) or op.to is not None or node.results[0].type.dtype is not f32:
                continue
            reason = next(filter(None, (_why_not(w, of_weights) for w in _weights(node))), "")
            if _is_rounded(node.operands[0]):
                reason = "x is rounded to blocks already"
            if reason:
                work.refuse(self.name, Refusal(reason, node))
            else:
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        node = site.root
        narrow = {0, *_places(node)}
        operands: list[Any] = [
            v if v is None or i not in narrow else b.cast(b.expr(v), to=self.dtype, name=f"{_short(v)}_{self.dtype}")
            for i, v in enumerate(node.operands)
        ]
        op = dataclasses.replace(node.op, to=node.results[0].type.dtype)  # type: ignore[type-var]
        return b.emit(op, [getattr(v, "value", v) for v in operands]).results


def _is_rounded(x: Value | None) -> bool:
    """Whether a value is what blocks decode to, and no weight."""
    return x is not None and x.node is not None and x.node.op.decodes and x.weight is None


def _places(node: Node) -> tuple[int, ...]:
    assert isinstance(node.op, MixedProduct)
    return node.op.multiplies(len(node.operands))


def _weights(node: Node) -> list[Value]:
    return [v for i in _places(node) if (v := node.operands[i]) is not None]


def _why_not(weight: Value, of_weights: set[Value]) -> str:
    """What stands against rounding the matrix of a product, if anything does."""
    if weight.kind == "constant":
        return "the matrix is a constant, and would be cast at every call"
    if weight not in of_weights:
        made = "an input" if weight.node is None else f"computed by {weight.node.op.name}"
        return f"the matrix is {made}, and no weight"
    return "the matrices are a stack" if weight.type.rank != 2 else ""


def _short(value: Value) -> str:
    return value.name.rpartition(".")[2]
