"""Weights in the format of torchao, which the metadata of the safetensors file describes, tensor by tensor.

    metadata   P.weight: {"_type": ..., "_data": {"block_size": [1, 32], ...}, "_tensor_data_names": [...]}

    _type                        P._weight_qdata                            block_size
    Int8Tensor                   i8[N, K]                                   a row, a group of inputs, or the tensor
    IntxUnpackedToInt8Tensor     i8[N, K], integers of `target_dtype`       a row, or a group of inputs
    Float8Tensor                 e4m3[N, K]                                 any

    P._weight_scale[N / rows, K / inputs], and P._weight_zero_point of its shape, if there is one

    w[n, k] = scale (q[n, k] - zero)

Tensors that are packed for GPUs are refused by name. Source: https://github.com/pytorch/ao,
`torchao/prototype/safetensors` and `torchao/quantization/quantize_/workflows`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.files.strict_json import read_json_object
from treadle.frontends.quantized.coded_weights import E4M3, CodedWeight
from treadle.frontends.quantized.module_parts import SCALES, ModuleParts
from treadle.frontends.quantized.quantized_weights import GroupedIntegers, QuantizedWeight
from treadle.frontends.quantized.scale_blocks import groups_of_scales
from treadle.frontends.quantized.settings import QuantizationSettings
from treadle.ir.transforms.rounded_inputs import InputRounding

Array = np.ndarray[Any, Any]

_READ = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_INTEGER = re.compile(r"int([1-8])")
_KNOWN = frozenset(("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point"))
"""Parts of a tensor. Any other part, such as a factor of the inputs, would change the product."""


def read_torchao(settings: QuantizationSettings, parts: ModuleParts) -> Mapping[str, QuantizedWeight]:
    """Return the weights of a folder of torchao. Raises CheckpointError: see `open_quantized`."""
    for key in ("quant_type", "include_input_output_embeddings", "untie_embedding_weights"):
        settings.get(key)  # tensors say how they are stored
    return {f"{module}.weight": _weight(module, parts) for module in parts.modules("._weight_qdata")}


def _weight(module: str, parts: ModuleParts) -> QuantizedWeight:
    name, first, scale = f"{module}.weight", f"{module}._weight_qdata", f"{module}._weight_scale"
    text = parts.checkpoint.metadata_of(first).get(name, "{}")
    place = f"{parts.label}: metadata of {printable(name)}"
    found = read_json_object(text.encode(errors="replace"), place, nesting=8, values=256)
    kind, data, names = found.get("_type"), found.get("_data"), found.get("_tensor_data_names")
    if kind not in _READ:
        raise parts.error(
            first,
            "unsupported tensor of torchao",
            printable(repr(kind))[:80],
            f"one of {', '.join(_READ)}; types packed for GPUs are not read",
        )
    if not isinstance(data, Mapping) or not isinstance(names, list) or not _KNOWN.issuperset(map(str, names)):
        raise parts.error(first, "the metadata of a weight is damaged or not supported", repr(names)[:80])
    record = parts.take(first, ("f8_e4m3",) if kind == "Float8Tensor" else ("i8",), (None, None))
    scales = groups_of_scales(record, parts.take(scale, SCALES), parts, data.get("block_size"))
    rounding = _rounding(data, static="act_quant_scale" in names)
    inputs = f"{module}._weight_act_quant_scale", f"{module}._weight_act_quant_zero_point"
    if rounding is not None:
        parts.roundings[name], parts.steps[name] = rounding, inputs
    for each in inputs:
        parts.hide(each)
    if kind == "Float8Tensor":
        return CodedWeight(record, f"torchao, {scales}", scales.shape, E4M3, scales, partial(parts.code_rows, first))
    bits = 8
    if kind == "IntxUnpackedToInt8Tensor":
        target = data.get("target_dtype")
        read = _INTEGER.fullmatch(str(target.get("_data"))) if isinstance(target, Mapping) else None
        if read is None:
            raise parts.error(first, "unsupported dtype of integers", printable(repr(target))[:80], "int1 to int8")
        bits = int(read[1])
    zero = f"{module}._weight_zero_point"
    zeros = parts.take(zero, ("i8", "i32", "i64"), parts.checkpoint.record(scale).shape) if parts.has(zero) else None
    held = 4 if bits <= 4 else 8
    offset = 1 << (held - 1)

    def factors() -> tuple[Array, Array]:
        each = scales.factors()
        if zeros is None:
            return each, np.full(each.shape, offset, np.int32)
        return each, scales.spread(_within(zero, bits, parts).astype(np.int32)) + offset

    def integers(rows: slice) -> Array:
        return _within(first, bits, parts, rows).view(np.uint8) + np.uint8(offset)

    stored = f"torchao, {bits} bits in groups of {scales.group}"
    return GroupedIntegers(record, stored, scales.shape, held, scales.group, integers, factors, scales.members)


def _rounding(data: Mapping[str, Any], *, static: bool) -> InputRounding | None:
    """Return the rounding of inputs that a tensor's metadata asks for."""
    if (kind := data.get("activation_quantization")) is not None:
        per_token = kind in ("int8_asym_per_token", "int8_sym_per_token")
        return InputRounding("int8" if per_token else str(kind)[:80], symmetric="asym" not in str(kind))
    kwargs = data.get("act_quant_kwargs")
    if kwargs is None:
        return None
    inside = kwargs.get("_data") if isinstance(kwargs, Mapping) else None
    number = "int8" if "Int8" in str(kwargs)[:80] else "f8e4m3fn"
    text = repr(inside)[:1000]
    return InputRounding(number, 0 if "PerRow" in text else -1, "ASYMMETRIC" not in text, static=static)


def _within(name: str, bits: int, parts: ModuleParts, rows: slice = slice(None)) -> Array:
    """Return rows of signed integers of a number of bits. Raises CheckpointError for an integer out of their range."""
    whole, most = parts.array(name), 1 << (bits - 1)
    held = whole[rows] if whole.ndim else whole
    if bits < 8 or held.dtype != np.int8:
        bad = (held < -most) | (held >= most)
        if bad.any():
            first = rows.indices(len(whole))[0] * (whole.size // len(whole)) if whole.ndim else 0
            at = first + int(bad.reshape(-1).argmax())
            received = f"{whole.reshape(-1)[at]} at {[int(i) for i in np.unravel_index(at, whole.shape)]}"
            raise parts.error(name, f"an integer is out of the range of {bits} bits", received, element=at)
    return held
