"""Weights in the format of AutoAWQ (Lin et al. 2023), 4 bits.

    version   qweight        qzeros         scales
    gemm      i32[K, N/8]    i32[G, N/8]    f16[G, N]     nibble i of word j is column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    gemv      i32[N, K/8]    i32[N, W]      f16[N, 8 W]   the lowest nibble first; columns from G on are padding

    w[n, k] = scales[g, n] (q[k, n] - zero[g, n])

Source: https://github.com/casper-hansen/AutoAWQ, `awq/modules/linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from treadle.frontends.quantized.module_parts import SCALES, ModuleParts
from treadle.frontends.quantized.quantized_weights import GroupedIntegers, QuantizedWeight, unpack_low_first
from treadle.frontends.quantized.settings import QuantizationSettings

Array = np.ndarray[Any, Any]

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(settings: QuantizationSettings, parts: ModuleParts) -> Mapping[str, QuantizedWeight]:
    """Return the weights of an AWQ folder. Raises CheckpointError: see `open_quantized`."""
    settings.integer("bits", (4,), aliases=("w_bit",))
    if not settings.flag("zero_point", True):
        raise settings.error("zero_point", False, "true")
    version = settings.choice("version", ("gemm", "gemv"), "gemm")
    group = settings.group(settings.integer("group_size", aliases=("q_group_size",)))
    read = _gemm if version == "gemm" else _gemv
    return {f"{module}.weight": read(module, group, parts) for module in parts.modules(".qweight")}


def _gemm(module: str, group: int, parts: ModuleParts) -> GroupedIntegers:
    words = parts.take(f"{module}.qweight", ("i32",), (None, None))
    size, outputs = words.shape[0], 8 * words.shape[1]
    length = parts.group(words, size, group)
    parts.take(f"{module}.scales", SCALES, (size // length, outputs))
    parts.take(f"{module}.qzeros", ("i32",), (size // length, outputs // 8))

    def factors() -> tuple[Array, Array]:
        return parts.scales(f"{module}.scales").T, _columns(parts.array(f"{module}.qzeros"))

    def integers(rows: slice) -> Array:
        first, end, _ = rows.indices(outputs)
        columns = _columns(parts.array(f"{module}.qweight")[:, first // 8 : -(-end // 8)])
        return columns[first % 8 :][: end - first]

    stored = f"awq, 4 bits in groups of {length}"
    return GroupedIntegers(words, stored, (outputs, size), 4, length, integers, factors)


def _columns(words: Array) -> Array:
    """Return the columns of words as rows, i32[m, n] to u8[8 n, m]. The words are transposed, since they are fewer."""
    m, n = words.shape
    bytes = np.ascontiguousarray(words.T).view(np.uint8).reshape(n, m, 4)
    made = np.empty((n, 8, m), np.uint8)
    for i in range(4):
        np.bitwise_and(bytes[..., i], np.uint8(15), out=made[:, _COLUMNS[2 * i]])
        np.right_shift(bytes[..., i], np.uint8(4), out=made[:, _COLUMNS[2 * i + 1]])
    return made.reshape(8 * n, m)


def _gemv(module: str, group: int, parts: ModuleParts) -> GroupedIntegers:
    words = parts.take(f"{module}.qweight", ("i32",), (None, None))
    outputs, size = words.shape[0], 8 * words.shape[1]
    length = parts.group(words, size, group)
    groups = size // length
    zeros = parts.take(f"{module}.qzeros", ("i32",), (outputs, None))
    scales = parts.take(f"{module}.scales", SCALES, (outputs, 8 * zeros.shape[1]))
    if groups > scales.shape[1]:
        raise parts.error(scales.name, f"there are fewer scales than the {groups} groups of a row", str(scales))

    def factors() -> tuple[Array, Array]:
        held = parts.array(f"{module}.scales").astype(np.float32)
        held[:, groups:] = 1  # padding
        parts.checked_scales(f"{module}.scales", held)
        return held[:, :groups], unpack_low_first(parts.array(f"{module}.qzeros"), 4)[:, :groups]

    stored = f"awq gemv, 4 bits in groups of {length}"
    name = f"{module}.qweight"
    integers, pairs = partial(_low_first, name, parts), partial(_bytes, name, parts)
    return GroupedIntegers(words, stored, (outputs, size), 4, length, integers, factors, pairs=pairs)


def _bytes(name: str, parts: ModuleParts, rows: slice) -> Array:
    return parts.array(name)[rows].view(np.uint8)


def _low_first(name: str, parts: ModuleParts, rows: slice) -> Array:
    return unpack_low_first(_bytes(name, parts, rows), 4)
