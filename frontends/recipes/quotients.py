"""Quotients of integers that are rounded toward zero, as in C."""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr


def truncated_quotient(b: Builder, x: Expr, y: Expr) -> Expr:
    """x / y of signed integers, rounded towards zero."""
    quotient = x // y
    zero, one = b.constant(0, x.dtype), b.constant(1, x.dtype)
    rest = x - quotient * y
    rounded_down = b.not_equal(rest, zero) & b.not_equal(x < zero, y < zero)
    return quotient + b.where(rounded_down, one, zero)
