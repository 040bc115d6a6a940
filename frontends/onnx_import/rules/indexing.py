"""ONNX operators that read and write at positions that an operand contains: Gather, Scatter, Trilu, OneHot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.recipes.positions import extent
from treadle.frontends.recipes.reshaping import reshaped
from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.types import i64


def from_start(site: OnnxSite, position: int, size: Size) -> Expr:
    """Return the indices of an input with negative indices converted to positions from the start of their axis."""
    b, value = site.b, site.value(position)
    content = value.content
    if content is not None and content.dtype != object:
        if not content.size or content.min() >= 0:
            return site.x(position)
        if size.constant is not None:
            return b.constant(np.where(content < 0, content + size.constant, content), value.type.carrier)
    indices = site.x(position)
    wide = indices.cast(i64)
    return b.where(wide < 0, wide + extent(b, size), wide)


@operator("Gather", latest=13, moves=(0,))
def _gather(site: OnnxSite) -> Made:
    """Gather slices along one axis. For the rows of a weight, as in an embedding, a negative index is refused at the
    call.
    """
    b, x, held = site.b, site.x(0), site.value(1)
    axis = site.axis(site.int("axis", 0), x.rank)
    content = held.content
    if content is not None and content.dtype != object and content.ndim == 0:
        at, size = int(content), x.shape[axis]
        start = size + at if at < 0 else Size.of(at)
        picked = b.slice(x, axis=axis, start=start, stop=start + 1)
        return reshaped(b, picked, [s for i, s in enumerate(picked.shape) if i != axis])[0]
    table = site.value(0).stored is not None and x.rank == 2 and axis == 0 and x.dtype.is_float
    indices = site.x(1) if table and content is None else from_start(site, 1, x.shape[axis])
    return b.embedding(x, indices) if table else b.gather(x, indices, axis=axis)


@operator("GatherElements", latest=13, moves=(0,))
def _gather_elements(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    axis = site.axis(site.int("axis", 0), x.rank)
    indices = from_start(site, 1, x.shape[axis])
    return b.take_along_axis(_cut_to(b, x, indices.shape, axis), indices, axis=axis)


def _cut_to(b: Builder, x: Expr, shape: Sequence[Size], axis: int) -> Expr:
    """Slice x to `shape` along the axes other than `axis`."""
    for i, size in enumerate(shape):
        if i != axis and x.shape[i] != size:
            x = b.slice(x, axis=i, stop=size)
    return x


@operator("GatherND", latest=13, moves=(0,))
def _gather_nd(site: OnnxSite) -> Made:
    """x[batch..., i0, i1, ...], where the last axis of the indices contains i0, i1, ..."""
    b, x = site.b, site.x(0)
    batch = site.int("batch_dims", 0)
    rows, _, depth = _places(site, x, 1, batch)
    head = x.shape[:batch]
    tail = x.shape[batch + depth :]
    points = site.shape(1)[batch:-1]
    table, _ = reshaped(b, x, [product(x.shape[: batch + depth]), *tail])
    picked = b.gather(table, rows, axis=0)
    return reshaped(b, picked, [*head, *points, *tail])[0]


def _places(site: OnnxSite, x: Expr, position: int, batch: int) -> tuple[Expr, list[Size], int]:
    """Convert indices of several axes to row numbers, [points], of x with these axes (and the batch axes) flattened.

    Returns the row numbers, the sizes of the points' axes, and the number of axes in an index.
    """
    b, indices, shape = site.b, site.x(position).cast(i64), site.shape(position)
    depth = site.number(shape[-1], "the number of axes in an index")
    if not 1 <= depth <= x.rank - batch:
        site.malformed(f"indices of {shape[-1]} axes do not fit rank {x.rank}")
    places: Expr | None = None
    for k in range(depth):
        size = x.shape[batch + k]
        part = b.slice(indices, axis=len(shape) - 1, start=k, stop=k + 1)
        part = b.where(part < 0, part + extent(b, size), part)
        places = part if places is None else places * extent(b, size) + part
    assert places is not None
    stride = product(x.shape[batch : batch + depth])
    for k in reversed(range(batch)):
        names = ["1"] * len(shape)
        names[k] = "n"
        along = b.rearrange(b.iota(size=x.shape[k]), pattern=f"n -> {' '.join(names)}")
        places = places + along * extent(b, stride)
        stride = stride * x.shape[k]
    return reshaped(b, places, [product(shape[:-1])])[0], list(shape[:-1]), depth


# -- writing -------------------------------------------------------------------------------------------------------


def _written(b: Builder, x: Expr, rows: Expr, updates: Expr, kind: str, site: OnnxSite) -> Expr:
    """Return x [rows, ...] with updates [points, ...] written or added at row numbers."""
    if kind == "add":
        return b.index_add(x, rows, updates, axis=0)
    if kind != "none":
        site.refuse(f"reduction {kind}")
    # The last update of a position is kept: for each row, the largest number among its updates.
    points, size = updates.shape[0], x.shape[0]
    at = b.equal(
        b.rearrange(rows, pattern="p -> 1 p"), b.rearrange(b.iota(size=size, dtype=rows.dtype), pattern="n -> n 1")
    )
    numbered = b.where(at, b.iota(size=points), b.constant(-1, i64))
    last = b.reduce_max(numbered, axes=(1,))
    chosen = b.gather(updates, b.maximum(last, 0), axis=0)
    ones = " ".join("1" * (x.rank - 1))
    hit = b.rearrange(last >= 0, pattern=f"n -> n {ones}") if ones else last >= 0
    return b.where(hit, chosen, x)


@operator("ScatterND", latest=18, moves=(0, 2))
def _scatter_nd(site: OnnxSite) -> Made:
    b, x, updates = site.b, site.x(0), site.x(2)
    kind = site.text("reduction", "none")
    rows, points, depth = _places(site, x, 1, 0)
    tail = x.shape[depth:]
    if any(s.constant == 0 for s in (*points, *x.shape)):
        return x
    table, _ = reshaped(b, x, [product(x.shape[:depth]), *tail])
    changes, _ = reshaped(b, updates, [product(points), *tail])
    return reshaped(b, _written(b, table, rows, changes, kind, site), x.shape)[0]


@operator("ScatterElements", latest=18, moves=(0, 2))
def _scatter_elements(site: OnnxSite) -> Made:
    b, x, updates = site.b, site.x(0), site.x(2)
    axis, kind = site.axis(site.int("axis", 0), x.rank), site.text("reduction", "none")
    indices = from_start(site, 1, x.shape[axis])
    whole = all(i == axis or x.shape[i] == s for i, s in enumerate(indices.shape))
    if kind == "add" and whole:
        return b.scatter_add(x, indices, updates, axis=axis)
    # Row numbers of x with all of its axes flattened.
    places: Expr | None = None
    for i, size in enumerate(x.shape):
        names = ["1"] * x.rank
        names[i] = "n"
        along = (
            indices.cast(i64)
            if i == axis
            else b.rearrange(b.iota(size=indices.shape[i]), pattern=f"n -> {' '.join(names)}")
        )
        places = along if places is None else places * extent(b, size) + along
    assert places is not None
    count = product(indices.shape)
    rows, _ = reshaped(b, b.expand(places, shape=indices.shape) if places.shape != indices.shape else places, [count])
    table, _ = reshaped(b, x, [product(x.shape)])
    changes, _ = reshaped(b, updates, [count])
    return reshaped(b, _written(b, table, rows, changes, kind, site), x.shape)[0]


@operator("TensorScatter", latest=24)
def _tensor_scatter(site: OnnxSite) -> Made:
    """Write an update into a cache along one axis. Each batch row has its own start position."""
    b, cache, update = site.b, site.x(0), site.x(1)
    axis, circular = site.axis(site.int("axis", -2), cache.rank), site.text("mode", "linear") == "circular"
    if axis == 0:
        site.malformed("the batch axis cannot be written along")
    size, count = cache.shape[axis], update.shape[axis]
    place = _along(b, b.iota(size=size), axis, cache.rank)
    if site.has(2):
        first = _along(b, site.x(2), 0, cache.rank)
        source = place - first
    else:
        source = place
    if circular:
        source = b.mod(source, extent(b, size))
    hit = (source >= 0) & (source < extent(b, count))
    source = b.where(hit, source, b.constant(0, i64))
    shape = tuple(size if i == axis else n for i, n in enumerate(cache.shape))
    picked = b.take_along_axis(update, b.expand(source, shape=shape), axis=axis)
    return b.where(hit, picked, cache)


def _along(b: Builder, x: Expr, axis: int, rank: int) -> Expr:
    """Return a vector reshaped for broadcasting along one axis of a tensor of this rank."""
    names = ["1"] * rank
    names[axis] = "n"
    return b.rearrange(x, pattern=f"n -> {' '.join(names)}")


# -- triangles, one-hot --------------------------------------------------------------------------------------------


@operator("Trilu", latest=14)
def _trilu(site: OnnxSite) -> Made:
    """The upper or lower triangle from the k-th diagonal. All other elements are zero."""
    b, x, upper = site.b, site.x(0), site.int("upper", 1)
    if x.rank < 2:
        site.malformed("the operand must have rank 2 or more")
    rows = b.rearrange(b.iota(size=x.shape[-2]), pattern="n -> n 1")
    columns = b.iota(size=x.shape[-1])
    if site.has(1):
        if product(site.shape(1)) != ONE:
            site.malformed("k must be a scalar")
        content = site.value(1).content
        edge = rows if content is not None and content.dtype != object and not content.any() else rows + site.x(1)
    else:
        edge = rows
    keep = columns >= edge if upper else columns <= edge
    return b.where(keep, x, b.constant(False if x.dtype.kind == "bool" else 0, x.dtype))


@operator("OneHot", latest=28)
def _one_hot(site: OnnxSite) -> Made:
    b, indices = site.b, site.x(0)
    depth, values = int(site.scalar(1)), site.x(2)
    rank = indices.rank + 1
    axis = site.axis(site.int("axis", -1), rank)
    off, on = (reshaped(b, b.slice(values, axis=0, start=k, stop=k + 1), [])[0] for k in (0, 1))
    names = axis_letters(indices.rank)
    spread = " ".join([*names[:axis], "1", *names[axis:]])
    wide = b.rearrange(indices.cast(i64), pattern=f"{' '.join(names)} -> {spread}")
    wide = b.where(wide < 0, wide + depth, wide)
    hit = b.equal(wide, _along(b, b.iota(size=depth), axis, rank))
    return b.where(hit, on, off)


@operator("ReverseSequence", latest=10)
def _reverse_sequence(site: OnnxSite) -> Made:
    """Reverse the first lengths[b] elements of each row."""
    b, x = site.b, site.x(0)
    batch, time = site.int("batch_axis", 1), site.int("time_axis", 0)
    place = _along(b, b.iota(size=x.shape[time]), time, x.rank)
    length = _along(b, site.x(1).cast(i64), batch, x.rank)
    index = b.where(place < length, length - 1 - place, place)
    shape = tuple(s if i in (batch, time) else ONE for i, s in enumerate(x.shape))
    full = b.expand(b.expand(index, shape=shape) if index.shape != shape else index, shape=x.shape)
    return b.take_along_axis(x, full, axis=time)
