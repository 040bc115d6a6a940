"""Block forms that numbers are rounded to.

int8_rows      8 bits, one scale per row: weights
uint8_rows     8 bits, one scale and one zero point per row: the other operand of products with weights in rows
int8_groups    8 bits, one scale per group: the other operand of products with weights in other blocks
int4_groups    4 bits, one scale per group: weights
"""

from __future__ import annotations

from typing import Any

import numpy as np

from treadle.ir.encodings.encoding import Array, BlockForm, block_form
from treadle.ir.encodings.gguf_forms import unpacked
from treadle.ir.errors import GraphError

_GROUPS = (16, 32, 64, 128, 256)

SMALLEST_ROW = np.float32(2.0**-119)
"""Smallest magnitude of a block: int8_rows and int8_groups encode a block as zeros if all its numbers are smaller."""


def group_length(form: str, group: int) -> int:
    """Return the number of elements in a group. Raises GraphError if the form does not support it."""
    if group not in _GROUPS:
        hint = "one of " + ", ".join(map(str, _GROUPS))
        raise GraphError(f"{form}: invalid group size", received=str(group), hint=hint)
    return group


def packed_nibbles(codes: Array) -> Array:
    """Pack 4-bit codes u8[..., n] into bytes u8[..., n / 2].

    Byte i has code i in its low bits, and code i + n / 2 in its high bits.
    """
    half = codes.shape[-1] // 2
    made: Array = codes[..., half:] << np.uint8(4)
    made |= codes[..., :half]
    return made


def packed_pairs(pairs: Array, *, high_first: bool = False) -> Array:
    """Pack 4-bit codes that are stored in pairs, u8[..., n / 2], as `packed_nibbles` packs them, for n from 4 on.

    Byte i of `pairs` has code 2 i in its low bits and code 2 i + 1 in its high bits; with `high_first` the other way
    round. Two codes of each half become a 16-bit word, which takes a third of the time of unpacking them.
    """
    quarter = pairs.shape[-1] // 2
    low, high = (pairs[..., half].astype("<u2") for half in (slice(quarter), slice(quarter, None)))
    first, second = (4, 0) if high_first else (0, 4)
    mask = np.uint16(15)
    made: Array = (low >> np.uint16(first)) & mask
    made |= ((high >> np.uint16(first)) & mask) << np.uint16(4)
    made |= ((low >> np.uint16(second)) & mask) << np.uint16(8)
    made |= ((high >> np.uint16(second)) & mask) << np.uint16(12)
    return made.view(np.uint8)


class _Symmetric(BlockForm):
    """y = scale q: q from -127 to 127, one float32 scale per block; the largest magnitude in a block is 127 scales

    The form is symmetric, so that integer products need no correction. The scale is 0 for a block of zeros, and for a
    block whose numbers are all below 2^-119: 127 / 2^-119 is the largest such factor that float32 can hold.
    """

    encodes = True
    spacing = 1 / 127
    marks = True
    whole = True

    def record(self, elements: int) -> np.dtype[Any]:
        return np.dtype([("scale", "<f4"), ("q", "i1", (elements,))])

    def decode(self, blocks: Array) -> Array:
        made: Array = blocks["q"].astype(np.float32) * blocks["scale"][:, None]
        return made

    def parts(self, blocks: Array) -> tuple[Array, Array, Array]:
        scale = blocks["scale"][:, None]
        return blocks["q"], scale, np.zeros_like(scale)

    def encode(self, values: Array) -> Array:
        made = np.empty(len(values), self.record(values.shape[-1]))
        largest = np.abs(values).max(axis=-1)
        finite, seen = np.isfinite(largest), largest >= SMALLEST_ROW
        made["scale"] = np.where(finite, np.where(seen, largest / np.float32(127), 0), np.nan)
        factor = np.float32(127) / np.where(finite & seen, largest, 1)
        made["q"] = np.rint(np.where((finite & seen)[:, None], values, 0) * factor[:, None])
        return made


SMALLEST_STEP = np.float32(2.0**-126)
"""A row of uint8_rows with a smaller scale becomes zeros: float32's least normal number, whose inverse is finite."""


@block_form
class UInt8Rows(BlockForm):
    """y = scale (q - zero): q and zero from 0 to 255, one float32 scale and one zero for a whole row

    The steps span the interval from the row's least number to its largest, extended to include 0, so that 0 is a step.
    A row of numbers of one sign, as from an activation function, still uses all steps. A row whose scale would be below
    2^-126 has the scale 0.
    """

    name = "uint8_rows"
    elements = None
    encodes = True
    spacing = 2 / 255  # relative to the largest magnitude, if numbers reach as far on both sides
    marks = True

    def __init__(self, group: int) -> None:
        if group:
            raise GraphError("uint8_rows takes no group size: a block is a whole row", received=f"uint8_rows({group})")

    def record(self, elements: int) -> np.dtype[Any]:
        return np.dtype([("scale", "<f4"), ("zero", "u1"), ("q", "u1", (elements,))])

    def decode(self, blocks: Array) -> Array:
        steps = blocks["q"].astype(np.float32) - blocks["zero"].astype(np.float32)[:, None]
        made: Array = steps * blocks["scale"][:, None]
        return made

    def encode(self, values: Array) -> Array:
        made = np.empty(len(values), self.record(values.shape[-1]))
        last = np.float32(255)
        least, largest = np.minimum(values.min(axis=-1), 0), np.maximum(values.max(axis=-1), 0)
        finite = np.isfinite(least) & np.isfinite(largest)
        step = np.where(finite, largest / last - least / last, 0)
        seen = step >= SMALLEST_STEP
        factor = np.where(seen, 1 / np.where(seen, step, 1), 0).astype(np.float32)
        zero = np.rint(-np.where(seen, least, 0) * factor)
        made["scale"] = np.where(finite, np.where(seen, step, 0), np.nan)
        made["zero"] = zero
        steps = np.rint(np.where(seen[:, None], values, 0) * factor[:, None]) + zero[:, None]
        made["q"] = np.minimum(steps, last)
        return made


@block_form
class Int8Rows(_Symmetric):
    """y = scale q; a block is a whole row"""

    name = "int8_rows"
    elements = None

    def __init__(self, group: int) -> None:
        if group:
            raise GraphError("int8_rows takes no group size: a block is a whole row", received=f"int8_rows({group})")


@block_form
class Int8Groups(_Symmetric):
    """y = scale q; a block is a group of neighbours. Products with weights in blocks round x to it."""

    name = "int8_groups"
    grouped = True

    def __init__(self, group: int) -> None:
        self.elements = group_length(self.name, group)


@block_form
class Int4Groups(BlockForm):
    """y = scale (q - 8): q from 0 to 15, one float16 scale per group; the value of largest magnitude is -8 scales

    Values are rounded to nearest. Elements i and i + n / 2 of a group of n share byte i, the first in the low half.
    """

    name = "int4_groups"
    encodes = True
    spacing = 1 / 8
    grouped = True
    whole = True

    def __init__(self, group: int) -> None:
        self.elements = group_length(self.name, group)

    def record(self, elements: int) -> np.dtype[Any]:
        return np.dtype([("scale", "<f2"), ("q", "u1", (elements // 2,))])

    def parts(self, blocks: Array) -> tuple[Array, Array, Array]:
        q = unpacked(blocks["q"], blocks["q"].shape[-1], 4).astype(np.int8) - np.int8(8)
        scale = blocks["scale"].astype(np.float32)[:, None]
        return q, scale, np.zeros_like(scale)

    def decode(self, blocks: Array) -> Array:
        q, scale, _ = self.parts(blocks)
        made: Array = scale * q.astype(np.float32)
        return made

    def encode(self, values: Array) -> Array:
        largest = np.take_along_axis(values, np.abs(values).argmax(axis=-1)[:, None], -1)
        with np.errstate(over="ignore"):
            scale = (largest / np.float32(-8)).astype(np.float16)
        if not np.isfinite(scale).all():
            beyond = float(largest[~np.isfinite(scale)][0])
            raise GraphError(
                "int4_groups: a value is too large for a float16 scale",
                received=f"a group whose largest value is {beyond:g}",
            )
        wide = scale.astype(np.float32)
        q = np.clip(np.rint(values / np.where(wide != 0, wide, 1)) + 8, 0, 15).astype(np.uint8)
        made = np.empty(len(values), self.record(values.shape[-1]))
        made["scale"] = scale[:, 0]
        made["q"] = packed_nibbles(q)
        return made
