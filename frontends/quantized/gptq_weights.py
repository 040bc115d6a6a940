"""Weights in the format of AutoGPTQ and GPTQModel (Frantar et al. 2023).

    qweight  i32[K b / 32, N]    integers of b bits, the lowest first along k
    qzeros   i32[G, N b / 32]    zeros, the lowest first along n; one less than the zero, unless the format is gptq_v2
    scales   f16[G, N]
    g_idx    i32[K]              the group of each input; if it is missing, k // group_size

    w[n, k] = scales[g, n] (q[k, n] - zero[g, n])

Source: https://github.com/ModelCloud/GPTQModel, `gptqmodel/nn_modules/qlinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.quantized.module_parts import SCALES, ModuleParts
from treadle.frontends.quantized.quantized_weights import GroupedIntegers, QuantizedWeight, unpack_low_first
from treadle.frontends.quantized.settings import QuantizationSettings, matches_pattern
from treadle.ir.errors import CheckpointError

Array = np.ndarray[Any, Any]

_BITS = (2, 3, 4, 8)


def read_gptq(settings: QuantizationSettings, parts: ModuleParts) -> Mapping[str, QuantizedWeight]:
    """Return the weights of a GPTQ folder. Raises CheckpointError: see `open_quantized`."""
    settings.refuse(
        is_marlin_format="the weights are in the order of a GPU kernel",
        adapter="an adapter changes the weights",
        rotation="rotated inputs",
    )
    settings.choice("pack_dtype", ("int32",), "int32")
    form = settings.choice("checkpoint_format", ("gptq", "gptq_v2"), settings.get("format", "gptq"))
    bits, group = settings.integer("bits", _BITS), settings.group(settings.integer("group_size"))
    overrides = settings.get("dynamic", {})
    if not isinstance(overrides, Mapping):
        raise settings.error("dynamic", overrides, "an object of patterns of module names")
    made: dict[str, QuantizedWeight] = {}
    for module in parts.modules(".qweight"):
        b, size = bits, group
        for pattern, values in overrides.items():
            if matches_pattern(pattern.removeprefix("-:").removeprefix("+:"), module, settings.within):
                if pattern.startswith("-:"):
                    raise CheckpointError(
                        f"the settings exclude {printable(module)}, which has quantized weights",
                        received=f"dynamic {printable(pattern)}",
                        within=settings.within,
                    )
                of = QuantizationSettings(values if isinstance(values, Mapping) else {}, settings.within, "gptq")
                b = of.integer("bits", _BITS) if of.get("bits") is not None else bits
                size = of.group(of.integer("group_size")) if of.get("group_size") is not None else group
                break
        made[f"{module}.weight"] = _weight(module, b, size, 0 if form == "gptq_v2" else 1, parts)
    return made


def _weight(module: str, bits: int, group: int, less: int, parts: ModuleParts) -> GroupedIntegers:
    name = f"{module}.qweight"
    words = parts.take(name, ("i32",), (None, None))
    rows, outputs = words.shape
    size = rows * 32 // bits
    if rows * 32 % bits or (bits == 3 and rows % 3) or outputs * bits % 32:
        raise parts.error(name, f"the words are not an integer number of integers of {bits} bits", str(words))
    group = parts.group(words, size, group)
    groups = size // group
    parts.take(f"{module}.scales", SCALES, (groups, outputs))
    parts.take(f"{module}.qzeros", ("i32",), (groups, outputs * bits // 32))
    members = None
    if parts.has(f"{module}.g_idx"):
        parts.take(f"{module}.g_idx", ("i32", "i64"), (size,))
        members = parts.members(f"{module}.g_idx", groups, group)
    return GroupedIntegers(
        words,
        f"gptq, {bits} bits in groups of {group}",
        (outputs, size),
        bits,
        group,
        partial(_integers, name, bits, parts),
        partial(_factors, module, bits, less, parts),
        members,
        partial(_bytes, name, parts) if bits == 4 else None,
    )


def _bytes(name: str, parts: ModuleParts, outputs: slice) -> Array:
    """Return the words of each output as bytes."""
    return np.ascontiguousarray(parts.array(name)[:, outputs].T).view(np.uint8)


def _integers(name: str, bits: int, parts: ModuleParts, outputs: slice) -> Array:
    return unpack_low_first(_bytes(name, parts, outputs), bits)


def _factors(module: str, bits: int, less: int, parts: ModuleParts) -> tuple[Array, Array]:
    zeros = unpack_low_first(parts.array(f"{module}.qzeros"), bits).astype(np.int32)
    if less and (zeros == (1 << bits) - 1).any():
        at = int((zeros == (1 << bits) - 1).reshape(-1).argmax())
        raise parts.error(
            f"{module}.qzeros",
            "a stored zero is the largest integer, which readers of this format understand differently",
            f"{(1 << bits) - 1} at {[int(i) for i in np.unravel_index(at, zeros.shape)]}",
            'save the checkpoint again with "checkpoint_format": "gptq_v2"',
            at * bits // 32,
        )
    return parts.scales(f"{module}.scales").T, (zeros + less).T
