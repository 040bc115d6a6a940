"""Windows of ONNX operators over all axes after the second: strides, dilations and padding, which may be automatic.

Automatic padding (SAME_UPPER, SAME_LOWER) depends on the sizes of the axes and of the kernel. If these are symbolic,
the padding is an expression of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.frontends.onnx_import.folding import is_at_least
from treadle.frontends.onnx_import.operators import OnnxSite
from treadle.ir.builder import Expr
from treadle.ir.sizing.sizes import ZERO, Size

_MOST_PARTS = 16
"""Maximum span of a kernel that is narrower than its stride, for which the padding of a symbolic axis is written as a
sum.
"""


@dataclass(frozen=True)
class WindowGeometry:
    """The windows along each axis.

    before, after   the padding
    """

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Size, ...]
    after: tuple[Size, ...]

    @property
    def padding(self) -> tuple[int, ...] | None:
        """The padding before each axis, then after each axis; () if there is none. None if some of it is symbolic."""
        numbers = [size.constant for size in (*self.before, *self.after)]
        known = tuple(n for n in numbers if n is not None)
        return None if len(known) < len(numbers) else known if any(known) else ()

    def apart(self, x: Expr, value: float = 0.0) -> tuple[Expr, tuple[int, ...]]:
        """Return x, and the padding for an op whose padding must be numbers. If some is symbolic, x is padded here
        instead.
        """
        padding = self.padding
        if padding is not None:
            return x, padding
        for axis, (before, after) in enumerate(zip(self.before, self.after, strict=True), start=2):
            if before != ZERO or after != ZERO:
                x = x.builder.pad(x, axis=axis, before=before, after=after, value=value)
        return x, ()


def kernel_sizes(site: OnnxSite, weight: Expr) -> tuple[Size, ...]:
    """Return the sizes of a weight's kernel, which `kernel_shape` may repeat."""
    found, declared = weight.shape[2:], site.ints("kernel_shape")
    if declared is None:
        return found
    if len(declared) != len(found) or any(s.constant not in (None, n) for n, s in zip(declared, found, strict=True)):
        site.malformed("kernel_shape differs from the kernel shape of the weight")
    symbolic = next((size for size in found if size.constant is None), None)
    if symbolic is not None:
        site.refuse_symbolic(
            f"kernel_shape is {list(declared)}, but the weight's kernel has shape [{', '.join(map(str, found))}]",
            symbolic,
        )
    return found


def steps(site: OnnxSite, spatial: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return strides and dilations."""
    strides, dilations = (site.ints(name) or (1,) * spatial for name in ("strides", "dilations"))
    if len(strides) != spatial or len(dilations) != spatial or min(*strides, *dilations, 1) < 1:
        site.malformed(f"strides {list(strides)} and dilations {list(dilations)} do not fit {spatial} axes")
    return tuple(strides), tuple(dilations)


def windows_of(site: OnnxSite, x: Expr, kernel: Sequence[Size]) -> WindowGeometry:
    """Return the windows of a node's attributes. Refuses automatic padding that the sizes do not determine."""
    spatial = x.rank - 2
    if spatial < 1 or len(kernel) != spatial:
        site.malformed(f"a kernel of {len(kernel)} axes does not fit an x of rank {x.rank}")
    strides, dilations = steps(site, spatial)
    automatic, pads = site.text("auto_pad", "NOTSET"), site.ints("pads") or (0,) * (2 * spatial)
    if len(pads) != 2 * spatial or min(pads) < 0:
        site.malformed(f"pads {list(pads)} do not fit {spatial} axes")
    if automatic not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        site.malformed(f"unknown auto_pad {automatic!r}")
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
    """Split padding between both sides of each axis. If it is odd, the larger half is after the axis if `odd_after`,
    else before it.
    """
    small = tuple(total // 2 for total in totals)
    large = tuple(total - half for total, half in zip(totals, small, strict=True))
    return (small, large) if odd_after else (large, small)


def _same(site: OnnxSite, size: Size, span: Size, stride: int) -> Size:
    """Return the total padding of an axis for SAME: the elements by which its ceil(size / stride) windows exceed the
    axis, or 0.
    """
    symbols = site.importer.graph.symbols
    whole = (size + stride - 1) // stride * stride
    beyond = whole - stride + span - size
    if beyond.constant is not None:
        return Size.of(max(beyond.constant, 0))
    if is_at_least(span, Size.of(stride), symbols):
        return beyond  # not negative, since whole >= size
    if span.constant is not None and span.constant <= _MOST_PARTS:
        # whole - size is less than the stride. The padding is the amount by which it exceeds stride - span, counted by
        # ones.
        reached = [(whole - size + stride - n) // stride for n in range(stride - span.constant + 1, stride)]
        return sum(reached, ZERO)
    what = f"auto_pad of windows with span {span} and stride {stride}, over an axis of size {size}"
    site.refuse_symbolic(what, span, size)
