"""Sizes of axes as values, and axes in reversed order."""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import i64


def extent(b: Builder, size: Size) -> Expr:
    """Return a size as a scalar i64."""
    return b.constant(size.constant, i64) if size.constant is not None else b.size(value=size)


def flipped(b: Builder, x: Expr, axis: int) -> Expr:
    """Return x with one axis reversed."""
    size = x.shape[axis]
    last = b.size(value=size - 1) if size.constant is None else b.constant(size.constant - 1, i64)
    return b.gather(x, last - b.iota(size=size), axis=axis)
