"""ONNX operators that move elements or make them from sizes: Reshape, Slice, Concat, Expand, Range, Shape, ..."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.frontends.onnx_import.folding import is_at_least
from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.elements import named
from treadle.frontends.onnx_import.values import Known, constant, tidied
from treadle.frontends.recipes.positions import extent, flipped
from treadle.frontends.recipes.reshaping import reshaped
from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.ir.types import i64

# -- constants and sizes -------------------------------------------------------------------------------------------


@operator("Constant", latest=25)
def _constant(site: OnnxSite) -> Made:
    names = list(site.attributes)
    if len(names) != 1:
        site.malformed(f"has {len(names)} attributes, not one")
    site.ignore(*names)
    attribute = site.attributes[names[0]]
    match names[0]:
        case "value":
            return site.importer.tensor(attribute.t, site.node.output[0], site.scope)
        case "value_int":
            return Known(named("INT64"), content=np.asarray(attribute.i, np.int64))
        case "value_ints":
            return Known(named("INT64"), content=np.asarray(list(attribute.ints), np.int64))
        case "value_float":
            return Known(named("FLOAT"), content=np.asarray(attribute.f, np.float32))
        case "value_floats":
            return Known(named("FLOAT"), content=np.asarray(list(attribute.floats), np.float32))
    site.refuse(f"of {names[0]}")


@operator("Identity", latest=25, moves=(0,))
def _identity(site: OnnxSite) -> Made:
    return site.value(0)


@operator("Shape", latest=25)
def _shape(site: OnnxSite) -> Made:
    shape = site.shape(0)
    return tidied(
        shape[slice(site.int("start", 0), site.int("end"))], (len(shape[slice(site.int("start", 0), site.int("end"))]),)
    )


@operator("Size", latest=25)
def _size(site: OnnxSite) -> Made:
    return tidied([product(site.shape(0))], ())


@operator("ConstantOfShape", latest=25)
def _constant_of_shape(site: OnnxSite) -> Made:
    site.ignore("value")
    given = site.attributes.get("value")
    value = Known(named("FLOAT"), content=np.zeros(1, np.float32))
    if given is not None:
        value = site.importer.tensor(given.t, f"{site.node.output[0]}.value", site.scope)
    content = value.content
    if content is None or content.size != 1:
        site.malformed("the value must be one element")
    scalar = constant(site.b, content.reshape(()), value.type)
    return Known(value.type, expr=_expanded(site.b, scalar, site.sizes(0)))


@operator("Range", latest=27)
def _range(site: OnnxSite) -> Made:
    """start, start + delta, ... below limit"""
    b, dtype = site.b, site.element(0).carrier
    if dtype.is_float:
        start, limit, delta = (float(site.scalar(i)) for i in range(3))
        if not (math.isfinite(start) and math.isfinite(limit) and math.isfinite(delta)) or delta == 0:
            site.malformed("start, limit and delta must be finite, and delta not zero")
        count = Size.of(max(math.ceil((limit - start) / delta), 0))
        steps = b.iota(size=count, dtype="f32" if dtype.numpy is None or dtype.bytes == 2 else dtype)
        return (steps * delta + start).cast(dtype)
    start_size, limit_size, step = (site.size(i) for i in range(3))
    step_number = step.constant
    if not step_number:
        site.refuse(f"with a step of {step}")
    extent = limit_size - start_size
    count = (
        (extent + step_number - 1) // step_number if step_number > 0 else (-extent - step_number - 1) // -step_number
    )
    if count.constant is not None:
        count = Size.of(max(count.constant, 0))
    steps = b.iota(size=count, dtype=dtype)
    if step_number != 1:
        steps = steps * step_number
    if start_size.constant == 0:
        return steps
    first = Known(named("INT64"), content=tidied([start_size], ())).expr(b)
    return steps + first.cast(dtype)


@operator("EyeLike", latest=22)
def _eye_like(site: OnnxSite) -> Made:
    b, shape = site.b, site.shape(0)
    to = site.importer.element(site.int("dtype", site.element(0).number))
    if len(shape) != 2:
        site.malformed("the operand must have rank 2")
    rows = b.rearrange(b.iota(size=shape[0]), pattern="n -> n 1")
    on = b.equal(b.iota(size=shape[1]), rows + site.int("k", 0))
    return Known(to, expr=on.cast(to.carrier))


# -- shapes --------------------------------------------------------------------------------------------------------


@operator("Reshape", latest=25, first=5, moves=(0,))
def _reshape(site: OnnxSite) -> Made:
    _b, x = site.b, site.x(0)
    wanted, keep_zero = site.sizes(1), site.int("allowzero", 0)
    sizes: list[Size] = []
    free: int | None = None
    for i, size in enumerate(wanted):
        if size.constant == -1:
            if free is not None:
                site.malformed("more than one -1 in the shape")
            free = i
        elif size.constant == 0 and not keep_zero:
            if i >= x.rank:
                site.malformed(f"0 at {i}, where the operand has rank {x.rank}")
            size = x.shape[i]
        elif size.constant is not None and size.constant < 0:
            site.malformed(f"a size of {size}")
        sizes.append(size)
    if free is not None:
        rest = product(s for i, s in enumerate(sizes) if i != free)
        whole = product(x.shape)
        if rest.constant == 0:
            sizes[free] = ZERO
        else:
            exact = whole.divide(rest)
            if exact is None:
                given = ", ".join(map(str, wanted))
                site.refuse(f"cannot tell what -1 stands for in [{given}], of {whole} elements")
            sizes[free] = exact
    return _shaped(site, x, sizes)


def _shaped(site: OnnxSite, x: Expr, sizes: Sequence[Size]) -> Expr:
    made, told = reshaped(site.b, x, sizes)
    if not told and all(s.constant != 0 for s in x.shape):
        before, after = (", ".join(map(str, shape)) for shape in (x.shape, sizes))
        site.importer.notes.opaque.append(f"{site.where}: [{before}] to [{after}]")
    return made


@operator("Flatten", latest=25, moves=(0,))
def _flatten(site: OnnxSite) -> Made:
    x, axis = site.x(0), site.int("axis", 1)
    if not -x.rank <= axis <= x.rank:
        site.malformed(f"there is no axis {axis} in a tensor of rank {x.rank}")
    axis = axis if axis >= 0 else axis + x.rank
    return _shaped(site, x, [product(x.shape[:axis]), product(x.shape[axis:])])


def _given_axes(site: OnnxSite, by_input: int = 13) -> tuple[int, ...] | None:
    if site.version < by_input:
        return site.ints("axes")
    return site.numbers(1) if site.has(1) else None


@operator("Squeeze", latest=25, moves=(0,))
def _squeeze(site: OnnxSite) -> Made:
    x, axes = site.x(0), _given_axes(site)
    if axes is None:
        dropped = {i for i, s in enumerate(x.shape) if s == ONE}
    else:
        dropped = {site.axis(axis, x.rank) for axis in axes}
    for i in sorted(dropped):
        if x.shape[i] != ONE:
            if x.shape[i].constant is not None:
                site.malformed(f"dimension {i} is {x.shape[i]}, not 1")
            site.refuse_symbolic(f"dimension {i} is {x.shape[i]}, and must be 1", x.shape[i])
    return reshaped(site.b, x, [s for i, s in enumerate(x.shape) if i not in dropped])[0]


@operator("Unsqueeze", latest=25, moves=(0,))
def _unsqueeze(site: OnnxSite) -> Made:
    x, axes = site.x(0), _given_axes(site)
    if axes is None:
        site.malformed("no axes are given")
    rank = x.rank + len(axes)
    new = [site.axis(axis, rank) for axis in axes]
    if len(set(new)) < len(new):
        site.malformed(f"an axis is named twice in {axes}")
    old = iter(x.shape)
    return reshaped(site.b, x, [ONE if i in new else next(old) for i in range(rank)])[0]


@operator("Transpose", latest=25, moves=(0,))
def _transpose(site: OnnxSite) -> Made:
    x, order = site.x(0), site.ints("perm")
    order = tuple(reversed(range(x.rank))) if order is None else order
    if sorted(order) != list(range(x.rank)):
        site.malformed(f"perm {list(order)} is no order of {x.rank} axes")
    if list(order) == list(range(x.rank)):
        return x
    names = axis_letters(x.rank)
    return site.b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(names[i] for i in order)}")


def _expanded(b: Builder, x: Expr, sizes: Sequence[Size]) -> Expr:
    """x broadcast with a shape: a size of one side holds where the other has 1."""
    rank = max(x.rank, len(sizes))
    held = [ONE] * (rank - x.rank) + list(x.shape)
    wanted = [ONE] * (rank - len(sizes)) + list(sizes)
    shape = [h if w == ONE else w for h, w in zip(held, wanted, strict=True)]
    if len(shape) == x.rank and tuple(shape) == x.shape:
        return x
    return b.expand(x, shape=tuple(shape))


@operator("Expand", latest=13, moves=(0,))
def _expand(site: OnnxSite) -> Made:
    return _expanded(site.b, site.x(0), site.sizes(1))


@operator("Tile", latest=13, first=6, moves=(0,))
def _tile(site: OnnxSite) -> Made:
    b, x, repeats = site.b, site.x(0), site.sizes(1)
    if len(repeats) != x.rank:
        site.malformed(f"{len(repeats)} repeats for rank {x.rank}")
    for axis, times in enumerate(repeats):
        if times == ONE:
            continue
        if x.shape[axis] == ONE:
            x = b.expand(x, shape=tuple(times if i == axis else n for i, n in enumerate(x.shape)))
            continue
        before = x.shape
        with_axis, _ = reshaped(b, x, [*before[:axis], ONE, *before[axis:]])
        again = b.expand(with_axis, shape=(*before[:axis], times, *before[axis:]))
        names = axis_letters(x.rank + 1)
        joined = [*names[:axis], f"({names[axis]} {names[axis + 1]})", *names[axis + 2 :]]
        x = b.rearrange(again, pattern=f"{' '.join(names)} -> {' '.join(joined)}")
    return x


# -- parts ---------------------------------------------------------------------------------------------------------


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
        told = site.ints("split")
        given = None if told is None else [Size.of(n) for n in told]
    else:
        given = site.sizes(1) if site.has(1) else None
    asked = site.int("num_outputs") if site.version >= 18 else None
    if given is not None:
        parts = given
    else:
        if asked is not None and asked != count:
            site.malformed(f"{asked} parts for {count} outputs")
        each = size.divide(count)
        if each is None:
            if size.constant is None:
                site.refuse_symbolic(f"an axis of size {size} into {count} equal parts", size)
            step = -(-size.constant // count)
            parts = [Size.of(max(min(step, size.constant - i * step), 0)) for i in range(count)]
        else:
            parts = [each] * count
    if len(parts) != len(site.node.output):
        site.malformed(f"{len(parts)} parts for {len(site.node.output)} outputs")
    made, start = [], ZERO
    for part in parts:
        made.append(b.slice(x, axis=axis, start=start, stop=start + part))
        start = start + part
    if start != size:
        site.mismatched(f"parts of {start} in all, of an axis of size {size}", start, size)
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
        site.malformed("starts, ends, axes and steps are not equally many")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _sliced(site, x, start, end, site.axis(axis, x.rank), step)
    return x


_FAR = 2**31 - 1
"""Ends of this and more mean the end of any axis."""


def _clamped(site: OnnxSite, edge: Size, size: Size, low: int, high: Size) -> Size:
    """An edge of a slice: from the end where it is negative, and within [low, high].

    Where only some sizes would have to be clamped, it is left as it is: the graph refuses those.
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
        site.malformed("a step of 0")
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
    """Before and after each axis, with a constant, the edge, a reflection, or the other end; negative: cut."""
    b, x = site.b, site.x(0)
    mode = site.text("mode", "constant")
    if site.version < 11:
        told = site.ints("pads") or ()
        pads, value = [Size.of(n) for n in told], site.float("value", 0.0)
    else:
        pads, value = site.sizes(1), _fill(site)
    axes = range(x.rank)
    if site.version >= 18 and site.has(3):
        axes = [site.axis(n, x.rank) for n in site.numbers(3)]  # type: ignore[assignment]
    if len(pads) != 2 * len(axes):
        site.malformed(f"{len(pads)} pads for {len(axes)} axes")
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
            site.malformed(f"mode is {mode!r}")
    return x


def _fill(site: OnnxSite) -> Any:
    """What is padded with: a number, or the scalar that holds it."""
    if not site.has(2):
        return 0
    content = site.value(2).content
    if content is not None and content.dtype != object and content.size == 1:
        number = content.reshape(()).item()
        if content.dtype != np.int64 or abs(number) < 2**53:  # which a float attribute holds
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
    """Where along an axis each element of its padded form is read."""
    n, lead, tail = size.constant, before.constant, after.constant
    if n is None or lead is None or tail is None:
        return _symbolic_border(site.b, size, before, after, mode)
    if n == 0:
        site.refuse(f"mode {mode} of an axis of no size")
    if n + lead + tail > 1 << 20:
        site.refuse(f"mode {mode} to an axis of {n + lead + tail}")
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
    """The same, where it is known at the call."""
    places = b.iota(size=before + size + after) - extent(b, before)
    last = extent(b, size) - 1
    if mode == "edge":
        return b.minimum(b.maximum(places, 0), last)
    if mode == "wrap":
        return b.mod(places, extent(b, size))
    folded = b.mod(places, b.maximum(last * 2, 1))
    return b.minimum(folded, last * 2 - folded)


@operator("DepthToSpace", latest=13)
def _depth_to_space(site: OnnxSite) -> Made:
    b, x, block = site.b, site.x(0), site.int("blocksize", 1)
    columns = site.text("mode", "DCR") == "CRD"
    if x.rank != 4:
        site.decompose()
    left = f"b (c p={block} q={block}) h w" if columns else f"b (p={block} q={block} c) h w"
    return b.rearrange(x, pattern=f"{left} -> b c (h p) (w q)")


@operator("SpaceToDepth", latest=13)
def _space_to_depth(site: OnnxSite) -> Made:
    x, block = site.x(0), site.int("blocksize", 1)
    if x.rank != 4:
        site.decompose()
    return site.b.rearrange(x, pattern=f"b c (h p={block}) (w q={block}) -> b (p q c) h w")
