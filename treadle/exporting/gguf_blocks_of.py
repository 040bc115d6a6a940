"""Weights in blocks as tensors of GGUF types, with their own integers.

int4_groups(32)                    Q4_0, the same bytes
int4_groups(64), (128), (256)      Q4_0, a scale repeated
int8_rows, int8_groups(32 and up)  Q8_0, a scale repeated and rounded to float16
uint4_groups, uint4_wide_groups    Q4_1: the scale, and -scale zero, rounded to float16
GGUF's own forms                   the same bytes
"""

from __future__ import annotations

from typing import Any

import numpy as np

from treadle.exporting.gguf_writing import TYPES
from treadle.files.shown_names import printable
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.encodings.plain_integers import IntegerParts, integer_parts
from treadle.ir.encodings.rounded_forms import packed_nibbles
from treadle.ir.errors import Hint, UsageError

Array = np.ndarray[Any, Any]

_BLOCK = 32


def gguf_type(name: str, encoding: Encoding, size: int) -> str:
    """Return the GGUF type in which a weight in rows of `size` elements is written.

    Raises UsageError for a form that has none.
    """
    if encoding.axis != -1:
        raise _refusal(name, encoding, "its blocks are not along its rows")
    if encoding.form in TYPES:
        return encoding.form
    found = {
        "int4_groups": "q4_0",
        "int8_rows": "q8_0",
        "int8_groups": "q8_0",
        "uint4_groups": "q4_1",
        "uint4_wide_groups": "q4_1",
    }.get(encoding.form)
    if found is None:
        raise _refusal(name, encoding, "GGUF has no such type")
    if encoding.group and encoding.group % _BLOCK:
        raise _refusal(name, encoding, f"GGUF's blocks have {_BLOCK} elements")
    if size % _BLOCK:
        why = f"rows of {size} are not an integer number of GGUF's blocks of {_BLOCK}"
        raise _refusal(name, encoding, why, fits=False)
    return found


def gguf_blocks(name: str, encoding: Encoding, own: Array) -> Array:
    """Return a weight's blocks in the type of `gguf_type`, u8[rows, bytes].

    Raises UsageError for a scale out of range.
    """
    if encoding.form in TYPES:
        return own
    size = encoding.size(own.shape[-1])
    form = gguf_type(name, encoding, size)
    if form == "q4_0" and encoding.group == _BLOCK:
        return own
    parts = integer_parts(encoding, own)
    if parts is None:
        raise _refusal(name, encoding, "a zero point is not an integer of 4 bits")
    made = np.empty((own.shape[0], size // _BLOCK), Encoding(form).block.record(_BLOCK))
    repeats = made.shape[1] // parts.scale.shape[-1]
    made["d"] = _half(name, encoding, np.repeat(parts.scale, repeats, axis=-1))
    if form == "q8_0":
        made["qs"] = parts.q.reshape(made["qs"].shape)
    else:
        made["qs"] = packed_nibbles(_nibbles(parts).reshape(*made.shape, _BLOCK))
    if form == "q4_1":
        zeros = np.repeat(_zeros(parts), repeats, axis=-1).astype(np.float32)
        made["m"] = _half(name, encoding, -zeros * np.repeat(parts.scale.astype(np.float32), repeats, axis=-1))
    blocks: Array = made.view(np.uint8).reshape(own.shape[0], -1)
    return blocks


def _nibbles(parts: IntegerParts) -> Array:
    """Return 4-bit integers from 0 to 15."""
    return parts.q if parts.q.dtype == np.uint8 else (parts.q + np.int8(8)).view(np.uint8)


def _zeros(parts: IntegerParts) -> Array:
    assert parts.zero is not None
    return parts.zero


def _half(name: str, encoding: Encoding, scales: Array) -> Array:
    """Return scales in float16. Raises UsageError for one that float16 cannot hold."""
    with np.errstate(over="ignore", under="ignore"):
        made = scales.astype(np.float16)
    lost = (np.isinf(made) & np.isfinite(scales)) | ((made == 0) & (scales != 0))
    if lost.any():
        raise _refusal(name, encoding, f"the scale {float(scales[lost][0]):g} is out of the range of float16")
    return made


def _refusal(name: str, encoding: Encoding, why: str, *, fits: bool = True) -> UsageError:
    """Return the error for a weight; `fits` is True if it can be decoded and stored in GGUF's blocks."""
    decoded = Hint('widen="blocks", without quantize', "--widen blocks without --quantize")
    return UsageError(
        f"{printable(name)} cannot be written to a GGUF file: {why}",
        received=f"stored as {encoding}",
        hint=Hint('widen="blocks", with quantize="int4"', "--widen blocks with --quantize int4") if fits else decoded,
    )
