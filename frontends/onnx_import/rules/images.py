"""ONNX operators that vision models use around their transformers: Resize, ConvTranspose.

A resize is linear and separable: along each axis it is a product with a matrix [new, old] that is known at import. If
the sizes are symbolic, the positions of the new elements are computed at the call, and elements are gathered there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.frontends.onnx_import.folding import is_at_least
from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.windows import WindowGeometry, halves, kernel_sizes, steps, windows_of
from treadle.frontends.recipes.transposed_convolutions import spread_kernels, with_bias
from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.types import f64, i64

Floats = npt.NDArray[np.float64]

_MOST = 4096
"""Maximum size of an axis, old or new, for which a resize uses a matrix."""

# -- resize --------------------------------------------------------------------------------------------------------


@operator("Resize", latest=19, first=11)
def _resize(site: OnnxSite) -> Made:
    """Resize. Attributes select the coordinates of edges and pixels, the filter, and the rounding to the nearest
    element.
    """
    b, x = site.b, site.x(0)
    mode, places = site.text("mode", "nearest"), site.text("coordinate_transformation_mode", "half_pixel")
    cubic, outside = site.float("cubic_coeff_a", -0.75), bool(site.int("exclude_outside", 0))
    nearest, antialias = site.text("nearest_mode", "round_prefer_floor"), bool(site.int("antialias", 0))
    policy = site.text("keep_aspect_ratio_policy", "stretch")
    site.ignore("extrapolation_value")
    axes = tuple(site.axis(a, x.rank) for a in site.ints("axes") or range(x.rank))
    if places == "tf_crop_and_resize":
        site.refuse("a region of interest is not supported")
    new, scales = _targets(site, x, axes, policy)
    for axis, size, scale in zip(axes, new, scales, strict=True):
        old = x.shape[axis]
        if size == old and scale in (1.0, None):
            continue
        if mode not in ("nearest", "linear", "cubic") or (mode != "nearest" and not x.dtype.is_float):
            site.refuse(f"mode {mode} of {x.dtype} is not supported")
        if old.constant == 0 or size.constant == 0:
            site.refuse(f"an axis of {old} cannot be resized to {size}")
        if old.constant is not None and size.constant is not None and max(old.constant, size.constant) <= _MOST:
            ends = old.constant, size.constant
            by = ends[1] / ends[0] if scale is None else scale
            at = _coordinates(site, places, np.arange(ends[1], dtype=np.float64), ends, scale, np.where)
            if mode == "nearest":
                x = b.gather(x, b.constant(_nearest(site, nearest, at, old.constant), i64), axis=axis)
            else:
                filtered = _linear if mode == "linear" else partial(_cubic, cubic)
                matrix = _matrix(at, old.constant, filtered, 1 if mode == "linear" else 2, by, outside, antialias)
                x = _product(site, x, matrix, axis)
            continue
        if mode == "cubic" or (mode == "linear" and antialias and (scale is None or scale < 1)):
            site.refuse_symbolic(f"mode {mode} from an axis of size {old} to {size} is not supported", old, size)
        count, wanted = (b.size(value=n, dtype=f64) for n in (old, size))
        at = _coordinates(site, places, b.iota(size=size).cast(f64), (count, wanted), scale, b.where)
        x = _taken_nearest(site, x, axis, at, nearest) if mode == "nearest" else _between(site, x, axis, at, outside)
    return x


def _targets(site: OnnxSite, x: Expr, axes: Sequence[int], policy: str) -> tuple[list[Size], list[float | None]]:
    """Return the new sizes of the axes, and the scales that determine positions. A scale of None is the ratio of the
    sizes.
    """
    old = [x.shape[a] for a in axes]
    if site.has(3) and site.shape(3) != (Size.of(0),):
        new = site.sizes(3)
        if len(new) != len(axes):
            site.malformed(f"{len(new)} sizes do not fit {len(axes)} axes")
        if policy == "stretch":
            return new, [None] * len(axes)
        pairs = [
            tuple(site.number(s, f"with policy {policy}, the size of an axis") for s in pair)
            for pair in zip(new, old, strict=True)
        ]
        if any(o == 0 for _, o in pairs):
            site.refuse("an axis of size 0 is not supported")
        ratio = (min if policy == "not_larger" else max)(n / o for n, o in pairs)
        return [Size.of(math.floor(ratio * o + 0.5)) for _, o in pairs], [ratio] * len(axes)
    scales = [float(s) for s in site.content(2).flat]
    if len(scales) != len(axes) or any(not (0 < s < math.inf) for s in scales):
        site.malformed(f"scales {scales[:8]} do not fit {len(axes)} axes")
    return [_scaled(site, o, s) for o, s in zip(old, scales, strict=True)], list(scales)


def _scaled(site: OnnxSite, size: Size, scale: float) -> Size:
    """floor(size scale)"""
    if size.constant is not None:
        return Size.of(math.floor(size.constant * scale))
    ratio = Fraction(scale)
    if ratio.denominator > _MOST:  # such as 0.6: rounding of a product with it depends on the size
        site.refuse_symbolic(f"an axis of size {size} cannot be scaled by {scale}", size)
    return size * ratio.numerator // ratio.denominator


def _coordinates(
    site: OnnxSite, places: str, i: Any, ends: tuple[Any, Any], scale: float | None, where: Callable[..., Any]
) -> Any:
    """Return the positions of the new elements i among the old elements. Computes in NumPy, or in the graph if sizes
    are scalars of the graph.

    ends    the old size and the new size
    scale   None: the ratio of the sizes. Then a position is multiplied by the old size before it is divided by the new
            one, so that a position on an element, or halfway between two, is exact
    """
    old, new = ends
    whole = new if scale is None else old * scale  # the new size before rounding

    def back(place: Any) -> Any:
        return place * old / new if scale is None else place / scale

    match places:
        case "half_pixel":
            return back(i + 0.5) - 0.5
        case "half_pixel_symmetric":
            return old / 2 * (1 - new / whole) + back(i + 0.5) - 0.5
        case "pytorch_half_pixel":
            return where(new > 1, back(i + 0.5) - 0.5, i * 0.0)
        case "align_corners":
            return i * (old - 1) / where(new > 1, whole - 1, whole * 0.0 + 1.0)
        case "asymmetric":
            return back(i)
    site.malformed(f"unknown coordinate_transformation_mode {places!r}")


def _taken_nearest(site: OnnxSite, x: Expr, axis: int, at: Expr, mode: str) -> Expr:
    """Return the elements of x that are nearest to positions along an axis. Positions are computed at the call."""
    b = site.b
    match mode:
        case "round_prefer_floor":
            index = -b.floor(0.5 - at)
        case "round_prefer_ceil":
            index = b.floor(at + 0.5)
        case "floor":
            index = b.floor(at)
        case "ceil":
            index = -b.floor(-at)
        case _:
            site.malformed(f"unknown nearest_mode {mode!r}")
    return b.gather(x, _within(b, index, x.shape[axis]), axis=axis)


def _between(site: OnnxSite, x: Expr, axis: int, at: Expr, exclude: bool) -> Expr:
    """Interpolate x linearly at positions along an axis: each pair of neighbors is weighted by distance."""
    b, size = site.b, x.shape[axis]
    first, ones = b.floor(at), " ".join("1" * (x.rank - 1 - axis))
    total: Expr | None = None
    weights = []
    for place in (first, first + 1.0):
        weight = 1.0 - b.abs(at - place)
        if exclude:
            inside = b.logical_and(place >= 0.0, place <= b.size(value=size - 1, dtype=f64))
            weight = b.where(inside, weight, 0.0)
        weights.append(weight)
    whole = weights[0] + weights[1]
    for place, weight in zip((first, first + 1.0), weights, strict=True):
        share = b.rearrange((weight / whole if exclude else weight).cast(x.dtype), pattern=f"n -> n {ones}")
        part = b.gather(x, _within(b, place, size), axis=axis) * share
        total = part if total is None else total + part
    assert total is not None
    return total


def _within(b: Builder, index: Expr, size: Size) -> Expr:
    """Return positions clamped to the range of an axis of this size."""
    last = b.size(value=size - 1, dtype=f64)
    return b.maximum(b.minimum(index, last), 0.0).cast(i64)


def _nearest(site: OnnxSite, mode: str, at: Floats, old: int) -> npt.NDArray[np.int64]:
    match mode:
        case "round_prefer_floor":
            index = np.ceil(at - 0.5)
        case "round_prefer_ceil":
            index = np.floor(at + 0.5)
        case "floor":
            index = np.floor(at)
        case "ceil":
            index = np.ceil(at)
        case _:
            site.malformed(f"unknown nearest_mode {mode!r}")
    return np.clip(index, 0, old - 1).astype(np.int64)


def _linear(distance: Floats) -> Floats:
    return np.asarray(np.maximum(1 - np.abs(distance), 0))


def _cubic(a: float, distance: Floats) -> Floats:
    """Return the cubic convolution kernel (Keys 1981) at these distances."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _matrix(at: Floats, old: int, kernel: object, reach: int, scale: float, exclude: bool, antialias: bool) -> Floats:
    """Return the weight of each old element in each new element, [new, old]. Beyond an edge, the edge's element is
    used.
    """
    assert callable(kernel)
    stretch = max(1 / scale, 1.0) if antialias else 1.0
    span = math.ceil(reach * stretch) + 1
    first = np.floor(at).astype(np.int64)
    matrix = np.zeros((len(at), old))
    rows = np.arange(len(at))
    for offset in range(-span, span + 1):
        place = first + offset
        weight = kernel((at - place) / stretch)
        if exclude:
            weight = np.where((place >= 0) & (place < old), weight, 0.0)
        np.add.at(matrix, (rows, np.clip(place, 0, old - 1)), weight)
    if exclude or antialias:
        matrix /= matrix.sum(1, keepdims=True)
    return matrix


def _product(site: OnnxSite, x: Expr, matrix: Floats, axis: int) -> Expr:
    b = site.b
    *names, new = axis_letters(x.rank + 1)
    result = [new if i == axis else n for i, n in enumerate(names)]
    weight = b.constant(matrix, x.dtype)
    return b.einsum(x, weight, equation=f"{' '.join(names)}, {new} {names[axis]} -> {' '.join(result)}")


# -- convolution, transposed ---------------------------------------------------------------------------------------


@operator("ConvTranspose", latest=22)
def _conv_transpose(site: OnnxSite) -> Made:
    """Transposed convolution: the gradient of a convolution by its input. Each element spreads a kernel; overlaps are
    added.

    x [b, c, *spatial], weight [c, o / groups, *kernel], bias [o]
    """
    b, x, weight, bias = site.b, site.x(0), site.x(1), site.maybe(2)
    spatial, groups = x.rank - 2, site.int("group", 1)
    kernel, beyond = kernel_sizes(site, weight), site.ints("output_padding") or (0,) * spatial
    found = _transposed_windows(site, x, kernel, beyond)
    y = spread_kernels(b, x, weight, kernel, groups=groups, strides=found.strides, dilations=found.dilations)
    for axis, (before, after) in enumerate(zip(found.before, found.after, strict=True), start=2):
        y = _cut(site, y, axis, before, after - beyond[axis - 2])
    return with_bias(b, y, bias)


def _transposed_windows(site: OnnxSite, x: Expr, kernel: Sequence[Size], beyond: Sequence[int]) -> WindowGeometry:
    """Return the windows of the convolution that ConvTranspose transposes. output_shape may determine the padding."""
    automatic, asked = site.text("auto_pad", "NOTSET"), site.ints("output_shape")
    spatial = len(kernel)
    if len(beyond) != spatial or (asked is not None and len(asked) < spatial):
        site.malformed(f"output_padding or output_shape does not fit {spatial} axes")
    if asked is None and automatic not in ("SAME_UPPER", "SAME_LOWER"):
        return windows_of(site, x, kernel)
    strides, dilations = steps(site, spatial)
    site.ignore("pads")
    totals = []
    for i, (n, k, stride, dilation) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        wanted = n * stride if asked is None else asked[i - spatial]
        totals.append((n - 1) * stride + beyond[i] + (k - 1) * dilation + 1 - wanted)
    return WindowGeometry(strides, dilations, *halves(totals, automatic == "SAME_UPPER"))


def _cut(site: OnnxSite, y: Expr, axis: int, before: Size, after: Size) -> Expr:
    """Return y without the first `before` and the last `after` elements of an axis. Negative numbers append zeros."""
    b, symbols = site.b, site.importer.graph.symbols
    missing, cut = [ZERO, ZERO], [ZERO, ZERO]
    for side, size in enumerate((before, after)):
        if is_at_least(size, ZERO, symbols):
            cut[side] = size
        elif is_at_least(ZERO, size, symbols):
            missing[side] = -size
        else:
            site.refuse_symbolic(f"a padding of {size} is negative for some sizes", size)
    if any(size != ZERO for size in missing):
        y = b.pad(y, axis=axis, before=missing[0], after=missing[1])
    if any(size != ZERO for size in cut):
        y = b.slice(y, axis=axis, start=cut[0], stop=y.shape[axis] - cut[1])
    return y
