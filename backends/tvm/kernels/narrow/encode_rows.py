"""Rows rounded to 8 bits, a scale a row, to the bits of `int8_rows`: as products' kernels read them, or as held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.round_rows import BLOCK
from treadle.backends.tvm.kernels.narrow.tiles import ROWS
from treadle.ir.encodings.rounded_forms import SMALLEST_ROW
from treadle.ir.layouts import QUAD_STEP, ROW_HEAD
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DTYPES, DType, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_i32, _i8 = DTYPES["i32"], DTYPES["i8"]
_INFINITY = 0x7F800000  # the bits of float32's
_SMALLEST = int(SMALLEST_ROW.view("i4"))


def form_of_rows(isa: Isa) -> str:
    """The form in which an instruction set's product reads 8-bit rows: see `EncodeRows`."""
    return "tiles" if isa.multiplies_tiles else "quads" if isa.multiplies_quads else "wide"


def rows_dtype(form: str) -> DType:
    """The dtype of what a form holds."""
    return f32 if form == "wide" else u8


def rows_elements(form: str, rows: Size, depth: Size) -> Size:
    """How many elements a form takes."""
    steps = (depth + QUAD_STEP - 1) // QUAD_STEP
    whole = (rows + BLOCK - 1) // BLOCK * BLOCK if form == "tiles" else rows
    return whole * steps * QUAD_STEP


@dataclass(frozen=True)
class EncodeRows(Kernel):
    """y = x[m, k] as 8-bit rows, k filled up to a multiple of 64 with zeros; rows[m, 2] = scales' bits, and sums

    form   how y lies: "tiles", [m // 32, k // 64, 2, 16, 64], as AMX reads them, where rows past m are whatever they
           are; "quads", row-major bytes; "wide", row-major in f32; "held", as `int8_rows` is held, not filled up

    A row with a number that is not finite has the scale NaN. Passed: x, y, rows; m, k; x's stride of rows.
    """

    form: str

    @property
    def title(self) -> str:
        return f"encode_rows_{self.form}"

    def emit(self, k: Emitter) -> None:
        held = self.form == "held"
        pointers = [k.pointer("x", f32), k.pointer("y", rows_dtype(self.form)), k.pointer("rows", _i32)]
        m, depth, stride = k.size("m"), k.size("k"), k.size("x_stride")
        steps = k.let(k.floor_divide(depth + (QUAD_STEP - 1), QUAD_STEP), "steps")
        x, rows = k.view(pointers[0], [m, depth], [stride, 1]), k.view(pointers[2], [m, 2])
        if self.form == "tiles":
            y = k.view(pointers[1], [k.floor_divide(m + (BLOCK - 1), BLOCK), steps, 2, ROWS, QUAD_STEP])
        else:
            y = k.view(pointers[1], [m, depth + ROW_HEAD if held else steps * QUAD_STEP])
        lanes = k.isa.lanes()
        with k.parallel(k.floor_divide(m + (ROWS - 1), ROWS), "sixteen") as sixteen:
            first = k.let(sixteen * ROWS, "first")
            with k.loop(k.least(m - first, k.index(ROWS)), "i") as i:
                row = k.let(first + i, "row")
                largest = self._largest(k, x, row, depth)
                scale, factor = scale_of(k, largest)
                if held:
                    bits = k.let(k.bits(scale, _i32), "bits")
                    for byte in range(ROW_HEAD):
                        part = (bits >> k.number(8 * byte, _i32)) & k.number(255, _i32)
                        k.store(y, [row, byte], k.cast(part, u8))
                sums = k.registers(lanes, _i32, "sums")
                k.store(sums, [0], k.number(0, _i32, lanes), lanes)
                whole = k.let(k.floor_divide(depth, QUAD_STEP), "whole")
                with k.loop(whole, "step") as step:
                    at = [row, step * QUAD_STEP]
                    self._step(k, x, at, y, self._place(k, sixteen, i, row, step), factor, sums, QUAD_STEP)
                with k.when(whole * QUAD_STEP < depth):
                    rest = k.registers(QUAD_STEP, f32, "rest")
                    for j in range(0, QUAD_STEP, lanes):
                        k.store(rest, [j], k.number(0.0, f32, lanes), lanes)
                    left = k.let(depth - whole * QUAD_STEP, "left")
                    with k.loop(left, "j") as j:
                        k.store(rest, [j], k.load(x, [row, whole * QUAD_STEP + j]))
                    to = self._place(k, sixteen, i, row, whole)
                    self._step(k, rest, [k.index(0)], y, to, factor, sums, left if held else QUAD_STEP)
                k.store(rows, [row, 0], k.bits(scale, _i32))
                k.store(rows, [row, 1], across(k, k.load(sums, [0], lanes), lanes, "add"))

    def _place(self, k: Emitter, sixteen: Expr, i: Expr, row: Expr, step: Expr) -> list[Expr]:
        """Where the numbers of a step of a row go."""
        if self.form == "tiles":
            return [k.floor_divide(sixteen, 2), step, k.floor_mod(sixteen, 2), i, k.index(0)]
        return [row, step * QUAD_STEP + (ROW_HEAD if self.form == "held" else 0)]

    def _largest(self, k: Emitter, x: Any, row: Expr, depth: Expr) -> Expr:
        """The bits of the largest magnitude of a row, of which those of infinity and NaN are the largest."""
        lanes = k.isa.lanes()
        most = k.registers(lanes, _i32, "most")
        k.store(most, [0], k.number(0, _i32, lanes), lanes)
        vectors = k.let(k.floor_divide(depth, lanes), "vectors")

        def bits(at: Expr, count: int) -> Expr:
            return k.bits(k.load(x, [row, at], count), _i32, count) & k.number(0x7FFFFFFF, _i32, count)

        with k.loop(vectors, "v") as v:
            k.store(most, [0], k.greatest(k.load(most, [0], lanes), bits(v * lanes, lanes)), lanes)
        found = k.registers(1, _i32, "found")
        k.store(found, [0], across(k, k.load(most, [0], lanes), lanes, "smax"))
        with k.loop(depth - vectors * lanes, "j") as j:
            k.store(found, [0], k.greatest(k.load(found, [0]), bits(vectors * lanes + j, 1)))
        return k.let(k.load(found, [0]), "largest")

    def _step(
        self, k: Emitter, x: Any, at: list[Expr], y: Any, to: list[Expr], factor: Expr, sums: Any, count: Expr
    ) -> None:
        """64 elements of a row, or `count` of the last of a held one."""
        lanes = k.isa.lanes()
        part = k.registers(QUAD_STEP, _i8, "part") if count is not QUAD_STEP else None
        for j in range(0, QUAD_STEP, lanes):
            nearest = k.nearest(k.load(x, [*at[:-1], at[-1] + j], lanes) * k.splat(factor, lanes))
            if self.form == "wide":
                k.store(y, [*to[:-1], to[-1] + j], nearest, lanes)
                continue
            whole = k.let(k.cast(nearest, _i32, lanes), "whole")
            if self.form == "quads":
                k.store(sums, [0], k.load(sums, [0], lanes) + whole, lanes)
            bytes = k.cast(whole, _i8, lanes)
            if part is not None:
                k.store(part, [j], bytes, lanes)
            else:
                k.store(y, [*to[:-1], to[-1] + j], k.bits(bytes, u8, lanes), lanes)
        if part is not None:
            with k.loop(count, "j") as j:
                k.store(y, [*to[:-1], to[-1] + j], k.bits(k.load(part, [j]), u8))


@dataclass(frozen=True)
class DecodeRows(Kernel):
    """y[m, k] = the numbers of 8-bit rows as they are held

    Passed: x, y; m, k; the strides of x's and y's rows.
    """

    def emit(self, k: Emitter) -> None:
        pointers = [k.pointer("x", u8), k.pointer("y", f32)]
        m, depth, of_x, of_y = (k.size(name) for name in ("m", "k", "x_stride", "y_stride"))
        x, y = k.view(pointers[0], [m, depth + ROW_HEAD], [of_x, 1]), k.view(pointers[1], [m, depth], [of_y, 1])
        with k.parallel(m, "row") as row:
            bits = k.cast(k.load(x, [row, 0]), _i32)
            for byte in range(1, ROW_HEAD):
                bits = bits | k.shift_left(k.cast(k.load(x, [row, byte]), _i32), k.number(8 * byte, _i32))
            scale = k.let(k.bits(bits, f32), "scale")
            with k.loop(depth, "j") as j:
                number = k.cast(k.cast(k.bits(k.load(x, [row, j + ROW_HEAD]), _i8), _i32), f32)
                k.store(y, [row, j], number * scale)


def scale_of(k: Emitter, largest: Expr) -> tuple[Expr, Expr]:
    """The scale of a block, by the bits of its largest magnitude, and what its numbers are multiplied with."""
    finite = largest < k.number(_INFINITY, _i32)
    used = k.both(finite, largest >= k.number(_SMALLEST, _i32))
    number = k.let(k.bits(largest, f32), "number")
    none = k.select(finite, k.number(0.0, f32), k.number(float("nan"), f32))
    scale = k.let(k.select(used, number / k.number(127.0, f32), none), "scale")
    divisor = k.select(used, number, k.number(1.0, f32))
    factor = k.let(k.select(used, k.number(127.0, f32) / divisor, k.number(0.0, f32)), "factor")
    return scale, factor


def across(k: Emitter, x: Expr, lanes: int, kind: str) -> Expr:
    """The sum ("add") or the largest ("smax") of a vector of 32-bit integers."""
    name, vector = f"treadle_{kind}_i32_{lanes}", f"<{lanes} x i32>"

    def text() -> str:
        return f"""
declare i32 @llvm.vector.reduce.{kind}.v{lanes}i32({vector})
define i32 @{name}({vector} %x) alwaysinline {{
  %r = call i32 @llvm.vector.reduce.{kind}.v{lanes}i32({vector} %x)
  ret i32 %r
}}"""

    return k.llvm(name, text, "int32", x)
