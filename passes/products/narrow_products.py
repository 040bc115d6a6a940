"""Matrix products in a narrower dtype: both factors are rounded, and the products are summed in the original dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.analysis.weight_only import values_of_weights
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import UsageError
from treadle.ir.graph import Node, Value
from treadle.ir.ops.products import Einsum, MixedProduct
from treadle.ir.types import DType, bf16, f32
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.facts import BEFORE_LOWERING, FULL_PRECISION, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite
from treadle.passes.products.einsum_as_product import as_product


@dataclass(frozen=True)
class NarrowProducts(SiteRewrite[Site]):
    """linear(x, w, bias)   -->   linear(cast(x, to=bf16), cast(w, to=bf16), bias, to=f32)        for a weight w

    The same holds for matmul, activated_linear, gated_linear and projections. The result, the bias and the sum stay
    float32. The cast of a weight is computed once, when weights are bound; a value that several products read is cast
    once.

    With `computed`, which training uses because its weights change, w may be any matrix. An einsum that is a product
    with a matrix, such as the gradients of `linear`, becomes a matmul:

    einsum(g, x, equation="b a n, b a k -> n k")   -->   matmul(rearrange(cast(g)), rearrange(cast(x)), to=f32)

    Refuses: a matrix that is computed or an input, as in attention, without `computed`; a constant, which would be cast
    at every call; a batch of matrices, so that products of attention are unchanged in decomposed form and in gradients;
    an einsum that is not a product with a matrix; a product whose operand a quantizing pass rounds at every call.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    ends: ClassVar[Facts] = frozenset({FULL_PRECISION})

    tidying: ClassVar[Pass | None] = CommonSubexpressions()
    dtype: DType = bf16
    computed: bool = False

    def __post_init__(self) -> None:
        if not self.dtype.is_float:
            raise UsageError("dtype of narrow-products must be a float dtype", received=self.dtype.name, hint="bf16")

    def sites(self, work: Rewriting) -> Iterator[Site]:
        of_weights = None if self.computed else values_of_weights(work.graph)
        for node in work.walk():
            op = node.op
            if node.results[0].type.dtype is not f32:
                continue
            if isinstance(op, Einsum) and self.computed:
                found = as_product(node)
                reason = found if isinstance(found, str) else _is_fixed(node.inputs)
            elif isinstance(op, MixedProduct) and op.to is None:
                reason = next(filter(None, (_why_not(w, of_weights) for w in _weights(node))), "")
            else:
                continue
            if _is_rounded(node.operands[0]):
                reason = "x is rounded to blocks already"
            if reason:
                work.refuse(self.name, Refusal(reason, node))
            else:
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        node = site.root
        if isinstance(node.op, Einsum):
            product = as_product(node)
            assert not isinstance(product, str)
            return [product.build(b, [self._narrow(b, v) for v in node.inputs], node.result.type.dtype).value]
        narrow = {0, *_places(node)}
        operands: list[Any] = [
            v if v is None or i not in narrow else self._narrow(b, v) for i, v in enumerate(node.operands)
        ]
        op = dataclasses.replace(node.op, to=node.results[0].type.dtype)  # type: ignore[type-var]
        return b.emit(op, [getattr(v, "value", v) for v in operands]).results

    def _narrow(self, b: Builder, value: Value) -> Expr:
        return b.cast(b.expr(value), to=self.dtype, name=f"{_short(value)}_{self.dtype}")


def _is_rounded(x: Value | None) -> bool:
    """Return True if a value is decoded from blocks and is not a weight."""
    return x is not None and x.node is not None and x.node.op.decodes and x.weight is None


def _places(node: Node) -> tuple[int, ...]:
    assert isinstance(node.op, MixedProduct)
    return node.op.multiplies(len(node.operands))


def _weights(node: Node) -> list[Value]:
    return [v for i in _places(node) if (v := node.operands[i]) is not None]


def _why_not(weight: Value, of_weights: set[Value] | None) -> str:
    """Return the reason why the matrix of a product is not rounded, or an empty string. If `of_weights` is None,
    any matrix may be rounded.
    """
    if fixed := _is_fixed([weight]):
        return fixed
    if of_weights is not None and weight not in of_weights:
        made = "an input" if weight.node is None else f"computed by {weight.node.op.name}"
        return f"the matrix is {made}, not a weight"
    return "the matrices are a batch" if weight.type.rank != 2 else ""


def _is_fixed(values: Iterable[Value]) -> str:
    constant = any(value.kind == "constant" for value in values)
    return "the matrix is a constant, and would be cast at every call" if constant else ""


def _short(value: Value) -> str:
    return value.name.rpartition(".")[2]
