"""Lowering rules of caches: kernels that update a state in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from treadle.backends.tvm.kernels.appending import Append
from treadle.backends.tvm.lowering.program import STATUS_WORDS
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node
from treadle.ir.ops.axis_names import place
from treadle.ir.sizing.sizes import ONE
from treadle.ir.storage.views import View


def _append(w: RoutineWriter, node: Node) -> None:
    state, x, rows, start = node.inputs
    axis = place(node.op.attributes["axis"], state.type.rank)
    given, slots, first = _quarters_of(w, w.view(x), axis), w.view(rows), w.view(start)
    to = w.updated(node, 0)
    into = _quarters(to, axis)
    assert into is not None, "states and new memory are contiguous"
    is_row = all(view.strides[-1] == ONE or view.shape[-1] == ONE for view in (given, into))
    kept = slice(3) if is_row else slice(4)
    strides = [*given.strides[kept], slots.strides[0], first.strides[0], *into.strides[kept]]
    kernel = Append(to.dtype.bytes, is_row, node.op.attributes["ring"])
    sizes = [*given.shape, into.shape[0], into.shape[2], *strides]
    written = replace(into, shape=given.shape)  # the part of the state that the kernel writes
    w.step(kernel, [given, slots, first, written, STATUS_WORDS], sizes, node, writes=2)


def _quarters(view: View, axis: int) -> View | None:
    """Merge the dimensions of a view into four: the first, those before `axis`, `axis`, the rest. Return None if the
    strides do not allow this.
    """
    after = view.merged(axis + 1, view.rank - axis - 1)
    return after.merged(1, axis - 1) if after is not None else None


def _quarters_of(w: RoutineWriter, view: View, axis: int) -> View:
    """Return a view of these four dimensions, of a copy if necessary."""
    found = _quarters(view, axis)
    if found is None:
        found = _quarters(w.copied(view), axis)
    assert found is not None
    return found


RULES: Mapping[str, Rule] = {"append": _append}
KEEPS: Mapping[str, Keeps] = {}
