"""Quotients that are rounded toward zero, as in C, and their remainders."""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr


def truncated_quotient(b: Builder, x: Expr, y: Expr) -> Expr:
    """Return x / y for signed integers, rounded toward zero."""
    quotient = x // y
    zero, one = b.constant(0, x.dtype), b.constant(1, x.dtype)
    rest = x - quotient * y
    rounded_down = b.not_equal(rest, zero) & b.not_equal(x < zero, y < zero)
    return quotient + b.where(rounded_down, one, zero)


def remainder_like_dividend(b: Builder, x: Expr, y: Expr) -> Expr:
    """Return the remainder of x / y, where the quotient is rounded toward zero; for floats it has the sign of x, like
    C's fmod.
    """
    one = b.constant(1.0, x.dtype)
    sign = b.where(x < 0.0, -one, one)  # |x| is computed as x times its sign, so that the gradient at 0 is 1 as well
    return sign * b.mod(x * sign, b.abs(y))
