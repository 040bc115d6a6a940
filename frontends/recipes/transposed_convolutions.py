"""Transposed convolution: the gradient of a convolution by its input."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters


def transposed_convolution(
    b: Builder, x: Expr, weight: Expr, strides: Sequence[int], dilations: Sequence[int], groups: int
) -> Expr:
    """Return the transposed convolution of x [b, c, *spatial] with weight [c, o / groups, *kernel], without padding:
    each element spreads a kernel, and overlaps are added.
    """
    spatial = x.rank - 2
    names = axis_letters(2 * spatial, "bcgo")
    places, inner = " ".join(names[:spatial]), " ".join(names[spatial:])
    split = b.rearrange(x, pattern=f"b (g={groups} c) {places} -> b g c {places}")
    kernels = b.rearrange(weight, pattern=f"(g={groups} c) o {inner} -> g c o {inner}")
    y = b.einsum(split, kernels, equation=f"b g c {places}, g c o {inner} -> b g o {places} {inner}")
    y = b.rearrange(y, pattern=f"b g o {places} {inner} -> b (g o) {places} {inner}")
    for i in reversed(range(spatial)):
        axis, stride, dilation = i + 2, strides[i], dilations[i]
        size = (x.shape[axis] - 1) * stride + (weight.shape[axis] - 1) * dilation + 1
        y = b.fold_windows(y, axis=axis, size=size, stride=stride, dilation=dilation)
    return y
