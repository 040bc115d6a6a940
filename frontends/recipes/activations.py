"""Activations of both importers, in forms whose gradients are finite wherever their values are.

A gradient of `where` multiplies the unselected branch by 0. So that branch must not overflow: 0 * inf is NaN.
"""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Value
from treadle.ir.ops.arithmetic import Div, Mul
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.reductions import ReduceMean, ReduceSum
from treadle.ir.ops.shapes import Rearrange, Reshape
from treadle.ir.sizing.sizes import ONE


def exponential_unit(b: Builder, x: Expr, alpha: float, *, scale: float = 1.0, inner: float = 1.0) -> Expr:
    """scale x above 0, scale alpha (e^(inner x) - 1) elsewhere, for floats of any width

    elu (Clevert et al. 2016), selu (Klambauer et al. 2017) and celu (Barron 2017) are cases of it. At 0 the gradient is
    the exponential's, as in PyTorch.
    """
    positive = x > 0.0
    below = b.where(positive, b.constant(0.0, x.dtype), x)
    curve = b.expm1(below if inner == 1 else below * inner) * (alpha * scale)
    made: Expr = b.where(positive, x if scale == 1 else x * scale, curve)
    return made


def root(b: Builder, total: Expr, order: int = 2) -> Expr:
    """The root of a sum of powers: a norm, a deviation. If the sum is 0 the gradient is 0, as in PyTorch."""
    nothing = b.equal(total, 0.0)
    zero, one = b.constant(0.0, total.dtype), b.constant(1.0, total.dtype)
    some = b.where(nothing, one, total)
    made: Expr = b.where(nothing, zero, b.sqrt(some) if order == 2 else b.pow(some, 1.0 / order))
    return made


def is_sum_of_squares(value: Value) -> bool:
    """Return True if a value is a sum or mean of squares, possibly scaled: where it is 0, so are its derivatives."""
    while value.node is not None:
        op, (x, *rest) = value.node.op, value.node.inputs
        if isinstance(op, Mul) and x is rest[0]:
            return True
        scaled = isinstance(op, Mul | Div) and rest[0].literal is not None
        if not (scaled or isinstance(op, ReduceSum | ReduceMean | Rearrange | Reshape | Cast)):
            return False
        value = x
    return False


def chosen(b: Builder, condition: Expr, x: Expr, y: Expr) -> Expr:
    """Select x where the condition holds, else y. If x or y is a quotient, its divisor is 1 at elements that are not
    selected.

    So where(x == 0, 1, sin(x) / x) has a finite gradient at 0.
    """
    one = b.constant(1, x.dtype)

    def divisor(value: Expr) -> Expr | None:
        node = value.value.node
        if node is None or not isinstance(node.op, Div) or node.inputs[1].literal is not None:
            return None
        found = Expr(b, node.inputs[1])
        fits = condition.rank <= found.rank and all(
            c in (ONE, d) for c, d in zip(condition.shape[::-1], found.shape[::-1], strict=False)
        )
        return found if fits else None

    def dividend(value: Expr) -> Expr:
        assert value.value.node is not None
        return Expr(b, value.value.node.inputs[0])

    if (below := divisor(x)) is not None:
        x = dividend(x) / b.where(condition, below, one)
    if (below := divisor(y)) is not None:
        y = dividend(y) / b.where(condition, one, below)
    made: Expr = b.where(condition, x, y)
    return made
