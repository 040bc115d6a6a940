"""Products of groups of 8-bit numbers with weights in blocks, computed by VNNI or in float32 as exact integer products.

    c[m, n] = epilogue(sum_b s[m, b] d[n, b] (sum_k a[m, k] q[n, k]) + s[m, b] c[n, b] (sum_k a[m, k]))

where k runs over the span b, 16 or 32 elements that share all scales. The sums over a span are exact integers: 32-bit
integers, to which VNNI adds four products at a time and AMX (`tile_groups`) whole tiles, or float32. They are added to
a float32 sum one after the other. So a row's bits depend on this row alone, and are the same on all instruction sets
with fused multiply-add.

Numbers of a block are unpacked in registers, once for all rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.block_words import WIDTH, column_lanes
from treadle.backends.tvm.kernels.encoded.tile_groups import MANY, PanelOnTiles
from treadle.backends.tvm.kernels.encoded.word_product import WordProduct, WordTile
from treadle.backends.tvm.kernels.narrow.byte_product import quads_added
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP, form_of_groups
from treadle.backends.tvm.kernels.narrow.encode_rows import rows_dtype
from treadle.backends.tvm.kernels.narrow.register_tiles import Many
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_i32 = DTYPES["i32"]


@dataclass(frozen=True)
class QuadBlockProduct(WordProduct):
    """c = epilogue(a @ decode(w)), a product of integers of 8 bits or less.

    Arguments: a, in the layout of `EncodeGroups` for the instruction set; w, in the form's layout; the scales and sums
    of groups from `EncodeGroups`, for the form's zero and halves; the extras, c; m, k, n; the strides of rows of `m`
    and `mn` extras and of c.
    """

    @property
    def title(self) -> str:
        return f"quad_{super().title}"

    @property
    def multiplies(self) -> str:
        return "int8"

    def ask(self, k: Emitter) -> list[Any]:
        return [k.pointer("a", rows_dtype(form_of_groups(k.isa)))]

    def ask_more(self, k: Emitter) -> list[Any]:
        return [k.pointer("scales", _i32)]

    def views(self, k: Emitter, given: Sequence[Any], m: Expr, depth: Expr, stride: Expr) -> dict[str, Any]:
        a, scales = given
        groups = k.floor_divide(depth, GROUP)
        return {"a": k.view(a, [m, depth]), "scales": k.view(scales, [m, groups, 1 + self.form.halves])}

    def many(self, k: Emitter, views: dict[str, Any], columns: Expr, depth: Expr) -> tuple[int, Many] | None:
        if not k.isa.multiplies_tiles or self.form.halves > 1:
            return None

        def write(panel: Expr, first: Expr, count: Expr) -> None:
            PanelOnTiles(self, k, views, 16 * self.tile(k.isa)[0])(panel, first, count, columns, depth)

        return MANY, write

    def group(self, k: Emitter, views: dict[str, Any], tile: WordTile, chunk: Expr, part: int, group: Expr) -> None:
        """Add the products of 32 elements to the tile: the integer sums of each span, scaled."""
        lanes, by_fours, vectors = column_lanes(k.isa), k.isa.multiplies_quads, len(tile.blocks)
        for half in range(self.form.halves):
            sums = self._summed(k, views, tile, chunk, part, group, half)
            scales = [tile.scales.at(k, v, chunk, part, half) for v in range(vectors)]
            for i in range(tile.high):
                for v, (d, least) in enumerate(scales):
                    at = [(i * vectors + v) * lanes]
                    total = k.load(sums, at, lanes)
                    if self.form.zero:
                        owed = k.load(views["scales"], [tile.row(k, i), group, 1 + half])
                        total += k.splat(owed if by_fours else k.cast(owed, f32), lanes)
                    total = k.cast(total, f32, lanes) if by_fours else total
                    before = k.load(tile.sums, at, lanes)
                    made = self.added(k, views["scales"], tile.row(k, i), group, half, before, total, d, least)
                    k.store(tile.sums, at, _in_order(k, made) if by_fours and self.form.is_direct else made, lanes)

    def added(
        self,
        k: Emitter,
        scales: Any,
        row: Expr,
        group: Expr,
        half: int,
        before: Expr,
        total: Expr,
        d: Expr,
        least: Expr | None,
    ) -> Expr:
        """Return `before` plus the scaled sums over a span, as a vector. Each term is one addition, in this order."""
        lanes = column_lanes(k.isa)
        scale = k.splat(k.bits(k.load(scales, [row, group, 0]), f32), lanes)
        made = before + total * (scale * d)
        if least is None:
            return made
        owed = k.splat(k.bits(k.load(scales, [row, group, 1 + half]), f32), lanes)
        return k.let(made, "made") + owed * least

    def _summed(
        self, k: Emitter, views: dict[str, Any], tile: WordTile, chunk: Expr, part: int, group: Expr, half: int
    ) -> Any:
        """Return the integer sums over a span: i32 by VNNI, or f32."""
        lanes, by_fours, vectors = column_lanes(k.isa), k.isa.multiplies_quads, len(tile.blocks)
        dtype = _i32 if by_fours else f32
        made = k.registers(tile.high * WIDTH, dtype, "whole")
        with k.unroll(tile.high * vectors, "r") as r:
            k.store(made, [r * lanes], k.number(0, dtype, lanes), lanes)
        for sixteen in range(2) if self.form.halves == 1 else (half,):
            begin = k.let(group * GROUP + 16 * sixteen, "begin")
            if by_fours:
                for i in range(4):
                    words = self.words(k, tile, chunk, part, sixteen, i)
                    self._fours(k, views["a"], tile, k.let(begin + 4 * i, "at"), words, made)
                continue
            with k.loop(k.index(4), "four") as i:
                words, at = self.words(k, tile, chunk, part, sixteen, i), k.let(begin + 4 * i, "at")
                for n in range(4):
                    wide = [k.let(block.number(w, n), "y") for block, w in zip(tile.blocks, words, strict=True)]
                    self._products(k, views["a"], tile, at + n, wide, made)
        return made

    def _fours(self, k: Emitter, a: Any, tile: WordTile, at: Expr, held: Sequence[Expr], made: Any) -> None:
        """Add the products of four elements of each row to the sums."""
        lanes = column_lanes(k.isa)
        for i in range(tile.high):
            x = k.let(k.splat(k.bits(k.load(a, [tile.row(k, i), at], 4), _i32), lanes), "x")
            for v, w in enumerate(held):
                to = [(i * len(held) + v) * lanes]
                k.store(made, to, quads_added(k, k.load(made, to, lanes), w, x), lanes)

    def _products(self, k: Emitter, a: Any, tile: WordTile, at: Expr, numbers: Sequence[Expr], to: Any) -> None:
        """Add the products of each row's element with the numbers of each vector of columns."""
        lanes = column_lanes(k.isa)
        for i in range(tile.high):
            x = k.let(k.splat(k.load(a, [tile.row(k, i), at]), lanes), "x")
            for v, y in enumerate(numbers):
                place = [(i * len(numbers) + v) * lanes]
                k.store(to, place, k.load(to, place, lanes) + x * y, lanes)


def _in_order(k: Emitter, value: Expr) -> Expr:
    """Return a vector that LLVM computes before it reads what is read later. Otherwise it reads the scales of all rows
    of a tile first, and moves sums out of registers.
    """

    def text() -> str:
        return """
define <16 x float> @treadle_in_order(<16 x float> %x) alwaysinline {
  %y = call <16 x float> asm sideeffect "", "=v,0,~{memory}"(<16 x float> %x)
  ret <16 x float> %y
}"""

    return k.llvm("treadle_in_order", text, "float32x16", value)
