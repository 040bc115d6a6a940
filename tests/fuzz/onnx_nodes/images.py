"""Random nodes: operators of windows and images (convolutions, pools, resizes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.fuzz.onnx_nodes.drawing import Draw, draws

Array = np.ndarray[Any, Any]


def _windows(d: Draw, kernel: Sequence[int], transposed: bool = False, dilated: bool = True) -> None:
    """Draw strides, dilations and padding. With automatic padding, ONNX Runtime supports no dilations, and raises an
    error for a stride larger than the kernel: those are left out.
    """
    automatic = d.of("SAME_UPPER", "SAME_LOWER") if d.maybe(0.3) else d.of(None, None, "NOTSET", "VALID")
    same = automatic is not None and automatic.startswith("SAME")
    d.perhaps(strides=[d.int(1, k if same else 3) for k in kernel])
    if dilated and not same:
        d.perhaps(dilations=[d.int(1, 2) for _ in kernel])
    d.set(auto_pad=automatic)
    if automatic in (None, "NOTSET") and d.maybe(0.7):
        d.set(pads=[d.int(0, k - 1) for _ in range(2) for k in kernel])


def _image(d: Draw, channels: int, kernel: Sequence[int]) -> Array:
    """Draw an x in which at least one window fits."""
    return d.floats([d.int(1, 2), channels, *(2 * k + d.int(0, 4) for k in kernel)])


@draws("Conv", "ConvInteger")
def _conv(d: Draw) -> None:
    kernel, groups = [d.int(1, 3) for _ in range(d.int(1, 2))], d.int(1, 2)
    c, o = d.int(1, 2), d.int(1, 3)
    x, weight = _image(d, groups * c, kernel), d.floats([groups * o, c, *kernel])
    if d.name == "Conv":
        d.x(x)
        d.x(weight, d.maybe())
        if d.maybe():
            d.x(d.floats([groups * o]))
    else:
        d.x(d.ints(x.shape, 0, 255, np.uint8))
        d.x(d.ints(weight.shape, 0, 255, np.uint8), d.maybe())
        if d.maybe():
            d.x(d.ints([], 0, 255, np.uint8))
            if d.maybe():
                d.x(d.ints([], 0, 255, np.uint8))
    _windows(d, kernel)
    d.set(group=groups if groups > 1 else None)
    d.perhaps(kernel_shape=kernel)


@draws("ConvTranspose")
def _conv_transpose(d: Draw) -> None:
    kernel, groups = [d.int(1, 3) for _ in range(d.int(1, 2))], d.int(1, 2)
    c, o = d.int(1, 2), d.int(1, 3)
    x = d.x(_image(d, groups * c, kernel))
    d.x(d.floats([groups * c, o, *kernel]), d.maybe())
    if d.maybe():
        d.x(d.floats([groups * o]))
    _windows(d, kernel)
    d.set(group=groups if groups > 1 else None)
    d.perhaps(kernel_shape=kernel)
    strides = d.attributes.get("strides", [1] * len(kernel))
    assert x is not None
    if d.attributes.get("auto_pad") is None and "pads" not in d.attributes and d.maybe(0.3):
        reach = zip(x.shape[2:], strides, d.attributes.get("dilations", [1] * len(kernel)), kernel, strict=True)
        whole = [(n - 1) * stride + (k - 1) * dilation + 1 for n, stride, dilation, k in reach]
        d.set(output_shape=[size - d.int(0, k - 1) for size, k in zip(whole, kernel, strict=True)])
    elif not (d.attributes.get("auto_pad") or "").startswith("SAME"):
        d.perhaps(output_padding=[d.int(0, stride - 1) for stride in strides])


@draws("AveragePool", "MaxPool", "LpPool")
def _pool(d: Draw) -> None:
    kernel = [d.int(1, 3) for _ in range(d.int(1, 3))]
    x = _image(d, 2, kernel)
    if d.name == "MaxPool" and d.version >= 12 and d.maybe(0.2):
        x = d.ints(x.shape, 0, 255, np.uint8)
    d.x(x)
    d.set(kernel_shape=kernel)
    dilated = d.version >= {"AveragePool": 19, "MaxPool": 10, "LpPool": 18}[d.name]
    _windows(d, kernel, dilated=dilated)
    if d.version >= (18 if d.name == "LpPool" else 10):
        d.perhaps(ceil_mode=d.int(0, 1))
    if d.name == "AveragePool":
        d.perhaps(count_include_pad=d.int(0, 1))
    if d.name == "MaxPool" and d.version >= 8:
        d.perhaps(storage_order=0)
    if d.name == "LpPool":
        d.perhaps(p=d.int(1, 3))


@draws("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(d: Draw) -> None:
    d.x(d.floats(d.shape(3, 5)))
    if d.name == "GlobalLpPool":
        d.perhaps(p=d.int(1, 3))


@draws("Resize")
def _resize(d: Draw) -> None:
    shape = [1, d.int(1, 2), d.int(2, 6), d.int(2, 6)]
    mode = d.of("nearest", "linear", "cubic")
    d.x(d.floats(shape))
    if d.version < 11:
        d.x(np.array([1.0, 1.0, 2.0, 1.5], np.float32), True)
        d.set(mode=d.of("nearest", "linear"))
        return
    d.x(None if d.version >= 13 else np.zeros(0, np.float32), True)
    axes = d.of([2, 3], [-1, -2]) if d.version >= 18 and d.maybe() else None
    over = [shape[a] for a in axes] if axes is not None else shape
    moved = [axes is not None or i > 1 for i in range(len(over))]
    places = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    places += ["half_pixel_symmetric"] if d.version >= 19 else []
    place, by_scale = d.of(None, *places), d.maybe()
    if by_scale:
        # With aligned corners, the specification scales the size without rounding, and ONNX Runtime rounds it first.
        scales = (1.0, 2.0, 3.0) if place == "align_corners" else (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
        d.x(np.array([d.of(*scales) if move else 1.0 for move in moved], np.float32), True)
    else:
        d.x(None if d.version >= 13 else np.zeros(0, np.float32), True)
        d.shaping([d.int(1, 9) if move else n for move, n in zip(moved, over, strict=True)])
    d.set(mode=mode, coordinate_transformation_mode=place, axes=axes)
    if mode == "nearest":
        # A position exactly on an element, such as 1.5 * 5/3 - 0.5, may be just below it in ONNX Runtime's floats.
        kinds = ("floor", "ceil") if by_scale else ()
        d.perhaps(nearest_mode=d.of("round_prefer_floor", "round_prefer_ceil", *kinds))
    if mode == "cubic":
        d.perhaps(cubic_coeff_a=-0.5, exclude_outside=d.int(0, 1))
    centered = d.attributes.get("coordinate_transformation_mode") in (None, "half_pixel")
    if d.version >= 18 and mode != "nearest" and centered:
        d.perhaps(antialias=d.int(0, 1))
    # With negative axes ONNX Runtime loses the policy, and with aligned corners it rounds the scaled size here, too.
    if d.version >= 18 and not by_scale and axes != [-1, -2] and place != "align_corners":
        d.perhaps(keep_aspect_ratio_policy=d.of("stretch", "not_larger", "not_smaller"))
    d.perhaps(extrapolation_value=0.5)
