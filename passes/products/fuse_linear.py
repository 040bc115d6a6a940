"""Linear layers: matmul by a transposed weight, and a bias added to it, as one op.

A weight that lies as [in, out] is multiplied as it is. `linear` takes [out, in], and a transposition would be a copy
for nothing: a backend that packs weights packs either, and adds the bias as the product is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from treadle.ir.builder import Builder
from treadle.ir.ops.products import Linear
from treadle.passes.cleanup.rearrange_forms import RearrangeForm, composed, form_of, reshaping_pattern
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite, RewriteSet


@dataclass(frozen=True)
class MatmulTransposed(Rewrite):
    """matmul(x, transpose(w))   -->   linear(x, w)

    Refuses: a w that is no weight (it is computed, as keys in an attention are).
    """

    def pattern(self, p: Vocabulary, x: Any, w: Any, pattern: Any) -> Any:
        return p.matmul(x, p.shared(p.rearrange(w, pattern=pattern)))

    def fits(self, m: Match) -> bool:
        return m.w.rank == 2 and m.x.dtype.is_float and form_of(m.pattern, m.w.type).is_transposition

    def check(self, m: Match) -> Refusal | None:
        value = m.w.value
        if value.weight is None and value.kind != "constant":
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

    def pattern(self, p: Vocabulary, x: Any, w: Any, bias: Any) -> Any:
        return p.named("product", p.linear(x, w)) + bias

    def fits(self, m: Match) -> bool:
        return bool(m.bias.rank == 1 and m.bias.shape[0] == m.w.shape[0] and m.product.type == m.result.type)

    def rewrite(self, b: Builder, m: Match) -> Any:
        return b.linear(m.x, m.w, m.bias)


def _is_linear(m: Match) -> bool:
    return bool(isinstance(m.product.value.node.op, Linear))


@dataclass(frozen=True)
class ProductOfRows(Rewrite):
    """matmul(join(x), w) + bias, with its rows split again   -->   matmul(x, w) + bias        and linear, likewise

    [B, S, k] -> [(B S), k] -> [(B S), n] -> [B, S, n], as an addmm has it: leading axes are rows as they are. What else
    the first rearrange does to x remains. A vector, [k] -> [1, k] -> [1, n] -> [n], is an operand of `linear` alone: a
    matmul keeps its one row. Refuses: a product or sum that is used elsewhere with its rows joined.
    """

    def pattern(self, p: Vocabulary, x: Any, w: Any, bias: Any, addend: Any, first: Any, second: Any) -> Any:
        rows = p.shared(p.rearrange(x, pattern=first))
        product = p.named("product", p.either(p.matmul(rows, w), p.linear(rows, w, p.either(bias, None))))
        return p.rearrange(p.either(product, product + addend), pattern=second)

    def fits(self, m: Match) -> bool:
        plain = m.w.rank == 2 and m.product.rank == 2 and (m.addend is None or m.addend.rank <= 1)
        if m.result.type.rank == 1 and not _is_linear(m):
            return False
        return bool(plain and m.product.type.dims[1:] == m.result.type.dims[-1:] and self._on_x(m) is not None)

    def _on_x(self, m: Match) -> RearrangeForm | None:
        """What the two rearranges do to x, if the second one splits rows, and leaves their order and the last axis."""
        split = form_of(m.second, m.product.type)
        rows, last = split.before
        if sum(split.after[:-1], ()) != rows or split.after[-1] != last:
            return None
        joined = m.product.value.node.inputs[0].type
        pattern = reshaping_pattern(joined, (*m.result.type.shape[:-1], joined.shape[-1]))
        return None if pattern is None else composed(m.first, pattern, m.x.type)

    def rewrite(self, b: Builder, m: Match) -> Any:
        form = self._on_x(m)
        assert form is not None
        x = m.x if form.is_identity and len(form.before) == len(form.after) else b.rearrange(m.x, pattern=form.pattern)
        product = b.linear(x, m.w, m.bias) if _is_linear(m) else b.matmul(x, m.w)
        return product if m.addend is None else product + m.addend


@dataclass(frozen=True)
class FuseLinear(RewriteSet):
    """x w^T + bias   -->   linear(x, w, bias)

     1. matmul(x, transpose(w))  -->  linear(x, w)
     2. linear(x, w) + bias  -->  linear(x, w, bias)
     3. rows joined before a product, and split after it  -->  the product of the rows as they are

    Refuses: a w that is no weight; a product that is used elsewhere without the bias, or with its rows joined.
    """

    rules: ClassVar[tuple[Rewrite, ...]] = (MatmulTransposed(), LinearBias(), ProductOfRows())
