"""ONNX operators that join and split tensors: Concat, Split, Slice and Pad."""

from __future__ import annotations

from typing import Any

import numpy as np

from treadle.frontends.onnx_import.folding import is_at_least
from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.elements import named
from treadle.frontends.onnx_import.values import Known, tidied
from treadle.frontends.recipes.positions import extent, flipped
from treadle.frontends.recipes.reshaping import reshaped
from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.types import i64


@operator("Concat", latest=13, first=4, moves=(-1,))
def _concat(site: OnnxSite) -> Made:
    parts = site.all()
    axis = site.axis(site.int("axis", 1), parts[0].rank)
    if len(parts) == 1:
        return parts[0]
    return site.b.concat(*parts, axis=axis)


@operator("Split", latest=18, moves=(0,))
def _split(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    axis = site.axis(site.int("axis", 0), x.rank)
    count, size = len(site.node.output), x.shape[axis]
    parts: list[Size]
    if site.version < 13:
        split = site.ints("split")
        given = None if split is None else [Size.of(n) for n in split]
    else:
        given = site.sizes(1) if site.has(1) else None
    asked = site.int("num_outputs") if site.version >= 18 else None
    if given is not None:
        parts = given
    else:
        if asked is not None and asked != count:
            site.malformed(f"{asked} parts do not fit {count} outputs")
        each = size.divide(count)
        if each is None:
            if size.constant is None:
                site.refuse_symbolic(f"an axis of size {size} cannot be split into {count} equal parts", size)
            step = -(-size.constant // count)
            parts = [Size.of(max(min(step, size.constant - i * step), 0)) for i in range(count)]
        else:
            parts = [each] * count
    if len(parts) != len(site.node.output):
        site.malformed(f"{len(parts)} parts do not fit {len(site.node.output)} outputs")
    whole = sum(parts, ZERO)
    if whole != size:
        site.mismatched(f"parts with a sum of {whole} do not fit an axis of size {size}", whole, size)
    made, start = [], ZERO
    for part in parts:
        made.append(b.slice(x, axis=axis, start=start, stop=start + part))
        start = start + part
    return made


@operator("Slice", latest=13, moves=(0,))
def _slice(site: OnnxSite) -> Made:
    x = site.x(0)
    if site.version < 10:
        starts = [Size.of(n) for n in site.ints("starts") or ()]
        ends = [Size.of(n) for n in site.ints("ends") or ()]
        axes = site.ints("axes")
        steps: tuple[int, ...] = (1,) * len(starts)
    else:
        starts, ends = site.sizes(1), site.sizes(2)
        axes = site.numbers(3) if site.has(3) else None
        steps = site.numbers(4) if site.has(4) else (1,) * len(starts)
    axes = tuple(range(len(starts))) if axes is None else axes
    if not len(starts) == len(ends) == len(axes) == len(steps):
        site.malformed("starts, ends, axes and steps differ in length")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _sliced(site, x, start, end, site.axis(axis, x.rank), step)
    return x


_FAR = 2**31 - 1
"""An end of at least this number means the end of the axis."""


def _clamped(site: OnnxSite, edge: Size, size: Size, low: int, high: Size) -> Size:
    """Return an edge of a slice as a position in [low, high]. A negative edge counts from the end.

    If it is out of range for some sizes only, the edge is not clamped: the graph refuses those sizes.
    """
    number, symbols = edge.constant, site.importer.graph.symbols
    if number is not None and number >= _FAR:
        return high
    if number is not None and number <= -_FAR:
        return Size.of(low)
    if (
        edge.bounds(symbols).lower < 0
        and edge.bounds(symbols).upper is not None
        and (edge.bounds(symbols).upper or 0) < 0
    ):
        edge = edge + size
    if is_at_least(Size.of(low), edge, symbols):
        return Size.of(low)
    return high if is_at_least(edge, high, symbols) else edge


def _sliced(site: OnnxSite, x: Expr, start: Size, end: Size, axis: int, step: int) -> Expr:
    b, size = site.b, x.shape[axis]
    if step == 0:
        site.malformed("a step must not be 0")
    if step > 0:
        first, last = (_clamped(site, edge, size, 0, size) for edge in (start, end))
        if is_at_least(first, last, site.importer.graph.symbols):
            last = first
        if first == ZERO and last == size and step == 1:
            return x
        return b.slice(x, axis=axis, start=first, stop=last, stride=step)
    first = _clamped(site, start, size, 0, size - 1)
    last = _clamped(site, end, size, -1, size - 1)
    if first.constant is None and last.constant == -1 and step == -1 and first == size - 1:
        return flipped(b, x, axis)
    count = (first - last - step - 1) // -step
    if count.constant is not None and count.constant <= 0:
        return b.slice(x, axis=axis, start=0, stop=0)
    begin = Known(named("INT64"), content=tidied([first], ())).expr(b)
    return b.gather(x, begin - b.iota(size=count, dtype=i64) * -step, axis=axis)


@operator("Pad", latest=25)
def _pad(site: OnnxSite) -> Made:
    """Pad before and after each axis, by a constant, the edge, a reflection, or wrapping. Negative pads crop."""
    b, x = site.b, site.x(0)
    mode = site.text("mode", "constant")
    if site.version < 11:
        numbers = site.ints("pads") or ()
        pads, value = [Size.of(n) for n in numbers], site.float("value", 0.0)
    else:
        pads, value = site.sizes(1), _fill(site)
    axes = range(x.rank)
    if site.version >= 18 and site.has(3):
        axes = [site.axis(n, x.rank) for n in site.numbers(3)]  # type: ignore[assignment]
    if len(pads) != 2 * len(axes):
        site.malformed(f"{len(pads)} pads do not fit {len(axes)} axes")
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        cut = [-n.constant if n.constant is not None and n.constant < 0 else 0 for n in (before, after)]
        if any(cut):
            x = b.slice(x, axis=axis, start=cut[0], stop=x.shape[axis] - cut[1])
        before, after = (ZERO if c else n for c, n in zip(cut, (before, after), strict=True))
        if before == ZERO and after == ZERO:
            continue
        if mode == "constant":
            x = _padded(b, x, axis, before, after, value)
        elif mode in ("edge", "reflect", "wrap"):
            x = b.gather(x, _border(site, x.shape[axis], before, after, mode), axis=axis)
        else:
            site.malformed(f"unknown mode {mode!r}")
    return x


def _fill(site: OnnxSite) -> Any:
    """Return the fill value: a number, or the scalar of the graph that contains it."""
    if not site.has(2):
        return 0
    content = site.value(2).content
    if content is not None and content.dtype != object and content.size == 1:
        number = content.reshape(()).item()
        if content.dtype != np.int64 or abs(number) < 2**53:  # a float attribute represents such a number exactly
            return number
    return reshaped(site.b, site.x(2), [])[0]


def _padded(b: Builder, x: Expr, axis: int, before: Size, after: Size, value: Any) -> Expr:
    if not isinstance(value, Expr):
        return b.pad(x, axis=axis, before=before, after=after, value=float(value))
    sides = [
        b.expand(value, shape=tuple(n if i == axis else s for i, s in enumerate(x.shape))) for n in (before, after)
    ]
    return b.concat(sides[0], x, sides[1], axis=axis)


def _border(site: OnnxSite, size: Size, before: Size, after: Size, mode: str) -> Expr:
    """Return for each element along a padded axis the position of its source element."""
    n, lead, tail = size.constant, before.constant, after.constant
    if n is None or lead is None or tail is None:
        return _symbolic_border(site.b, size, before, after, mode)
    if n == 0:
        site.refuse(f"mode {mode} of an empty axis is not supported")
    if n + lead + tail > 1 << 20:
        site.refuse(f"mode {mode} cannot pad to an axis of {n + lead + tail}")
    places = np.arange(-lead, n + tail)
    if mode == "edge":
        places = np.clip(places, 0, n - 1)
    elif mode == "wrap":
        places = places % n
    else:
        period = max(2 * (n - 1), 1)
        folded = places % period
        places = np.where(folded >= n, period - folded, folded)
    return site.b.constant(places, i64)


def _symbolic_border(b: Builder, size: Size, before: Size, after: Size, mode: str) -> Expr:
    """Return the positions of `_border` for symbolic sizes, computed at the call."""
    places = b.iota(size=before + size + after) - extent(b, before)
    last = extent(b, size) - 1
    if mode == "edge":
        return b.minimum(b.maximum(places, 0), last)
    if mode == "wrap":
        return b.mod(places, extent(b, size))
    folded = b.mod(places, b.maximum(last * 2, 1))
    return b.minimum(folded, last * 2 - folded)
