"""Products of 8-bit rows: on AMX, by VNNI, or otherwise by float32 products of integers.

    c[m, n] = epilogue((sum_k a[m, k] w[n, k] - z[m] sum_k w[n, k]) (s[m] t[n]), ...)

a holds unsigned bytes and w signed bytes; s and t hold a scale for each row, and z holds a's zero points. Sums of w's
rows are stored in its panels. Sums are exact in 32 bits, up to 2^16 elements of k. So results of all these kernels are
bitwise identical, and a row's bits depend on this row alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.narrow import tiles
from treadle.backends.tvm.kernels.narrow.encode_rows import form_of_rows, rows_dtype
from treadle.backends.tvm.kernels.narrow.register_product import ProductSizes, RegisterProduct, RegisterTile
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width
from treadle.backends.tvm.kernels.narrow.tile_product import WIDTH, TileProduct
from treadle.ir.layouts import PAIR_SQUARE, QUAD_HEAD, QUAD_STEP, ROW_HEAD
from treadle.ir.types import DTYPES, DType, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

MOST_SUMMED = 1 << 16
"""Maximum number of elements of k whose byte products fit into 32 bits: 255 127 2^16 < 2^31. Sums minus z times w's
sums fit, too.
"""
_HEAD = QUAD_HEAD * WIDTH
_SQUARE = PAIR_SQUARE * QUAD_STEP
_EXACT = 8  # number of steps whose byte products float32 sums exactly: 255 127 512 < 2^24
_i32 = DTYPES["i32"]


def _less_zero(
    k: Emitter, w: Any, rows: Any, panel: Expr, column: int, row: Expr, total: Expr, lanes: int, width: int
) -> Expr:
    """Return a vector of integer sums, minus the row's zero point times the sums of the panel's columns."""
    held = k.load(w, [panel, ROW_HEAD * width + 4 * column], 4 * lanes)
    return total - k.splat(k.load(rows, [row, 1]), lanes) * k.bits(held, _i32, lanes)


def _scaled(k: Emitter, w: Any, rows: Any, panel: Expr, column: int, row: Expr, total: Expr, lanes: int) -> Expr:
    """Return a vector of integer sums as float32, times the row's scale and the scales of the panel's columns."""
    held = k.load(w, [panel, ROW_HEAD * column], ROW_HEAD * lanes)
    scale = k.splat(k.bits(k.load(rows, [row, 0]), f32), lanes) * k.bits(held, f32, lanes)
    return k.let(k.cast(total, f32, lanes) * scale, "y")


@dataclass(frozen=True)
class ByteTileProduct(TileProduct):
    """c = epilogue((a @ w - z sums of w) scales), for tiles of bytes, with 32-bit sums.

    The fields are the same as for `TileProduct`, without `tiled`. Arguments: a, as `EncodeRows` writes tiles; w, in
    quads(32); the scales and zero points of rows from `EncodeRows`; the extras, c; m, k, n; the strides of rows of `m`
    and `mn` extras and of c.
    """

    @property
    def title(self) -> str:
        return f"byte_{super().title}"

    @property
    def multiplies(self) -> str:
        return "int8"

    @property
    def factors(self) -> DType:
        return u8

    @property
    def summed(self) -> DType:
        return _i32

    def scales(self, k: Emitter) -> list[Any]:
        return [k.pointer("rows", _i32)]

    def multiply(self, k: Emitter, sums: int, left: int, right: int) -> None:
        tiles.multiply_bytes(k, sums, left, right, signed=False)

    def panel(self, steps: Expr) -> list[Expr]:
        return [steps * (2 * _SQUARE) + _HEAD]

    def square(self, step: Expr, number: Expr, element: Expr) -> list[Expr]:
        return [step * (2 * _SQUARE) + (number * _SQUARE + element + _HEAD)]

    def float_sums(self, k: Emitter, views: Mapping[str, Any], sums: Sequence[Expr], panel: Expr, row: Expr) -> Any:
        w, rows, made = views["w"], views["rows"], []
        for j, x in enumerate(sums):
            at = panel, j * PAIR_SQUARE, row
            made.append(_scaled(k, w, rows, *at, _less_zero(k, w, rows, *at, x, PAIR_SQUARE, WIDTH), PAIR_SQUARE))
        return made


@dataclass(frozen=True)
class QuadProduct(RegisterProduct):
    """c = epilogue((a @ w - z sums of w) scales), for bytes, four at a time.

    VNNI multiplies unsigned bytes by signed bytes. Without VNNI, a - z is stored in float32, bytes of w are widened to
    float32, and products are summed in float32, up to the number of products that is exact.

    Pointers: a, as `EncodeRows` writes it for the instruction set; w, in flat quads (`quads_for`); the scales and zero
    points of rows.
    """

    @property
    def multiplies(self) -> str:
        return "int8"

    def ask(self, k: Emitter) -> dict[str, Any]:
        form = "quads" if k.isa.multiplies_quads else form_of_rows(k.isa)
        return {"a": k.pointer("a", rows_dtype(form)), "w": k.pointer("w", u8), "rows": k.pointer("rows", _i32)}

    def steps(self, k: Emitter, depth: Expr) -> Expr:
        return k.floor_divide(depth + (QUAD_STEP - 1), QUAD_STEP)

    def shapes(self, k: Emitter, sizes: ProductSizes, width: int) -> Mapping[str, list[Expr]]:
        m, depth = sizes.m, sizes.steps * QUAD_STEP
        return {"a": [m, depth], "w": [sizes.panels, (depth + QUAD_HEAD) * width], "rows": [m, 2]}

    def sum(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, sizes: ProductSizes) -> Any:
        steps, lanes, count = sizes.steps, k.isa.lanes(), tile.high * tile.vectors
        quads = steps * PAIR_SQUARE
        made = k.registers(count * lanes, _i32, "tile")
        if k.isa.multiplies_quads:
            acc = k.registers(count * lanes, _i32)
            with k.unroll(count, "r") as r:
                k.store(acc, [r * lanes], k.number(0, _i32, lanes), lanes)
            with k.loop(quads, "quad") as quad:
                self._quad(k, views, tile, quad, acc)
            with k.unroll(count, "r") as r:
                k.store(made, [r * lanes], k.load(acc, [r * lanes], lanes), lanes)
            return made
        with k.loop(count, "r") as r:
            k.store(made, [r * lanes], k.number(0, _i32, lanes), lanes)
        with k.loop(k.floor_divide(steps + (_EXACT - 1), _EXACT), "chunk") as chunk:
            acc = k.registers(count * lanes, f32)
            with k.unroll(count, "r") as r:
                k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)
            done = k.let(chunk * (_EXACT * PAIR_SQUARE), "done")
            with k.loop(k.least(quads - done, k.index(_EXACT * PAIR_SQUARE)), "q") as q:
                self._quad(k, views, tile, k.let(done + q, "quad"), acc)
            with k.unroll(count, "r") as r:
                more = k.cast(k.load(acc, [r * lanes], lanes), _i32, lanes)
                k.store(made, [r * lanes], k.load(made, [r * lanes], lanes) + more, lanes)
        return made

    def value(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, row: Expr, at: int, total: Expr) -> Expr:
        lanes, of = k.isa.lanes(), (k, views["w"], views["rows"], tile.panel, at, row)
        if k.isa.multiplies_quads:
            total = _less_zero(*of, total, lanes, narrow_width(k.isa))
        return _scaled(*of, total, lanes)

    def _quad(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, quad: Expr, acc: Any) -> None:
        """Add the products of four elements of k to the sums."""
        lanes, width = k.isa.lanes(), narrow_width(k.isa)
        at = k.let(quad * 4, "at")
        held = []
        if k.isa.ahead:
            for line in range(0, 4 * width, 64):
                k.prefetch(views["w"], [tile.panel, quad * (4 * width) + (QUAD_HEAD * width + line + k.isa.ahead)])
        for v in range(tile.vectors):
            index = [tile.panel, quad * (4 * width) + (QUAD_HEAD * width + 4 * (tile.start + v * lanes))]
            held.append(k.let(k.bits(k.load(views["w"], index, 4 * lanes), _i32, lanes), "w"))
        if k.isa.multiplies_quads:
            for i in range(tile.high):
                four = k.bits(k.load(views["a"], [tile.row(k, i), at], 4), _i32)
                x = k.let(k.splat(four, lanes), "x")
                for v, w in enumerate(held):
                    sums = [(i * tile.vectors + v) * lanes]
                    k.store(acc, sums, quads_added(k, k.load(acc, sums, lanes), x, w), lanes)
            return
        for n in range(4):
            wide = [k.let(_byte(k, w, n, lanes), "y") for w in held]
            for i in range(tile.high):
                x = k.let(k.splat(k.load(views["a"], [tile.row(k, i), at + n]), lanes), "x")
                for v, w in enumerate(wide):
                    sums = [(i * tile.vectors + v) * lanes]
                    k.store(acc, sums, k.load(acc, sums, lanes) + x * w, lanes)


def _byte(k: Emitter, quads: Expr, number: int, lanes: int) -> Expr:
    """Return the signed byte with this number of each four, as float32."""
    up = k.shift_left(quads, k.number(24 - 8 * number, _i32, lanes)) if number < 3 else quads
    return k.cast(up >> k.number(24, _i32, lanes), f32, lanes)


def quads_added(k: Emitter, sums: Expr, left: Expr, right: Expr) -> Expr:
    """Return sums + left[0] right[0] + ... + left[3] right[3] for the four bytes in each lane. Bytes of `left` are
    unsigned.
    """

    def text() -> str:
        return """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define <16 x i32> @treadle_quads_added(<16 x i32> %s, <16 x i32> %l, <16 x i32> %r) alwaysinline {
  %a = bitcast <16 x i32> %l to <64 x i8>
  %b = bitcast <16 x i32> %r to <64 x i8>
  %y = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %s, <64 x i8> %a, <64 x i8> %b)
  ret <16 x i32> %y
}"""

    return k.llvm("treadle_quads_added", text, "int32x16", sums, left, right)
