"""ONNX operators of vision models around their transformers: Resize, ConvTranspose.

A resize is linear and one axis after the other: each is a product with a matrix [new, old] that is known at import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from treadle.frontends.onnx_import.folding import is_at_least
from treadle.frontends.onnx_import.operators import Made, Site, operator
from treadle.frontends.onnx_import.windows import Windows, halves, kernel_sizes, steps, windows
from treadle.ir.builder import Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizes import ZERO, Size
from treadle.ir.types import i64

Floats = npt.NDArray[np.float64]

_MOST = 4096
"""The largest axis, old or new, that a matrix of a resize is made for."""

# -- resize --------------------------------------------------------------------------------------------------------


@operator("Resize", latest=19, first=11)
def _resize(site: Site) -> Made:
    """The form of the edges' and the pixels' places, the filter, and the rounding of the nearest are attributes."""
    b, x = site.b, site.x(0)
    mode, places = site.text("mode", "nearest"), site.text("coordinate_transformation_mode", "half_pixel")
    cubic, outside = site.float("cubic_coeff_a", -0.75), bool(site.int("exclude_outside", 0))
    nearest, antialias = site.text("nearest_mode", "round_prefer_floor"), bool(site.int("antialias", 0))
    policy = site.text("keep_aspect_ratio_policy", "stretch")
    site.ignore("extrapolation_value")
    axes = tuple(site.axis(a, x.rank) for a in site.ints("axes") or range(x.rank))
    if places == "tf_crop_and_resize":
        site.refuse("with a region of interest")
    new, scales = _targets(site, x, axes, policy)
    for axis, size, scale in zip(axes, new, scales, strict=True):
        old = x.shape[axis]
        if size == old and scale == 1.0:
            continue
        if old.constant is None or size.constant is None:
            site.refuse(f"an axis of size {old} to {size}, which must be numbers", "dims= gives the sizes of axes")
        if not (0 < old.constant <= _MOST and 0 < size.constant <= _MOST):
            site.refuse(f"an axis of {old} to {size}")
        at = _coordinates(site, places, old.constant, size.constant, scale)
        if mode == "nearest":
            x = b.gather(x, b.constant(_nearest(site, nearest, at, old.constant), i64), axis=axis)
        else:
            filtered = _linear if mode == "linear" else partial(_cubic, cubic) if mode == "cubic" else None
            if filtered is None or not x.dtype.is_float:
                site.refuse(f"mode {mode} of {x.dtype}")
            matrix = _matrix(at, old.constant, filtered, 1 if mode == "linear" else 2, scale, outside, antialias)
            x = _product(site, x, matrix, axis)
    return x


def _targets(site: Site, x: Expr, axes: Sequence[int], policy: str) -> tuple[list[Size], list[float]]:
    """The new sizes of the axes, and the scales by which places are found."""
    old = [x.shape[a] for a in axes]
    if site.has(3) and site.shape(3) != (Size.of(0),):
        new = site.sizes(3)
        if len(new) != len(axes):
            site.malformed(f"{len(new)} sizes for {len(axes)} axes")
        if policy != "stretch":
            ratios = [
                n.constant / o.constant if n.constant and o.constant else math.nan
                for n, o in zip(new, old, strict=True)
            ]
            if any(math.isnan(r) for r in ratios):
                site.refuse(f"policy {policy} with symbolic sizes")
            ratio = min(ratios) if policy == "not_larger" else max(ratios)
            new = [Size.of(math.floor(ratio * (o.constant or 0) + 0.5)) for o in old]
            return new, [ratio] * len(axes)
        pairs = zip(new, old, strict=True)
        return new, [n.constant / o.constant if n.constant and o.constant else 1.0 for n, o in pairs]
    content = site.content(2)
    scales = [float(s) for s in content.flat]
    if len(scales) != len(axes) or any(not (0 < s < math.inf) for s in scales):
        site.malformed(f"scales {scales[:8]} for {len(axes)} axes")
    new = []
    for o, s in zip(old, scales, strict=True):
        if s != 1.0 and o.constant is None:
            site.refuse(f"an axis of size {o} by {s}", "dims= gives the sizes of axes")
        new.append(o if s == 1.0 else Size.of(math.floor((o.constant or 0) * s)))
    return new, scales


def _coordinates(site: Site, places: str, old: int, new: int, scale: float) -> Floats:
    """Where each new element lies among the old ones."""
    i = np.arange(new, dtype=np.float64)
    match places:
        case "half_pixel":
            return (i + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            adjustment = new / (scale * old)
            center = old / 2
            return center * (1 - adjustment) + (i + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if new > 1 else np.zeros(new)
        case "align_corners":
            exact = old * scale  # which is not rounded to a size here
            return i * ((old - 1) / (exact - 1)) if new > 1 else np.zeros(new)
        case "asymmetric":
            return i / scale
    site.malformed(f"coordinate_transformation_mode is {places!r}")


def _nearest(site: Site, mode: str, at: Floats, old: int) -> npt.NDArray[np.int64]:
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
            site.malformed(f"nearest_mode is {mode!r}")
    return np.clip(index, 0, old - 1).astype(np.int64)


def _linear(distance: Floats) -> Floats:
    return np.asarray(np.maximum(1 - np.abs(distance), 0))


def _cubic(a: float, distance: Floats) -> Floats:
    """The convolution of Keys 1981."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _matrix(at: Floats, old: int, kernel: object, reach: int, scale: float, exclude: bool, antialias: bool) -> Floats:
    """[new, old]: how much each old element counts in each new one. Past an edge, the edge's own element counts."""
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


def _product(site: Site, x: Expr, matrix: Floats, axis: int) -> Expr:
    b = site.b
    *names, new = axis_letters(x.rank + 1)
    result = [new if i == axis else n for i, n in enumerate(names)]
    weight = b.constant(matrix, x.dtype)
    return b.einsum(x, weight, equation=f"{' '.join(names)}, {new} {names[axis]} -> {' '.join(result)}")


# -- convolution, transposed ---------------------------------------------------------------------------------------


@operator("ConvTranspose", latest=22)
def _conv_transpose(site: Site) -> Made:
    """The gradient of a convolution by its input: each element spreads a kernel, and what overlaps is added.

    x [b, c, *spatial], weight [c, o / groups, *kernel], bias [o]
    """
    b, x, weight, bias = site.b, site.x(0), site.x(1), site.maybe(2)
    spatial, groups = x.rank - 2, site.int("group", 1)
    kernel, beyond = kernel_sizes(site, weight), site.ints("output_padding") or (0,) * spatial
    found = _transposed_windows(site, x, kernel, beyond)
    names = axis_letters(2 * spatial, "bcgo")
    places, inner = " ".join(names[:spatial]), " ".join(names[spatial:])
    split = b.rearrange(x, pattern=f"b (g={groups} c) {places} -> b g c {places}")
    kernels = b.rearrange(weight, pattern=f"(g={groups} c) o {inner} -> g c o {inner}")
    y = b.einsum(split, kernels, equation=f"b g c {places}, g c o {inner} -> b g o {places} {inner}")
    y = b.rearrange(y, pattern=f"b g o {places} {inner} -> b (g o) {places} {inner}")
    for i in reversed(range(spatial)):
        axis, stride, dilation = i + 2, found.strides[i], found.dilations[i]
        size = (x.shape[axis] - 1) * stride + (kernel[i] - 1) * dilation + 1
        y = b.fold_windows(y, axis=axis, size=size, stride=stride, dilation=dilation)
    for axis, (before, after) in enumerate(zip(found.before, found.after, strict=True), start=2):
        y = _cut(site, y, axis, before, after - beyond[axis - 2])
    return y if bias is None else y + b.rearrange(bias, pattern=f"o -> o {' '.join('1' * spatial)}")


def _transposed_windows(site: Site, x: Expr, kernel: Sequence[Size], beyond: Sequence[int]) -> Windows:
    """The windows whose convolution ConvTranspose is the transpose of; padding may be what gives the wanted sizes."""
    automatic, asked = site.text("auto_pad", "NOTSET"), site.ints("output_shape")
    spatial = len(kernel)
    if len(beyond) != spatial or (asked is not None and len(asked) < spatial):
        site.malformed(f"output_padding or output_shape is not for {spatial} axes")
    if asked is None and automatic not in ("SAME_UPPER", "SAME_LOWER"):
        return windows(site, x, kernel)
    strides, dilations = steps(site, spatial)
    site.ignore("pads")
    totals = []
    for i, (n, k, stride, dilation) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        wanted = n * stride if asked is None else asked[i - spatial]
        totals.append((n - 1) * stride + beyond[i] + (k - 1) * dilation + 1 - wanted)
    return Windows(strides, dilations, *halves(totals, automatic == "SAME_UPPER"))


def _cut(site: Site, y: Expr, axis: int, before: Size, after: Size) -> Expr:
    """y without that many elements on both sides of an axis; with so many zeros more where they are negative."""
    b, symbols = site.b, site.importer.graph.symbols
    missing, cut = [ZERO, ZERO], [ZERO, ZERO]
    for side, size in enumerate((before, after)):
        if is_at_least(size, ZERO, symbols):
            cut[side] = size
        elif is_at_least(ZERO, size, symbols):
            missing[side] = -size
        else:
            site.refuse_symbolic(f"a padding of {size}, which is negative for some sizes", size)
    if any(size != ZERO for size in missing):
        y = b.pad(y, axis=axis, before=missing[0], after=missing[1])
    if any(size != ZERO for size in cut):
        y = b.slice(y, axis=axis, start=cut[0], stop=y.shape[axis] - cut[1])
    return y
