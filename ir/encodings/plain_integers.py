"""Blocks of integers as plain arrays: the integers of each line, and the scale and zero point of each block.

    y = scale (q - zero)

Formats of other programs store these arrays, so a weight can be written to them with its own integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from treadle.ir.encodings.encoding import Array, Encoding
from treadle.ir.encodings.gguf_forms import unpacked

_SIGNED_BITS = {"int8_rows": 8, "int8_groups": 8, "q8_0": 8, "int4_groups": 4, "q4_0": 4}
"""Bits of the integers of symmetric forms."""
_ZERO_BITS = {"uint8_rows": (8, False), "uint4_groups": (4, False), "uint4_wide_groups": (4, False),
              "int8_zero_groups": (8, True)}  # fmt: skip
"""For forms with zero points: the bits of the integers, and True if they are signed."""


@dataclass(frozen=True)
class IntegerParts:
    """A weight in blocks of integers, with its blocked axis last.

    q       the integers, i8 or u8 [..., k]
    scale   one number for each block, f16 or f32 [..., blocks]
    zero    one integer for each block, in the dtype of q; None: 0
    bits    4 or 8
    block   number of elements that share a scale
    whole   True if the form has one block for a whole line
    """

    q: Array
    scale: Array
    zero: Array | None
    bits: int
    block: int
    whole: bool


def has_integer_parts(encoding: Encoding) -> bool:
    """Return True if `integer_parts` reads the form; zero points may still prevent it."""
    return encoding.form in _SIGNED_BITS or encoding.form in _ZERO_BITS


def integer_parts(encoding: Encoding, blocks: Array) -> IntegerParts | None:
    """Return the integers of an array of blocks. Return None for a form of other numbers, and for zero points that are
    not integers in the range of q.
    """
    if not has_integer_parts(encoding):
        return None
    lines = np.ascontiguousarray(np.moveaxis(blocks, encoding.axis, -1))
    size = encoding.size(lines.shape[-1])
    n, whole = encoding.elements(size), encoding.block.elements is None
    records = lines.view(encoding.block.record(n))
    named = records.dtype.names or ()
    scale = records["scale" if "scale" in named else "d"]
    if encoding.form in _SIGNED_BITS:
        q, _, _ = encoding.block.parts(records.reshape(-1)) if not whole else (records["q"], None, None)
        return IntegerParts(q.reshape(*lines.shape[:-1], size), scale, None, _SIGNED_BITS[encoding.form], n, whole)
    bits, signed = _ZERO_BITS[encoding.form]
    codes = records["q"] if bits == 8 else unpacked(records["q"].reshape(-1, n // 2), n // 2, 4)
    points, limits = records["zero"], (-128, 127) if signed else (0, (1 << bits) - 1)
    with np.errstate(invalid="ignore"):
        if not ((points == np.rint(points)) & (points >= limits[0]) & (points <= limits[1])).all():
            return None
    dtype = np.dtype(np.int8 if signed else np.uint8)
    q = codes.reshape(*lines.shape[:-1], size).view(dtype)
    return IntegerParts(q, scale, points.astype(dtype), bits, n, whole)


def low_first_bytes(q: Array) -> Array:
    """Pack 4-bit integers, two a byte in the order of the array, the first in the low bits."""
    flat = q.reshape(-1).view(np.uint8) & np.uint8(15)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    made: Array = flat[0::2] | (flat[1::2] << np.uint8(4))
    return made
