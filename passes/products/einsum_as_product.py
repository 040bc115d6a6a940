"""An einsum of two factors as the matrix product that it is.

    "b a n, n k -> b a k"     matmul(g, w)
    "b a n, b a k -> n k"     matmul(rearrange(g, "b a n -> n (b a)"), rearrange(x, "b a k -> (b a) k"))

So the gradients of `linear` are spelled. Letters that one factor and the result have are the rows of the left factor,
or the columns of the right one; letters that both have, and not the result, are summed.
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
    """How an einsum is a matrix product.

    left        the position of the factor with the rows
    pattern     by which it is rearranged, so that what is summed comes last; empty where it lies so
    matrix      by which the other factor is rearranged to a matrix; empty where it is one
    transposed  whether that is [columns, summed], as the weight of `linear` is
    """

    left: int
    pattern: str
    matrix: str
    transposed: bool

    def build(self, b: Builder, factors: Sequence[Expr], to: DType) -> Expr:
        """The product of the einsum's two factors, summed in dtype `to`."""
        x, y = factors[self.left], factors[1 - self.left]
        x = b.rearrange(x, pattern=self.pattern) if self.pattern else x
        y = b.rearrange(y, pattern=self.matrix) if self.matrix else y
        return b.linear(x, y, to=to) if self.transposed else b.matmul(x, y, to=to)


def as_product(node: Node) -> EinsumProduct | str:
    """How an einsum is a matrix product, or why it is none."""
    if len(node.inputs) != 2:
        return "it multiplies no two factors"
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
        return f"it is a stack of products, one for each {' '.join(stacked)}"
    if any(n not in result for n in {*first, *second}.difference(both)):
        return "an axis of one factor alone is summed"
    if not both or len(both) in (len(first), len(second)):
        return "it multiplies no two matrices"
    left = 0 if result[-1] in second else 1
    x, y = (first, second) if left == 0 else (second, first)
    columns = [n for n in y if n not in both]
    if columns != result[-1:]:
        return f"its columns are of several axes, {' '.join(columns)}"
    rows, transposed = result[:-1], y[0] == columns[0]
    summed = [n for n in y if n in both]
    joined = summed[0] if len(summed) == 1 else f"({' '.join(summed)})"
    ends = [columns[0], joined] if transposed else [joined, columns[0]]
    return EinsumProduct(left, _pattern(x, [*rows, joined]), _pattern(y, ends), transposed)


def _pattern(held: Sequence[str], wanted: Sequence[str]) -> str:
    return "" if list(held) == list(wanted) else f"{' '.join(held)} -> {' '.join(wanted)}"
