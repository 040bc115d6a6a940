"""Lowering rules of shapes: views where strides can say it, else copies.

rearrange, expand, slice and windows never copy unless the routine's result is theirs; reshape where dimensions that it
joins lie apart; concat and pad copy each part into a view of the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from treadle.backends.tvm.kernels.pointwise import Chain, Instruction
from treadle.backends.tvm.kernels.shaping import FoldWindows
from treadle.backends.tvm.lowering.indexing_rules import thirds
from treadle.backends.tvm.lowering.program import View, row_major
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.axis_splitting import common_runs
from treadle.ir.graph import Node
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.parts import Pad, Slice
from treadle.ir.ops.shapes import Reshape
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.types import DType, boolean

# -- views ---------------------------------------------------------------------------------------------------


def _rearrange(w: RoutineWriter, node: Node) -> None:
    w.rearranged(node)


def _expand(w: RoutineWriter, node: Node) -> None:
    w.set(node.result, w.view(node.inputs[0]).broadcast(node.result.type.shape))


def _slice(w: RoutineWriter, node: Node) -> None:
    (x,), op = node.inputs, node.op
    assert isinstance(op, Slice)
    axis = place(op.axis, x.type.rank)
    start, _ = op.span(x.type.shape[axis])
    w.set(node.result, w.view(x).sliced(axis, start, node.result.type.shape[axis], Size.of(op.stride)))


def _reshape(w: RoutineWriter, node: Node) -> None:
    (x,), op = node.inputs, node.op
    assert isinstance(op, Reshape)
    source, shape = w.view(x), node.result.type.shape
    found = reshaped(source, shape)
    if found is None:
        found = replace(w.copied(source), shape=shape, strides=row_major(shape))
    w.set(node.result, found)


def reshaped(view: View, shape: tuple[Size, ...]) -> View | None:
    """The elements in row-major order under another shape, or None where no strides say it.

    Runs of dimensions with the same product on both sides are merged, then split.
    """
    if view.is_contiguous:
        return replace(view, shape=shape, strides=row_major(shape))
    runs = common_runs(view.shape, shape)
    if runs is None:
        return None
    strides: list[Size] = [ONE] * len(shape)
    for olds, news in runs:
        taken = replace(view, shape=tuple(view.shape[a] for a in olds), strides=tuple(view.strides[a] for a in olds))
        merged = taken.merged(0, len(olds))
        if merged is None:
            return None
        for axis, step in zip(news, row_major([shape[a] for a in news]), strict=True):
            strides[axis] = merged.strides[0] * step
    return replace(view, shape=shape, strides=tuple(strides))


def _windows(w: RoutineWriter, node: Node) -> None:
    (x,), given = node.inputs, node.op.attributes
    source, axis = w.view(x), place(given["axis"], x.type.rank)
    stride, shape = source.strides[axis], node.result.type.shape
    moved = source.sliced(axis, ZERO, shape[axis], Size.of(given["stride"]))
    w.set(node.result, replace(moved, shape=shape, strides=(*moved.strides, stride * given["dilation"])))


# -- copies --------------------------------------------------------------------------------------------------


def _concat(w: RoutineWriter, node: Node) -> None:
    to = w.destination(node.result)
    axis = place(node.op.attributes["axis"], to.rank)
    start = ZERO
    for part in node.inputs:
        size = part.type.shape[axis]
        w.copy(w.view(part), to.sliced(axis, start, size), node)
        start = start + size


def _pad(w: RoutineWriter, node: Node) -> None:
    (x,), op = node.inputs, node.op
    assert isinstance(op, Pad)
    to, axis = w.destination(node.result), place(op.axis, x.type.rank)
    size = x.type.shape[axis]
    for start, count in ((ZERO, op.before), (op.before + size, op.after)):
        if count != ZERO:
            fill(w, to.sliced(axis, start, count), op.value, node)
    w.copy(w.view(x), to.sliced(axis, op.before, size), node)


def fill(w: RoutineWriter, to: View, value: float, node: Node) -> None:
    """Add a step that writes one number everywhere."""
    constant = Instruction("constant", (), to.dtype.name, (("value", _held(value, to.dtype)),))
    w.pointwise(Chain((), (constant,)), [], to, node)


def _held(value: float, dtype: DType) -> float | int | bool:
    """A number as an array of the dtype holds it."""
    if dtype.is_float:
        return float(value)
    if dtype is boolean:
        return bool(value)
    with np.errstate(all="ignore"):
        return int(np.asarray(value).astype(dtype.numpy))


def _fold_windows(w: RoutineWriter, node: Node) -> None:
    (x,), given = node.inputs, node.op.attributes
    to = w.destination(node.result)
    axis = place(given["axis"], to.rank)

    def split(view: View) -> View | None:
        """p, i, d, e"""
        return thirds(replace(view, shape=view.shape[:-1], strides=view.strides[:-1]), axis)

    source = w.view(x)
    outer = split(source)
    if outer is None:
        source = w.copied(source)
        outer = split(source)
    direct = thirds(to, axis)
    made = direct if direct is not None else thirds(w.scratch(to.dtype, to.shape), axis)
    assert outer is not None
    assert made is not None
    sizes = [made.shape[0], made.shape[1], made.shape[2], outer.shape[1], source.shape[-1]]
    steps = [Size.of(given["stride"]), Size.of(given["dilation"])]
    strides = [*outer.strides, source.strides[-1], *made.strides]
    w.step(FoldWindows(to.dtype.name), [outer, made], [*sizes, *steps, *strides], node)
    if direct is None:
        w.copy(View.contiguous(made.buffer, to.shape), to, node)


def _relayout(w: RoutineWriter, node: Node) -> None:
    (x,) = node.inputs
    w.views[node.result] = w.packed(w.view(x), node.op.attributes["to"])


RULES: Mapping[str, Rule] = {
    "rearrange": _rearrange,
    "expand": _expand,
    "slice": _slice,
    "reshape": _reshape,
    "windows": _windows,
    "concat": _concat,
    "pad": _pad,
    "fold_windows": _fold_windows,
    "relayout": _relayout,
}
KEEPS: Mapping[str, Keeps] = {}
