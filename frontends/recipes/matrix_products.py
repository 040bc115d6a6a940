"""Matrix products of operands of any rank, as in NumPy's matmul."""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr


def matmul(b: Builder, x: Expr, y: Expr) -> Expr:
    """NumPy's matmul: a vector is a row on the left, a column on the right, and the result drops that axis."""
    if x.rank == 1 and y.rank == 1:
        return b.einsum(x, y, equation="k, k ->")
    if x.rank == 1:
        row = b.matmul(b.rearrange(x, pattern="k -> 1 k"), y)
        return b.rearrange(row, pattern="... 1 n -> ... n")
    if y.rank == 1:
        column = b.matmul(x, b.rearrange(y, pattern="k -> k 1"))
        return b.rearrange(column, pattern="... m 1 -> ... m")
    return b.matmul(x, y)
