"""Convolution, and the sliding windows that its body uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Demand, Grads, Op, Operand, Primitive
from treadle.ir.ops.along_axes import wide_array
from treadle.ir.ops.axis_names import axis_letters, place, resized, sized
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import ZERO, Size, SizeLike
from treadle.ir.storage.views import View
from treadle.ir.types import Type, f32


def window_count(size: Size, window: SizeLike, stride: int, dilation: int) -> Size:
    """Return the number of windows that fit on an axis: floor((size - dilation (window - 1) - 1) / stride) + 1."""
    return (size - (Size.of(window) - 1) * dilation - 1) // stride + 1


def positive(**numbers: int) -> None:
    """Raise RuleError for the first of these numbers that is less than 1."""
    for name, number in numbers.items():
        if number < 1:
            raise RuleError(f"{name} must be 1 or more, is {number}")


@op("windows", dtypes="t -> t", linear="x", flops=0)
class Windows(Primitive):
    """y[..., i, ..., k] = x[..., i stride + k dilation, ...]: windows of `size` elements along one axis

    The axis becomes the axis of windows; the elements of each window are along a new last axis. Elements at the end
    that do not fill a window are dropped.
    """

    x = Operand()
    axis: int
    size: Size
    stride: int = 1
    dilation: int = 1

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        *names, element = axis_letters((ranks[0] or 0) + 1, self.size.symbols)
        axis = place(self.axis, len(names))
        count = window_count(Size.symbol(names[axis]), self.size, self.stride, self.dilation)
        left, right = resized(names, axis, count)
        return f"{left} -> {right} ^{element}={self.size}"

    def lookahead(self, types: Sequence[Type | None]) -> Sequence[int | None]:
        size = self.size.constant
        return [None if size is None or self.stride != 1 else (size - 1) * self.dilation]

    def check(self, types: Sequence[Type | None]) -> None:
        positive(stride=self.stride, dilation=self.dilation)

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        (x,) = types
        assert x is not None
        size, span = x.shape[place(self.axis, x.rank)], (self.size - 1) * self.dilation + 1
        return [
            (self.size - 1, f"size must be 1 or more, is {self.size}"),
            (size - span, f"a window spans {span} elements, the axis has {size}"),
        ]

    def reference(self, x: Any) -> Any:
        axis = place(self.axis, x.ndim)
        span = (self.size.evaluate({}) - 1) * self.dilation + 1
        every = np.lib.stride_tricks.sliding_window_view(x, span, axis=axis)
        index = [slice(None)] * every.ndim
        index[axis], index[-1] = slice(None, None, self.stride), slice(None, None, self.dilation)
        return every[tuple(index)]

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        (y,), axis = self.infer(types), place(self.axis, x.rank)
        moved = x.sliced(axis, ZERO, y.shape[axis], Size.of(self.stride))
        return replace(moved, shape=y.shape, strides=(*moved.strides, x.strides[axis] * self.dilation))

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        axis = place(self.axis, x.rank)
        return [b.fold_windows(g, axis=axis, size=x.shape[axis], stride=self.stride, dilation=self.dilation)]

    samples = [
        S("f32[2,7]", axis=1, size=3),
        S("f32[8,2]", axis=0, size=2, stride=3, dilation=2),
        S("f32[2,5,3]", axis=-2, size=2, stride=2),
        S("i64[4]", axis=0, size=4),
    ]
    errors = [
        (S("f32[4]", axis=0, size=3, dilation=2), "a window spans 5 elements, the axis has 4"),
        (S("f32[4]", axis=0, size=2, stride=0), "stride must be 1 or more"),
        (S("f32[4]", axis=0, size=2, dilation=0), "dilation must be 1 or more"),
        (S("f32[4]", axis=0, size=0), "size must be 1 or more"),
    ]


@op("fold_windows", dtypes="n -> n", linear="x")
class FoldWindows(Primitive):
    """y[..., i stride + k dilation, ...] += x[..., i, ..., k]: windows added at their positions

    The op is the transpose of `windows`. Overlapping windows of 16-bit floats are added in f32.

    size   the size of the axis that the windows were taken from
    """

    x = Operand()
    axis: int
    size: Size
    stride: int = 1
    dilation: int = 1
    accumulates = f32

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        *names, element = axis_letters(ranks[0] or 0, self.size.symbols)
        left, right = resized(names, place(self.axis, len(names)), self.size)
        return f"{left} [{element}] -> {right}"

    def check(self, types: Sequence[Type | None]) -> None:
        (x,) = types
        assert x is not None
        positive(stride=self.stride, dilation=self.dilation)
        if x.rank < 2:
            raise RuleError("x needs an axis of windows, and a last axis of their elements")
        count = window_count(self.size, x.shape[-1], self.stride, self.dilation)
        found = x.shape[place(self.axis, x.rank - 1)]
        if found != count:
            raise RuleError(f"an axis of size {self.size} has {count} windows, but x has {found}")

    def reference(self, x: Any) -> Any:
        axis = place(self.axis, x.ndim - 1)
        shape = list(x.shape[:-1])
        shape[axis] = self.size.evaluate({})
        wide = wide_array(x)
        y = np.zeros(shape, wide.dtype)
        moved, reach = np.moveaxis(y, axis, 0), (x.shape[axis] - 1) * self.stride + 1
        for k in range(x.shape[-1]):
            first = k * self.dilation
            moved[first : first + reach : self.stride] += np.moveaxis(wide[..., k], axis, 0)
        return y.astype(x.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        axis = place(self.axis, x.rank - 1)
        return [b.windows(g, axis=axis, size=x.shape[-1], stride=self.stride, dilation=self.dilation)]

    samples = [
        S("f32[2,5,3]", axis=1, size=7),
        S("f32[2,2,2]", axis=0, size=8, stride=3, dilation=2),
        S("f32[2,2,3,2]", axis=-2, size=5, stride=2),
        S("i64[1,4]", axis=0, size=4),
    ]
    errors = [
        (S("f32[2,5,3]", axis=1, size=8), "an axis of size 8 has 6 windows, but x has 5"),
        (S("f32[3]", axis=0, size=3), "x needs an axis of windows"),
        (S("f32[5,2]", axis=0, size=6, stride=0), "stride must be 1 or more"),
        (S("f32[5,2]", axis=0, size=5, dilation=0), "dilation must be 1 or more"),
    ]


def sliding(
    count: int, strides: tuple[int, ...], padding: tuple[int, ...], dilations: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    """Return padding before, padding after, stride and dilation of windows for each of `count` axes. Raises RuleError.

    strides, dilations   one number per axis; empty means 1
    padding              before each axis, then after each; half the number of values pads both sides equally; empty: 0
    """
    padding = padding * (2 if len(padding) == count else 1) or (0,) * (2 * count)
    strides, dilations = strides or (1,) * count, dilations or (1,) * count
    for name, numbers, wanted in (
        ("strides", strides, count),
        ("dilations", dilations, count),
        ("padding", padding, 2 * count),
    ):
        if len(numbers) != wanted:
            same, axes = f"{name}=({', '.join(map(str, numbers * count))})", "axis" if count == 1 else "axes"
            raise RuleError(
                f"{name} has {len(numbers)} number{'s' * (len(numbers) != 1)} for {count} spatial {axes}",
                hint=same if len(numbers) == 1 else "one number for each axis",
            )
    return list(zip(padding[:count], padding[count:], strides, dilations, strict=True))


@op("conv", dtypes="f, f, f -> f", linear="x bias | weight bias", flops=2)
class Conv(Composite):
    """y[b, o, i...] = bias[o] + sum_{c, k...} x[b, c, i stride + k dilation - padding...] weight[o, c, k...]

    Cross-correlation over any number of spatial axes, which is called convolution in deep learning (Dumoulin & Visin
    2016). x is [b, c, *spatial], weight [o, c / groups, *kernel], y [b, o, *spatial].

    strides, dilations   one number per spatial axis; empty means 1
    padding              zeros before each spatial axis, then after each (ONNX's pads); half the number of values
                         pads both sides equally; empty means none. Causal: (dilation (k - 1), 0)
    groups               the number of groups; output group j reads input group j alone
    """

    x = Operand()
    weight = Operand()
    bias = Operand(optional=True)
    strides: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    accumulates = f32

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        spatial = (ranks[0] or 0) - 2
        if spatial < 1:
            raise RuleError("x must be [b, c, *spatial], with at least one spatial axis")
        each = self.spatial(spatial)
        sizes, kernel = [f"n{i}" for i in range(spatial)], [f"k{i}" for i in range(spatial)]
        counts = [
            sized(window_count(Size.symbol(n) + before + after, Size.symbol(k), stride, dilation))
            for n, k, (before, after, stride, dilation) in zip(sizes, kernel, each, strict=True)
        ]
        c, o = (f"(g={self.groups} c)", "(g o)") if self.groups != 1 else ("c", "o")
        weight = f"{o} c {' '.join(f'[{k}]' for k in kernel)}"
        return f"b {c} {' '.join(f'[{n}]' for n in sizes)}, {weight}, {o} -> b {o} {' '.join(counts)}"

    def resized(self, sizes: Mapping[str, Size], types: Sequence[Type | None]) -> Op | None:
        """Return the op on a part of its operands, which may have fewer groups."""
        groups = sizes.get("g")
        if groups is None:
            return self
        return None if groups.constant is None else replace(self, groups=groups.constant)

    def spatial(self, count: int) -> list[tuple[int, int, int, int]]:
        """Return padding before, padding after, stride and dilation of each spatial axis. Raises RuleError."""
        return sliding(count, self.strides, self.padding, self.dilations)

    def check(self, types: Sequence[Type | None]) -> None:
        x, _, _ = types
        assert x is not None
        positive(groups=self.groups)
        for _, _, stride, dilation in self.spatial(x.rank - 2):
            positive(stride=stride, dilation=dilation)

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        x, weight, _ = types
        assert x is not None
        assert weight is not None
        found = []
        for size, window, (before, after, _, dilation) in zip(
            x.shape[2:], weight.shape[2:], self.spatial(x.rank - 2), strict=False
        ):
            padded, span = size + before + after, (window - 1) * dilation + 1
            found.append((padded - span, f"the kernel spans {span} elements, the padded axis has {padded}"))
        return found

    def takes_patches(self, weight: Sequence[Size]) -> bool:
        """Return True if windows have several elements, have known sizes, and do not overlap. Each window is then read
        once, as a row of a matrix.
        """
        kernel = [size.constant for size in weight[2:]]
        each = self.spatial(len(kernel))
        apart = (
            k is not None and stride > (k - 1) * dilation
            for k, (*_, stride, dilation) in zip(kernel, each, strict=True)
        )
        return self.groups == 1 and all(apart) and any(k != 1 for k in kernel)

    def body(self, b: Builder, x: Expr, weight: Expr, bias: Expr | None) -> Any:
        spatial = x.rank - 2
        for axis, (before, after, stride, dilation) in enumerate(self.spatial(spatial), start=2):
            if before or after:
                x = b.pad(x, axis=axis, before=before, after=after)
            x = b.windows(x, axis=axis, size=weight.shape[axis], stride=stride, dilation=dilation)
        names = axis_letters(2 * spatial, "bcgo")
        places, kernel = " ".join(names[:spatial]), " ".join(names[spatial:])
        if self.groups == 1:
            y = b.einsum(x, weight, equation=f"b c {places} {kernel}, o c {kernel} -> b o {places}")
        else:
            group = f"g={self.groups}"
            x = b.rearrange(x, pattern=f"b ({group} c) {places} {kernel} -> b g c {places} {kernel}")
            weight = b.rearrange(weight, pattern=f"({group} o) c {kernel} -> g o c {kernel}")
            y = b.einsum(x, weight, equation=f"b g c {places} {kernel}, g o c {kernel} -> b g o {places}")
            y = b.rearrange(y, pattern=f"b g o {places} -> b (g o) {places}")
        return y if bias is None else y + b.rearrange(bias, pattern=f"o -> o {' '.join('1' * spatial)}")

    def lowering(self, b: Builder, x: Expr, weight: Expr, bias: Expr | None) -> Any:
        """Build windows that do not overlap as rows of a matrix, so that backends lay out the weight once, as for
        linear. Overlapping windows would be copied several times, so they are not built in this way.
        """
        if not self.takes_patches(weight.shape):
            return self.body(b, x, weight, bias)
        spatial = x.rank - 2
        each = self.spatial(spatial)
        for axis, (before, after, stride, dilation) in enumerate(each, start=2):
            if before or after:
                x = b.pad(x, axis=axis, before=before, after=after)
            x = b.windows(x, axis=axis, size=weight.shape[axis], stride=stride, dilation=dilation)
        names = axis_letters(2 * spatial, "bcgo")
        places, within = " ".join(names[:spatial]), " ".join(names[spatial:])
        counts = [x.shape[axis].constant for axis in range(2, 2 + spatial)]
        if None in counts:  # a row's place among several can only be computed from constant numbers
            rows = b.rearrange(x, pattern=f"b c {places} {within} -> b {places} (c {within})")
            given = places
        else:
            rows = b.rearrange(x, pattern=f"b c {places} {within} -> b ({places}) (c {within})")
            given = "(" + " ".join(f"{name}={n}" for name, n in zip(names, counts, strict=False)) + ")"
        y = b.linear(rows, b.rearrange(weight, pattern=f"o c {within} -> o (c {within})"), bias)
        return b.rearrange(y, pattern=f"b {given} o -> b o {places}")

    samples = [
        S("f32[2,3,8]", "f32[4,3,3]", "f32[4]", padding=(2, 0)),
        S("f32[2,4,5,6]", "f32[6,2,3,2]", None, strides=(2, 1), padding=(1, 0), groups=2),
        S("f32[1,2,9]", "f32[2,1,2]", "f32[2]", dilations=(3,), strides=(2,), groups=2),
        S("f32[1,2,3,3,3]", "f32[2,2,2,2,2]", None),
    ]
    errors = [
        (S("f32[1,2,8]", "f32[4,3,3]", None), "axis c sizes disagree: 2 in x, 3 in weight"),
        (S("f32[1,3,8]", "f32[4,1,3]", None, groups=2), "(g c) has size 2"),
        (S("f32[1,3,2]", "f32[4,3,3]", None), "the kernel spans 3 elements, the padded axis has 2"),
        (S("f32[1,3,8]", "f32[4,3,3]", "f32[3]"), "sizes disagree: 4 in weight, 3 in bias"),
        (S("f32[1,3,8]", "f32[4,3,3]", None, strides=(1, 1)), "strides has 2 numbers for 1 spatial axis"),
        (S("f32[3,8]", "f32[3,3]", None), "with at least one spatial axis"),
        (S("f32[1,3,8]", "f32[4,3,3]", None, strides=(0,)), "stride must be 1 or more"),
        (S("f32[1,3,8]", "f32[4,3,3]", None, dilations=(0,)), "dilation must be 1 or more"),
        (S("f32[1,3,8]", "f32[4,3,3]", None, groups=0), "groups must be 1 or more"),
    ]
