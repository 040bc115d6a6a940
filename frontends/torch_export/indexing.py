"""ATen operators that read at positions in an index tensor: embedding, index, gather.

Masks are often read at all positions of an axis: x[batch[:, None, None], key[None, None, :]], in which both indices
count from 0. Such a read is a rearrange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from treadle.frontends.recipes.positions import extent
from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.frontends.torch_export.shapes import expanded
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Value
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.ir.tensors.shapes import permuted, reshaped
from treadle.ir.transforms.padding_rows import without_gradient
from treadle.ir.types import boolean, i64, u8

# -- known properties of an index ----------------------------------------------------------------------------------

_MOVES = ("rearrange", "expand", "reshape", "slice", "gather", "concat", "cast")


def is_count(value: Value, depth: int = 12) -> bool:
    """Return True if the elements of a value are known not to be negative."""
    if value.literal is not None:
        return bool(np.all(value.literal.array >= 0))
    dtype, node = value.type.dtype, value.node
    if dtype.bytes < 4 and dtype.is_int and dtype is not u8:
        return False  # a narrow cast may have made them negative
    if node is None or depth == 0:
        return False
    if node.op.name in ("iota", "positions", "size", "argmax"):
        return True
    if node.op.name in _MOVES:
        moved = node.operands[:1] if node.op.name == "gather" else node.operands
        return all(v is not None and v.type.dtype.kind != "float" and is_count(v, depth - 1) for v in moved)
    if node.op.name in ("add", "mul"):
        return all(v is not None and is_count(v, depth - 1) for v in node.operands)
    return False


def counted_axis(x: Expr, size: Size) -> int | None:
    """Return the axis of x along which its elements are 0, 1, ..., size - 1, if every other axis has size 1; None if
    there is no such axis.
    """
    value, axes = x.value, [i for i, n in enumerate(x.shape) if n != ONE]
    if size == ONE:
        return None
    if len(axes) != 1 or x.shape[axes[0]] != size:
        return None
    while (node := value.node) is not None:
        if node.op.name == "iota":
            return axes[0]
        if node.op.name in ("rearrange", "reshape"):
            value = node.operands[0]  # type: ignore[assignment]
        elif node.op.name == "add" and any(v is not None and _is_zero(v) for v in node.operands):
            value = next(v for v in node.operands if v is not None and not _is_zero(v))
        else:
            return None
    return None


def _is_zero(value: Value) -> bool:
    return value.literal is not None and value.literal.shape == () and not value.literal.array.any()


def from_start(b: Builder, indices: Expr, size: Size) -> Expr:
    """Return indices in which negative indices are replaced by positions from the start of the axis."""
    if is_count(indices.value):
        return indices
    wide = indices.cast(i64)
    return b.where(wide < 0, wide + extent(b, size), wide)


# -- reading -------------------------------------------------------------------------------------------------------


@operator("embedding.default")
def _embedding(site: TorchSite) -> Made:
    table, indices = site.x("weight"), site.x("indices")
    y, row = site.b.embedding(table, indices), site.integer("padding_idx")
    return y if row < 0 else without_gradient(site.b, y, indices, row)


_BAGS = ("sum", "mean", "max")
"""Names of the modes of F.embedding_bag, by PyTorch's number."""


@operator("embedding_bag.padding_idx", "embedding_bag.default")
def _embedding_bag(site: TorchSite) -> Made:
    """Return the sum, mean or maximum of each bag's rows of a table. Rows at `padding_idx` are left out; a bag without
    rows gives zeros.
    """
    b, table, mode = site.b, site.x("weight"), _BAGS[site.integer("mode")]
    bags, size = _bags(site)
    indices, _ = reshaped(b, site.x("indices"), [bags, size])
    rows, factors = b.embedding(table, indices), site.maybe("per_sample_weights")
    if factors is not None:
        rows = rows * reshaped(b, factors, [bags, size, ONE])[0]
    is_row = b.expand(b.constant(True, boolean), shape=(bags, size, ONE))
    if site.given("padding_idx") is not None:
        row = site.integer("padding_idx")
        is_row = b.rearrange(indices.cast(i64) != row, pattern="b n -> b n 1")
        rows = b.where(is_row, rows, b.constant(-math.inf if mode == "max" else 0.0, rows.dtype))
    count = b.reduce_sum(is_row.cast(rows.dtype), axes=(1,))
    if mode == "max":
        made = b.where(count > 0.0, b.reduce_max(rows, axes=(1,)), 0.0)
    else:
        made = b.reduce_sum(rows, axes=(1,))
        made = made / b.maximum(count, 1.0) if mode == "mean" else made
    return [made, None, None, None]


def _bags(site: TorchSite) -> tuple[Size, Size]:
    """Return the number of bags and their size: F.embedding_bag of indices [b, n] passes them as [b n], and the start
    of each bag as arange(0, b n, n).
    """
    starts, total, bags, size = site.node.args[2], site.x("indices").shape[0], None, ONE
    if str(getattr(starts, "target", "")) == "aten.arange.start_step" and starts.args[0] == 0:
        end, size = (site.importer.symbols.size(getattr(n, "meta", {}).get("val", n)) for n in (*starts.args, 1)[1:3])
        bags = total.divide(size) if end == total else None
    if bags is None or site.flag("include_last_offset"):
        site.refuse("bags of different sizes are not supported", "indices [b, n] without offsets, and padding_idx")
    return bags, size


@operator("index_select.default")
def _index_select(site: TorchSite) -> Made:
    b, x, indices = site.b, site.x("self"), site.x("index")
    if x.rank == 0:
        return x
    axis = site.axis("dim")
    if indices.rank == 0:
        indices, _ = reshaped(b, indices, [ONE])
    return b.gather(x, from_start(b, indices, x.shape[axis]), axis=axis)


@operator("gather.default")
def _gather(site: TorchSite) -> Made:
    """Read elements along one axis; along the other axes, x may be longer than the indices."""
    b, x, indices, axis = site.b, site.x("self"), site.x("index"), site.axis("dim")
    if x.rank == 0:
        return expanded(b, reshaped(b, x, [ONE] * indices.rank)[0], indices.shape)
    if indices.rank == 0:
        return b.gather(x, indices, axis=0)
    if any(n == ZERO for n in indices.shape):
        return expanded(b, b.constant(False if x.dtype.kind == "bool" else 0, x.dtype), indices.shape)
    for i, size in enumerate(indices.shape):
        if i != axis and x.shape[i] != size:
            x = b.slice(x, axis=i, stop=size)
    return b.take_along_axis(x, indices, axis=axis)


@operator("index.Tensor")
def _index(site: TorchSite) -> Made:
    """x[i, :, j]: the indices broadcast; their axes replace the indexed axes, or come first if not adjacent."""
    b, x = site.b, site.x("self")
    indices = list(site.given("indices"))
    if any(i is not None and i.dtype.kind == "bool" for i in indices):
        site.refuse("a mask is not supported: the number of elements depends on data")
    axes = [k for k, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    together = axes == list(range(axes[0], axes[-1] + 1))
    # Move the indexed axes to the front. After the gather, the result's axes are moved back.
    rest = [k for k in range(x.rank) if k not in axes]
    points = broadcast(site, [i.shape for i in given])
    counted = [counted_axis(i, x.shape[k]) for i, k in zip(given, axes, strict=True)]
    front = permuted(b, x, [*axes, *rest])
    known = [c + len(points) - i.rank if c is not None else None for c, i in zip(counted, given, strict=True)]
    if None not in known and len(set(known)) == len(known):
        picked = _laid(b, front, known, len(points))  # type: ignore[arg-type]
    elif len(given) == 1:
        picked = b.gather(front, from_start(b, given[0], front.shape[0]), axis=0)
    else:
        picked = _at_points(b, front, given, points)
    if together and axes[0] > 0:
        n, lead = len(points), axes[0]
        order = [*range(n, n + lead), *range(n), *range(n + lead, picked.rank)]
        picked = permuted(b, picked, order)
    return picked


def broadcast(site: TorchSite, shapes: Sequence[tuple[Size, ...]]) -> list[Size]:
    rank = max(len(s) for s in shapes)
    made = [ONE] * rank
    for shape in shapes:
        for i, size in enumerate(shape, start=rank - len(shape)):
            if size != ONE:
                if made[i] not in (ONE, size):
                    site.refuse(f"indices of {made[i]} and {size} elements do not broadcast")
                made[i] = size
    return made


def _laid(b: Builder, x: Expr, places: Sequence[int], points: int) -> Expr:
    """Return x, whose first axes are read at all positions. Each of these axes is moved to the axis along which its
    index counts.
    """
    names = axis_letters(x.rank)
    spread = [names[places.index(i)] if i in places else "1" for i in range(points)]
    return b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join([*spread, *names[len(places) :]])}")


def rows_at(b: Builder, sizes: Sequence[Size], indices: Sequence[Expr]) -> Expr:
    """Return indices along several axes as positions on one axis that flattens these axes."""
    rows: Expr | None = None
    for index, size in zip(indices, sizes, strict=True):
        place = from_start(b, index, size).cast(i64)
        rows = place if rows is None else rows * extent(b, size) + place
    assert rows is not None
    return rows


def _at_points(b: Builder, x: Expr, indices: Sequence[Expr], points: Sequence[Size]) -> Expr:
    """Return x[i, j, ...], which indexes the first axes of x: they are flattened to one axis, along which rows are
    gathered.
    """
    count = len(indices)
    rows = rows_at(b, x.shape[:count], indices)
    table, _ = reshaped(b, x, [product(x.shape[:count]), *x.shape[count:]])
    return b.gather(table, expanded(b, rows, points), axis=0)


# -- one-hot -----------------------------------------------------------------------------------------------------------


@operator("one_hot.default")
def _one_hot(site: TorchSite) -> Made:
    b, x, count = site.b, site.x("self"), site.integer("num_classes")
    names = axis_letters(x.rank)
    wide = b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join([*names, '1'])}") if names else x
    return b.equal(wide, b.iota(size=count, dtype=x.dtype)).cast(site.dtype())
