"""Linear layers as one op: matmul with a transposed weight, and an added bias.

A weight in layout [in, out] stays the weight of a matmul. `linear` takes [out, in], but a transposition would be a
useless copy: a backend that packs weights packs both layouts, and adds the bias when it stores the product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from treadle.ir.builder import Builder
from treadle.ir.ops.products import Linear
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type
from treadle.passes.cleanup.rearrange_forms import RearrangeForm, composed, form_of, reshaping_pattern
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite, RewriteSet


@dataclass(frozen=True)
class MatmulTransposed(Rewrite):
    """matmul(x, transpose(w))   -->   linear(x, w)

    Refuses: a w that is not a weight (for example keys in an attention, which are computed).
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


def _between(p: Vocabulary, x: Any, w: Any, bias: Any, addend: Any, first: Any, second: Any) -> Any:
    """Return a product of x with a weight, and an addend, between two rearranges."""
    rows = p.shared(p.rearrange(x, pattern=first))
    product = p.named("product", p.either(p.matmul(rows, w), p.linear(rows, w, p.either(bias, None))))
    return p.rearrange(p.either(product, product + addend), pattern=second)


def _is_plain(m: Match) -> bool:
    """Return True if the product is of rows and a matrix, and the addend is a vector or a number."""
    return bool(m.w.rank == 2 and m.product.rank >= 2 and (m.addend is None or m.addend.rank <= 1))


def _again(b: Builder, m: Match, x: Any) -> Any:
    """Return the product applied to other rows."""
    product = b.linear(x, m.w, m.bias) if _is_linear(m) else b.matmul(x, m.w)
    return product if m.addend is None else product + m.addend


def _with_width(form: RearrangeForm, width: Size) -> RearrangeForm | None:
    """Return the form for rows of another width, or None if it changes the last axis."""
    last = form.before[-1] if form.before else ()
    if len(last) != 1 or not form.after or form.after[-1] != last:
        return None
    return replace(form, sizes=tuple([width if atom in last else size for atom, size in enumerate(form.sizes)]))


@dataclass(frozen=True)
class ProductOfRows(Rewrite):
    """rearrange(matmul(rearrange(x), w) + bias)   -->   matmul(rearrange(x), w) + bias        and linear, likewise

    The second rearrange moves, joins or splits rows; x is rearranged directly to the final order of the product's
    rows. Examples: [B, S, k] -> [(B S), k] -> [(B S), n] -> [B, S, n], as in an addmm, or [B, h, S, d] -> [(S B), k] ->
    [(S B), n] -> [B, S, n], as in PyTorch's attention. The rest of the first rearrange remains. A vector, [k] -> [1, k]
    -> [1, n] -> [n], is a valid operand of `linear` only: a matmul keeps its one row. Refuses: a product or sum that is
    used elsewhere with its rows in the old order.
    """

    def pattern(self, p: Vocabulary, x: Any, w: Any, bias: Any, addend: Any, first: Any, second: Any) -> Any:
        return _between(p, x, w, bias, addend, first, second)

    def fits(self, m: Match) -> bool:
        if m.result.type.rank == 1 and not _is_linear(m):
            return False
        return _is_plain(m) and m.product.type.dims[-1:] == m.result.type.dims[-1:] and self._on_x(m) is not None

    def _on_x(self, m: Match) -> RearrangeForm | None:
        """Return both rearranges as one rearrange of x, if the second one keeps the last axis, else None."""
        split = form_of(m.second, m.product.type)
        *rows, last = split.before
        if split.after[-1] != last:
            return None
        joined = m.product.value.node.inputs[0].type
        if sum(split.after[:-1], ()) == sum(rows, ()):
            pattern = reshaping_pattern(joined, (*m.result.type.shape[:-1], joined.shape[-1]))
        else:
            moved = _with_width(split, joined.shape[-1])
            pattern = None if moved is None else moved.pattern
        return None if pattern is None else composed(m.first, pattern, m.x.type)

    def rewrite(self, b: Builder, m: Match) -> Any:
        form = self._on_x(m)
        assert form is not None
        x = m.x if form.is_identity and len(form.before) == len(form.after) else b.rearrange(m.x, pattern=form.pattern)
        return _again(b, m, x)


@dataclass(frozen=True)
class RowsAfterProduct(Rewrite):
    """rearrange(matmul(rearrange(x), w) + bias)   -->   rearrange(matmul(x, w) + bias)        and linear, likewise

    The first rearrange moves, joins or splits rows, and the second one splits the last axis, for example into heads.
    Refuses: a product or sum that is used elsewhere with its rows in the old order.
    """

    def pattern(self, p: Vocabulary, x: Any, w: Any, bias: Any, addend: Any, first: Any, second: Any) -> Any:
        return _between(p, x, w, bias, addend, first, second)

    def fits(self, m: Match) -> bool:
        taken_apart = m.product.type.dims[-1:] != m.result.type.dims[-1:]
        return _is_plain(m) and taken_apart and m.x.rank >= 2 and self._of_result(m) is not None

    def _of_result(self, m: Match) -> RearrangeForm | None:
        """Return both rearranges as one rearrange of the product of x, or None if that is not possible."""
        width = m.product.type.dims[-1]
        moved = _with_width(form_of(m.first, m.x.type), width.size)
        made = Type(m.product.type.dtype, (*m.x.type.dims[:-1], width))
        return None if moved is None else composed(moved.pattern, m.second, made)

    def rewrite(self, b: Builder, m: Match) -> Any:
        form = self._of_result(m)
        assert form is not None
        return b.rearrange(_again(b, m, m.x), pattern=form.pattern)


@dataclass(frozen=True)
class FuseLinear(RewriteSet):
    """x w^T + bias   -->   linear(x, w, bias)

     1. matmul(x, transpose(w))  -->  linear(x, w)
     2. linear(x, w) + bias  -->  linear(x, w, bias)
     3. rows moved, joined or split after a product  -->  the product of rows in that order
     4. rows moved, joined or split before a product  -->  the product of the original rows

    Refuses: a w that is not a weight; a product that is used elsewhere without the bias, or with its rows in the old
    order.
    """

    rules: ClassVar[tuple[Rewrite, ...]] = (MatmulTransposed(), LinearBias(), ProductOfRows(), RowsAfterProduct())
