"""Weights of experts in the format of gpt-oss: mxfp4 (OCP microscaling formats).

    P_blocks   u8[E, N, K / 32, 16]   e2m1 floats of 4 bits; the even input in the low half of a byte
    P_scales   u8[E, N, K / 32]       exponents of two: 2^(s - 127)

    w[e, n, k] = e2m1[e, n, k] 2^(s[e, n, k // 32] - 127)

The weight P is f32[E, N, K]: experts, outputs and inputs. Rows of gate and up alternate in gpt-oss' `gate_up_proj`. The
family gpt-oss itself is not supported; a declaration can read these weights. Source:
`transformers/integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.quantized.coded_weights import MXFP4, CodedWeight
from treadle.frontends.quantized.module_parts import ModuleParts
from treadle.frontends.quantized.quantized_weights import QuantizedWeight, Read
from treadle.frontends.quantized.scale_blocks import ScaleBlocks
from treadle.frontends.quantized.settings import QuantizationSettings
from treadle.ir.encodings.encoding import Encoding

Array = np.ndarray[Any, Any]

_GROUP = 32


def read_mxfp4(settings: QuantizationSettings, parts: ModuleParts) -> Mapping[str, QuantizedWeight]:
    """Return the weights of experts in mxfp4. Raises CheckpointError: see `open_quantized`."""
    settings.refuse(dequantize="weights stay in blocks")
    return {module: _experts(module, parts) for module in parts.modules("_blocks")}


def _experts(module: str, parts: ModuleParts) -> Experts:
    blocks, scales = f"{module}_blocks", f"{module}_scales"
    record = parts.take(blocks, ("u8",), (None, None, None, _GROUP // 2))
    experts, outputs, groups, _ = record.shape
    parts.take(scales, ("u8", "f8_e8m0"), (experts, outputs, groups))
    matrix = (experts * outputs, groups * _GROUP)

    def codes(rows: slice) -> Array:
        return parts.codes(blocks).reshape(matrix[0], -1)[rows]

    found = ScaleBlocks(1, _GROUP, matrix, partial(parts.powers, scales))
    stored = f"mxfp4, groups of {_GROUP}"
    rows = CodedWeight(record, stored, matrix, MXFP4, found, codes)
    return Experts(record, stored, (experts, outputs, matrix[1]), rows)


@dataclass(frozen=True, eq=False)
class Experts(QuantizedWeight):
    """The matrices of experts, f32[E, N, K].

    rows  the matrices below each other, f32[E N, K]
    """

    first: TensorRecord
    stored: str
    shape: tuple[int, ...]
    rows: QuantizedWeight

    @property
    def form(self) -> Encoding | None:
        return self.rows.form

    def reader(self) -> Read:
        read, n = self.rows.reader(), self.shape[1]

        def experts(rows: slice) -> Array:
            first, end, _ = rows.indices(self.shape[0])
            return read(slice(first * n, end * n)).reshape(end - first, n, -1)

        return experts

    def numbers(self) -> Array:
        return self.rows.numbers().reshape(self.shape)
