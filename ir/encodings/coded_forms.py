"""Block forms of codes: an element is an entry of the form's table times its group's scale, in float32.

e4m3_groups    8 bits: floats with 4 bits of exponent and 3 of mantissa
e2m1_groups    4 bits: floats with 2 bits of exponent and 1 of mantissa
nf4_groups     4 bits: quantiles of the normal distribution (Dettmers et al. 2023)
fp4_groups     4 bits: floats of bitsandbytes, of 3 exponents and 1 bit of mantissa, up to 1

Sources: the OCP 8-bit floating point specification (E4M3: no infinities, NaN is S.1111.111), the OCP microscaling
specification (E2M1), and `create_normal_map` and `create_fp8_map` of bitsandbytes' functional.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from treadle.ir.encodings.encoding import FORMS, Array, BlockForm, block_form
from treadle.ir.encodings.gguf_forms import unpacked
from treadle.ir.encodings.rounded_forms import group_length


def _float_table(exponents: int, mantissas: int, bias: int) -> Array:
    """Return the values of small floats by their codes: a sign, an exponent, and a mantissa, without infinities."""
    codes = np.arange(1 << (exponents + mantissas))
    exponent, mantissa = codes >> mantissas, codes & ((1 << mantissas) - 1)
    fraction = mantissa / (1 << mantissas) + (exponent > 0)
    positive = np.ldexp(fraction, np.maximum(exponent, 1) - bias).astype(np.float32)
    return np.concatenate([positive, -positive])


def _e4m3() -> Array:
    table = _float_table(4, 3, 7)
    table[[0x7F, 0xFF]] = np.nan
    return table


class CodedGroups(BlockForm):
    """y = table[q] scale: a code of 4 or 8 bits, and one float32 scale per group

    Codes i and i + n / 2 of a group of n codes of 4 bits share byte i, the first in the low half.

    table  the values by code, f32[16] or f32[256]
    """

    grouped = True
    table: ClassVar[Array]

    def __init__(self, group: int) -> None:
        self.elements: int = group_length(self.name, group)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if len(self.table) == 256 else 4

    def record(self, elements: int) -> np.dtype[Any]:
        return np.dtype([("scale", "<f4"), ("q", "u1", (elements * self.bits // 8,))])

    def decode(self, blocks: Array) -> Array:
        q = blocks["q"]
        codes = q if self.bits == 8 else unpacked(q, q.shape[-1], 4)
        made: Array = self.table[codes]
        made *= blocks["scale"][:, None]
        return made


@block_form
class E4M3Groups(CodedGroups):
    """y = q scale: q is an e4m3 float of 8 bits"""

    name = "e4m3_groups"
    table = _e4m3()

    def sample(self, rng: np.random.Generator, count: int, elements: int) -> Array:
        made = super().sample(rng, count, elements)
        made["q"] -= (made["q"] & 0x7F) == 0x7F  # no NaN
        return made


@block_form
class E2M1Groups(CodedGroups):
    """y = q scale: q is an e2m1 float of 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives"""

    name = "e2m1_groups"
    table = _float_table(2, 1, 1)


@block_form
class NF4Groups(CodedGroups):
    """y = table[q] scale: q is the number of a quantile of the normal distribution, from -1 to 1"""

    name = "nf4_groups"
    table = np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        np.float32,
    )  # fmt: skip


@block_form
class FP4Groups(CodedGroups):
    """y = table[q] scale: q is a float of bitsandbytes, from -1 to 1"""

    name = "fp4_groups"
    table = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)


def table_of(form: str) -> Array:
    """Return the values by code of a form, f32[16] or f32[256]."""
    block = FORMS[form](32)
    assert isinstance(block, CodedGroups)
    return block.table
