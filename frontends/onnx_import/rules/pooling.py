"""ONNX operators that reduce windows: pooling over windows of a fixed size, and global pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.windows import WindowGeometry, windows_of
from treadle.frontends.recipes.activations import root
from treadle.ir.builder import Expr
from treadle.ir.ops.along_axes import widened
from treadle.ir.ops.pooling import MaxPool, padding_for_ceil
from treadle.ir.sizing.sizes import ZERO, Size

# -- windows -------------------------------------------------------------------------------------------------------


class Pool:
    """One node's windows over x. With ceil_mode, the number of windows is rounded up.

    asked   the windows with the node's own padding
    found   the windows with the additional padding that the last windows need
    """

    def __init__(self, site: OnnxSite) -> None:
        self.x, kernel = site.x(0), site.ints("kernel_shape")
        if not kernel or min(kernel) < 1:
            site.malformed(f"kernel_shape must have positive sizes, but is {list(kernel or ())}")
        self.kernel = kernel
        self.asked = self.found = windows_of(site, self.x, [Size.of(k) for k in kernel])
        if site.int("ceil_mode", 0) and site.text("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
            each = zip(kernel, self.asked.strides, self.asked.dilations, self.asked.after, strict=True)
            ends = (padding_for_ceil(k, stride, dilation, after.constant or 0) for k, stride, dilation, after in each)
            self.found = replace(self.asked, after=tuple(map(Size.of, ends)))

    def apply(self, op: str, x: Expr, over: WindowGeometry, fill: float = 0.0) -> Expr:
        """Apply an op over the windows of x, along its last axes. `fill` is the op's result for an empty window."""
        x, padding = over.apart(x, fill)
        made: Expr = x.builder.apply(
            op, x, kernel=self.kernel, strides=over.strides, dilations=over.dilations, padding=padding
        )
        return made


@operator("MaxPool", latest=22)
def _max_pool(site: OnnxSite) -> Made:
    if any(site.wanted[1:]):
        site.refuse("the indices of the maxima are not supported as an output")
    site.ignore("storage_order")  # applies to the indices only
    pool = Pool(site)
    return pool.apply("max_pool", pool.x, pool.found, MaxPool.filling(pool.x.dtype))


@operator("AveragePool", latest=22)
def _average_pool(site: OnnxSite) -> Made:
    """Average pooling. The node's own padding counts as zeros or is ignored. Padding for the last windows is always
    ignored.
    """
    pool, x = Pool(site), site.x(0)
    if not site.int("count_include_pad", 0):
        return _mean(pool, x, pool.found)
    zeros, none = x, (ZERO,) * len(pool.kernel)
    for axis, (before, after) in enumerate(zip(pool.asked.before, pool.asked.after, strict=True), start=2):
        if before != ZERO or after != ZERO:
            zeros = site.b.pad(zeros, axis=axis, before=before, after=after)
    more = tuple(end - asked for end, asked in zip(pool.found.after, pool.asked.after, strict=True))
    return _mean(pool, zeros, replace(pool.found, before=none, after=more))


def _mean(pool: Pool, x: Expr, over: WindowGeometry) -> Expr:
    if over.padding is not None:
        return pool.apply("average_pool", x, over)
    wide = widened(x)
    ones = x.builder.expand(x.builder.constant(1, wide.dtype), shape=(1, 1, *x.shape[2:]))
    return (pool.apply("sum_pool", wide, over) / pool.apply("sum_pool", ones, over)).cast(x.dtype)


@operator("LpPool", latest=22, first=2)
def _lp_pool(site: OnnxSite) -> Made:
    pool = Pool(site)
    return _norm(site, lambda powers: pool.apply("sum_pool", powers, pool.found))


def _norm(site: OnnxSite, total: Callable[[Expr], Expr]) -> Expr:
    """(sum |x|^p)^(1/p)"""
    b, x, p = site.b, site.x(0), site.int("p", 2)
    if p < 1:
        site.malformed(f"p is {p}")
    if p == 1:
        return total(b.abs(x))
    return root(b, total(x * x if p == 2 else b.pow(b.abs(x), float(p))), p)


# -- global pools --------------------------------------------------------------------------------------------------


def _spatial(site: OnnxSite) -> tuple[int, ...]:
    rank = len(site.shape(0))
    if rank < 2:
        site.malformed(f"x must be [b, c, ...], but has rank {rank}")
    return tuple(range(2, rank))


@operator("GlobalAveragePool", latest=22)
def _global_average(site: OnnxSite) -> Made:
    return site.b.reduce_mean(site.x(0), axes=_spatial(site), keep=True)


@operator("GlobalMaxPool", latest=22)
def _global_max(site: OnnxSite) -> Made:
    return site.b.reduce_max(site.x(0), axes=_spatial(site), keep=True)


@operator("GlobalLpPool", latest=22, first=2)
def _global_lp(site: OnnxSite) -> Made:
    return _norm(site, lambda powers: site.b.reduce_sum(powers, axes=_spatial(site), keep=True))
