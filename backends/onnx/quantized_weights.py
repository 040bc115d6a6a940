"""Weights in blocks as operands of DequantizeLinear: their own integers, scales and zero points.

    y = DequantizeLinear(q, scale, zero)        axis, and block_size if a line has several blocks

Rows of 8 bits need opset 13, groups and 4 bits opset 21. Other weights are written as float32 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.backends.onnx.schemas import INT4, UINT4
from treadle.backends.onnx.spelled_line import Tensor
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.encodings.plain_integers import IntegerParts, has_integer_parts, integer_parts, low_first_bytes
from treadle.ir.graph import Graph, Value
from treadle.ir.types import f32, i8, u8

Array = np.ndarray[Any, Any]

_BLOCKS_FROM = 21
"""The first opset in which DequantizeLinear has `block_size` and 4-bit integers."""


@dataclass(frozen=True)
class QuantizedTensors:
    """The operands and attributes of a weight's DequantizeLinear, and the elements of the operands.

    elements  by operand: its shape, and its elements as an array or as packed bytes
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    attributes: Mapping[str, int]
    elements: Mapping[Tensor, tuple[tuple[int, ...], Array | bytes]]


def quantized_parts(graph: Graph, weights: Mapping[str, Any], opset: int) -> dict[str, IntegerParts]:
    """Return the integers of the weights that DequantizeLinear can read at an opset, by name.

    graph  without calls; a weight that is read as blocks by an op other than `decode` is left out
    """
    moved = {v for node in graph.main.nodes if not node.op.decodes for v in node.inputs}
    found = {}
    for name, value in graph.main.parameters.items():
        encoding = value.type.encoding
        if encoding is None or value in moved or name not in weights or not _fits(encoding, value, opset):
            continue
        parts = integer_parts(encoding, np.asarray(weights[name]))
        if parts is not None:
            found[name] = parts
    return found


def _fits(encoding: Encoding, value: Value, opset: int) -> bool:
    rows = encoding.block.elements is None
    return has_integer_parts(encoding) and value.type.rank == 2 and (rows or opset >= _BLOCKS_FROM)


def quantized_tensors(name: str, encoding: Encoding, parts: IntegerParts, unique: Any) -> QuantizedTensors:
    """Return the operands of a weight's DequantizeLinear.

    unique  returns an unused name of the file, near the name that it gets
    """
    line = encoding.axis % 2
    signed = parts.q.dtype == np.int8
    dtype = {(8, True): i8, (8, False): u8, (4, True): INT4, (4, False): UINT4}[parts.bits, signed]

    def operand(suffix: str, of: Any, array: Array) -> tuple[Tensor, tuple[tuple[int, ...], Array | bytes]]:
        whole = array[..., 0] if parts.whole and suffix != "quantized" else np.moveaxis(array, -1, line)
        held = np.ascontiguousarray(whole)
        elements: Array | bytes = low_first_bytes(held).tobytes() if of in (INT4, UINT4) else held
        return Tensor(unique(f"{name}_{suffix}"), of), (held.shape, elements)

    made = [operand("quantized", dtype, parts.q), operand("scale", f32, parts.scale.astype(np.float32))]
    made += [] if parts.zero is None else [operand("zero_point", dtype, parts.zero)]
    attributes = {"axis": 1 - line} if parts.whole else {"axis": line, "block_size": parts.block}
    (q, scale), zero = (t for t, _ in made[:2]), (made[2][0] if len(made) > 2 else None)
    return QuantizedTensors(q, scale, zero, attributes, dict(made))
