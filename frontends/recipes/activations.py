"""Activations for both importers, in forms whose gradients are finite wherever their values are finite.

The gradient of `where` multiplies the gradient of the unselected branch by 0. So that branch must not overflow, because
0 * inf is NaN.
"""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr


def exponential_unit(b: Builder, x: Expr, alpha: float, *, scale: float = 1.0, inner: float = 1.0) -> Expr:
    """scale x above 0, scale alpha (e^(inner x) - 1) elsewhere, for floats of any width

    elu (Clevert et al. 2016), selu (Klambauer et al. 2017) and celu (Barron 2017) are special cases. At 0 the gradient
    is that of the exponential, as in PyTorch.
    """
    positive = x > 0.0
    below = b.where(positive, b.constant(0.0, x.dtype), x)
    curve = b.expm1(below if inner == 1 else below * inner) * (alpha * scale)
    made: Expr = b.where(positive, x if scale == 1 else x * scale, curve)
    return made


def root(b: Builder, total: Expr) -> Expr:
    """The square root of a sum of squares, such as a norm or a deviation. If the root is 0, its gradient is 0, as in
    PyTorch.
    """
    nothing = b.equal(total, 0.0)
    zero, one = b.constant(0.0, total.dtype), b.constant(1.0, total.dtype)
    made: Expr = b.where(nothing, zero, b.sqrt(b.where(nothing, one, total)))
    return made
