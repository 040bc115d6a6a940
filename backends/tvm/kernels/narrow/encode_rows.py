"""Quantization of rows to 8 bits, for the left operand of products or as encoded values. The numbers are bitwise
identical to `uint8_rows` or `int8_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.round_rows import BLOCK
from treadle.backends.tvm.kernels.narrow.tiles import ROWS
from treadle.ir.encodings.rounded_forms import SMALLEST_ROW, SMALLEST_STEP
from treadle.ir.layouts import QUAD_STEP, ROW_HEAD
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DTYPES, DType, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

    Numbers = Callable[[Expr, int], Expr]
    """A function that returns numbers of a row: a vector with a number of lanes, from a position on."""

_i32, _i8 = DTYPES["i32"], DTYPES["i8"]
_INFINITY = 0x7F800000  # the bits of infinity in float32
_SIGN = 1 << 31
_SMALLEST, _SMALLEST_STEP = int(SMALLEST_ROW.view("i4")), float(SMALLEST_STEP)


def form_of_rows(isa: Isa) -> str:
    """Return the form in which the products of an instruction set read 8-bit rows: see `EncodeRows`."""
    return "tiles" if isa.multiplies_tiles else "quads" if isa.multiplies_quads else "wide"


def rows_dtype(form: str) -> DType:
    """Return the dtype of a form's elements."""
    return f32 if form == "wide" else u8


def rows_elements(form: str, rows: Size, depth: Size) -> Size:
    """Return the number of elements that a form stores for `rows` rows of `depth` elements."""
    steps = (depth + QUAD_STEP - 1) // QUAD_STEP
    whole = (rows + BLOCK - 1) // BLOCK * BLOCK if form == "tiles" else rows
    return whole * steps * QUAD_STEP


@dataclass(frozen=True)
class EncodeRows(Kernel):
    """y = x[m, k] by[k] in bytes, k padded to a multiple of 64 with zeros; rows[m, 2] = scales' bits, and zero points

    form    layout of y: "tiles", [m // 32, k // 64, 2, 16, 64], as AMX reads them, where rows past m are undefined;
            "quads", row-major bytes; "wide", row-major in f32, minus the zero point; "held", the encoding's own form,
            without padding
    signed  True for `int8_rows`, whose bytes have 128 added except in the form "held"; False for `uint8_rows`
    scaled  True if there is a `by`
    static  True if all rows have the scale and the zero point that two more pointers hold, for `uint8_rows`
    again   True if x holds encoded rows: their scales, zero points and numbers stay the same, in another form

    If a row contains NaN or infinity (with `static`: NaN), its scale is NaN. Arguments: x, by if `scaled`, the scale
    and the zero point if `static`, y, rows; m, k; x's stride of rows.
    """

    form: str
    signed: bool = False
    scaled: bool = False
    static: bool = False
    again: bool = False

    @property
    def title(self) -> str:
        verb = "copy" if self.again else "encode"
        kind = f"{'scaled_' * self.scaled}{'static_' * self.static}{'signed_' * self.signed}"
        return f"{verb}_{kind}rows_{self.form}"

    @property
    def head(self) -> int:
        """Number of bytes of an encoded row before its numbers."""
        return _head(self.signed) if self.form == "held" else 0

    def emit(self, k: Emitter) -> None:
        held = self.form == "held"
        read = [k.pointer("x", u8 if self.again else f32), *([k.pointer("by", f32)] if self.scaled else [])]
        given = [k.pointer(name, f32) for name in ("scale", "zero") if self.static]
        pointers = [k.pointer("y", rows_dtype(self.form)), k.pointer("rows", _i32)]
        m, depth, stride = k.size("m"), k.size("k"), k.size("x_stride")
        steps = k.let(k.floor_divide(depth + (QUAD_STEP - 1), QUAD_STEP), "steps")
        given = [k.view(each, [k.index(1)]) for each in given]
        head = _head(self.signed) if self.again else 0
        x, rows = k.view(read[0], [m, depth + head], [stride, 1]), k.view(pointers[1], [m, 2])
        by = k.view(read[1], [depth]) if self.scaled else None
        if self.form == "tiles":
            y = k.view(pointers[0], [k.floor_divide(m + (BLOCK - 1), BLOCK), steps, 2, ROWS, QUAD_STEP])
        else:
            y = k.view(pointers[0], [m, depth + self.head if held else steps * QUAD_STEP])
        with k.parallel(k.floor_divide(m + (ROWS - 1), ROWS), "sixteen") as sixteen:
            first = k.let(sixteen * ROWS, "first")
            with k.loop(k.least(m - first, k.index(ROWS)), "i") as i:
                row = k.let(first + i, "row")
                of_row = _row_head(k, x, row, self.signed) if self.again else None

                def number(at: Expr, count: int = 1, row: Expr = row, of_row: Any = of_row) -> Expr:
                    found = k.load(x, [row, at + head], count)
                    if of_row is not None:
                        return integers(k, found, self.signed, of_row[1], count)
                    return found if by is None else found * k.load(by, [at], count)

                bits, factor, zero = self._coding(k, number, depth, of_row, given)
                if held:
                    self._write_head(k, y, row, bits, zero)
                self._write_numbers(k, number, depth, y, partial(self._place, k, sixteen, i, row), (factor, zero))
                k.store(rows, [row, 0], bits)
                k.store(rows, [row, 1], zero)

    def _coding(
        self, k: Emitter, number: Numbers, depth: Expr, of_row: tuple[Expr, Expr] | None, steps: Sequence[Any]
    ) -> tuple[Expr, Expr, Expr]:
        """Return the bits of a row's scale, the factor of its numbers, and its zero point.

        of_row  the bits of the scale and the zero point of an encoded row, or None
        steps   views of the scale and of the zero point of all rows, if `static`
        """
        if self.static:
            factor, zero = (k.let(k.load(each, [k.index(0)])) for each in steps)
            largest, _ = self._ends(k, number, depth, magnitude=True)
            none = largest > k.number(_INFINITY, _i32)
            scale = k.select(none, k.number(float("nan"), f32), factor)
            bits = k.let(k.bits(scale, _i32), "bits")
            return bits, factor, k.let(k.cast(zero, _i32), "zero")
        if of_row is not None:
            bits, zero = of_row
            return bits, k.number(1.0, f32), k.number(128, _i32) if self.signed else zero
        scale, factor, zero = self._steps(k, *self._ends(k, number, depth))
        return k.let(k.bits(scale, _i32), "bits"), factor, zero

    def _write_head(self, k: Emitter, y: Any, row: Expr, bits: Expr, zero: Expr) -> None:
        """Store the bytes of an encoded row before its numbers: the scale, and the zero point of an unsigned row."""
        for byte in range(ROW_HEAD):
            part = (bits >> k.number(8 * byte, _i32)) & k.number(255, _i32)
            k.store(y, [row, byte], k.cast(part, u8))
        if not self.signed:
            k.store(y, [row, ROW_HEAD], k.cast(zero, u8))

    def _write_numbers(
        self,
        k: Emitter,
        number: Numbers,
        depth: Expr,
        y: Any,
        place: Callable[[Expr], list[Expr]],
        coding: tuple[Expr, Expr],
    ) -> None:
        """Quantize and store the numbers of a row, 64 at a time.

        place   returns the index in y at which a step's numbers begin
        coding  the factor and the zero point
        """
        lanes = k.isa.lanes()
        whole = k.let(k.floor_divide(depth, QUAD_STEP), "whole")
        with k.loop(whole, "step") as step:
            to = place(step)
            at = k.let(step * QUAD_STEP, "at")
            self._step(k, lambda j: number(at + j, lanes), y, to, *coding, QUAD_STEP)
        with k.when(whole * QUAD_STEP < depth):
            rest = k.registers(QUAD_STEP, f32, "rest")
            for j in range(0, QUAD_STEP, lanes):
                k.store(rest, [j], k.number(0.0, f32, lanes), lanes)
            left = k.let(depth - whole * QUAD_STEP, "left")
            with k.loop(left, "j") as j:
                k.store(rest, [j], number(whole * QUAD_STEP + j, 1))
            last = left if self.form == "held" else QUAD_STEP
            self._step(k, lambda j: k.load(rest, [j], lanes), y, place(whole), *coding, last)

    def _place(self, k: Emitter, sixteen: Expr, i: Expr, row: Expr, step: Expr) -> list[Expr]:
        """Return the index in y at which the numbers of a step of a row begin."""
        if self.form == "tiles":
            return [k.floor_divide(sixteen, 2), step, k.floor_mod(sixteen, 2), i, k.index(0)]
        return [row, step * QUAD_STEP + self.head]

    def _ends(self, k: Emitter, number: Numbers, depth: Expr, magnitude: bool = False) -> tuple[Expr, Expr]:
        """Return the bits of a row's largest number, and the bits of minus its smallest number; 0 if no number has that
        sign.

        For a signed row, and with `magnitude`, both are the bits of the largest magnitude. The bits of infinity and NaN
        are larger than the bits of all other numbers.
        """
        magnitude = magnitude or self.signed
        lanes = k.isa.lanes()
        most = k.registers(2 * lanes, _i32, "most")
        for side in range(2):
            k.store(most, [side * lanes], k.number(0, _i32, lanes), lanes)
        vectors = k.let(k.floor_divide(depth, lanes), "vectors")

        def bits(at: Expr, count: int) -> list[Expr]:
            found = k.let(k.bits(number(at, count), _i32, count))
            if magnitude:
                return [found & k.number(_SIGN - 1, _i32, count)]
            return [
                found,
                found ^ k.number(-_SIGN, _i32, count),
            ]  # as integers, the bits of negative numbers are below 0

        with k.loop(vectors, "v") as v:
            for side, each in enumerate(bits(v * lanes, lanes)):
                at = [side * lanes]
                k.store(most, at, k.greatest(k.load(most, at, lanes), each), lanes)
        ends = k.registers(2, _i32, "ends")
        for side in range(2):
            k.store(ends, [side], k.maximum_of_lanes(k.load(most, [side * lanes], lanes), lanes, _i32))
        with k.loop(depth - vectors * lanes, "j") as j:
            for side, each in enumerate(bits(vectors * lanes + j, 1)):
                k.store(ends, [side], k.greatest(k.load(ends, [side]), each))
        largest = k.let(k.load(ends, [0]), "largest")
        return largest, largest if magnitude else k.let(k.load(ends, [1]), "least")

    def _steps(self, k: Emitter, largest: Expr, least: Expr) -> tuple[Expr, Expr, Expr]:
        """Return a row's scale, the factor of its numbers, and its zero point."""
        if self.signed:
            return *scale_of(k, largest), k.number(128, _i32)
        infinity, one = k.number(_INFINITY, _i32), k.number(1.0, f32)
        finite = k.both(largest < infinity, least < infinity)
        above, below = k.let(k.bits(largest, f32), "above"), k.let(k.bits(least, f32), "below")
        none = k.select(finite, k.number(0.0, f32), k.number(float("nan"), f32))
        steps = k.number(255.0, f32)
        step = k.let(above / steps + below / steps, "step")
        used = k.both(finite, step >= k.number(_SMALLEST_STEP, f32))
        factor = k.let(k.select(used, one / k.select(used, step, one), k.number(0.0, f32)), "factor")
        zero = k.cast(k.nearest(k.select(used, below, k.number(0.0, f32)) * factor), _i32)
        return k.let(k.select(used, step, none), "scale"), factor, k.let(zero, "zero")

    def _step(
        self,
        k: Emitter,
        number: Callable[[int], Expr],
        y: Any,
        to: list[Expr],
        factor: Expr,
        zero: Expr,
        count: Expr,
    ) -> None:
        """Quantize and store 64 elements of a row. In the form "held", the last step stores only `count` elements.

        `number(j)` returns the vector of elements that starts at j.
        """
        lanes = k.isa.lanes()
        part = k.registers(QUAD_STEP, u8, "part") if count is not QUAD_STEP else None
        up = k.let(k.splat(k.cast(zero, f32), lanes), "up")
        for j in range(0, QUAD_STEP, lanes):
            each = k.splat(factor, lanes)  # `static`: the scale, by which numbers are divided as in `fake_quantize`
            near = k.nearest(number(j) / each if self.static else number(j) * each)
            if self.static:
                near = k.greatest(near, -up)
            if not self.signed:  # rounding both halves up would give 256 steps
                near = k.least(near, k.number(255.0, f32, lanes) - up)
            if self.form == "wide":
                k.store(y, [*to[:-1], to[-1] + j], near, lanes)
                continue
            lifted = near if self.signed and self.form == "held" else near + up
            bytes = k.cast(k.cast(lifted, _i32, lanes), u8, lanes)
            if part is not None:
                k.store(part, [j], bytes, lanes)
            else:
                k.store(y, [*to[:-1], to[-1] + j], bytes, lanes)
        if part is not None:
            with k.loop(count, "j") as j:
                k.store(y, [*to[:-1], to[-1] + j], k.load(part, [j]))


@dataclass(frozen=True)
class DecodeRows(Kernel):
    """y[m, k] = the decoded numbers of 8-bit rows

    signed  True for `int8_rows`, False for `uint8_rows`

    Arguments: x, y; m, k; the strides of x's and y's rows.
    """

    signed: bool = True

    @property
    def title(self) -> str:
        return f"decode_{'signed_' * self.signed}rows"

    def emit(self, k: Emitter) -> None:
        pointers = [k.pointer("x", u8), k.pointer("y", f32)]
        m, depth, of_x, of_y = (k.size(name) for name in ("m", "k", "x_stride", "y_stride"))
        head = _head(self.signed)
        x, y = k.view(pointers[0], [m, depth + head], [of_x, 1]), k.view(pointers[1], [m, depth], [of_y, 1])
        with k.parallel(m, "row") as row:
            bits, zero = _row_head(k, x, row, self.signed)
            scale = k.let(k.bits(bits, f32), "scale")
            with k.loop(depth, "j") as j:
                k.store(y, [row, j], integers(k, k.load(x, [row, j + head]), self.signed, zero) * scale)


def _head(signed: bool) -> int:
    """Return the number of bytes of an encoded row before its numbers."""
    return ROW_HEAD if signed else ROW_HEAD + 1


def _row_head(k: Emitter, x: Any, row: Expr, signed: bool) -> tuple[Expr, Expr]:
    """Return the bits of an encoded row's scale, and its zero point."""
    zero = k.number(0, _i32) if signed else k.cast(k.load(x, [row, ROW_HEAD]), _i32)
    return scale_bits(k, x, row, k.index(0)), k.let(zero, "zero")


def scale_bits(k: Emitter, x: Any, row: Expr, at: Expr) -> Expr:
    """Return the bits of the scale that begins at byte `at` of an encoded row."""
    bits = k.cast(k.load(x, [row, at]), _i32)
    for byte in range(1, ROW_HEAD):
        bits = bits | k.shift_left(k.cast(k.load(x, [row, at + byte]), _i32), k.number(8 * byte, _i32))
    return k.let(bits, "bits")


def integers(k: Emitter, bytes: Expr, signed: bool, zero: Expr | None = None, lanes: int = 1) -> Expr:
    """Return the bytes of encoded numbers as float32, minus the zero point if it is passed."""
    whole = k.cast(k.bits(bytes, _i8, lanes) if signed else bytes, _i32, lanes)
    return k.cast(whole if zero is None else whole - (k.splat(zero, lanes) if lanes > 1 else zero), f32, lanes)


def scale_of(k: Emitter, largest: Expr) -> tuple[Expr, Expr]:
    """Return the scale of a block, and the factor by which its numbers are multiplied, from the bits of the largest
    magnitude.
    """
    finite = largest < k.number(_INFINITY, _i32)
    used = k.both(finite, largest >= k.number(_SMALLEST, _i32))
    number = k.let(k.bits(largest, f32), "number")
    none = k.select(finite, k.number(0.0, f32), k.number(float("nan"), f32))
    scale = k.let(k.select(used, number / k.number(127.0, f32), none), "scale")
    divisor = k.select(used, number, k.number(1.0, f32))
    factor = k.let(k.select(used, k.number(127.0, f32) / divisor, k.number(0.0, f32)), "factor")
    return scale, factor
