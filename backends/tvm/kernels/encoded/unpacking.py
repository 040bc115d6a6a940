"""Numbers of blocks, unpacked in registers: the forms that kernels read byte by byte, and the code that unpacks them.

Blocks are stored in panels: byte j of adjacent lines is contiguous, so that a vector holds one byte of each line, and
unpacking yields one element of each line.

    y = d q + c      for a block's scale d, and c = 0, its minimum, -8 d, or -d times its zero
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.layouts import PAIR_STEP
from treadle.ir.types import DTYPES, f16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

Load = Callable[["Expr"], "Expr"]
"""A function that loads a vector of the bytes at an offset in a block, u8."""

_i32, _i16, _i8 = (DTYPES[name] for name in ("i32", "i16", "i8"))


@dataclass(frozen=True)
class PackedForm:
    """A form of blocks that kernels read byte by byte.

    bits   bits of an element: 8, signed, or 4
    group  number of elements of a block; 0: a line is one block
    scale  bytes of a block's scale, with which it begins: 2 or 4
    least  True if a block's minimum, or its zero, follows the scale, in 2 bytes
    zero   value to subtract from an element: 8, or 0
    zeros  True if these 2 bytes are a zero: c is -d times it
    """

    bits: int
    group: int
    scale: int = 2
    least: bool = False
    zero: int = 0
    zeros: bool = False

    @property
    def header(self) -> int:
        """Number of bytes of a block before its elements."""
        return self.scale + 2 * self.least

    @property
    def bytes(self) -> int:
        """Number of bytes of a block, for a form with groups."""
        return self.header + self.group * self.bits // 8

    @property
    def title(self) -> str:
        """Name of the form in a kernel's name."""
        size = f"_by_{self.group}" + "_wide" * (self.scale == 4) if self.group else ""
        return f"{self.bits}_bits{size}" + ("_with_zero" if self.zeros else "_with_least" * self.least)

    def scales(self, k: Emitter, load: Load, base: Expr, lanes: int) -> tuple[Expr, Expr | None]:
        """Return d and c of the blocks that begin at `base`. c is None if it is 0."""
        d = k.let(_float(k, [load(base + i) for i in range(self.scale)], lanes), "d")
        if self.least:
            c = _float(k, [load(base + self.scale + i) for i in range(2)], lanes)
            return d, k.let(self._offset(k, d, c, lanes), "c")
        return d, k.let(d * k.number(-float(self.zero), f32, lanes), "c") if self.zero else None

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

        raised  True if the second element stays multiplied by 16, which saves a shift
        """
        if self.bits == 8:
            return [k.cast(k.cast(k.bits(byte, _i8, lanes), _i32, lanes), f32, lanes)]
        wide = k.let(k.cast(byte, _i32, lanes), "byte")
        low = wide & k.number(15, _i32, lanes)
        high = wide & k.number(240, _i32, lanes) if raised else wide >> k.number(4, _i32, lanes)
        return [k.cast(low, f32, lanes), k.cast(high, f32, lanes)]


def _float(k: Emitter, bytes: Sequence[Expr], lanes: int) -> Expr:
    """Return a float16 of two bytes, or a float32 of four bytes, as float32. The lowest byte comes first."""
    made = k.cast(bytes[0], _i32, lanes)
    for place, byte in enumerate(bytes[1:], start=1):
        made = made | k.shift_left(k.cast(byte, _i32, lanes), k.number(8 * place, _i32, lanes))
    if len(bytes) == 4:
        return k.bits(made, f32, lanes)
    return k.cast(k.bits(k.cast(made, _i16, lanes), f16, lanes), f32, lanes)


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
    return {
        "int8_rows": INT8_ROWS,
        "q8_0": PackedForm(8, 32),
        "q4_0": PackedForm(4, 32, zero=8),
        "q4_1": PackedForm(4, 32, least=True),
    }.get(encoding.form)
