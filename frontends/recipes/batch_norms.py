"""Batch norm at inference: the running statistics are weights."""

from __future__ import annotations

from treadle.ir.builder import Builder, Expr
from treadle.ir.initial_values import Init


def normalized(b: Builder, x: Expr, mean: Expr, variance: Expr, eps: float) -> Expr:
    """Return (x - mean) / sqrt(variance + eps), with mean and variance [c] for x [b, c, ...]. If the variance is a
    weight, it is drawn as ones, since a random one may be negative.
    """
    weight = variance.value.weight
    if weight is not None and weight.name is not None:
        b.graph.initial.setdefault(weight.name, Init("ones"))
    return (x - along_channels(b, mean, x.rank)) * b.rsqrt(along_channels(b, variance, x.rank) + eps)


def along_channels(b: Builder, x: Expr, rank: int) -> Expr:
    """Return a vector in the shape in which it broadcasts along the second axis of a tensor of this rank."""
    return b.rearrange(x, pattern=" ".join(["c -> c", *["1"] * (rank - 2)]))
