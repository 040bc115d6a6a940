"""Random nodes: operators that quantize."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from tests.fuzz.onnx_nodes.drawing import Draw, draws

Array = np.ndarray[Any, Any]


@draws("QuantizeLinear", "DequantizeLinear")
def _quantize(d: Draw) -> None:
    shape, kind = d.shape(), d.of(np.int8, np.uint8)
    axis = d.axis(len(shape))
    along = d.version >= 13 and d.maybe()
    scale = np.abs(d.floats(shape[axis % len(shape) :][:1] if along else [])) + np.float32(0.1)
    low, high = (-20, 20) if kind is np.int8 else (100, 140)
    zero = d.ints(scale.shape, low, high, kind)
    if d.name == "QuantizeLinear":
        d.x(d.floats(shape) * 3)
    else:
        d.x(d.ints(shape, low, high, kind))
    d.x(scale)
    with_zero = d.maybe(0.7) or (d.name == "DequantizeLinear" and kind is np.uint8)
    if with_zero:
        d.x(zero)
    if along:
        d.set(axis=axis)
    if d.name == "QuantizeLinear":
        if d.version >= 19:
            d.perhaps(saturate=1)
        if d.version >= 21 and not with_zero:
            d.perhaps(output_dtype=d.of(TensorProto.INT8, TensorProto.UINT8))
        if d.version >= 23:
            d.perhaps(precision=TensorProto.FLOAT)
    elif d.version >= 23:
        d.perhaps(output_dtype=TensorProto.FLOAT)
    if d.version >= 21 and not along and d.maybe(0.3):
        _blocked(d, kind)


def _blocked(d: Draw, kind: Any) -> None:
    """Scales of blocks of two along the last axis."""
    shape = [d.int(1, 3), 4]
    low, high = (-20, 20) if kind is np.int8 else (100, 140)
    x = d.floats(shape) * 3 if d.name == "QuantizeLinear" else d.ints(shape, low, high, kind)
    operands = [x, np.abs(d.floats([shape[0], 2])) + np.float32(0.1), d.ints([shape[0], 2], low, high, kind)]
    d.operands = [(operand, False) for operand in operands]
    d.attributes.pop("output_dtype", None)
    d.set(axis=1, block_size=2)


@draws("DynamicQuantizeLinear")
def _dynamic_quantize(d: Draw) -> None:
    d.x(d.floats(d.shape()) * 3)
    d.outputs = 3


@draws("QLinearMatMul")
def _quantized_matmul(d: Draw) -> None:
    m, k, n = d.int(1, 4), d.int(1, 5), d.int(1, 4)
    for shape in ([m, k], [k, n], None):
        if shape is not None:
            d.x(d.ints(shape, 0, 255, np.uint8))
        d.x(np.array(abs(d.r.gauss(0, 1)) + (20 if shape is None else 0.1), np.float32))
        d.x(d.ints([], 90, 150, np.uint8))
