"""Lowering rules of 8-bit rows: what is rounded at every call, and products of it.

What only products read exists in the form alone in which their kernel reads it; for anybody else rows are made as they
are held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from treadle.backends.tvm.kernels.narrow.byte_product import MOST_SUMMED
from treadle.backends.tvm.kernels.narrow.encode_rows import (
    DecodeRows,
    EncodeRows,
    form_of_rows,
    rows_dtype,
    rows_elements,
)
from treadle.backends.tvm.kernels.narrow.register_tiles import quads_for
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import ROWS, EncodedLinear
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.storage.views import View
from treadle.ir.types import DTYPES, Type, f32
from treadle.passes.memory.storage_plan import How


def _encode(w: RoutineWriter, node: Node) -> None:
    (value,), y = node.inputs, node.result
    x, m, k = _rows(w, w.view(value))
    uses = w.uses.get(y, [])
    products = [at == 0 and isinstance(reader.op, EncodedLinear) for reader, at in uses]
    to = w.view(y)
    if any(products):
        w.encoded[y] = _as_read(w, node, x, to.storage.name)
        own = w.place(y).how is How.OWN and y not in w.plan.function.outputs.values()
        if all(products) and own:
            w.rounded[to.storage] = w.encoded[y][0]
            return
    told = w.scratch(DTYPES["i32"], (m, Size.of(2)), f"{to.storage.name}_scales")
    target = w.scratch(to.dtype, to.shape) if not to.is_contiguous else to
    w.step(EncodeRows("held"), [x, target, told], [m, k, x.strides[0]], node, writes=2)
    if target is not to:
        w.copy(target, to, node)


def rows_of(w: RoutineWriter, node: Node, value: Value) -> tuple[View, View]:
    """8-bit rows as products' kernels read them, and what these are told; of rows that are held, made of their numbers.

    So the bits of what is held are kept, but for the last of a scale.
    """
    if value in w.encoded:
        return w.encoded[value]
    held, m, _ = _rows(w, w.view(value))
    k = value.type.shape[-1]
    numbers = w.scratch(f32, (m, k))
    w.step(DecodeRows(), [held, numbers], [m, k, held.strides[0], k], node)
    return _as_read(w, node, numbers, held.storage.name)


def in_quads(w: RoutineWriter, value: Value) -> View:
    """A right side of 8-bit rows as kernels read it; what is no weight is laid out now."""
    view, laid = w.view(value), quads_for(w.isa)
    if value.layout == laid:
        return view
    made = w.scratch(view.dtype, (laid.elements(view.shape),), f"{view.storage.name}_quads")
    w.pack(view, made, laid)
    return replace(made, shape=view.shape, strides=view.strides)


def _as_read(w: RoutineWriter, node: Node, x: View, name: str) -> tuple[View, View]:
    """Rows [m, k], rounded, in the form in which the instruction set's product reads them."""
    (m, k), form = x.shape, form_of_rows(w.isa)
    made = w.scratch(rows_dtype(form), (rows_elements(form, m, k),), f"{name}_{form}")
    told = w.scratch(DTYPES["i32"], (m, Size.of(2)), f"{name}_scales")
    w.step(EncodeRows(form), [x, made, told], [m, k, x.strides[0]], node, writes=2)
    return made, told


def _decode(w: RoutineWriter, node: Node) -> None:
    x, m, _ = _rows(w, w.view(node.inputs[0]))
    to = w.view(node.result)
    made = to if to.is_contiguous else w.scratch(to.dtype, to.shape)
    k = node.result.type.shape[-1]
    w.step(DecodeRows(), [x, made], [m, k, x.strides[0], k], node)
    if made is not to:
        w.copy(made, to, node)


def _rows(w: RoutineWriter, x: View) -> tuple[View, Size, Size]:
    """A view as rows [m, k] whose elements lie side by side, or a copy of it, with m and k."""
    rows = x.merged(0, x.rank - 1)
    if rows is None or (rows.strides[1] != ONE and rows.shape[1] != ONE):
        rows = w.copied(x).merged(0, x.rank - 1)
    assert rows is not None
    m, k = rows.shape
    return rows, m, k


def _encodes(op: Op, types: Sequence[Type | None]) -> bool:
    return op.attributes["to"] == ROWS and all(t is not None and t.dtype is f32 for t in types)


def _decodes(op: Op, types: Sequence[Type | None]) -> bool:
    return bool(op.attributes["of"] == ROWS)


def multiplies(op: Op, types: Sequence[Type | None]) -> bool:
    """Whether kernels do a product of rows: 32 bits hold its sums."""
    size = types[0].shape[-1].constant if types[0] is not None else None
    return size is not None and size <= MOST_SUMMED


RULES: Mapping[str, Rule] = {"encode": _encode, "decode": _decode}
KEEPS: Mapping[str, Keeps] = {"encode": _encodes, "decode": _decodes, "encoded_linear": multiplies}
