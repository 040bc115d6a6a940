"""A product with a matrix as a pattern: linear, or matmul with or without a bias, for either layout of the matrix."""

from __future__ import annotations

from typing import Any

from treadle.ir.builder import Expr
from treadle.ir.ops.products import Linear
from treadle.passes.framework.pattern import Vocabulary


def product_with(p: Vocabulary, name: str, x: Any, weight: Any, bias: Any) -> Any:
    """Return the pattern of x weight + bias, captured under `name`; `bias` is None if there is none."""
    plain = p.matmul(x, weight)
    return p.named(name, p.either(p.linear(x, weight, p.either(bias, None)), plain, plain + bias))


def is_product(product: Expr, weight: Expr, bias: Expr | None) -> bool:
    """Return True if the weight of a match is one matrix, and its bias is a vector of the matrix's width or is
    broadcast to one.
    """
    if weight.rank != 2:
        return False
    if bias is None:
        return True
    width = weight.shape[weight_axes(product).split().index("n")]
    return bool(bias.rank == 1 and bias.shape[0] == width and bias.dtype == product.dtype)


def weight_axes(product: Expr) -> str:
    """Return the layout of the weight: "n k" for linear, "k n" for matmul."""
    node = product.value.node
    return "n k" if node is not None and isinstance(node.op, Linear) else "k n"
