"""The left operand of a product in bf16: rows are rounded, and stored in the form that the product's kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.tiles import ROWS
from treadle.ir.layouts import PAIR_STEP
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DTYPES, DType, bf16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

BLOCK = 2 * ROWS
"""Number of rows in a block of tiles."""


def form_for(isa: Isa) -> str:
    """Return the form in which the products of an instruction set read rows: see `RoundRows`."""
    return "tiles" if isa.multiplies_tiles else "pairs" if isa.multiplies_pairs else "wide"


def held_dtype(form: str) -> DType:
    """Return the dtype of a form's elements."""
    return f32 if form == "wide" else bf16


def held_elements(form: str, rows: Size, depth: Size) -> Size:
    """Return the number of elements that a form stores for `rows` rows of `depth` elements."""
    steps = (depth + PAIR_STEP - 1) // PAIR_STEP
    whole = (rows + BLOCK - 1) // BLOCK * BLOCK if form == "tiles" else rows
    return whole * steps * PAIR_STEP


@dataclass(frozen=True)
class RoundRows(Kernel):
    """y = x[m, k] rounded to bf16, k padded to a multiple of 32 with zeros

    dtype  dtype of x, by name: f32 or bf16
    form   layout of y: "tiles", [m // 32, k // 32, 2, 16, 32], as AMX reads them, where rows past m are undefined;
           "pairs", row-major in bf16; "wide", row-major in f32

    Arguments: x, y; m, k; x's stride of rows.
    """

    dtype: str
    form: str

    @property
    def title(self) -> str:
        return f"round_rows_{self.form}"

    def emit(self, k: Emitter) -> None:
        px, py = k.pointer("x", DTYPES[self.dtype]), k.pointer("y", held_dtype(self.form))
        m, depth, stride = k.size("m"), k.size("k"), k.size("x_stride")
        steps = k.let(k.floor_divide(depth + (PAIR_STEP - 1), PAIR_STEP), "steps")
        x = k.view(px, [m, depth], [stride, 1])
        if self.form == "tiles":
            y = k.view(py, [k.floor_divide(m + (BLOCK - 1), BLOCK), steps, 2, ROWS, PAIR_STEP])
        else:
            y = k.view(py, [m, steps * PAIR_STEP])
        with k.parallel(k.floor_divide(m + (ROWS - 1), ROWS), "sixteen") as sixteen:
            first = k.let(sixteen * ROWS, "first")
            with k.loop(k.least(m - first, k.index(ROWS)), "i") as i:
                row = k.let(first + i, "row")
                whole = k.let(k.floor_divide(depth, PAIR_STEP), "whole")
                with k.loop(whole, "step") as step:
                    self._step(k, x, [row, step * PAIR_STEP], y, sixteen, i, row, step)
                with k.when(whole < steps):
                    held = k.registers(PAIR_STEP, x.dtype, "held")
                    lanes = k.isa.lanes()
                    for j in range(0, PAIR_STEP, lanes):
                        k.store(held, [j], k.number(0, x.dtype, lanes), lanes)
                    with k.loop(depth - whole * PAIR_STEP, "j") as j:
                        k.store(held, [j], k.load(x, [row, whole * PAIR_STEP + j]))
                    self._step(k, held, [k.index(0)], y, sixteen, i, row, whole)

    def _step(self, k: Emitter, x: Any, at: list[Expr], y: Any, sixteen: Expr, i: Expr, row: Expr, step: Expr) -> None:
        """Round and store 32 elements of a row."""
        if self.form == "tiles":
            to = [k.floor_divide(sixteen, 2), step, k.floor_mod(sixteen, 2), i, k.index(0)]
        else:
            to = [row, step * PAIR_STEP]
        lanes = k.isa.lanes()
        if self.dtype == "f32" and k.isa.multiplies_pairs and self.form != "wide":
            low, high = (k.load(x, [*at[:-1], at[-1] + j], lanes) for j in (0, lanes))
            k.store(y, to, two_rounded(k, low, high), 2 * lanes)
            return
        for j in range(0, PAIR_STEP, lanes):
            value = k.load(x, [*at[:-1], at[-1] + j], lanes)
            value = k.let(k.cast(value, bf16, lanes)) if self.dtype == "f32" else value
            value = k.cast(value, f32, lanes) if self.form == "wide" else value
            k.store(y, [*to[:-1], to[-1] + j], value, lanes)


def two_rounded(k: Emitter, low: Expr, high: Expr) -> Expr:
    """Round two vectors of 16 floats to 32 bf16 numbers with one instruction, which flushes subnormal numbers to zero.

    The instructions that multiply bf16 numbers flush them, too.
    """

    def text() -> str:
        return """
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <32 x i16> @treadle_two_rounded(<16 x float> %low, <16 x float> %high) alwaysinline {
  %b = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %r = bitcast <32 x bfloat> %b to <32 x i16>
  ret <32 x i16> %r
}"""

    return k.llvm("treadle_two_rounded", text, "uint16x32", low, high)
