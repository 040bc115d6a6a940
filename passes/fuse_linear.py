"""Linear layers: matmul by a transposed weight, and a bias added to it, as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder
from treadle.passes.rearrange_forms import form_of
from treadle.passes.rewrite import Match, Refusal, Rewrite, RewriteSet


@dataclass(frozen=True)
class MatmulTransposed(Rewrite):
    """matmul(x, transpose(w))   -->   linear(x, w)

    Refuses: a w that is no weight (it is computed, as keys in an attention are).
    """

    def pattern(self, p: Any, x: Any, w: Any, pattern: Any) -> Any:
        return p.matmul(x, p.shared(p.rearrange(w, pattern=pattern)))

    def fits(self, m: Match) -> bool:
        return m.w.rank == 2 and m.x.dtype.is_float and form_of(m.pattern, m.w.type).is_transposition

    def check(self, m: Match) -> Refusal | None:
        value = m.w.value
        if value.kind not in ("parameter", "constant"):
            return Refusal(
                f"the matrix is computed by {value.node.op.name}" if value.node else "the matrix is an input"
            )
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.linear(m.x, m.w)


@dataclass(frozen=True)
class LinearBias(Rewrite):
    """linear(x, w) + bias   -->   linear(x, w, bias)        for a vector of linear's width

    Refuses: a linear that is used elsewhere without the bias.
    """

    def pattern(self, p: Any, x: Any, w: Any, bias: Any) -> Any:
        return p.named("product", p.linear(x, w)) + bias

    def fits(self, m: Match) -> bool:
        return bool(m.bias.rank == 1 and m.bias.shape[0] == m.w.shape[0] and m.product.type == m.result.type)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.linear(m.x, m.w, m.bias)


@dataclass(frozen=True)
class FuseLinear(RewriteSet):
    """x w^T + bias   -->   linear(x, w, bias)

     1. matmul(x, transpose(w))  -->  linear(x, w)
     2. linear(x, w) + bias  -->  linear(x, w, bias)

    Refuses: a w that is no weight; a product that is used elsewhere without the bias.
    """

    rules: ClassVar[tuple[Rewrite, ...]] = (MatmulTransposed(), LinearBias())
