"""ATen operators that write at positions in an index tensor: scatter, scatter_add, index_put, index_add.

A write that is not a sum becomes a read. For each position, the number of the last element written there is computed:

    at = where(index == n, 0 1 2 ... m-1, -1), its greatest along m          at = scatter_add(0, index, 1 2 ... m) - 1
    y  = where(at >= 0, source[at], x)                                       if no position is written twice

So the result is bitwise identical to PyTorch's in any dtype. If positions repeat, the last write wins, as in PyTorch on
one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from treadle.frontends.torch_export.indexing import broadcast, counted_axis, from_start, rows_at
from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.frontends.torch_export.shapes import expanded, replaced
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Value
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.ir.tensors.shapes import permuted, reshaped
from treadle.ir.types import i64

# -- along one axis ------------------------------------------------------------------------------------------------


def _within(site: TorchSite, rule: Callable[[Expr, Expr, Expr | None], Expr]) -> Expr:
    """Apply `rule` to self, index and src, with the indices extended to self's size along the other axes.

    If the indices are shorter than self, the rest of self is unchanged, and the rest of src is not read.
    """
    b, x, indices, axis = site.b, site.x("self"), site.x("index"), site.axis("dim")
    source = site.maybe("src") if "src" in site.arguments else None
    if x.rank == 0:
        row, places, written = (None if v is None else reshaped(b, v, [ONE])[0] for v in (x, indices, source))
        assert row is not None
        assert places is not None
        return reshaped(b, rule(row, places, written), [])[0]
    if any(n == ZERO for n in indices.shape):
        return x
    for i, size in enumerate(indices.shape):
        if source is not None and source.shape[i] != size:
            source = b.slice(source, axis=i, stop=size)

    def cut(part: Expr, axes: Sequence[int]) -> Expr:
        if not axes:
            return rule(part, indices, source)
        i = axes[0]
        head = b.slice(part, axis=i, stop=indices.shape[i])
        return replaced(b, part, cut(head, axes[1:]), i, ZERO)

    return cut(x, [i for i in range(x.rank) if i != axis and x.shape[i] != indices.shape[i]])


def _zeros(b: Builder, shape: Sequence[Size]) -> Expr:
    return expanded(b, b.constant(0, i64), shape)


def _hits(b: Builder, x: Expr, indices: Expr, axis: int) -> Expr:
    """Return the number of writes to each element of x."""
    ones = expanded(b, b.constant(1, i64), indices.shape)
    return b.scatter_add(_zeros(b, x.shape), indices, ones, axis=axis)


def _laid(b: Builder, size: Size, axis: int, rank: int, first: int = 0) -> Expr:
    """Return first, first + 1, ... along one axis of a tensor of this rank."""
    names = ["n" if i == axis else "1" for i in range(rank)]
    numbers = b.iota(size=size)
    return b.rearrange(numbers + first if first else numbers, pattern=f"n -> {' '.join(names)}")


def _last_writes(b: Builder, indices: Expr, size: Size, axis: int) -> Expr:
    """For each of `size` positions along an axis, the number of the last index that equals it; -1 if there is none."""
    count, rank = indices.shape[axis], indices.rank
    if is_distinct(indices.value, axis):
        shape = [size if i == axis else n for i, n in enumerate(indices.shape)]
        numbers = expanded(b, _laid(b, count, axis, rank, first=1), indices.shape)
        return b.scatter_add(_zeros(b, shape), indices, numbers, axis=axis) - 1
    apart, _ = reshaped(b, indices.cast(i64), [*indices.shape[:axis], ONE, *indices.shape[axis:]])
    same = b.equal(apart, _laid(b, size, axis, rank + 1))
    return b.reduce_max(b.where(same, _laid(b, count, axis + 1, rank + 1), b.constant(-1, i64)), axes=(axis + 1,))


def is_distinct(value: Value, axis: int) -> bool:
    """Return True if the indices along an axis are known to be distinct: a single index, an iota, distinct constants,
    results of top_k.

    A narrowing cast may make two indices equal. A cast of positions to 32 bits does not, because no axis is that long.
    """
    if value.type.shape[axis] == ONE:
        return True
    narrowed = False
    while True:
        if value.literal is not None:
            if narrowed:
                return False
            places = np.sort(np.broadcast_to(value.literal.array, value.literal.shape), axis=axis)
            return bool((np.diff(places, axis=axis) != 0).all())
        node = value.node
        if node is None:
            return False
        if node.op.name == "cast" and value.type.dtype.is_int and node.inputs[0].type.dtype.is_int:
            held, given = value.type.dtype.bytes, node.inputs[0].type.dtype.bytes
            if held < min(given, 4):
                return False
            narrowed = narrowed or held < given
            value = node.inputs[0]
            continue
        return node.op.name == "iota" or (
            node.op.name == "top_k" and node.op.attributes["axis"] % value.type.rank == axis
        )


@operator("scatter.src")
def _scatter(site: TorchSite) -> Made:
    b, axis = site.b, site.axis("dim")

    def rule(x: Expr, indices: Expr, source: Expr | None) -> Expr:
        assert source is not None
        at = _last_writes(b, indices, x.shape[axis], axis)
        return b.where(at >= 0, b.take_along_axis(source.cast(x.dtype), b.maximum(at, 0), axis=axis), x)

    return _within(site, rule)


@operator("scatter.value")
def _scatter_value(site: TorchSite) -> Made:
    b, axis = site.b, site.axis("dim")

    def rule(x: Expr, indices: Expr, source: Expr | None) -> Expr:
        return b.where(_hits(b, x, indices, axis) > 0, site.operand("value", x.dtype), x)

    return _within(site, rule)


@operator("scatter_add.default")
def _scatter_add(site: TorchSite) -> Made:
    return _within(site, _adding(site))


def _adding(site: TorchSite) -> Callable[[Expr, Expr, Expr | None], Expr]:
    b, axis = site.b, site.axis("dim")

    def rule(x: Expr, indices: Expr, source: Expr | None) -> Expr:
        assert source is not None
        if x.dtype.kind == "bool":
            site.refuse("bools are not supported")
        return b.scatter_add(x, indices, source.cast(x.dtype), axis=axis)

    return rule


@operator("scatter_reduce.two", "scatter.reduce")
def _scatter_reduce(site: TorchSite) -> Made:
    """Build scattered sums and means. Without self, the written elements start at 0."""
    b, axis, kind = site.b, site.axis("dim"), site.text("reduce")
    own = bool(site.given("include_self", True))
    if kind not in ("sum", "add", "mean") or (kind == "mean" and not site.dtype().is_float):
        site.refuse(f"reduce={kind!r} with dtype {site.dtype()} is not supported", "reduce='sum'")

    def rule(x: Expr, indices: Expr, source: Expr | None) -> Expr:
        hits = None if own and kind != "mean" else _hits(b, x, indices, axis)
        start = x if own or hits is None else b.where(hits > 0, b.constant(0, x.dtype), x)
        total = _adding(site)(start, indices, source)
        if kind != "mean" or hits is None:
            return total
        count = hits + 1 if own else b.maximum(hits, 1)
        return total / count.cast(x.dtype)

    return _within(site, rule)


@operator("index_add.default")
def _index_add(site: TorchSite) -> Made:
    b, x, indices, source = site.b, site.x("self"), site.x("index"), site.x("source")
    if site.real("alpha") != 1:
        site.refuse("alpha is not supported", "the source times alpha")
    if x.dtype.kind == "bool":
        site.refuse("bools are not supported")
    if x.rank == 0:
        return x + reshaped(b, source, [])[0]
    axis = site.axis("dim")
    if indices.rank == 0:
        indices, _ = reshaped(b, indices, [ONE])
        source, _ = reshaped(b, source, [ONE if i == axis else n for i, n in enumerate(x.shape)])
    return b.index_add(x, from_start(b, indices, x.shape[axis]), source, axis=axis)


# -- at points of several axes -------------------------------------------------------------------------------------


@operator("index_put.default", "_unsafe_index_put.default")
def _index_put(site: TorchSite) -> Made:
    """x[i, :, j] = values, which broadcast; with `accumulate` they are added, also if points repeat."""
    b, x, more = site.b, site.x("self"), site.flag("accumulate")
    values = site.x("values").cast(x.dtype)
    indices = list(site.given("indices"))
    if more and x.dtype.kind == "bool":
        site.refuse("a sum of bools is not supported")
    if any(i is not None and i.dtype.kind == "bool" for i in indices):
        return _at_truths(site, x, indices, values, more)
    axes = [k for k, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    rest = [k for k in range(x.rank) if k not in axes]
    points = broadcast(site, [i.shape for i in given])
    # Values have the layout of x[i, :, j]: the points replace the indexed axes if these are adjacent, else come first.
    together = axes == list(range(axes[0], axes[-1] + 1))
    lead, n = (axes[0] if together else 0), len(points)
    spread = [*(x.shape[k] for k in rest[:lead]), *points, *(x.shape[k] for k in rest[lead:])]
    values = expanded(b, values, spread)
    values = permuted(b, values, [*range(lead, lead + n), *range(lead), *range(lead + n, len(spread))])
    front = permuted(b, x, [*axes, *rest])
    tail, sizes = [x.shape[k] for k in rest], [x.shape[k] for k in axes]
    table, _ = reshaped(b, front, [product(sizes), *tail])
    updates, _ = reshaped(b, values, [product(points), *tail])
    rows, _ = reshaped(b, expanded(b, rows_at(b, sizes, given), points), [product(points)])
    if more:
        made = b.index_add(table, rows, updates, axis=0)
    else:
        at = _last_points(b, rows, given, sizes, points)
        held = b.rearrange(at, pattern=f"n -> n {' '.join('1' * len(tail))}")
        made = b.where(held >= 0, b.gather(updates, b.maximum(at, 0), axis=0), table)
    made, _ = reshaped(b, made, front.shape)
    order = [*axes, *rest]
    return permuted(b, made, [order.index(k) for k in range(x.rank)])


def _last_points(b: Builder, rows: Expr, given: Sequence[Expr], sizes: Sequence[Size], points: Sequence[Size]) -> Expr:
    """Do the same as `_last_writes`, for rows. Points are distinct if the index of each axis is an iota."""
    size = product(sizes)
    counted = {
        c + len(points) - i.rank for i, n in zip(given, sizes, strict=True) if (c := counted_axis(i, n)) is not None
    }
    if len(given) == 1 and given[0].rank == 1:
        return _last_writes(b, from_start(b, given[0], size), size, 0)
    if any(i not in counted and n != ONE for i, n in enumerate(points)):
        return _last_writes(b, rows, size, 0)
    numbers = b.iota(size=rows.shape[0]) + 1
    return b.index_add(_zeros(b, [size]), rows, numbers, axis=0) - 1


def _at_truths(site: TorchSite, x: Expr, indices: Sequence[Expr | None], values: Expr, more: bool) -> Expr:
    """x[..., mask] = values, if the values are the same for all elements that the mask selects."""
    b, given = site.b, [i for i in indices if i is not None]
    if len(given) > 1:
        site.refuse("indexing with a boolean mask together with another index is not supported", "torch.where")
    (mask,) = given
    first = next(k for k, i in enumerate(indices) if i is not None)
    behind = x.rank - first - mask.rank
    shape = list(values.shape)
    if len(shape) > behind and shape[len(shape) - behind - 1] != ONE:
        site.refuse("a mask with separate values is not supported: their number depends on data", "torch.where")
    if len(shape) > behind:
        at = len(shape) - behind - 1
        values, _ = reshaped(b, values, [*shape[:at], *[ONE] * mask.rank, *shape[at + 1 :]])
    wide, _ = reshaped(b, mask, [*mask.shape, *[ONE] * behind])
    wide, values = (expanded(b, v, x.shape) for v in (wide, x + values if more else values))
    return b.where(wide, values, x)
