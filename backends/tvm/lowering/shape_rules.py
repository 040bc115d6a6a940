"""Lowering rules of shape ops: copies for values that are not views in the storage plan.

rearrange, expand, slice, reshape and windows are usually views, for which nothing is written. concat and pad copy
operands that are not already stored in the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from treadle.backends.tvm.kernels.pointwise import Chain, Instruction
from treadle.backends.tvm.kernels.shaping import FoldWindows
from treadle.backends.tvm.lowering.indexing_rules import thirds
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.parts import Pad
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.storage.rearranged_views import Rearranged
from treadle.ir.storage.views import View
from treadle.ir.types import DType, boolean

# -- views that are written --------------------------------------------------------------------------------------


def _move(w: RoutineWriter, node: Node) -> None:
    """Add a copy of the elements of a view, if it is a result of the function, or if strides cannot express it."""
    (x,) = node.inputs
    source, to = w.view(x), w.view(node.result)
    shown = node.op.viewed(source, [x.type])
    there = node.op.part_of(to, [x.type], 0) if shown is None else None
    if there is not None:
        w.copy(source, there, node)
        return
    if shown is None:
        shown = node.op.viewed(w.copied(source), [x.type])
    assert shown is not None
    w.copy(shown, to, node)


def _rearrange(w: RoutineWriter, node: Node) -> None:
    (x,) = node.inputs
    moved = Rearranged.of(node.op, x.type)
    w.copy(moved.factored(w.view(x)), moved.split(w.view(node.result), moved.result), node)


# -- copies --------------------------------------------------------------------------------------------------


def _concat(w: RoutineWriter, node: Node) -> None:
    to = w.view(node.result)
    axis = place(node.op.attributes["axis"], to.rank)
    start = ZERO
    for part in node.inputs:
        size = part.type.shape[axis]
        if not w.is_part(part, node):
            w.copy(w.view(part), to.sliced(axis, start, size), node)
        start = start + size


def _pad(w: RoutineWriter, node: Node) -> None:
    (x,), op = node.inputs, node.op
    assert isinstance(op, Pad)
    to, axis = w.view(node.result), place(op.axis, x.type.rank)
    size = x.type.shape[axis]
    for start, count in ((ZERO, op.before), (op.before + size, op.after)):
        if count != ZERO:
            fill(w, to.sliced(axis, start, count), op.value, node)
    if not w.is_part(x, node):
        w.copy(w.view(x), to.sliced(axis, op.before, size), node)


def fill(w: RoutineWriter, to: View, value: float, node: Node) -> None:
    """Add a step that fills a view with one number."""
    constant = Instruction("constant", (), to.dtype.name, (("value", _held(value, to.dtype)),))
    w.pointwise(Chain((), (constant,)), [], to, node)


def _held(value: float, dtype: DType) -> float | int | bool:
    """Return a number as the value that an array of the dtype stores for it."""
    if dtype.is_float:
        return float(value)
    if dtype is boolean:
        return bool(value)
    with np.errstate(all="ignore"):
        return int(np.asarray(value).astype(dtype.numpy))


def _fold_windows(w: RoutineWriter, node: Node) -> None:
    (x,), given = node.inputs, node.op.attributes
    to = w.view(node.result)
    axis = place(given["axis"], to.rank)

    def split(view: View) -> View | None:
        """Return the view with the dimensions p, i, d, e, or None if the strides do not allow this."""
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
        w.copy(View.contiguous(made.storage, to.shape), to, node)


def _relayout(w: RoutineWriter, node: Node) -> None:
    (x,) = node.inputs
    w.pack(w.view(x), w.view(node.result))


RULES: Mapping[str, Rule] = {
    "rearrange": _rearrange,
    "expand": _move,
    "slice": _move,
    "reshape": _move,
    "windows": _move,
    "concat": _concat,
    "pad": _pad,
    "fold_windows": _fold_windows,
    "relayout": _relayout,
}
KEEPS: Mapping[str, Keeps] = {}
