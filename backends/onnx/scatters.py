"""ONNX code that reads and writes elements at positions: windows of an axis, sums at indices, entries of a cache.

    windows                  Gather at the positions of every window
    fold_windows, index_add  ScatterND that adds, with the axis moved to the front
    scatter_add              ScatterElements that adds
    append                   ScatterND at pairs of a slot and a position

`reduction="add"` exists from opset 16 on.
"""

from __future__ import annotations

import numpy as np

from treadle.backends.onnx.spelled_line import OnnxLine, Tensor
from treadle.backends.onnx.writer import newer_opset
from treadle.ir.ops.axis_names import place
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import i64


def _window_positions(line: OnnxLine, count: Size, size: Size) -> Tensor:
    """Return i64[count, size]: the position on the axis of each element of each window."""
    w, stride, dilation = line.w, line.op.stride, line.op.dilation
    if count.constant is not None and size.constant is not None:
        grid = np.arange(count.constant)[:, None] * stride + np.arange(size.constant) * dilation
        return w.constant(grid, i64)
    first = w.add("Unsqueeze", w.add("Mul", w.counted(count), w.constant(stride, i64)), w.integers(1))
    return w.add("Add", first, w.add("Mul", w.counted(size), w.constant(dilation, i64)))


def windows(line: OnnxLine) -> Tensor:
    """Emit the windows of an axis. The elements of a window are along a new last axis."""
    rank = line.type("x").rank
    axis = place(line.op.axis, rank)
    made = line.w.add("Gather", line.x, _window_positions(line, line.result.shape[axis], line.op.size), axis=axis)
    order = [at for at in range(rank + 1) if at != axis + 1] + [axis + 1]
    return made if axis + 1 == rank else line.w.add("Transpose", made, perm=order)


def fold_windows(line: OnnxLine) -> Tensor:
    """Emit the sum of windows, each added at its original positions."""
    x, rank = line.type("x"), line.type("x").rank
    axis = place(line.op.axis, rank - 1)
    positions = _window_positions(line, x.shape[axis], x.shape[-1])
    others = [at for at in range(rank - 1) if at != axis]
    shape = [line.result.shape[at] for at in (axis, *others)]
    zeros = line.w.add("Expand", line.w.constant(0, x.dtype), line.w.vector(shape))
    updates = line.w.add("Transpose", line.x, perm=[axis, rank - 1, *others])
    return _moved_back(line, _added(line, zeros, positions, updates), axis, rank - 1)


def index_add(line: OnnxLine) -> Tensor:
    """Emit the target with rows added at indices along an axis."""
    rank, picked = line.type("target").rank, line.type("indices").rank
    axis = place(line.op.axis, rank)
    others = [at for at in range(rank) if at != axis]
    target, updates = line.target, line.added
    if axis:
        target = line.w.add("Transpose", target, perm=[axis, *others])
        before, after = range(axis), range(axis + picked, rank - 1 + picked)
        updates = line.w.add("Transpose", updates, perm=[*range(axis, axis + picked), *before, *after])
    return _moved_back(line, _added(line, target, line.indices, updates), axis, rank)


def _added(line: OnnxLine, target: Tensor, positions: Tensor, updates: Tensor) -> Tensor:
    """Emit the target with the updates added to its rows at these positions."""
    _refuse_before_16(line)
    rows = line.w.add("Unsqueeze", line.w.cast(positions, i64), line.w.integers(-1))
    return line.w.add("ScatterND", target, rows, updates, reduction="add")


def _moved_back(line: OnnxLine, made: Tensor, axis: int, rank: int) -> Tensor:
    """Move the first dimension back to the position of `axis`."""
    order = [*range(1, axis + 1), 0, *range(axis + 1, rank)]
    return line.w.add("Transpose", made, perm=order) if axis else made


def append(line: OnnxLine) -> Tensor:
    """Emit a copy of a cache (which is not a state in ONNX), with new elements at pairs of a slot and a position."""
    w, rank = line.w, line.type("state").rank
    axis = place(line.op.axis, rank)
    order = [0, axis, *(at for at in range(1, rank) if at != axis)]
    count, capacity = line.type("x").shape[axis], line.type("state").shape[axis]
    places = w.add("Add", w.add("Unsqueeze", line.start, w.integers(1)), w.counted(count))
    if line.op.ring:
        places = w.add("Mod", places, w.vector([capacity]))
    slots = w.add("Expand", w.add("Unsqueeze", line.rows, w.integers(1)), w.vector([line.type("x").shape[0], count]))
    pairs = w.add("Concat", *(w.add("Unsqueeze", each, w.integers(-1)) for each in (slots, places)), axis=-1)
    state, x = line.state, line.x
    if axis != 1:
        state, x = (w.add("Transpose", each, perm=order) for each in (state, x))
    made = w.add("ScatterND", state, pairs, x)
    back = [order.index(at) for at in range(rank)]
    return w.add("Transpose", made, perm=back) if axis != 1 else made


def scatter_add(line: OnnxLine) -> Tensor:
    """Emit the target with each element added at its own index along an axis."""
    _refuse_before_16(line)
    return line.w.add("ScatterElements", line.target, line.indices, line.added, axis=line.op.axis, reduction="add")


def _refuse_before_16(line: OnnxLine) -> None:
    if line.w.opset < 16:
        raise line.w.refusal(
            f"opset {line.w.opset} has no scatter with reduction='add'",
            hint=newer_opset(16),
        )
