"""Windows of ONNX operators over the axes after the second: strides, dilations and padding, which may be automatic.

Padding that an operator chooses (SAME_UPPER, SAME_LOWER) depends on the sizes of the axes and of the kernel. Where
these are symbolic it is an expression of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.frontends.onnx_import.folding import is_at_least
from treadle.frontends.onnx_import.operators import OnnxSite
from treadle.ir.builder import Expr
from treadle.ir.sizing.sizes import ZERO, Size

_MOST_PARTS = 16
"""The largest kernel, narrower than its stride, whose padding of a symbolic axis is written as a sum."""


@dataclass(frozen=True)
class WindowGeometry:
    """How windows lie along each axis.

    before, after   the padding
    """

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Size, ...]
    after: tuple[Size, ...]

    @property
    def padding(self) -> tuple[int, ...] | None:
        """The padding before each axis, then after each, if all of it is numbers; empty where there is none."""
        numbers = [size.constant for size in (*self.before, *self.after)]
        known = tuple(n for n in numbers if n is not None)
        return None if len(known) < len(numbers) else known if any(known) else ()

    def apart(self, x: Expr, value: float = 0.0) -> tuple[Expr, tuple[int, ...]]:
        """x, and the padding that remains for an op that takes numbers: where some of it is symbolic, x is padded."""
        padding = self.padding
        if padding is not None:
            return x, padding
        for axis, (before, after) in enumerate(zip(self.before, self.after, strict=True), start=2):
            if before != ZERO or after != ZERO:
                x = x.builder.pad(x, axis=axis, before=before, after=after, value=value)
        return x, ()


def kernel_sizes(site: OnnxSite, weight: Expr) -> tuple[Size, ...]:
    """The sizes of a weight's kernel, which `kernel_shape` may repeat."""
    found, told = weight.shape[2:], site.ints("kernel_shape")
    if told is None:
        return found
    if len(told) != len(found) or any(s.constant not in (None, n) for n, s in zip(told, found, strict=True)):
        site.malformed("kernel_shape is not the weight's")
    symbolic = next((size for size in found if size.constant is None), None)
    if symbolic is not None:
        site.refuse_symbolic(f"kernel_shape is {list(told)}, the weight's is {', '.join(map(str, found))}", symbolic)
    return found


def steps(site: OnnxSite, spatial: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and dilations."""
    strides, dilations = (site.ints(name) or (1,) * spatial for name in ("strides", "dilations"))
    if len(strides) != spatial or len(dilations) != spatial or min(*strides, *dilations, 1) < 1:
        site.malformed(f"strides {list(strides)} and dilations {list(dilations)} are not for {spatial} axes")
    return tuple(strides), tuple(dilations)


def windows_of(site: OnnxSite, x: Expr, kernel: Sequence[Size]) -> WindowGeometry:
    """The windows that a node's attributes say. Refuses an automatic padding that its sizes do not tell."""
    spatial = x.rank - 2
    if spatial < 1 or len(kernel) != spatial:
        site.malformed(f"a kernel of {len(kernel)} axes for an x of rank {x.rank}")
    strides, dilations = steps(site, spatial)
    automatic, pads = site.text("auto_pad", "NOTSET"), site.ints("pads") or (0,) * (2 * spatial)
    if len(pads) != 2 * spatial or min(pads) < 0:
        site.malformed(f"pads {list(pads)} are not for {spatial} axes")
    if automatic not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        site.malformed(f"auto_pad is {automatic!r}")
    if automatic == "VALID":
        pads = (0,) * (2 * spatial)
    if automatic in ("NOTSET", "VALID"):
        ends = tuple(Size.of(n) for n in pads)
        return WindowGeometry(strides, dilations, ends[:spatial], ends[spatial:])
    totals = [
        _same(site, size, (k - 1) * dilation + 1, stride)
        for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    return WindowGeometry(strides, dilations, *halves(totals, automatic == "SAME_UPPER"))


def halves(totals: Sequence[Size], odd_after: bool) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Padding on both sides of each axis; the odd element comes after it, or before."""
    small = tuple(total // 2 for total in totals)
    large = tuple(total - half for total, half in zip(totals, small, strict=True))
    return (small, large) if odd_after else (large, small)


def _same(site: OnnxSite, size: Size, span: Size, stride: int) -> Size:
    """How far the ceil(size / stride) windows of SAME reach beyond an axis, 0 or more."""
    symbols = site.importer.graph.symbols
    whole = (size + stride - 1) // stride * stride
    beyond = whole - stride + span - size
    if beyond.constant is not None:
        return Size.of(max(beyond.constant, 0))
    if is_at_least(span, Size.of(stride), symbols):
        return beyond  # since whole is at least the size
    if span.constant is not None and span.constant <= _MOST_PARTS:
        # whole - size is less than the stride; for each number that it reaches past stride - span, one element.
        reached = [(whole - size + stride - n) // stride for n in range(stride - span.constant + 1, stride)]
        return sum(reached, ZERO)
    what = f"auto_pad of windows that span {span}, a stride of {stride} apart, over an axis of size {size}"
    site.refuse_symbolic(what, span, size)
