"""The axis order of a product's weight: [out, in], as in linear, or [in, out], as in matmul."""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.types import DType

WEIGHT_AXES = ("n k", "k n")
"""The values of an attribute `weight_axes`."""


def refuse_weight_axes(weight_axes: str) -> None:
    """Raise RuleError if the value of an attribute is not in `WEIGHT_AXES`."""
    if weight_axes not in WEIGHT_AXES:
        raise RuleError(f"unknown weight_axes {weight_axes!r}", hint="one of " + ", ".join(map(repr, WEIGHT_AXES)))


def rows_of(weight_axes: str) -> str:
    """Return the axes of x without its last, as text for an axis rule: matmul has an axis of rows, linear needs
    none.
    """
    return "... m" if weight_axes == "k n" else "..."


def multiplied(b: Builder, x: Expr, weight: Expr, bias: Expr | None, weight_axes: str, to: DType | None = None) -> Expr:
    """Build x weight + bias, summed in the dtype `to`."""
    product: Expr
    if weight_axes == "n k":
        product = b.linear(x, weight, bias, to=to)
        return product
    product = b.matmul(x, weight, to=to)
    return product if bias is None else product + bias
