"""Base of products with weights in blocks that are read by words: tiles of 16 columns by rows that fit in registers.

    c[m, n] = epilogue(sum_k a[m, k] (d q[n, k] + c))

A block's scales are computed once for all rows of a tile, and stored next to the sums. Then its elements are unpacked
in registers, 32 at a time. Each row is summed over k in the same order for any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.block_words import WIDTH, HeldScales, WordBlock, WordForm, column_lanes
from treadle.backends.tvm.kernels.finishing import FinishedProduct
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.narrow.register_tiles import Many, over_tiles, row_of
from treadle.backends.tvm.kernels.pointwise import Chain
from treadle.ir.types import f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class WordTile:
    """A tile of the output: the accumulators of some rows of a, for one block along k.

    first   index of the tile's first row of a
    high    number of rows
    count   number of existing rows, if fewer: the others repeat the last row and are not stored
    blocks  the block of each vector of columns
    sums    the accumulators, row by row, one vector after the other
    scales  scales of the blocks
    """

    first: Expr
    high: int
    count: Expr | None
    blocks: Sequence[WordBlock]
    sums: Any
    scales: HeldScales

    def row(self, k: Emitter, number: int) -> Expr:
        """Return the index of a row of a, from its number in the tile."""
        return row_of(k, self.first, number, self.count)


@dataclass(frozen=True)
class WordProduct(FinishedProduct):
    """c = epilogue(a @ decode(w)), the base class of these kernels.

    form     form of w's blocks, which extend along k
    epilogue a chain whose first input is the sum; None: the sum is stored unchanged
    extras   form of the chain's other inputs: see `Finishing`
    whole    True if n is a multiple of a panel's width at every call
    """

    form: WordForm
    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    whole: bool = False

    @property
    def title(self) -> str:
        return f"block_product_{self.form.title}{self.finishing.title}"

    # -- specific to a kind of left side ----------------------------------------------------------------------------

    def ask(self, k: Emitter) -> list[Any]:
        """Declare the pointer of a, and return it."""
        raise NotImplementedError

    def ask_more(self, k: Emitter) -> list[Any]:
        """Declare the pointers that follow w's, and return them."""
        return []

    def stride(self, k: Emitter, depth: Expr) -> Expr:
        """Return the stride of a's rows: `depth`, or a size that is declared here."""
        return depth

    def views(self, k: Emitter, given: Sequence[Any], m: Expr, depth: Expr, stride: Expr) -> dict[str, Any]:
        """Return views of the declared pointers by name; the view of a is named "a"."""
        raise NotImplementedError

    def group(self, k: Emitter, views: dict[str, Any], tile: WordTile, chunk: Expr, part: int, group: Expr) -> None:
        """Multiply 32 elements along k, and add the products to a tile's accumulators. `part` is their index in the
        chunk, and `group` their index in the row.
        """
        raise NotImplementedError

    def many(self, k: Emitter, views: dict[str, Any], columns: Expr, depth: Expr) -> tuple[int, Many] | None:
        """Return a minimum number of rows and the function that replaces tiles for at least this number, or None."""
        return None

    # -- the loops -----------------------------------------------------------------------------------------------

    @staticmethod
    def tile(isa: Isa) -> tuple[int, int]:
        """Return the numbers of rows and columns of a tile: two sums for each vector of the tile must fit into
        registers.
        """
        vectors = WIDTH // column_lanes(isa)
        return max(1, min(12, (isa.registers - 6) // (2 * vectors))), WIDTH

    def emit(self, k: Emitter) -> None:
        form = self.form
        given, w = self.ask(k), k.pointer("w", u8)
        given += self.ask_more(k)
        finished = self.finishing.pointers(k)
        m, depth, columns = k.size("m"), k.size("k"), k.size("n")
        stride, strides = self.stride(k, depth), self.finishing.strides(k)
        held = k.let(k.floor_divide(depth, form.elements), "held")
        panels = k.let(k.floor_divide(columns + (WIDTH - 1), WIDTH), "panels")
        shapes = self.finishing.shapes(m, columns, strides)
        views = self.views(k, given, m, depth, stride) | {p.name: k.view(p, *shapes[p.name]) for p in finished}
        views["w"] = k.view(w, [panels, held * (form.bytes * WIDTH)])

        def tile(panel: Expr, column: int, width: int, row: Expr, rows: int, count: Expr | None = None) -> None:
            self._tile(k, views, panel, row, rows, count, columns, held)

        over_tiles(k, m, panels, tile, self.tile(k.isa), self.many(k, views, columns, depth))

    def _tile(
        self,
        k: Emitter,
        views: dict[str, Any],
        panel: Expr,
        first: Expr,
        high: int,
        count: Expr | None,
        columns: Expr,
        held: Expr,
    ) -> None:
        """Emit the product of `high` rows, of which `count` exist, and a panel."""
        form, lanes = self.form, column_lanes(k.isa)
        vectors = WIDTH // lanes
        acc = k.registers(high * WIDTH, f32, "sums")
        with k.unroll(high * vectors, "r") as r:
            k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(held, "block") as block:
            base = k.let(block * (form.bytes * WIDTH), "base")
            if k.isa.ahead:
                for line in range(0, form.bytes * WIDTH, 64):
                    k.prefetch(views["w"], [panel, base + (line + k.isa.ahead)])
            blocks = self.blocks(k, views["w"], panel, base)
            tile = WordTile(first, high, count, blocks, acc, HeldScales.of(k, blocks))
            groups = k.let(block * (form.chunks * form.parts), "groups")
            if form.chunks == 1:
                for part in range(form.parts):
                    self.group(k, views, tile, k.index(0), part, k.let(groups + part, "group"))
            else:
                with k.loop(k.index(form.chunks), "chunk") as chunk:
                    for part in range(form.parts):
                        at = k.let(groups + chunk * form.parts + part, "group")
                        self.group(k, views, tile, chunk, part, at)
        tile_of_sums = k.registers(high * WIDTH, f32, "tile")
        with k.unroll(high * vectors, "r") as r:
            k.store(tile_of_sums, [r * lanes], k.load(acc, [r * lanes], lanes), lanes)
        with k.loop(high if count is None else count, "i") as i, k.loop(vectors, "v") as v:
            value = k.load(tile_of_sums, [(i * vectors + v) * lanes], lanes)
            column = k.let(panel * WIDTH + v * lanes, "column")
            self.finishing.store(k, views, [first + i], column, value, columns, lanes)

    def blocks(self, k: Emitter, w: Any, panel: Expr, base: Expr) -> list[WordBlock]:
        """Return a panel's block that begins at `base`, for each vector of columns."""
        lanes = column_lanes(k.isa)

        def load(at: Expr, count: int) -> Expr:
            return k.load(w, [panel, base + at], count)

        return [WordBlock(k, self.form, lanes, load, v * lanes) for v in range(WIDTH // lanes)]

    def words(self, k: Emitter, tile: WordTile, chunk: Expr, part: int, half: int, i: Expr) -> list[Expr]:
        """Return four consecutive elements of each vector of columns: see `WordForm.four`."""
        return [k.let(self.form.four(block, chunk, part, half, i), "w") for block in tile.blocks]
