"""Block forms with a zero in each group, in which weights of quantized checkpoints are read.

uint4_groups        4 bits, a float16 scale and a zero per group
uint4_wide_groups   4 bits, a float32 scale and a zero per group
int8_zero_groups    8 bits, a float32 scale and a zero per group

Zeros are float16, which holds each integer up to 2048. Integers of 2 and 3 bits are stored in the forms of 4 bits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from treadle.ir.encodings.encoding import Array, BlockForm, block_form
from treadle.ir.encodings.gguf_forms import unpacked
from treadle.ir.encodings.rounded_forms import group_length


class _ZeroForm(BlockForm):
    """A form of integers with a scale and a zero per group.

    scale  dtype of the scale
    """

    grouped = True
    scale: ClassVar[str] = "<f4"

    def __init__(self, group: int) -> None:
        self.elements: int = group_length(self.name, group)

    def record(self, elements: int) -> np.dtype[Any]:
        return np.dtype([("scale", self.scale), ("zero", "<f2"), ("q", "u1", (elements // 2,))])

    def numbers(self, blocks: Array) -> Array:
        """Return the integers of n records as f32[n, elements]."""
        return unpacked(blocks["q"], blocks["q"].shape[-1], 4).astype(np.float32)

    def decode(self, blocks: Array) -> Array:
        made: Array = self.numbers(blocks) - blocks["zero"].astype(np.float32)[:, None]
        made *= blocks["scale"].astype(np.float32)[:, None]
        return made


@block_form
class UInt4Groups(_ZeroForm):
    """y = scale q - scale zero: q from 0 to 15, a float16 scale and a zero per group

    For a zero that is an integer from 0 to 16, y is scale (q - zero) exactly. Elements i and i + n / 2 of a group of n
    share byte i, the first in the low half.
    """

    name = "uint4_groups"
    scale = "<f2"
    whole = True

    def parts(self, blocks: Array) -> tuple[Array, Array, Array]:
        d = blocks["scale"].astype(np.float32)[:, None]
        q = unpacked(blocks["q"], blocks["q"].shape[-1], 4).astype(np.int8)
        return q, d, d * -blocks["zero"].astype(np.float32)[:, None]

    def decode(self, blocks: Array) -> Array:
        q, d, c = self.parts(blocks)
        made: Array = d * q.astype(np.float32) + c
        return made


@block_form
class UInt4WideGroups(_ZeroForm):
    """y = scale (q - zero): q from 0 to 15 as in uint4_groups, a float32 scale and a zero per group"""

    name = "uint4_wide_groups"


@block_form
class Int8ZeroGroups(_ZeroForm):
    """y = scale (q - zero): q from -128 to 127, a float32 scale and a zero per group"""

    name = "int8_zero_groups"

    def record(self, elements: int) -> np.dtype[Any]:
        return np.dtype([("scale", self.scale), ("zero", "<f2"), ("q", "i1", (elements,))])

    def numbers(self, blocks: Array) -> Array:
        made: Array = blocks["q"].astype(np.float32)
        return made
