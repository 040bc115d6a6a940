"""Lowering rules of indexing: gather and take_along_axis, their transposes, iota and positions.

Kernels have three dimensions for operands of any rank: the axes before the indexed axis, that axis, and the axes after
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from treadle.backends.tvm.kernels.arithmetic.conversions import working
from treadle.backends.tvm.kernels.encoded.block_words import word_form
from treadle.backends.tvm.kernels.encoded.take_blocks import TakeBlocks, TakeWords
from treadle.backends.tvm.kernels.encoded.unpacking import packed_form
from treadle.backends.tvm.kernels.gathering import ScatterAdd, Take
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction
from treadle.backends.tvm.kernels.shaping import Iota
from treadle.backends.tvm.lowering.program import STATUS_WORDS
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node, Value
from treadle.ir.ops.axis_names import place
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.storage.views import View
from treadle.ir.types import DType
from treadle.passes.lowering.read_blocks import unpacking

# -- reading -------------------------------------------------------------------------------------------------


def _embedding(w: RoutineWriter, node: Node) -> None:
    _gather_along(w, node, 0)


def _gather(w: RoutineWriter, node: Node) -> None:
    _gather_along(w, node, _axis(node))


def _gather_along(w: RoutineWriter, node: Node, axis: int) -> None:
    x, indices = node.inputs
    if (unpacked := unpacking(x)) is not None:
        _take_blocks(w, node, unpacked, indices)
        return
    source, picked = w.view(x), _flat(w, w.view(indices))

    def emit(to: View) -> None:
        panels = source.panels
        if panels is not None:
            (_, count, columns), (p, i, _) = (ONE, *x.type.shape), to.shape
            kernel = Take(x.type.dtype.bytes, indices.type.dtype.name, True, panels.width, panels.transposed)
            # x's strides are omitted: the kernel knows the layout of panels
            sizes = [p, count, columns, i, ZERO, ZERO, picked.strides[0], *to.strides[:2]]
            w.step(kernel, [source, picked, to, STATUS_WORDS], sizes, node, writes=2)
            return
        _take(w, node, _thirds_of(w, source, axis), _shared(picked), to, shared=True)

    _write(w, node.result, axis, indices.type.rank, emit, rows=source.panels is not None)


def _take_blocks(w: RoutineWriter, node: Node, unpacked: Node, indices: Value) -> None:
    """Gather rows of a table that is stored in blocks."""
    source, picked = w.view(unpacked.inputs[0]), _flat(w, w.view(indices))
    layout, of = source.panels, unpacked.op.attributes["of"]
    assert layout is not None
    kernel: Kernel
    if layout.kind == "blocks":
        words = word_form(of)
        assert words is not None
        kernel = TakeWords(words, indices.type.dtype.name)
    else:
        form = packed_form(of)
        assert form is not None
        kernel = TakeBlocks(form, indices.type.dtype.name, layout.width, layout.kind, layout.flat, layout.twos)
    rows, columns = unpacked.result.type.shape

    def emit(to: View) -> None:
        sizes = [rows, columns, to.shape[1], picked.strides[0], to.strides[1]]
        w.step(kernel, [source, picked, to, STATUS_WORDS], sizes, node, writes=2)

    _write(w, node.result, 0, indices.type.rank, emit, rows=True)


def _take_along_axis(w: RoutineWriter, node: Node) -> None:
    x, indices = node.inputs
    axis = _axis(node)
    source, picked = _thirds_of(w, w.view(x), axis), _thirds_of(w, w.view(indices), axis)
    _write(w, node.result, axis, 1, lambda to: _take(w, node, source, picked, to))


def _take(w: RoutineWriter, node: Node, x: View, picked: View, to: View, shared: bool = False) -> None:
    """Add the step that gathers; all views have three dimensions. `shared`: all elements of a row have the
    same index.
    """
    rows = shared and _side_by_side(x) and _side_by_side(to)
    p, i, d = to.shape
    strides = (x.strides, picked.strides, to.strides)
    if rows:
        strides = (x.strides[:2], picked.strides[1:2], to.strides[:2])
    kernel = Take(to.dtype.bytes, picked.dtype.name, rows)
    sizes = [p, x.shape[1], d, i, *[s for each in strides for s in each]]
    w.step(kernel, [x, picked, to, STATUS_WORDS], sizes, node, writes=2)


# -- adding --------------------------------------------------------------------------------------------------


def _index_add(w: RoutineWriter, node: Node) -> None:
    _, indices, updates = node.inputs
    axis = _axis(node)
    picked = _shared(_flat(w, w.view(indices)))
    _add(w, node, axis, picked, _thirds_of(w, w.view(updates), axis, indices.type.rank), shared=True)


def _scatter_add(w: RoutineWriter, node: Node) -> None:
    _, indices, updates = node.inputs
    axis = _axis(node)
    _add(w, node, axis, _thirds_of(w, w.view(indices), axis), _thirds_of(w, w.view(updates), axis))


def _add(w: RoutineWriter, node: Node, axis: int, picked: View, added: View, shared: bool = False) -> None:
    """Add steps that copy the target and add the updates to the copy. 16-bit values are summed in float32, and rounded
    once at the end.
    """
    target = node.inputs[0]
    dtype = target.type.dtype
    held = working(dtype)

    def emit(to: View) -> None:
        into = to if held is dtype else w.scratch(held, to.shape, "sums")
        before = w.view(target)
        whole = View.contiguous(into.storage, target.type.shape) if into is not to else None
        if whole is not None:
            w.pointwise(cast(dtype, held), [before], whole, node)
        else:
            w.copy(_thirds_of(w, before, axis), into, node)
        rows = shared and _side_by_side(added) and _side_by_side(into)
        p, i, d = added.shape
        strides = (added.strides, picked.strides, into.strides)
        if rows:
            strides = (added.strides[:2], picked.strides[1:2], into.strides[:2])
        sizes = [p, into.shape[1], d, i, *[s for each in strides for s in each]]
        kernel = ScatterAdd(held.name, dtype.name, picked.dtype.name, rows)
        w.step(kernel, [added, picked, into, STATUS_WORDS], sizes, node, writes=2)
        if whole is not None:
            w.pointwise(cast(held, dtype), [into], to, node)

    _write(w, node.result, axis, 1, emit)


def cast(from_: DType, to: DType) -> Chain:
    """Return a chain that converts from one dtype to another."""
    return Chain((from_.name,), (Instruction("cast", (0,), to.name),))


# -- positions -----------------------------------------------------------------------------------------------


def _iota(w: RoutineWriter, node: Node) -> None:
    to = w.view(node.result)
    w.step(Iota(to.dtype.name), [to], [to.shape[0], to.strides[0]], node)


def _positions(w: RoutineWriter, node: Node) -> None:
    """Lower positions. If the plan repeats one row, only this row is written."""
    to = w.view(node.result)
    outer = tuple(range(to.rank - 1))
    repeats = all(to.strides[axis] == ZERO for axis in outer)
    row = replace(to, shape=to.shape[-1:], strides=to.strides[-1:])
    counted = row if repeats else w.scratch(to.dtype, to.shape[-1:], "positions")
    w.step(Iota(to.dtype.name), [counted], [*counted.shape, *counted.strides], node)
    if not repeats:
        w.copy(counted.broadcast(to.shape), to, node)


# -- three dimensions ----------------------------------------------------------------------------------------


def _axis(node: Node) -> int:
    return place(node.op.attributes["axis"], node.inputs[0].type.rank)


def thirds(view: View, axis: int, count: int = 1) -> View | None:
    """Merge the dimensions of a view into three: those before `axis`, `count` dimensions from `axis` on, the rest.
    Return None if the strides do not allow this.
    """
    after = view.merged(axis + count, view.rank - axis - count)
    middle = after.merged(axis, count) if after is not None else None
    return middle.merged(0, axis) if middle is not None else None


def _thirds_of(w: RoutineWriter, view: View, axis: int, count: int = 1) -> View:
    """Return a view of these three dimensions, of a copy if necessary."""
    found = thirds(view, axis, count)
    if found is None:
        found = thirds(w.copied(view), axis, count)
    assert found is not None
    return found


def _write(
    w: RoutineWriter, value: Value, axis: int, count: int, emit: Callable[[View], None], rows: bool = False
) -> None:
    """Emit a result through a view of three dimensions. If the result's storage has no such view, write to new memory
    and copy.
    """
    to = w.view(value)
    direct = thirds(to, axis, count)
    if direct is not None and not (rows and not _side_by_side(direct)):
        emit(direct)
        return
    made = w.scratch(to.dtype, to.shape)
    direct = thirds(made, axis, count)
    assert direct is not None
    emit(direct)
    w.copy(made, to, value.node)


def _flat(w: RoutineWriter, view: View) -> View:
    """Return the view, or a copy, with all dimensions merged into one."""
    found = view.merged(0, view.rank)
    if found is None:
        found = w.copied(view).merged(0, view.rank)
    assert found is not None
    return found


def _shared(picked: View) -> View:
    """Return the indices as a view in which they are repeated for every p and d."""
    return View(picked.storage, (ONE, picked.shape[0], ONE), (ZERO, picked.strides[0], ZERO), picked.offset)


def _side_by_side(view: View) -> bool:
    last: Size = view.shape[-1]
    return view.strides[-1] == ONE or last == ONE


RULES: Mapping[str, Rule] = {
    "embedding": _embedding,
    "gather": _gather,
    "take_along_axis": _take_along_axis,
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "iota": _iota,
    "positions": _positions,
}
KEEPS: Mapping[str, Keeps] = {}
