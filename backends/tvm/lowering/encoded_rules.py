"""Lowering rules of 8-bit rows and groups: activations that are quantized at every call, and their products.

If only products read a quantized value, it is stored only in the form that their kernel reads. Other consumers read
encoded rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from treadle.backends.tvm.kernels.encoded.block_words import WordForm, word_form
from treadle.backends.tvm.kernels.narrow.byte_product import MOST_SUMMED
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP, EncodeGroups, form_of_groups, rows_of_groups
from treadle.backends.tvm.kernels.narrow.encode_rows import (
    DecodeRows,
    EncodeRows,
    form_of_rows,
    rows_dtype,
    rows_elements,
)
from treadle.backends.tvm.kernels.narrow.register_tiles import quads_for
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import GROUPS, ROWS, STEPS, EncodedLinear
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.storage.views import View
from treadle.ir.types import DTYPES, Type, f32
from treadle.passes.memory.storage_plan import How


def _encode(w: RoutineWriter, node: Node) -> None:
    value, vector, *steps = (*node.operands, None, None, None)[:4]
    y = node.result
    assert value is not None
    x, m, k = _rows(w, w.view(value))
    by = None if vector is None else _in_line(w, w.view(vector))
    static = [w.view(v) for v in steps if v is not None]
    uses = w.uses.get(y, [])
    products = [reader.op for reader, at in uses if at == 0 and isinstance(reader.op, EncodedLinear)]
    to = w.view(y)
    forms = {_owed(form): form for form in map(form_of, products)}
    for owed, form in forms.items():
        w.encoded[y, owed] = _as_read(w, node, x, k, to.storage.name, form, _is_signed(y), by, static)
    if products:
        own = w.place(y).how is How.OWN and y not in w.plan.function.outputs.values()
        if len(products) == len(uses) and own:
            w.rounded[to.storage] = w.encoded[y, next(iter(forms))][0]
            return
    target = w.scratch(to.dtype, to.shape) if not to.is_contiguous else to
    if node.op.attributes["to"] == GROUPS:
        x = x if x.is_contiguous else w.copied(x)
        m, k = m * (k // GROUP), Size.of(GROUP)
        x = replace(x, shape=(m, k), strides=(k, ONE))
    scales = w.scratch(DTYPES["i32"], (m, Size.of(2)), f"{to.storage.name}_scales")
    read = [x] if by is None else [x, by]
    kernel = EncodeRows("held", _is_signed(y), by is not None, bool(static))
    w.step(kernel, [*read, *static, target, scales], [m, k, x.strides[0]], node, writes=2)
    if target is not to:
        w.copy(target, to, node)


def form_of(op: EncodedLinear) -> WordForm | None:
    """Return the form in which an integer product unpacks its right operand, or None if the right operand has 8-bit
    rows.
    """
    return None if op.of == ROWS else word_form(op.of)


def _owed(form: WordForm | None) -> tuple[int, int]:
    """Return the properties of a form that change the scales of groups; see `EncodeGroups`."""
    return (-1, 0) if form is None else (form.zero, form.halves)


def rows_of(w: RoutineWriter, node: Node, value: Value, form: WordForm | None) -> tuple[View, View]:
    """Return a product's left operand and its scales in the form that kernels read. They are copied from an encoded
    value if necessary.

    The copy has the integers and scales of the encoded value. Decoding and encoding again could change them.
    """
    if (value, _owed(form)) in w.encoded:
        return w.encoded[value, _owed(form)]
    x, _, _ = _rows(w, w.view(value))
    return _as_read(w, node, x, value.type.shape[-1], w.view(value).storage.name, form, _is_signed(value), again=True)


def laid_out(w: RoutineWriter, value: Value, form: WordForm | None) -> View:
    """Return the right operand of an integer product in the layout that kernels read. Only weights are packed in
    advance.
    """
    view, layout = w.view(value), quads_for(w.isa) if form is None else form.layout
    if value.layout == layout:
        return view
    made = w.scratch(view.dtype, (layout.elements(view.shape),), f"{view.storage.name}_{layout.kind}")
    w.pack(view, made, layout)
    return replace(made, shape=view.shape, strides=view.strides)


def _as_read(
    w: RoutineWriter,
    node: Node,
    x: View,
    k: Size,
    name: str,
    of: WordForm | None,
    signed: bool,
    by: View | None = None,
    static: Sequence[View] = (),
    *,
    again: bool = False,
) -> tuple[View, View]:
    """Add the step that quantizes rows [m, k], times `by`, into the form that the instruction set's product reads.
    Return the rows and their scales.

    static  the scale and the zero point of all rows; empty: each row has its own

    With `again`, x holds m encoded rows of k numbers each, which are only copied into this form.
    """
    m = x.shape[0]
    if of is not None:
        assert by is None  # `_encodes` excludes this case
        form = form_of_groups(w.isa)
        rows = rows_of_groups(form, m)
        made = w.scratch(rows_dtype(form), (rows * k,), f"{name}_{form}")
        scales = w.scratch(DTYPES["i32"], (rows, k // GROUP, Size.of(1 + of.halves)), f"{name}_scales")
        groups = EncodeGroups(form, of.zero, of.halves, again)
        w.step(groups, [x, made, scales], [m, k, x.strides[0]], node, writes=2)
        return made, scales
    form = form_of_rows(w.isa)
    made = w.scratch(rows_dtype(form), (rows_elements(form, m, k),), f"{name}_{form}")
    scales = w.scratch(DTYPES["i32"], (m, Size.of(2)), f"{name}_scales")
    read = [x, *([] if by is None else [by]), *static]
    rows_kernel = EncodeRows(form, signed, by is not None, bool(static), again)
    w.step(rows_kernel, [*read, made, scales], [m, k, x.strides[0]], node, writes=2)
    return made, scales


def _decode(w: RoutineWriter, node: Node) -> None:
    to, encoding = w.view(node.result), node.op.attributes["of"]
    made = to if to.is_contiguous else w.scratch(to.dtype, to.shape)
    x, count, bytes = _rows(w, w.view(node.inputs[0]))
    elements = node.result.type.shape[-1]
    if encoding == GROUPS:
        x = x if x.is_contiguous else w.copied(x)
        count, elements, bytes = count * (elements // GROUP), Size.of(GROUP), Size.of(encoding.bytes(GROUP))
        x = replace(x, shape=(count, bytes), strides=(bytes, ONE))
    w.step(DecodeRows(encoding != STEPS), [x, made], [count, elements, x.strides[0], elements], node)
    if made is not to:
        w.copy(made, to, node)


def _in_line(w: RoutineWriter, vector: View) -> View:
    """Return a vector whose elements are contiguous, or a contiguous copy of it."""
    return vector if vector.strides[0] == ONE or vector.shape[0] == ONE else w.copied(vector)


def _is_signed(value: Value) -> bool:
    return value.type.encoding != STEPS


def _rows(w: RoutineWriter, x: View) -> tuple[View, Size, Size]:
    """Return a view as rows [m, k] of contiguous elements, or a copy, and the sizes m and k."""
    rows = x.merged(0, x.rank - 1)
    if rows is None or (rows.strides[1] != ONE and rows.shape[1] != ONE):
        rows = w.copied(x).merged(0, x.rank - 1)
    assert rows is not None
    m, k = rows.shape
    return rows, m, k


def _encodes(op: Op, types: Sequence[Type | None]) -> bool:
    """Return True if a kernel encodes these operands. Groups cannot be multiplied by a vector before encoding."""
    if op.attributes["to"] == GROUPS and len(types) > 1 and types[1] is not None:
        return False
    return op.attributes["to"] in (ROWS, STEPS, GROUPS) and all(t is None or t.dtype is f32 for t in types)


def _decodes(op: Op, types: Sequence[Type | None]) -> bool:
    return bool(op.attributes["of"] in (ROWS, STEPS, GROUPS) and op.attributes["to"] in (None, f32))


def multiplies(op: Op, types: Sequence[Type | None]) -> bool:
    """Return True if kernels compute an integer product: the sums of rows must fit into 32 bits."""
    assert isinstance(op, EncodedLinear)
    if op.of != ROWS:
        return takes_blocks(op.of)
    size = types[0].shape[-1].constant if types[0] is not None else None
    return size is not None and size <= MOST_SUMMED


def takes_blocks(weight: Encoding) -> bool:
    """Return True if kernels multiply quantized values with weights of this encoding as integers."""
    return weight == ROWS or word_form(weight) is not None


RULES: Mapping[str, Rule] = {"encode": _encode, "decode": _decode}
KEEPS: Mapping[str, Keeps] = {"encode": _encodes, "decode": _decodes, "encoded_linear": multiplies}
