"""Lowering rules of reductions, cumulative sums, argmax and top-k. Dimensions are merged into few loops, and vectors
are used if strides allow it.

A kernel has a fixed number of loops. Adjacent dimensions become one loop if their strides allow it. If they do not, an
operand is copied first, and a result is computed into new memory and copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from treadle.backends.tvm.kernels.reduction import Reduce, RunningSum, SizeValue
from treadle.backends.tvm.kernels.selection import ArgMax, TopK
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node
from treadle.ir.ops.along_axes import places
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.reductions import ArgMax as ArgMaxOp
from treadle.ir.ops.reductions import CumSum, ReduceMax, ReduceMean, ReduceMin, ReduceSum, SizeOf
from treadle.ir.ops.reductions import TopK as TopKOp
from treadle.ir.sizing.sizes import ONE, ZERO
from treadle.ir.storage.views import View

# -- dimensions as loops -------------------------------------------------------------------------------------

Form = Callable[[View, Sequence[View]], "list[View] | None"]
"""A function that returns views of an operand and of results, in that order, with the dimensions that a kernel
expects, or None if the strides do not allow this.
"""


def fitted(
    w: RoutineWriter, node: Node, x: View, results: Sequence[View], form: Form
) -> tuple[list[View], Callable[[], None]]:
    """Return the operand and the results as views in a form, with few copies, and a function that copies results back.

    Call that function after adding the kernel's step.
    """
    for operand_copied, results_copied in ((False, False), (True, False), (False, True), (True, True)):
        source = w.scratch(x.dtype, x.shape) if operand_copied else x
        made = [w.scratch(r.dtype, r.shape) for r in results] if results_copied else list(results)
        found = form(source, made)
        if found is not None:
            break
    assert found is not None, "contiguous views fit every form"
    if operand_copied:
        w.copy(x, source, node)

    def finish() -> None:
        for result, copy in zip(results, made, strict=True):
            if copy is not result:
                w.copy(copy, result, node)

    return found, finish


def looped(views: Sequence[View], first: int, count: int, most: int) -> list[View] | None:
    """Merge `count` dimensions from `first` on into exactly `most` dimensions, in the same way in all views. Return
    None if the strides do not allow this.

    These dimensions have the same sizes in all views.
    """
    kept = [a for a in range(first, first + count) if views[0].shape[a] != ONE]
    found = [_picked(v, [*range(first), *kept, *range(first + count, v.rank)]) for v in views]
    left = len(kept)
    for axis in range(first + len(kept) - 2, first - 1, -1):
        merged = [v.merged(axis, 2) for v in found]
        if left > most and all(v is not None for v in merged):
            found = [v for v in merged if v is not None]
            left -= 1
    if left > most:
        return None
    ones = most - left
    return [
        replace(
            v,
            shape=(*v.shape[:first], *[ONE] * ones, *v.shape[first:]),
            strides=(*v.strides[:first], *[ZERO] * ones, *v.strides[first:]),
        )
        for v in found
    ]


def rows(x: View, results: Sequence[View]) -> list[View] | None:
    """Return views for kernels along rows: two loops over all dimensions but the last, which is contiguous."""
    views = looped([x, *results], 0, x.rank - 1, 2)
    return views if views is not None and all(side_by_side(v, 2) for v in views) else None


def side_by_side(view: View, axis: int) -> bool:
    """Return True if a dimension is contiguous or has size 1."""
    return view.strides[axis] == ONE or view.shape[axis] == ONE


def _picked(view: View, axes: Sequence[int]) -> View:
    """Return a view of some dimensions, in the order of `axes`. All other dimensions have size 1."""
    return replace(view, shape=tuple(view.shape[a] for a in axes), strides=tuple(view.strides[a] for a in axes))


# -- rules ---------------------------------------------------------------------------------------------------


def _reduce(w: RoutineWriter, node: Node) -> None:
    op, (value,) = node.op, node.inputs
    assert isinstance(op, (ReduceSum, ReduceMax, ReduceMin, ReduceMean))
    reduced = places(op.axes, value.type.rank)
    kept = [a for a in range(value.type.rank) if a not in reduced]
    x, y = w.view(value).permuted([*kept, *reduced]), w.view(node.result)
    if op.keep:
        y = _picked(y, kept)
    if not reduced:
        w.copy(x, y, node)
        return

    def form(x: View, results: Sequence[View]) -> list[View] | None:
        outer = looped([x, *results], 0, len(kept), 2)
        inner = None if outer is None else looped(outer[:1], 2, len(reduced), 2)
        if outer is None or inner is None:
            return None
        views = [*inner, *outer[1:]]
        return views if side_by_side(views[0], 3) or _columns(views) else None

    (source, to), finish = fitted(w, node, x, [y], form)
    along = "columns" if _columns([source, to]) and not side_by_side(source, 3) else "rows"
    kernel = Reduce(op.name.removeprefix("reduce_"), x.dtype.name, along)
    w.step(kernel, [source, to], [*source.shape, *source.strides, *to.strides], node)
    finish()


def _columns(views: Sequence[View]) -> bool:
    """Return True if the remaining dimension is contiguous in the operand and in the result."""
    return all(side_by_side(v, 1) for v in views)


def _cumsum(w: RoutineWriter, node: Node) -> None:
    op, (value,) = node.op, node.inputs
    assert isinstance(op, CumSum)
    axis = place(op.axis, value.type.rank)

    def form(x: View, results: Sequence[View]) -> list[View] | None:
        outer = looped([x, *results], 0, axis, 1)
        return outer and looped(outer, 2, value.type.rank - axis - 1, 1)

    (x, y), finish = fitted(w, node, w.view(value), [w.view(node.result)], form)
    vector = x.shape[2] != ONE and side_by_side(x, 2) and side_by_side(y, 2)
    kernel = RunningSum(x.dtype.name, op.exclusive, op.reverse, vector)
    w.step(kernel, [x, y], [*x.shape, *x.strides, *y.strides], node)
    finish()


def _argmax(w: RoutineWriter, node: Node) -> None:
    op, (value,) = node.op, node.inputs
    assert isinstance(op, ArgMaxOp)
    axis = place(op.axis, value.type.rank)
    others = [a for a in range(value.type.rank) if a != axis]
    y = w.view(node.result)
    if op.keep:
        y = _picked(y, others)

    def form(x: View, results: Sequence[View]) -> list[View] | None:
        return looped([x, *results], 0, len(others), 2)

    (x, y), finish = fitted(w, node, w.view(value).permuted([*others, axis]), [y], form)
    w.step(ArgMax(x.dtype.name, side_by_side(x, 2)), [x, y], [*x.shape, *x.strides, *y.strides], node)
    finish()


def _top_k(w: RoutineWriter, node: Node) -> None:
    op, (value,) = node.op, node.inputs
    assert isinstance(op, TopKOp)
    axis = place(op.axis, value.type.rank)
    order = [*(a for a in range(value.type.rank) if a != axis), axis]
    results = [w.view(r).permuted(order) for r in node.results]

    def form(x: View, results: Sequence[View]) -> list[View] | None:
        return looped([x, *results], 0, len(order) - 1, 2)

    views, finish = fitted(w, node, w.view(value).permuted(order), results, form)
    x = views[0]
    sizes = [*x.shape, *(stride for view in views for stride in view.strides)]
    w.step(TopK(op.k, x.dtype.name, side_by_side(x, 2)), views, sizes, node, writes=2)
    finish()


def _size(w: RoutineWriter, node: Node) -> None:
    op = node.op
    assert isinstance(op, SizeOf)
    w.step(SizeValue(op.dtype.name), [w.view(node.result)], [op.value], node)


RULES: Mapping[str, Rule] = {
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_mean": _reduce,
    "cumsum": _cumsum,
    "argmax": _argmax,
    "top_k": _top_k,
    "size": _size,
}
KEEPS: Mapping[str, Keeps] = {}
