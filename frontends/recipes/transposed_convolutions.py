"""Transposed convolution: the gradient of a convolution by its input. Each element spreads a kernel, and overlaps add.

x [b, c, *spatial], weight [c, o / groups, *kernel]   -->   einsum, then fold_windows along each axis
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import Size


def spread_kernels(
    b: Builder,
    x: Expr,
    weight: Expr,
    kernel: Sequence[Size],
    *,
    groups: int,
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Expr:
    """Return the transposed convolution without padding: y [b, o, *spatial]."""
    spatial = x.rank - 2
    names = axis_letters(2 * spatial, "bcgo")
    places, inner = " ".join(names[:spatial]), " ".join(names[spatial:])
    split = b.rearrange(x, pattern=f"b (g={groups} c) {places} -> b g c {places}")
    kernels = b.rearrange(weight, pattern=f"(g={groups} c) o {inner} -> g c o {inner}")
    y = b.einsum(split, kernels, equation=f"b g c {places}, g c o {inner} -> b g o {places} {inner}")
    y = b.rearrange(y, pattern=f"b g o {places} {inner} -> b (g o) {places} {inner}")
    for i in reversed(range(spatial)):
        size = (x.shape[i + 2] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
        y = b.fold_windows(y, axis=i + 2, size=size, stride=strides[i], dilation=dilations[i])
    return y


def with_bias(b: Builder, y: Expr, bias: Expr | None) -> Expr:
    """Return y [b, o, *spatial] with a bias [o]."""
    return y if bias is None else y + b.rearrange(bias, pattern=f"o -> o {' '.join('1' * (y.rank - 2))}")
