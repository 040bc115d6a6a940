"""An einsum of two factors as a matrix product.

    "b a n, n k -> b a k"     matmul(g, w)
    "b a n, b a k -> n k"     matmul(rearrange(g, "b a n -> n (b a)"), rearrange(x, "b a k -> (b a) k"))

The gradients of `linear` are such einsums. Letters of one factor that are in the result are the rows of the left
factor, or the columns of the right factor. Letters of both factors that are not in the result are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.types import DType


@dataclass(frozen=True)
class EinsumProduct:
    """The form of an einsum as a matrix product.

    left        the position of the factor with the rows
    pattern     the rearrangement that puts its summed axes last; empty if they are last already
    matrix      the rearrangement of the other factor to a matrix; empty if it is one
    transposed  True if that matrix is [columns, summed], as the weight of `linear` is
    """

    left: int
    pattern: str
    matrix: str
    transposed: bool

    def build(self, b: Builder, factors: Sequence[Expr], to: DType) -> Expr:
        """Return the product of the einsum's two factors, summed in dtype `to`."""
        x, y = factors[self.left], factors[1 - self.left]
        x = b.rearrange(x, pattern=self.pattern) if self.pattern else x
        y = b.rearrange(y, pattern=self.matrix) if self.matrix else y
        return b.linear(x, y, to=to) if self.transposed else b.matmul(x, y, to=to)


def as_product(node: Node) -> EinsumProduct | str:
    """Return the einsum as a matrix product, or the reason why it is not a product."""
    if len(node.inputs) != 2:
        return "it does not multiply two factors"
    applied = node.op.apply([v.type for v in node.inputs])
    dims = [*[d or () for d in applied.operands], applied.results[0]]
    if any(not d.factors for held in dims for d in held):
        return "an axis is repeated"
    dotted = [name for name in applied.factors if name.startswith("...")]
    names = {name: name for name in applied.factors}
    names |= dict(zip(dotted, axis_letters(len(dotted), names), strict=True))
    first, second, result = ([names[d.factors[0]] for d in held] for held in dims)
    both = [n for n in second if n in first]
    if stacked := [n for n in both if n in result]:
        return f"it is a batch of products, over {' '.join(stacked)}"
    if any(n not in result for n in {*first, *second}.difference(both)):
        return "an axis of only one factor is summed"
    if not both or len(both) in (len(first), len(second)):
        return "it does not multiply two matrices"
    left = 0 if result[-1] in second else 1
    x, y = (first, second) if left == 0 else (second, first)
    columns = [n for n in y if n not in both]
    if columns != result[-1:]:
        return f"its columns have several axes, {' '.join(columns)}"
    rows, transposed = result[:-1], y[0] == columns[0]
    summed = [n for n in y if n in both]
    joined = summed[0] if len(summed) == 1 else f"({' '.join(summed)})"
    ends = [columns[0], joined] if transposed else [joined, columns[0]]
    return EinsumProduct(left, _pattern(x, [*rows, joined]), _pattern(y, ends), transposed)


def _pattern(held: Sequence[str], wanted: Sequence[str]) -> str:
    return "" if list(held) == list(wanted) else f"{' '.join(held)} -> {' '.join(wanted)}"
