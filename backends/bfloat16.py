"""Conversion of bf16 for NumPy, which has no such dtype: uint16 bits inside kernels, float32 arrays or PyTorch tensors
for callers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from treadle.backends.protocol import Port
from treadle.backends.signature import numpy_taken, refuse_dtype
from treadle.ir.types import f32

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 15
_NAN = 0x7FC0


def bf16_taken(port: Port, value: Any) -> Array:
    """Return the bits of a bf16 tensor, or of float32 numbers that bf16 represents exactly. Raises BackendError for
    others.
    """
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        import torch

        bits: Array = value.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
        return bits
    wide = numpy_taken(Port(port.name, port.type.with_dtype(f32)), value)
    bits = rounded(wide)
    if not np.array_equal(widened(bits), wide, equal_nan=True):
        raise refuse_dtype(port, "a float32 that bf16 cannot represent", f"a tensor, {port.name}.to(torch.bfloat16)")
    return bits


def bf16_given(bits: Array, tensor: bool) -> Any:
    """Return bits of bf16 as a float32 array, or as a bf16 tensor if `tensor`."""
    if not tensor:
        return widened(bits)
    import torch

    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def rounded(wide: Array) -> Array:
    """Round float32 numbers to bits of bf16, to nearest even; a NaN stays NaN. Numbers are converted in blocks that fit
    into a cache.
    """
    values = np.ascontiguousarray(wide, np.float32).reshape(-1)
    words = values.view(np.uint32)
    made = np.empty(words.size, np.uint16)
    held = np.empty(min(_BLOCK, words.size), np.uint32)
    for start in range(0, words.size, _BLOCK):
        part = words[start : start + _BLOCK]
        up = held[: part.size]
        np.right_shift(part, 16, out=up)
        np.bitwise_and(up, 1, out=up)
        up += 0x7FFF
        up += part
        np.right_shift(up, 16, out=up)
        made[start : start + _BLOCK] = up
        block = values[start : start + _BLOCK]
        if np.isnan(np.max(block)):
            made[start : start + _BLOCK][np.isnan(block)] = _NAN
    return made.reshape(np.shape(wide))


def widened(bits: Array) -> Array:
    """Convert bits of bf16 to float32 numbers."""
    words = bits.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)
