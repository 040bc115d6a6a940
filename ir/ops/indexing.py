"""Ops that read and write at positions which another operand holds, and ops that return positions.

An indexed axis (`@v`) is read at the positions in the indices. In a scatter, it is written at these positions, and the
result has the axis.

    gather       "@v d, i -> i d"
    index_add    "@v d, i, i d -> @v d"      i is reduced by sum; target is added once

The reference raises GraphError for an index below 0 or beyond the axis. In a backend, such an index is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Grads, Operand, Primitive
from treadle.ir.ops.along_axes import wide_array
from treadle.ir.ops.axis_names import axis_letters, place
from treadle.ir.ops.shapes import Expand, zeros
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.stepping import Held, Kept, Stepping
from treadle.ir.types import DType, Type, f32, i64


def inside(op: str, indices: Any, size: int) -> Any:
    """Return the indices, checked against the size of the axis that they index. Raises GraphError."""
    outside = (indices < 0) | (indices >= size)
    if np.any(outside):
        raise GraphError(f"{op}: index {indices[outside].flat[0]} is outside an axis of size {size}")
    return indices


def _elements(indices: Any, axis: int) -> tuple[Any, ...]:
    """Return NumPy's index for the elements that `indices` selects along one axis; on other axes an element keeps its
    position.
    """
    grid = list(np.indices(indices.shape, sparse=True))
    grid[axis] = indices
    return tuple(grid)


# -- slices --------------------------------------------------------------------------------------------------


@op("gather", dtypes="t, i -> t", linear="x", flops=0)
class Gather(Primitive):
    """y[..., i..., ...] = x[..., indices[i...], ...]: slices of x along one axis, at indices of any rank"""

    moves_blocks = True
    x = Operand()
    indices = Operand()
    axis: int = 0

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        before, v, after, picked = _slice_names(self.axis, ranks[0] or 0, ranks[1] or 0)
        return f"{before} @{v} {after}, {picked} -> {before} {picked} {after}"

    def reference(self, x: Any, indices: Any) -> Any:
        return np.take(x, inside("gather", indices, x.shape[self.axis]), axis=self.axis)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, indices) = grads, inputs
        axis = place(self.axis, x.rank)
        return [b.index_add(zeros(b, x.type), indices, g, axis=axis), None]

    samples = [
        S("f32[5,3]", "i64[2,4] < 5"),
        S("f32[2,5,3]", "i64[4] < 5", axis=1),
        S("f32[2,3]", "i32[2,2] < 3", axis=-1),
        S("f32[4,3]", "i64[] < 4"),
        S("i64[4]", "i64[3] < 4"),
    ]
    errors = [
        (S("f32[4]", "f32[2]"), "indices must be an integer"),
        (S("f32[4]", "i64[2]", axis=1), "there is no axis 1"),
    ]


@op("index_add", dtypes="n, i, n -> n", linear="target added")
class IndexAdd(Primitive):
    """y = target, then y[..., indices[i...], ...] += added[..., i..., ...] for every i

    The op is the transpose of `gather`. If indices repeat, all their elements are added, 16-bit floats in f32.
    """

    target = Operand()
    indices = Operand()
    added = Operand()
    axis: int = 0
    accumulates = f32

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        before, v, after, picked = _slice_names(self.axis, ranks[0] or 0, ranks[1] or 0)
        target = f"{before} @{v} {after}"
        return f"{target}, {picked}, {before} {picked} {after} -> {target}"

    def reference(self, target: Any, indices: Any, added: Any) -> Any:
        y = np.array(wide_array(target))
        axis = place(self.axis, y.ndim)
        rows = np.moveaxis(added, range(axis, axis + indices.ndim), range(indices.ndim))
        np.add.at(np.moveaxis(y, axis, 0), inside("index_add", indices, y.shape[axis]), rows)
        return y.astype(target.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (_, indices, _) = grads, inputs
        return [g, None, b.gather(g, indices, axis=self.axis)]

    samples = [
        S("f32[5,3]", "i64[2,4] < 5", "f32[2,4,3]"),
        S("f32[2,5,3]", "i64[4] < 5", "f32[2,4,3]", axis=1),
        S("f32[2,3]", "i32[4] < 3", "f32[2,4]", axis=-1),
        S("f32[4,3]", "i64[] < 4", "f32[3]"),
        S("i64[4]", "i64[3] < 4", "i64[3]"),
    ]
    errors = [
        (S("f32[4,3]", "i64[2]", "f32[2,2]"), "sizes disagree"),
        (S("f32[4,3]", "i64[2]", "f32[3]"), "added must have rank 2"),
    ]


def _slice_names(axis: int, rank: int, picked: int) -> tuple[str, str, str, str]:
    """Return four names or groups of names: of the axes before the indexed axis, of the indexed axis, of the axes after
    it, and of the indices' axes.
    """
    axis = place(axis, rank)
    names = axis_letters(rank + picked)
    return " ".join(names[:axis]), names[axis], " ".join(names[axis + 1 : rank]), " ".join(names[rank:])


@op("embedding", axes="@v d, ... -> ... d", dtypes="t, i -> t", linear="table", flops=0)
class Embedding(Composite):
    """y[..., d] = table[indices[...], d]"""

    moves_blocks = True
    table = Operand()
    indices = Operand()

    def body(self, b: Builder, table: Expr, indices: Expr) -> Any:
        return b.gather(table, indices, axis=0)

    samples = [S("f32[5,3]", "i64[2,4] < 5"), S("f32[5,3]", "i32[] < 5")]
    errors = [
        (S("f32[5]", "i64[2]"), "table must have rank 2"),
        (S("f32[5,3]", "f32[2]"), "indices must be an integer"),
    ]


# -- elements ------------------------------------------------------------------------------------------------


@op("take_along_axis", dtypes="t, i -> t", linear="x", flops=0)
class TakeAlongAxis(Primitive):
    """y[..., i, ...] = x[..., indices[..., i, ...], ...]: elements of x along one axis

    The op equals NumPy's take_along_axis and PyTorch's gather. indices has the rank of x, and the sizes of x except
    along the axis.
    """

    x = Operand()
    indices = Operand()
    reads_slots = frozenset({"x"})
    axis: int = -1

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        source, picked = _element_names(self.axis, ranks[0] or 0)
        return f"{source}, {picked} -> {picked}"

    def reference(self, x: Any, indices: Any) -> Any:
        return np.take_along_axis(x, inside("take_along_axis", indices, x.shape[self.axis]), self.axis)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, indices) = grads, inputs
        return [b.scatter_add(zeros(b, x.type), indices, g, axis=self.axis), None]

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], states: Held) -> Any:
        """Build the reading of elements that the prologue stored in the rows' slots, by their offsets in the state. If
        the indices are the same along the dimensions after the axis, lines of the state are read.
        """
        x, indices = operands
        if not isinstance(x, Kept) or not isinstance(indices, Expr) or x.is_flat:
            return None
        b, shape, axis = step.b, x.state.shape, place(self.axis, x.state.rank)
        if axis == 0:
            return None
        names = [f"x{n}" for n in range(len(shape))]
        lines = _before_expand(b, indices)
        end = axis + 1 if all(size == ONE for size in lines.shape[axis + 1 :]) else len(shape)
        if end <= axis + 1 < len(shape):
            kept = " ".join(names[:end])
            indices = b.rearrange(lines, pattern=f"{kept}{' 1' * (len(shape) - end)} -> {kept}")
        offset = step.beside(x.rows, indices, (0,))
        for dim in range(1, end):
            place_along = indices if dim == axis else step.beside(b.iota(size=shape[dim]), indices, (dim,))
            offset = offset * b.size(value=shape[dim]) + place_along
        flat = b.rearrange(x.state, pattern=f"{' '.join(names)} -> ({' '.join(names[:end])}) {' '.join(names[end:])}")
        return b.gather(flat, offset, axis=0)

    samples = [
        S("f32[2,5]", "i64[2,3] < 5"),
        S("f32[5,2,3]", "i64[2,2,3] < 5", axis=0),
        S("i64[4]", "i32[2] < 4"),
    ]
    errors = [
        (S("f32[2,5]", "i64[3,1]"), "sizes disagree: 2 in x, 3 in indices"),
        (S("f32[2,5]", "i64[2]"), "indices must have rank 2"),
    ]


@op("scatter_add", dtypes="n, i, n -> n", linear="target added")
class ScatterAdd(Primitive):
    """y = target, then y[..., indices[..., i, ...], ...] += added[..., i, ...] for every i

    The op is the transpose of `take_along_axis`, and equals PyTorch's scatter_add. indices and added have the same
    shape: the rank of target, and its sizes except along the axis. If indices repeat, all their elements are added,
    16-bit floats in f32.
    """

    target = Operand()
    indices = Operand()
    added = Operand()
    axis: int = -1
    accumulates = f32

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        target, picked = _element_names(self.axis, ranks[0] or 0)
        return f"{target}, {picked}, {picked} -> {target}"

    def reference(self, target: Any, indices: Any, added: Any) -> Any:
        y = np.array(wide_array(target))
        np.add.at(y, _elements(inside("scatter_add", indices, y.shape[self.axis]), self.axis), added)
        return y.astype(target.dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (_, indices, _) = grads, inputs
        return [g, None, b.take_along_axis(g, indices, axis=self.axis)]

    samples = [
        S("f32[2,5]", "i64[2,3] < 5", "f32[2,3]"),
        S("f32[5,2,3]", "i64[6,2,3] < 5", "f32[6,2,3]", axis=0),
        S("i64[4]", "i32[2] < 4", "i64[2]"),
    ]
    errors = [
        (S("f32[2,5]", "i64[2,3]", "f32[2,4]"), "sizes disagree"),
        (S("f32[2,5]", "i64[2]", "f32[2]"), "indices must have rank 2"),
    ]


def _before_expand(b: Builder, indices: Expr) -> Expr:
    """Return the operand of the op that expands the indices, if its rank is the same; else the indices."""
    node = indices.value.node
    if node is None or not isinstance(node.op, Expand) or node.inputs[0].type.rank != indices.rank:
        return indices
    return b.expr(node.inputs[0])


def _element_names(axis: int, rank: int) -> tuple[str, str]:
    """Return the dimensions of the tensor with the indexed axis, and the dimensions of the indices, as text for a
    rule.
    """
    axis = place(axis, rank)
    names = axis_letters(rank + 1)
    before, after = names[:axis], names[axis + 1 : rank]
    return " ".join([*before, f"@{names[axis]}", *after]), " ".join([*before, names[rank], *after])


# -- positions -----------------------------------------------------------------------------------------------


@op("iota", flops=0)
class Iota(Primitive):
    """y[n] = n: the numbers from 0 to size - 1

    dtype   the dtype of y, an integer or a float
    """

    step = "counts from the past length"
    stops_gradient = True
    size: Size
    dtype: DType = i64

    @property
    def positional(self) -> frozenset[str]:
        return frozenset(axis_letters(1, self.size.symbols))

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        (name,) = axis_letters(1, self.size.symbols)
        return f"-> ^{name}={self.size}"

    def dtypes(self) -> str:
        return f"-> {self.dtype}"

    def check(self, types: Sequence[Type | None]) -> None:
        if self.dtype.kind == "bool":
            raise RuleError("counts in numbers, not bool")

    def reference(self) -> Any:
        return np.arange(self.size.evaluate({}), dtype=self.dtype.numpy)

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], held: Held) -> Any:
        """Build the positions of each row's tokens, [b, s]."""
        return step.positions(self.size).cast(self.dtype)

    samples = [S(size=5), S(size=3, dtype="f32")]
    errors = [(S(size=3, dtype="bool"), "counts in numbers")]


@op("positions", axes="... >s -> ... >s", dtypes="t -> i64", flops=0)
class Positions(Primitive):
    """y[..., i] = i: the position of each element of x along the last axis

    A position is the number of preceding elements, so the axis is scanned; in a generation step, positions continue
    from the row's past length. The op reads no element of x.
    """

    x = Operand()
    step = "adds the past length of the row"
    stops_gradient = True

    @property
    def positional(self) -> frozenset[str]:
        return frozenset("s")

    def reference(self, x: Any) -> Any:
        return np.broadcast_to(np.arange(x.shape[-1]), x.shape)

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], held: Held) -> Any:
        """Build the positions of each row's tokens, [b, s], or [b, ..., s] if x has other dimensions."""
        (x,) = operands
        if not isinstance(x, Expr):
            return None
        found = step.positions(x.shape[-1])
        if x.rank < 2 or found.shape == x.shape:
            return found
        return step.b.expand(step.beside(found, x, (0, x.rank - 1)), shape=x.shape)

    def repeats(self, types: Sequence[Type | None]) -> tuple[int, ...]:
        (x,) = types
        assert x is not None
        return tuple(range(x.rank - 1))

    samples = [S("i64[2,5]"), S("f32[4]")]
    errors = [(S("f32[]"), "x must have rank 1 or more")]
