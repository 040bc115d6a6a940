"""Lowering rules of softmax, normalizations and rotary positions: ops that work along a row and keep its size.

Kernels compute in float32. For axes other than the last, and for float64, the ops' bodies are lowered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

from treadle.backends.tvm.kernels.normalization import Normalize
from treadle.backends.tvm.kernels.rotary import Rotary
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.lowering.reduction_rules import fitted, rows, side_by_side
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.normalization import LayerNorm, LogSoftmax, MaskedSoftmax, RMSNorm
from treadle.ir.ops.normalization import Softmax as SoftmaxOp
from treadle.ir.ops.rotary import Rotary as RotaryOp
from treadle.ir.storage.views import View
from treadle.ir.types import Type, bf16, f16, f32

_DTYPES = (f32, f16, bf16)


def _softmax(w: RoutineWriter, node: Node) -> None:
    (value,) = node.inputs
    (x, y), finish = fitted(w, node, w.view(value), [w.view(node.result)], rows)
    kernel = Softmax(isinstance(node.op, LogSoftmax), x.dtype.name, isinstance(node.op, MaskedSoftmax))
    w.step(kernel, [x, y], [*x.shape, *x.strides[:2], *y.strides[:2]], node)
    finish()


def _normalize(w: RoutineWriter, node: Node) -> None:
    op, (value, *extra) = node.op, node.operands
    assert isinstance(op, (LayerNorm, RMSNorm))
    assert value is not None
    read = [_vector(w, v) for v in extra if v is not None]
    (x, y), finish = fitted(w, node, w.view(value), [w.view(node.result)], rows)
    there = [v is not None for v in extra] + [False]
    kernel = Normalize(isinstance(op, LayerNorm), there[0], there[1], op.eps, x.dtype.name)
    w.step(kernel, [x, *read, y], [*x.shape, *x.strides[:2], *y.strides[:2]], node)
    finish()


def _rotary(w: RoutineWriter, node: Node) -> None:
    op, (value, positions, frequencies) = node.op, node.inputs
    assert isinstance(op, RotaryOp)

    def form(x: View, results: Sequence[View]) -> list[View] | None:
        views = [x, *results]
        return views if all(side_by_side(v, 3) for v in views) else None

    places, turns = w.view(positions), _vector(w, frequencies)
    (x, y), finish = fitted(w, node, w.view(value), [w.view(node.result)], form)
    count = frequencies.type.shape[0]
    lanes = gcd(count.constant or w.isa.lanes(), w.isa.lanes())  # if there are no frequencies, the loop is empty
    kernel = Rotary(op.layout == "interleaved", lanes, x.dtype.name, places.dtype.name)
    sizes = [*x.shape, count, *x.strides[:3], *places.strides, *y.strides[:3]]
    w.step(kernel, [x, places, turns, y], sizes, node)
    finish()


def _vector(w: RoutineWriter, value: Value) -> View:
    view = w.view(value)
    return view if side_by_side(view, 0) else w.copied(view)


def _along_last(op: Op, types: Sequence[Type | None]) -> bool:
    (x,) = types
    assert isinstance(op, (SoftmaxOp, LogSoftmax))
    assert x is not None
    return x.dtype in _DTYPES and place(op.axis, x.rank) == x.rank - 1


def _narrow(op: Op, types: Sequence[Type | None]) -> bool:
    return types[0] is not None and types[0].dtype in _DTYPES


def _turned(op: Op, types: Sequence[Type | None]) -> bool:
    return _narrow(op, types) and types[2] is not None and types[2].dtype is f32


RULES: Mapping[str, Rule] = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "masked_softmax": _softmax,
    "layer_norm": _normalize,
    "rms_norm": _normalize,
    "rotary": _rotary,
}
KEEPS: Mapping[str, Keeps] = {
    "softmax": _along_last,
    "log_softmax": _along_last,
    "masked_softmax": _narrow,
    "layer_norm": _narrow,
    "rms_norm": _narrow,
    "rotary": _turned,
}
