"""Numbers of blocks, unpacked in registers: the forms that kernels read byte by byte, and the code that unpacks them.

Blocks are stored in panels: byte j of adjacent lines is contiguous, so that a vector holds one byte of each line, and
unpacking yields one element of each line.

    y = d q + c      for a block's scale d, and c = 0, its minimum, -8 d, or -d times its zero
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from treadle.ir.encodings.coded_forms import CodedGroups, table_of
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.layouts import PAIR_STEP
from treadle.ir.types import DTYPES, f16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

Load = Callable[["Expr"], "Expr"]
"""A function that loads a vector of the bytes at an offset in a block, u8."""

_i32, _i16, _i8 = (DTYPES[name] for name in ("i32", "i16", "i8"))
_E2M1 = {"e2m1_groups": 2.0**126, "mxfp4": 2.0**127}
"""The factors of e2m1 floats by form: see `_small_float`. Floats of mxfp4 are doubled, since its scales are halved."""


@dataclass(frozen=True)
class PackedForm:
    """A form of blocks that kernels read byte by byte.

    bits   bits of an element: 8, signed, or 4
    group  number of elements of a block; 0: a line is one block
    scale  bytes of a block's scale, with which it begins: 2 or 4; 1: an exponent of two, whose power is halved
    least  True if a block's minimum, or its zero, follows the scale, in 2 bytes
    zero   value to subtract from an element: 8, or 0
    zeros  True if these 2 bytes are a zero: c is -d times it. If d has 4 bytes, it is subtracted first, since d q is
           not exact
    codes  the form of codes whose table has the elements' values, "nf4_groups"; empty: elements are integers
    """

    bits: int
    group: int
    scale: int = 2
    least: bool = False
    zero: int = 0
    zeros: bool = False
    codes: str = ""

    @property
    def header(self) -> int:
        """Number of bytes of a block before its elements."""
        return self.scale + 2 * self.least

    @property
    def in_pairs(self) -> bool:
        """True if kernels can read bytes in pairs."""
        return self.header % 2 == 0 and not self._subtracts

    @property
    def _subtracts(self) -> bool:
        return self.zeros and self.scale == 4

    @property
    def bytes(self) -> int:
        """Number of bytes of a block, for a form with groups."""
        return self.header + self.group * self.bits // 8

    @property
    def title(self) -> str:
        """Name of the form in a kernel's name."""
        if self.codes:
            return f"{self.codes.removesuffix('_groups')}_by_{self.group}"
        size = f"_by_{self.group}" + "_wide" * (self.scale == 4) if self.group else ""
        return f"{self.bits}_bits{size}" + ("_with_zero" if self.zeros else "_with_least" * self.least)

    def scales(self, k: Emitter, load: Load, base: Expr, lanes: int) -> tuple[Expr, Expr | None]:
        """Return d and c of the blocks that begin at `base`, for `number`. c is None if it is 0."""
        d = k.let(_float(k, [load(base + i) for i in range(self.scale)], lanes), "d")
        if self.least:
            c = _float(k, [load(base + self.scale + i) for i in range(2)], lanes)
            if self._subtracts:
                return d, k.let(c, "zero")
            return d, k.let(self._offset(k, d, c, lanes), "c")
        return d, k.let(d * k.number(-float(self.zero), f32, lanes), "c") if self.zero else None

    def number(self, element: Expr, d: Expr, c: Expr | None) -> Expr:
        """Return the number of an element, from the scales that `scales` returns."""
        if c is None:
            return element * d
        return (element - c) * d if self._subtracts else element * d + c

    def scales_of_pairs(self, k: Emitter, load: Load, lanes: int) -> tuple[Expr, Expr | None]:
        """Return d and c like `scales`, for blocks with bytes stored in pairs: `load` takes the index of a pair."""

        def half(place: int) -> Expr:
            return k.cast(k.bits(load(k.index(place)), f16, lanes), f32, lanes)

        if self.scale == 4:
            low, high = (k.cast(k.bits(load(k.index(place)), _i16, lanes), _i32, lanes) for place in range(2))
            low = low & k.number(0xFFFF, _i32, lanes)
            d = k.let(k.bits(low | k.shift_left(high, k.number(16, _i32, lanes)), f32, lanes), "d")
        else:
            d = k.let(half(0), "d")
        if self.least:
            return d, k.let(self._offset(k, d, half(self.scale // 2), lanes), "c")
        return d, k.let(d * k.number(-float(self.zero), f32, lanes), "c") if self.zero else None

    def _offset(self, k: Emitter, d: Expr, stored: Expr, lanes: int) -> Expr:
        return d * (k.number(0.0, f32, lanes) - stored) if self.zeros else stored

    def elements(self, k: Emitter, byte: Expr, lanes: int, *, raised: bool = False) -> list[Expr]:
        """Return the elements of a byte as float32: one element, or two, one of the block's first half and one of its
        second half.

        raised  True if the second element stays multiplied by 16, which saves a shift; not for codes
        """
        if self.codes:
            wide = k.let(k.cast(byte, _i32, lanes), "byte")
            if self.bits == 8:
                return [_small_float(k, wide, lanes, 20, 2.0**120)]
            halves = [wide & k.number(15, _i32, lanes), wide >> k.number(4, _i32, lanes)]
            if k.isa.permutes and lanes == k.isa.lanes():
                return [_permuted(k, self.codes, code, lanes) for code in halves]
            if self.codes in _E2M1:
                return [_small_float(k, code, lanes, 22, _E2M1[self.codes]) for code in halves]
            return [_entry(k, code, lanes, table_of(self.codes).tolist()) for code in halves]
        if self.bits == 8:
            return [k.cast(k.cast(k.bits(byte, _i8, lanes), _i32, lanes), f32, lanes)]
        wide = k.let(k.cast(byte, _i32, lanes), "byte")
        low = wide & k.number(15, _i32, lanes)
        high = wide & k.number(240, _i32, lanes) if raised else wide >> k.number(4, _i32, lanes)
        return [k.cast(low, f32, lanes), k.cast(high, f32, lanes)]


def _float(k: Emitter, bytes: Sequence[Expr], lanes: int) -> Expr:
    """Return a float16 of two bytes, or a float32 of four bytes, as float32. The lowest byte comes first. For one byte
    e, return 2^(e - 128).
    """
    made = k.cast(bytes[0], _i32, lanes)
    if len(bytes) == 1:
        power = k.bits(k.shift_left(made - k.number(1, _i32, lanes), k.number(23, _i32, lanes)), f32, lanes)
        for e in (1, 0):  # subnormal
            power = k.select(made < k.number(e + 1, _i32, lanes), k.number(2.0 ** (e - 128), f32, lanes), power)
        return power
    for place, byte in enumerate(bytes[1:], start=1):
        made = made | k.shift_left(k.cast(byte, _i32, lanes), k.number(8 * place, _i32, lanes))
    if len(bytes) == 4:
        return k.bits(made, f32, lanes)
    return k.cast(k.bits(k.cast(made, _i16, lanes), f16, lanes), f32, lanes)


def _small_float(k: Emitter, code: Expr, lanes: int, shift: int, scale: float) -> Expr:
    """Return an 8-bit or 4-bit float as float32. Its exponent and mantissa are shifted to float32's, and `scale` makes
    up for the difference of the exponents' biases. Subnormal numbers become float32 subnormals, so all are exact.
    """
    sign = 8 if shift == 22 else 128
    below = k.shift_left(code & k.number(sign - 1, _i32, lanes), k.number(shift, _i32, lanes))
    above = k.shift_left(code & k.number(sign, _i32, lanes), k.number(32 - sign.bit_length(), _i32, lanes))
    return k.bits(below | above, f32, lanes) * k.number(scale, f32, lanes)


def _entry(k: Emitter, code: Expr, lanes: int, table: Iterable[float]) -> Expr:
    """Return entries of a table of 16, by codes of four bits: each bit selects one of two halves."""
    code = k.let(code, "code")
    values = [k.number(float(value), f32, lanes) for value in table]
    for bit in range(4):
        low = (code & k.number(1 << bit, _i32, lanes)) < k.number(1, _i32, lanes)
        values = [k.let(k.select(low, values[i], values[i + 1]), "y") for i in range(0, len(values), 2)]
    return values[0]


_WIDE = {"uint4_wide_groups": 4, "int8_zero_groups": 8}
"""The bits of forms with a float32 scale and a zero."""


def _permuted(k: Emitter, codes: str, code: Expr, lanes: int) -> Expr:
    """Return entries of a form's table of 16, by codes of four bits: an instruction selects lanes of the table."""
    table = np.float32(2) * table_of("e2m1_groups") if codes == "mxfp4" else table_of(codes)
    name = f"treadle_entries_of_{codes}_{lanes}"
    entries = [f"float 0x{np.float64(value).view(np.uint64):016X}" for value in table]
    floats, integers = (f"<{lanes} x {kind}>" for kind in ("float", "i32"))

    def text() -> str:
        if lanes == 16:
            return f"""
declare {floats} @llvm.x86.avx512.permvar.sf.512({floats}, {integers})
define {floats} @{name}({integers} %c) alwaysinline {{
  %y = call {floats} @llvm.x86.avx512.permvar.sf.512({floats} <{", ".join(entries)}>, {integers} %c)
  ret {floats} %y
}}"""
        low, high = (f"<{', '.join(entries[i : i + 8])}>" for i in (0, 8))
        return f"""
declare {floats} @llvm.x86.avx2.permps({floats}, {integers})
define {floats} @{name}({integers} %c) alwaysinline {{
  %low = call {floats} @llvm.x86.avx2.permps({floats} {low}, {integers} %c)
  %high = call {floats} @llvm.x86.avx2.permps({floats} {high}, {integers} %c)
  %is = icmp ugt {integers} %c, {_splat_text(lanes, 7)}
  %y = select <{lanes} x i1> %is, {floats} %high, {floats} %low
  ret {floats} %y
}}"""

    return k.llvm(name, text, f"float32x{lanes}", code)


def _splat_text(lanes: int, value: int) -> str:
    return f"<{', '.join([f'i32 {value}'] * lanes)}>"


INT8_ROWS = PackedForm(8, 0, scale=4)
"""Rows of 8 bits, each with one float32 scale."""


def reads_in_tiles(form: PackedForm) -> bool:
    """Return True if an AMX kernel reads a form: a block is as long as a row of a tile, or a line is one block."""
    return form.group in (0, PAIR_STEP)


def packed_form(encoding: Encoding) -> PackedForm | None:
    """Return the form in which kernels read an encoding byte by byte, or None."""
    if encoding.form == "int4_groups":
        return PackedForm(4, encoding.group, zero=8)
    if encoding.form == "uint4_groups":
        return PackedForm(4, encoding.group, least=True, zeros=True)
    if encoding.form == "int8_groups":
        return PackedForm(8, encoding.group, scale=4)
    if encoding.form in _WIDE:
        return PackedForm(_WIDE[encoding.form], encoding.group, scale=4, least=True, zeros=True)
    if isinstance(encoding.block, CodedGroups):
        return PackedForm(encoding.block.bits, encoding.group, scale=4, codes=encoding.form)
    return {
        "int8_rows": INT8_ROWS,
        "mxfp4": PackedForm(4, 32, scale=1, codes="mxfp4"),
        "q8_0": PackedForm(8, 32),
        "q4_0": PackedForm(4, 32, zero=8),
        "q4_1": PackedForm(4, 32, least=True),
    }.get(encoding.form)
