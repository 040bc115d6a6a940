"""ATen operators of F.interpolate.

A resize is separable: along each axis, elements are gathered, or summed with weights that are known at import. If sizes
are symbolic, the positions of the new elements are computed at the call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from treadle.frontends.recipes.resizing import LARGEST, combined, cubic, interpolated, linear, weights, within
from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.ir.builder import Expr
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import f32, f64, i64

_CUBIC, _CUBIC_ANTIALIASED = -0.75, -0.5


@operator("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
@operator("_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact3d.vec")
def _nearest(site: TorchSite) -> Made:
    """Positions are computed in f32, as in PyTorch: their rounding decides which element is the nearest."""
    b, x = site.b, site.x("input")
    shift = 0.5 if "exact" in str(site.node.target) else 0.0
    for axis, size, given in _targets(site, x):
        old = x.shape[axis]
        if old.constant is not None and size.constant is not None:
            scale = np.float32(given or old.constant / size.constant)
            at = np.floor((np.arange(size.constant, dtype=np.float32) + np.float32(shift)) * scale)
            index = b.constant(np.minimum(at.astype(np.int64), old.constant - 1), i64)
        else:
            by = given or b.size(value=old, dtype=f32) / b.size(value=size, dtype=f32)
            index = within(b, b.floor((b.iota(size=size).cast(f32) + shift) * by).cast(f64), old)
        x = b.gather(x, index, axis=axis)
    return x


@operator("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec", "upsample_bicubic2d.vec")
@operator("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec")
def _smooth(site: TorchSite) -> Made:
    b, x, target = site.b, site.x("input"), str(site.node.target)
    antialias, is_cubic = "_aa" in target, "cubic" in target
    kernel = partial(cubic, _CUBIC_ANTIALIASED if antialias else _CUBIC) if is_cubic else linear
    for axis, size, given in _targets(site, x):
        old = x.shape[axis]
        if old.constant is not None and size.constant is not None and max(old.constant, size.constant) <= LARGEST:
            ends = old.constant, size.constant
            at, reach = _positions(site, np.arange(ends[1], dtype=np.float64), ends, given), 1 + is_cubic
            by = 1 / given if given else ends[1] / ends[0]
            x = combined(b, x, weights(at, ends[0], kernel, reach, by, exclude=antialias, antialias=antialias), axis)
        elif antialias or is_cubic:
            name = "cubic" if is_cubic else "antialiased"
            site.refuse(
                f"{name} interpolation from {old} to {size} elements is not supported",
                'sizes that are not symbolic, or mode="bilinear" without antialias',
            )
        else:
            count, wanted = (b.size(value=n, dtype=f64) for n in (old, size))
            x = interpolated(b, x, axis, _positions(site, b.iota(size=size).cast(f64), (count, wanted), given))
    return x


def _targets(site: TorchSite, x: Expr) -> list[tuple[int, Size, float | None]]:
    """Return the axes to resize, their new sizes, and the number of old elements for each new one, if the call gives
    scale factors; else None: the ratio of the sizes.
    """
    sizes, factors = site.shape()[2:], site.given("scale_factors") or [None] * (x.rank - 2)
    steps = [1 / factor if factor else None for factor in factors]
    return [
        (axis, size, step)
        for axis, (size, step) in enumerate(zip(sizes, steps, strict=True), start=2)
        if size != x.shape[axis] or step not in (None, 1.0)
    ]


def _positions(site: TorchSite, i: Any, ends: tuple[Any, Any], step: float | None) -> Any:
    """Return the positions of the new elements i among the old ones, from the old and the new size. Computes in NumPy,
    or in the graph if sizes are scalars of the graph.
    """
    old, new = ends
    if not site.flag("align_corners"):
        return (i + 0.5) * (old / new if step is None else step) - 0.5
    most = site.b.maximum if isinstance(new, Expr) else np.maximum
    return i * ((old - 1.0) / most(new - 1.0, 1.0))
