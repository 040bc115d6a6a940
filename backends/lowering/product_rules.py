"""Lowering rules of products: linear and matmul, with the chain that finishes them."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.backends.kernels.matmul import Matmul, panel_width
from treadle.backends.kernels.pointwise import Chain, Instruction
from treadle.backends.lowering.grouping import chain_of, inputs_of
from treadle.backends.lowering.program import Panels, View
from treadle.backends.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.errors import BackendError
from treadle.ir.graph import Node, Value
from treadle.ir.sizes import ONE, Size, product
from treadle.ir.types import f32


def _linear(w: RoutineWriter, node: Node) -> None:
    part = w.groups.get(node)
    made = part.product if part is not None else node
    assert made is not None
    x, weight, bias = made.operands
    assert x is not None and weight is not None
    if x.type.dtype is not f32:
        raise BackendError(f"the tvm backend has no kernel for linear in {x.type.dtype}")
    n, k = weight.type.shape
    layout = Panels(panel_width(n.constant, w.isa))
    packed = w.panels(weight, layout)
    if packed is None:
        packed = w.packed(w.view(weight), layout)
    rows = _rows(w, w.view(x))
    to = w.destination(node.result)
    flat = _as_rows(to)
    target = flat if flat is not None else w.scratch(to.dtype, (product(to.shape[:-1]), n))
    chain, read, how = _epilogue(w, node, made.result, bias, target)
    kernel = Matmul(k.constant, n.constant, layout.width, chain, how)
    sizes: list[Size | int] = [rows.shape[0]]
    sizes += [size for size in (k, n) if size.constant is None]
    sizes.append(rows.strides[0])
    sizes += [v.strides[0] for v, h in zip(read, how, strict=True) if h == "mn"]
    sizes.append(target.strides[0])
    w.step(kernel, [rows, packed, *read, target], sizes, node)
    if flat is None:
        w.copy(View.contiguous(target.buffer, to.shape), to, node)


def _epilogue(
    w: RoutineWriter, node: Node, made: Value, bias: Value | None, target: View
) -> tuple[Chain | None, list[View], tuple[str, ...]]:
    """The chain that finishes a product, its extra operands as rows, and how each lies."""
    part = w.groups.get(node)
    extras = [v for v in inputs_of(part) if v is not made] if part is not None else []
    chain = chain_of(part, [made, *extras]) if part is not None else None
    read, how = [], []
    for value in extras:
        view, lies = _extra(w, w.view(value), made, target)
        read.append(view)
        how.append(lies)
    if bias is not None:
        read.insert(0, w.view(bias))
        how.insert(0, "n")
        chain = _with_bias(chain)
    return chain, read, tuple(how)


def _with_bias(chain: Chain | None) -> Chain:
    """The chain with sum + bias in place of the sum; the bias is the second input."""
    add = Instruction("add", (0, 1), "f32")
    if chain is None:
        return Chain(("f32", "f32"), (add,))
    inputs = ("f32", "f32", *chain.inputs[1:])
    old = len(chain.inputs)

    def moved(place: int) -> int:
        return len(inputs) if place == 0 else place + 1 if place < old else place + 2

    rest = [Instruction(i.op, tuple(moved(p) for p in i.operands), i.dtype, i.attributes) for i in chain.instructions]
    return Chain(inputs, (add, *rest))


def _extra(w: RoutineWriter, view: View, made: Value, target: View) -> tuple[View, str]:
    """An operand of an epilogue as a view over rows and columns, or over columns, or one number."""
    shape = made.type.shape
    if view.shape == shape:
        return _rows(w, view), "mn"
    if all(size == ONE for size in view.shape):
        return view, "1"
    if view.shape[-1] == shape[-1] and all(size == ONE for size in view.shape[:-1]) and view.strides[-1] == ONE:
        return view, "n"
    return _rows(w, w.copied(view.broadcast(shape))), "mn"


def _rows(w: RoutineWriter, view: View) -> View:
    """A view as a matrix of rows that lie at one distance, elements side by side; a copy where it is not."""
    found = _as_rows(view)
    if found is not None:
        return found
    made = _as_rows(w.copied(view))
    assert made is not None
    return made


def _as_rows(view: View) -> View | None:
    if view.rank == 0 or (view.strides[-1] != ONE and view.shape[-1] != ONE):
        return None
    return view.merged(0, view.rank - 1)


RULES: Mapping[str, Rule] = {"linear": _linear}
KEEPS: Mapping[str, Keeps] = {}
