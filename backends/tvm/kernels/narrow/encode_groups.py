"""Quantization of rows to 8 bits in groups of 32 elements with a scale each, for the left operand of products. The
numbers are bitwise identical to `int8_groups(32)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.encode_rows import integers, rows_dtype, scale_bits, scale_of
from treadle.backends.tvm.kernels.narrow.tiles import ROWS
from treadle.ir.layouts import ROW_HEAD
from treadle.ir.ops.blocks import GROUPS
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DTYPES, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

GROUP = GROUPS.group
"""Number of elements of a group."""
_i32, _i8 = DTYPES["i32"], DTYPES["i8"]


def form_of_groups(isa: Isa) -> str:
    """Return the form in which the products of an instruction set read groups: see `EncodeGroups`."""
    return "filled" if isa.multiplies_tiles else "quads" if isa.multiplies_quads else "wide"


def rows_of_groups(form: str, rows: Size) -> Size:
    """Return the number of rows that a form stores for `rows` rows."""
    return (rows + ROWS - 1) // ROWS * ROWS if form == "filled" else rows


@dataclass(frozen=True)
class EncodeGroups(Kernel):
    """y = x[m, k] as groups of 8-bit numbers; scales[m, k // 32, 1 + parts] = a scale's bits, then corrections

    form   layout of y: "quads", row-major bytes; "wide", row-major in f32; "filled", bytes of a multiple of 16 rows, of
           which those past m are undefined and have 0 in `scales`
    zero   offset of the right operand's integers: the correction of a part is minus zero times its sum, an i32. 0: each
           number of the right operand has an added constant, and the correction is the scale times the sum, as the bits
           of a float32
    parts  number of parts of a group with different scales in the right operand: 1 or 2
    again  True if x holds encoded groups: their scales and numbers stay the same, in another form

    If a group contains NaN or infinity, its scale is NaN. k is a multiple of 32. Arguments: x, y, scales; m, k; x's
    stride of rows.
    """

    form: str
    zero: int
    parts: int = 1
    again: bool = False

    @property
    def title(self) -> str:
        return f"{'copy' if self.again else 'encode'}_groups_{self.form}"

    def emit(self, k: Emitter) -> None:
        pointers = [
            k.pointer("x", u8 if self.again else f32),
            k.pointer("y", rows_dtype(self.form)),
            k.pointer("scales", _i32),
        ]
        m, depth, stride = k.size("m"), k.size("k"), k.size("x_stride")
        groups = k.let(k.floor_divide(depth, GROUP), "groups")
        width = groups * (ROW_HEAD + GROUP) if self.again else depth
        x, y = k.view(pointers[0], [m, width], [stride, 1]), k.view(pointers[1], [m, depth])
        scales = k.view(pointers[2], [m + (ROWS if self.form == "filled" else 0), groups, 1 + self.parts])
        with k.parallel(k.floor_divide(m + (ROWS - 1), ROWS), "sixteen") as sixteen:
            first = k.let(sixteen * ROWS, "first")
            with k.loop(k.least(m - first, k.index(ROWS)), "i") as i, k.loop(groups, "group") as group:
                self._group(k, x, y, scales, k.let(first + i, "row"), group)
            if self.form == "filled":
                with (
                    k.loop(k.greatest(first + ROWS - m, k.index(0)), "i") as i,
                    k.loop(groups * (1 + self.parts), "j") as j,
                ):
                    k.store(scales, [m + i, 0, j], k.number(0, _i32))

    def _group(self, k: Emitter, x: Any, y: Any, scales: Any, row: Expr, group: Expr) -> None:
        lanes = k.isa.lanes()
        start = k.let(group * GROUP, "start")
        if self.again:
            at = k.let(group * (ROW_HEAD + GROUP), "at")
            scale, factor = k.let(k.bits(scale_bits(k, x, row, at), f32), "scale"), k.number(1.0, f32)
            held = [k.load(x, [row, at + (ROW_HEAD + j)], lanes) for j in range(0, GROUP, lanes)]
            found = [k.let(integers(k, bytes, signed=True, lanes=lanes), "x") for bytes in held]
        else:
            found = [k.let(k.load(x, [row, start + j], lanes), "x") for j in range(0, GROUP, lanes)]
            most = None
            for value in found:
                bits = k.bits(value, _i32, lanes) & k.number(0x7FFFFFFF, _i32, lanes)
                most = k.let(bits if most is None else k.greatest(most, bits), "most")
            scale, factor = scale_of(k, k.let(k.maximum_of_lanes(most, lanes, _i32), "largest"))
        totals: list[Expr] = []
        each = GROUP // lanes // self.parts  # vectors of a part
        for at, value in enumerate(found):
            place = [row, start + at * lanes]
            nearest = k.let(k.nearest(value * k.splat(factor, lanes)), "nearest")
            whole = k.let(k.cast(nearest, _i32, lanes), "whole")
            if at % each:
                totals[-1] = k.let(totals[-1] + whole, "total")
            else:
                totals.append(whole)
            if self.form == "wide":
                k.store(y, place, nearest, lanes)
            else:
                k.store(y, place, k.bits(k.cast(whole, _i8, lanes), u8, lanes), lanes)
        k.store(scales, [row, group, 0], k.bits(scale, _i32))
        for part, total in enumerate(totals):
            summed = k.let(k.sum_of_lanes(total, lanes, _i32), "summed")
            owed = summed * k.number(-self.zero, _i32)
            if not self.zero:
                owed = k.bits(k.let(k.cast(summed, f32) * scale, "owed"), _i32)
            k.store(scales, [row, group, 1 + part], owed)
