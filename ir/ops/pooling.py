"""Pooling: windows over the last axes, each reduced to its maximum, its sum or its mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Demand, Operand
from treadle.ir.ops.along_axes import wide_array, widened
from treadle.ir.ops.axis_names import sized
from treadle.ir.ops.convolution import positive, sliding, window_count
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DType, Type, f32

_MOST_SLICES = 16
"""The largest window, along one axis, that is computed by combining slices."""


def padding_for_ceil(kernel: int, stride: int, dilation: int, after: int) -> int:
    """Return the padding after an axis with which no window is lost that starts before the end of the padding `after`.

    Frameworks call this ceil_mode: the number of windows is rounded up. The last window may extend beyond the requested
    padding (`after`), but must not start in it.
    """
    return min(after + stride - 1, (kernel - 1) * dilation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pool(Composite):
    """Windows over the last axes of x [..., *spatial]. `kernel` has one number per spatial axis.

    kernel               the number of elements in a window along each axis
    strides, dilations   one number per axis; empty means 1
    padding              the padding before each axis, then after each; half the number of values pads both sides
                         equally; empty means 0. It must be less than the span of a window. Padding holds no elements.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    @property
    def places(self) -> list[tuple[int, int, int, int, int]]:
        """For the windows along each axis: size, padding before, padding after, stride and dilation. Raises
        RuleError.
        """
        each = sliding(len(self.kernel), self.strides, self.padding, self.dilations)
        return [(size, *along) for size, along in zip(self.kernel, each, strict=True)]

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        names = [f"n{i}" for i in range(len(self.kernel))]
        counts = [
            sized(window_count(Size.symbol(name) + before + after, size, stride, dilation))
            for name, (size, before, after, stride, dilation) in zip(names, self.places, strict=True)
        ]
        return f"... {' '.join(f'[{n}]' for n in names)} -> ... {' '.join(counts)}"

    def check(self, types: Sequence[Type | None]) -> None:
        (x,) = types
        assert x is not None
        if not self.kernel:
            raise RuleError("kernel must have one number per spatial axis, is ()")
        if len(self.kernel) > x.rank:
            raise RuleError(f"kernel has {len(self.kernel)} dimensions, more than the {x.rank} of x")
        for size, before, after, stride, dilation in self.places:
            positive(kernel=size, strides=stride, dilations=dilation)
            span = (size - 1) * dilation + 1
            if not (0 <= before < span and 0 <= after < span):
                raise RuleError(
                    f"padding must be from 0 to {span - 1}, since a window spans {span}; is {max(before, after)}"
                )

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        (x,) = types
        assert x is not None
        found = []
        for axis, (size, before, after, _, dilation) in enumerate(self.places, start=x.rank - len(self.kernel)):
            padded, span = x.shape[axis] + before + after, (size - 1) * dilation + 1
            found.append((padded - span, f"a window spans {span} elements, the padded axis has {padded}"))
        return found

    def windows_of(self, x: Any, fill: float) -> tuple[Any, tuple[int, ...]]:
        """Return an array of all windows, with the elements of each window along the last axes, and the numbers of
        those axes.
        """
        first = x.ndim - len(self.kernel)
        widths = [(0, 0)] * first + [(before, after) for _, before, after, _, _ in self.places]
        spans = tuple((size - 1) * dilation + 1 for size, _, _, _, dilation in self.places)
        padded = np.pad(x, widths, constant_values=fill)
        every: Any = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(first, x.ndim)))
        taken = [slice(None, None, stride) for *_, stride, _ in self.places]
        within = [slice(None, None, dilation) for *_, dilation in self.places]
        return every[(..., *taken, *within)], tuple(range(x.ndim, x.ndim + len(self.kernel)))

    samples = [
        S("f32[2,3,8] distinct", kernel=(3,), strides=(2,)),
        S("f32[2,3,5,6] distinct", kernel=(3, 2), strides=(2, 1), padding=(1, 0, 2, 1)),
        S("f32[9,2] distinct", kernel=(2, 1), strides=(3, 1), dilations=(4, 1), padding=(1, 0)),
        S("f32[2,3,3,4] distinct", kernel=(2, 2, 2)),
        S("f32[4,4] distinct", kernel=(1, 1), strides=(1, 2)),
    ]
    errors = [
        (S("f32[1,2,3]", kernel=(4,)), "a window spans 4 elements, the padded axis has 3"),
        (S("f32[1,2,8]", kernel=(2,), padding=(2,)), "padding must be from 0 to 1, since a window spans 2; is 2"),
        (S("f32[1,2,8]", kernel=(0,)), "kernel must be 1 or more"),
        (S("f32[1,2,8]", kernel=(2,), strides=(0,)), "strides must be 1 or more"),
        (S("f32[1,2,8]", kernel=(2,), dilations=(0,)), "dilations must be 1 or more"),
        (S("f32[1,2,8]", kernel=(2,), strides=(1, 1)), "strides has 2 numbers for 1 spatial axis"),
        (S("f32[8]", kernel=(2, 2)), "kernel has 2 dimensions, more than the 1 of x"),
        (S("f32[8]", kernel=()), "kernel must have one number per spatial axis"),
        (S("bool[8]", kernel=(2,)), "x must be a"),
    ]


class _Separable(_Pool):
    """A pool whose reduction of a window can be computed one axis after the other."""

    reduces: ClassVar[str]
    """The op that reduces a window, and the op that combines two elements."""
    combines: ClassVar[str]
    reducing: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Attributes of the reducing op."""

    @staticmethod
    def filling(dtype: DType) -> float:
        """Return the neutral element of the reduction, which pads x."""
        raise NotImplementedError

    def body(self, b: Builder, x: Expr) -> Any:
        return self._along_each(b, x, slices=False)

    def lowering(self, b: Builder, x: Expr) -> Any:
        """Build small windows as strided slices of x that are combined elementwise. This is several times as fast on
        every backend.
        """
        return self._along_each(b, x, slices=True)

    def _along_each(self, b: Builder, x: Expr, slices: bool) -> Expr:
        """Reduce one axis after the other, sums in the dtype in which they accumulate.

        If one of several equal elements is selected, the last axis comes first, since the elements of a window are
        ordered along the last axis first.
        """
        dtype = x.dtype
        x = x.cast(self.sums_in(dtype))
        fill = self.filling(x.dtype)
        along = list(enumerate(self.places, start=x.rank - len(self.kernel)))
        for axis, (size, before, after, stride, dilation) in along[::-1] if self.reducing and not slices else along:
            if before or after:
                x = b.pad(x, axis=axis, before=before, after=after, value=fill)
            if (size, stride) == (1, 1):
                continue
            if slices and size <= _MOST_SLICES:
                reach = (window_count(x.shape[axis], size, stride, dilation) - 1) * stride + 1
                starts = range(0, size * dilation, dilation)
                parts = [b.slice(x, axis=axis, start=i, stop=reach + i, stride=stride) for i in starts]
                x = reduce(partial(b.apply, self.combines), parts)
            else:
                x = b.windows(x, axis=axis, size=size, stride=stride, dilation=dilation)
                x = b.apply(self.reduces, x, axes=(-1,), **self.reducing)
        return x.cast(dtype)


@op("max_pool", dtypes="n -> n")
class MaxPool(_Separable):
    """y[..., i...] = max_{k...} x[..., i stride + k dilation - padding...]; a NaN gives NaN

    Padding is ignored: a window without elements gives -inf, or the least integer. The first of equal maxima in the
    window gets the gradient, as in torch.max_pool2d.
    """

    x = Operand()
    reduces, combines, reducing = "reduce_max", "maximum", MappingProxyType({"ties": "first"})

    @staticmethod
    def filling(dtype: DType) -> float:
        return float(np.iinfo(dtype.numpy or np.int64).min) if dtype.is_int else -math.inf

    def reference(self, x: Any) -> Any:
        fill = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
        windows, axes = self.windows_of(x, fill)
        return windows.max(axes)

    samples = [*_Pool.samples, S("i64[3,7] distinct", kernel=(3,), strides=(2,), padding=(1,))]


@op("sum_pool", dtypes="n -> n", linear="x")
class SumPool(_Separable):
    """y[..., i...] = sum_{k...} x[..., i stride + k dilation - padding...]

    Padding counts as zeros. 16-bit floats are summed in f32.
    """

    x = Operand()
    reduces, combines = "reduce_sum", "add"
    accumulates = f32

    @staticmethod
    def filling(dtype: DType) -> float:
        return 0.0

    def reference(self, x: Any) -> Any:
        wide = wide_array(x)
        windows, axes = self.windows_of(wide, 0)
        return windows.sum(axes, dtype=wide.dtype).astype(x.dtype)

    samples = [*_Pool.samples, S("i64[3,7]", kernel=(3,), strides=(2,), padding=(1,))]


@op("average_pool", dtypes="f -> f", linear="x")
class AveragePool(_Pool):
    """y[..., i...] = the mean of the elements of x in the window at i

    Padding is not counted: a window without elements gives NaN. To count zeros around x (count_include_pad in
    frameworks), pad x with zeros. 16-bit floats are summed in f32.
    """

    x = Operand()
    accumulates = f32

    def body(self, b: Builder, x: Expr) -> Any:
        wide = widened(x)
        return (b.sum_pool(wide, **self.attributes) / self.counts(b, wide)).cast(x.dtype)

    def counts(self, b: Builder, x: Expr) -> Expr:
        """Return the number of elements in each window, in x's dtype: a scalar or one number per position."""
        spatial = len(self.kernel)
        total = b.constant(math.prod(s for s, before, after, _, _ in self.places if not (before or after)), x.dtype)
        for i, (size, before, after, stride, dilation) in enumerate(self.places):
            if before or after:
                ones = b.expand(b.constant(1, x.dtype), shape=(x.shape[x.rank - spatial + i],))
                held = b.sum_pool(
                    ones, kernel=(size,), strides=(stride,), padding=(before, after), dilations=(dilation,)
                )
                total = total * b.rearrange(held, pattern=f"n -> n {' '.join('1' * (spatial - 1 - i))}")
        return total

    def reference(self, x: Any) -> Any:
        windows, axes = self.windows_of(wide_array(x), np.nan)
        held = ~np.isnan(self.windows_of(np.zeros(x.shape), np.nan)[0])
        return (np.where(held, windows, 0).sum(axes) / held.sum(axes)).astype(x.dtype)
