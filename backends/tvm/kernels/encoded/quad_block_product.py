"""Products of groups of 8-bit numbers with weights in blocks: whole numbers, by VNNI or in float32.

    c[m, n] = epilogue(sum_b s[m, b] d[n, b] (sum_k a[m, k] q[n, k]) + s[m, b] c[n, b] (sum_k a[m, k]))

over k of the block b. Sums over 32 elements are whole numbers, and exact: in 32-bit integers, to which VNNI adds four
products at a time and AMX (`tile_groups`) whole tiles, or in float32. Blocks are added to a float32 sum one after the
other, so that a row's bits are its own, and the same on all instruction sets that add a product in one instruction.

Numbers of a block are unpacked in registers, once for all rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.tile_groups import MANY, PanelOnTiles
from treadle.backends.tvm.kernels.encoded.unpacking import PackedForm
from treadle.backends.tvm.kernels.finishing import FinishedProduct
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.narrow.byte_product import flipped, quads_added
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP, form_of_groups
from treadle.backends.tvm.kernels.narrow.encode_rows import rows_dtype
from treadle.backends.tvm.kernels.narrow.register_tiles import over_tiles
from treadle.backends.tvm.kernels.pointwise import Chain
from treadle.ir.layouts import Layout, blocks
from treadle.ir.types import DTYPES, f16, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

WIDTH = 16
"""Columns of a panel."""
_i32, _i8 = DTYPES["i32"], DTYPES["i8"]
_NIBBLES = 0x0F0F0F0F


def multiplies_groups(form: PackedForm | None) -> bool:
    """Whether kernels multiply blocks of a form with groups of 8-bit numbers."""
    return form is not None and form.group > 0 and form.group % GROUP == 0 and form.scale == 2


def layout_of_blocks(form: PackedForm) -> Layout:
    """The layout in which these kernels read a form."""
    return blocks(WIDTH, form.bytes, form.header)


def owed_zero(form: PackedForm) -> int:
    """What the numbers that a form holds, as bytes without sign, are too large by: see `EncodeGroups`."""
    return 0 if form.least else 128 if form.bits == 8 else form.zero


def tile_of(isa: Isa) -> tuple[int, int]:
    """Rows of a tile, and its columns: two sums of each stay in registers."""
    vectors = WIDTH // isa.lanes()
    return max(1, min(12, (isa.registers - 6) // (2 * vectors))), WIDTH


@dataclass(frozen=True)
class QuadBlockProduct(FinishedProduct):
    """c = epilogue(a @ decode(w)), of whole numbers of 8 bits or less.

    form     of w's blocks, which lie along k: two bytes of scale, and 32 elements or a multiple
    epilogue what is done with the sum, the chain's first input; None: it is stored as it is
    extras   how the chain's other inputs lie: see `Finishing`
    whole    whether n is a multiple of a panel's width at every call

    Passed: a, as `EncodeGroups` lays out the instruction set's form; w, in `layout_of_blocks`; what the first tells of
    groups; the extras, c; m, k, n; `m` and `mn` extras' and c's strides of rows.
    """

    form: PackedForm
    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    whole: bool = False

    @property
    def title(self) -> str:
        return f"quad_block_product_{self.form.title}{self.finishing.title}"

    def emit(self, k: Emitter) -> None:
        given = [k.pointer("a", rows_dtype(form_of_groups(k.isa))), k.pointer("w", u8), k.pointer("told", _i32)]
        finished = self.finishing.pointers(k)
        m, depth, columns = k.size("m"), k.size("k"), k.size("n")
        strides = self.finishing.strides(k)
        held = k.let(k.floor_divide(depth, self.form.group), "held")
        panels = k.let(k.floor_divide(columns + (WIDTH - 1), WIDTH), "panels")
        shapes = self.finishing.shapes(m, columns, strides)
        views = {p.name: k.view(p, *shapes[p.name]) for p in finished}
        views["a"] = k.view(given[0], [m, depth])
        views["w"] = k.view(given[1], [panels, held * (self.form.bytes * WIDTH)])
        views["told"] = k.view(given[2], [m, k.floor_divide(depth, GROUP), 2])

        def tile(panel: Expr, column: int, width: int, row: Expr, rows: int) -> None:
            self._tile(k, views, panel, row, rows, columns, held)

        def many(panel: Expr, first: Expr, count: Expr) -> None:
            PanelOnTiles(self, k, views, 16 * tile_of(k.isa)[0])(panel, first, count, columns, depth)

        on_tiles = (MANY, many) if k.isa.multiplies_tiles else None
        over_tiles(k, m, panels, tile, tile_of(k.isa), on_tiles)

    def _tile(
        self, k: Emitter, views: Mapping[str, Any], panel: Expr, first: Expr, high: int, columns: Expr, held: Expr
    ) -> None:
        """So many rows of a panel."""
        form, lanes = self.form, k.isa.lanes()
        vectors = WIDTH // lanes
        acc = k.registers(high * WIDTH, f32, "sums")
        with k.unroll(high * vectors, "r") as r:
            k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(held, "block") as block:
            base = k.let(block * (form.bytes * WIDTH), "base")
            if k.isa.ahead:
                for line in range(0, form.bytes * WIDTH, 64):
                    k.prefetch(views["w"], [panel, base + (line + k.isa.ahead)])
            scales = [self.scales(k, views["w"], panel, base, v * lanes) for v in range(vectors)]
            for part in range(form.group // GROUP):
                group = k.let(block * (form.group // GROUP) + part, "group")
                sums = self._summed(k, views, panel, first, high, base, group, part)
                for i in range(high):
                    for v, (d, least) in enumerate(scales):
                        at = [(i * vectors + v) * lanes]
                        total = k.load(sums, at, lanes)
                        total = k.cast(total, f32, lanes) if sums.dtype is _i32 else total
                        before = k.load(acc, at, lanes)
                        k.store(acc, at, self.added(k, views["told"], first + i, group, before, total, d, least), lanes)
        tile = k.registers(high * WIDTH, f32, "tile")
        with k.unroll(high * vectors, "r") as r:
            k.store(tile, [r * lanes], k.load(acc, [r * lanes], lanes), lanes)
        with k.loop(high, "i") as i, k.loop(vectors, "v") as v:
            value = k.load(tile, [(i * vectors + v) * lanes], lanes)
            column = k.let(panel * WIDTH + v * lanes, "column")
            self.finishing.store(k, views, [first + i], column, value, columns, lanes)

    def added(
        self, k: Emitter, told: Any, row: Expr, group: Expr, before: Expr, total: Expr, d: Expr, least: Expr | None
    ) -> Expr:
        """What was before, and a vector of sums over a group, scaled: one addition each, in this order."""
        lanes = k.isa.lanes()
        scale = k.splat(k.bits(k.load(told, [row, group, 0]), f32), lanes)
        made = before + total * (scale * d)
        if least is None:
            return made
        owed = k.splat(k.bits(k.load(told, [row, group, 1]), f32), lanes)
        return k.let(made, "made") + owed * least

    def scales(self, k: Emitter, w: Any, panel: Expr, base: Expr, column: int) -> tuple[Expr, Expr | None]:
        """d and c of the block that begins at `base`, of a vector of columns."""
        lanes = k.isa.lanes()
        made = []
        for number in range(self.form.header // 2):
            bytes = k.load(w, [panel, base + (number * 2 * WIDTH + 2 * column)], 2 * lanes)
            made.append(k.let(k.cast(k.bits(bytes, f16, lanes), f32, lanes), "d"))
        return made[0], made[1] if self.form.least else None

    def quads(self, part: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Of 32 elements of a block: which four bytes, and of each half that counts how far it is shifted, and which
        element it begins with."""
        form = self.form
        if form.bits == 8:
            yield from ((quad, [(0, 4 * quad)]) for quad in range(part * GROUP // 4, (part + 1) * GROUP // 4))
            return
        half = form.group // 2
        if half < GROUP:
            yield from ((quad, [(0, 4 * quad), (4, half + 4 * quad)]) for quad in range(half // 4))
            return
        start, shift = (part * GROUP) % half, 4 * (part * GROUP // half)
        yield from (
            (quad, [(shift, half * (shift // 4) + 4 * quad)]) for quad in range(start // 4, (start + GROUP) // 4)
        )

    def _summed(
        self,
        k: Emitter,
        views: Mapping[str, Any],
        panel: Expr,
        first: Expr,
        high: int,
        base: Expr,
        group: Expr,
        part: int,
    ) -> Any:
        """The sums of whole numbers over 32 elements: i32 by VNNI, or f32."""
        form, lanes, by_fours = self.form, k.isa.lanes(), k.isa.multiplies_quads
        vectors = WIDTH // lanes
        dtype = _i32 if by_fours else f32
        made = k.registers(high * WIDTH, dtype, "whole")
        for i in range(high):
            owed = k.number(0, dtype, lanes)
            if owed_zero(form) and (by_fours or form.bits == 4):
                owed = k.load(views["told"], [first + i, group, 1])
                owed = k.splat(owed if by_fours else k.cast(owed, f32), lanes)
            for v in range(vectors):
                k.store(made, [(i * vectors + v) * lanes], owed, lanes)
        begin = k.let(group * GROUP - part * GROUP, "begin")
        for quad, halves in self.quads(part):
            held = [self.words(k, views["w"], panel, base, quad, v * lanes) for v in range(vectors)]
            for shift, element in halves:
                at = k.let(begin + element, "at")
                if by_fours:
                    self._fours(k, views["a"], first, high, at, [self.bytes_of(k, w, shift) for w in held], made)
                    continue
                for n in range(4):
                    wide = [k.let(self._float(k, w, shift + 8 * n), "y") for w in held]
                    for i in range(high):
                        x = k.let(k.splat(k.load(views["a"], [first + i, at + n]), lanes), "x")
                        for v, y in enumerate(wide):
                            to = [(i * vectors + v) * lanes]
                            k.store(made, to, k.load(made, to, lanes) + x * y, lanes)
        return made

    def _fours(self, k: Emitter, a: Any, first: Expr, high: int, at: Expr, held: Sequence[Expr], made: Any) -> None:
        """Add products of four elements of each row to the sums."""
        lanes = k.isa.lanes()
        for i in range(high):
            x = k.let(k.splat(k.bits(k.load(a, [first + i, at], 4), _i32), lanes), "x")
            for v, w in enumerate(held):
                to = [(i * len(held) + v) * lanes]
                k.store(made, to, quads_added(k, k.load(made, to, lanes), w, x), lanes)

    def words(self, k: Emitter, w: Any, panel: Expr, base: Expr, quad: int, column: int) -> Expr:
        """Four bytes of a block that begins at `base`, of a vector of columns."""
        lanes = k.isa.lanes()
        place = base + (self.form.header * WIDTH + 4 * (quad * WIDTH + column))
        return k.let(k.bits(k.load(w, [panel, place], 4 * lanes), _i32, lanes), "w")

    def bytes_of(self, k: Emitter, words: Expr, shift: int, *, signed: bool = False) -> Expr:
        """Four numbers of each lane as bytes: as they are, or larger by what is owed, without sign."""
        lanes = k.isa.lanes()
        if self.form.bits == 8:
            return words if signed else k.let(flipped(k, words), "w")
        moved = words >> k.number(shift, _i32, lanes) if shift else words
        made = k.let(moved & k.number(_NIBBLES, _i32, lanes), "w")
        if not signed or not self.form.zero:
            return made
        return k.bits(made, _i8, 4 * lanes) - k.number(self.form.zero, _i8, 4 * lanes)

    def _float(self, k: Emitter, words: Expr, shift: int) -> Expr:
        """One number of each lane, which lies so many bits up, as float32."""
        lanes = k.isa.lanes()
        if self.form.bits == 8:
            up = k.shift_left(words, k.number(24 - shift, _i32, lanes)) if shift < 24 else words
            return k.cast(up >> k.number(24, _i32, lanes), f32, lanes)
        moved = words >> k.number(shift, _i32, lanes) if shift else words
        return k.cast(moved & k.number(15, _i32, lanes), f32, lanes)
