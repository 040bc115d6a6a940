"""Resizing an axis: new elements are the nearest old elements, or sums of them weighted by distance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import f64, i64

Floats = npt.NDArray[np.float64]
Kernel = Callable[[Floats], Floats]

LARGEST = 4096
"""Maximum size of an axis, old or new, for which a resize uses a matrix of weights."""


def linear(distance: Floats) -> Floats:
    return np.asarray(np.maximum(1 - np.abs(distance), 0))


def cubic(a: float, distance: Floats) -> Floats:
    """Return the cubic convolution kernel (Keys 1981) at these distances."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def weights(
    at: Floats, old: int, kernel: Kernel, reach: int, scale: float, *, exclude: bool = False, antialias: bool = False
) -> Floats:
    """Return the weight of each old element in each new element, [new, old]. Beyond an edge, the edge's element is
    used.

    at         positions of the new elements among the old ones
    old        number of old elements
    kernel     weight by distance, which is 0 at a distance of `reach` or more
    scale      new size / old size
    exclude    positions beyond the edges have no weight
    antialias  widen the kernel if there are fewer new elements than old ones
    """
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


def combined(b: Builder, x: Expr, matrix: Floats, axis: int) -> Expr:
    """Return x with new elements along an axis, which are sums of the old ones with these weights, [new, old]."""
    *names, new = axis_letters(x.rank + 1)
    result = [new if i == axis else n for i, n in enumerate(names)]
    weight = b.constant(matrix, x.dtype)
    return b.einsum(x, weight, equation=f"{' '.join(names)}, {new} {names[axis]} -> {' '.join(result)}")


def interpolated(b: Builder, x: Expr, axis: int, at: Expr, *, exclude: bool = False) -> Expr:
    """Interpolate x linearly at positions along an axis: each pair of neighbors is weighted by distance.

    exclude  positions beyond the edges have no weight, instead of the weight of the edge's element
    """
    size = x.shape[axis]
    first, ones = b.floor(at), " ".join("1" * (x.rank - 1 - axis))
    total: Expr | None = None
    shares = []
    for place in (first, first + 1.0):
        weight = 1.0 - b.abs(at - place)
        if exclude:
            inside = b.logical_and(place >= 0.0, place <= b.size(value=size - 1, dtype=f64))
            weight = b.where(inside, weight, 0.0)
        shares.append(weight)
    whole = shares[0] + shares[1]
    for place, weight in zip((first, first + 1.0), shares, strict=True):
        share = b.rearrange((weight / whole if exclude else weight).cast(x.dtype), pattern=f"n -> n {ones}")
        part = b.gather(x, within(b, place, size), axis=axis) * share
        total = part if total is None else total + part
    assert total is not None
    return total


def within(b: Builder, index: Expr, size: Size) -> Expr:
    """Return positions clamped to the range of an axis of this size."""
    last = b.size(value=size - 1, dtype=f64)
    return b.maximum(b.minimum(index, last), 0.0).cast(i64)
