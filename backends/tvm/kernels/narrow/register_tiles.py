"""Tiles of products without AMX, whose accumulators stay in registers, and the tasks that run over them.

A task has several tiles of rows of one panel. Full tiles come first, then one tile of the remaining rows, as in
`Matmul`: a panel is read or unpacked once for each tile. Each row is summed in the same order, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Protocol

from treadle.backends.tvm.kernels.isa import Isa
from treadle.ir.layouts import PAIR_SQUARE, Layout, pairs, quads

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

PART = 128
"""Approximate number of rows of a task."""

Tile = Callable[..., None]
"""A function that emits one tile, from its panel, first column in the panel, number of columns, first row and number of
rows. `count` is the number of existing rows, if fewer.
"""


def narrow_width(isa: Isa) -> int:
    """Return the number of columns of a panel of pairs or quads: two AMX tiles, or a few vectors."""
    return 3 * PAIR_SQUARE if _is_widest(isa) else 2 * PAIR_SQUARE


def pairs_for(isa: Isa, transposed: bool = False) -> Layout:
    """Return the layout in which products read a bf16 weight: in squares for AMX."""
    return pairs(narrow_width(isa), transposed, flat=not isa.multiplies_tiles)


def quads_for(isa: Isa) -> Layout:
    """Return the layout in which products read 8-bit rows of a weight: in squares for AMX."""
    return quads(narrow_width(isa), flat=not isa.multiplies_tiles)


def tile_of(isa: Isa) -> tuple[int, int]:
    """Return the numbers of rows and columns of a tile: the largest tile that leaves registers for a and w."""
    if _is_widest(isa):
        return 8, narrow_width(isa)
    columns = PAIR_SQUARE * (2 if isa.registers >= 32 else 1)
    return max(1, min(12, (isa.registers - 8) * isa.lanes() // columns)), columns


HEIGHTS = (1, 2, 3, 4, 6, 8)
"""Heights of tiles of the last rows. With more of them, fewer rows are computed in vain, and kernels have more code."""


class RowTile(Protocol):
    """A function that emits one tile, from its first row, its height and the number of existing rows, if fewer."""

    def __call__(self, first: Expr, high: int, /, *, count: Expr = ...) -> None: ...


Many = Callable[["Expr", "Expr", "Expr"], None]
"""A function that emits all rows of a task for a panel, from the panel, the first row and the number of rows."""


def over_tiles(
    k: Emitter,
    m: Expr,
    panels: Expr,
    tile: Tile,
    shape: tuple[int, int] | None = None,
    many: tuple[int, Many] | None = None,
) -> None:
    """Emit every tile of m rows and `panels` panels, divided into tasks.

    shape  numbers of rows and columns of a tile, as wide as a panel; None: the result of `tile_of`, with panels of
           `narrow_width`
    many   minimum number of rows and the function that replaces tiles for at least this number; tasks then begin at
           multiples of 16 rows
    """
    high, columns = shape or tile_of(k.isa)
    width = columns if shape is not None else narrow_width(k.isa)
    part = PART // high * high if many is None else 16 * high
    parts = k.let(k.floor_divide(m + (part - 1), part), "parts")
    with k.parallel(panels * parts, "task") as task:
        panel = k.opaque(k.floor_divide(task, parts), "panel")
        first = k.opaque((task - panel * parts) * part, "first")
        count = k.let(k.least(m - first, k.index(part)), "count")
        if many is not None:
            least, of_many = many
            with k.when(m >= k.index(least)):
                of_many(panel, first, count)
        with k.when(m < k.index(least)) if many is not None else nullcontext():
            for column in range(0, width, columns):
                over_rows(k, first, count, high, partial(tile, panel, column, columns))


def _is_widest(isa: Isa) -> bool:
    return isa.registers >= 32 and isa.lanes() == PAIR_SQUARE and not isa.multiplies_tiles


def over_rows(k: Emitter, start: Expr, m: Expr, high: int, tile: RowTile) -> None:
    """Emit m rows by calls of `tile`: full tiles, then one tile of the remaining rows."""
    blocks = k.let(k.floor_divide(m, high), "blocks")
    rest = k.let(k.floor_mod(m, high), "rest")
    with k.loop(blocks, "block") as block:
        tile(k.let(start + block * high, "row"), high)
    over_rest(k, start + blocks * high, rest, high, tile)


def over_rest(k: Emitter, first: Expr, rest: Expr, high: int, tile: RowTile) -> None:
    """Emit one tile for the `rest` rows, fewer than `high`, from row `first`. Its height is the least of `HEIGHTS`, and
    of `high`, that suffices. If some of its rows do not exist, `count` is the number of rows that do.
    """
    heights = [height for height in HEIGHTS if height < high]
    if heights and heights[-1] < high - 1:
        heights.append(high)
    for below, height in zip((0, *heights), heights, strict=False):
        with k.when(k.both(rest > k.index(below), rest <= k.index(height))):
            row = k.let(first, "row")
            if height - below == 1:
                tile(row, height)
            else:
                tile(row, height, count=rest)


def row_of(k: Emitter, first: Expr, number: Expr | int, count: Expr | None) -> Expr:
    """Return the index of a row of a tile. Rows that do not exist repeat the last one.

    first   index of the tile's first row
    number  the row's number in the tile
    count   number of existing rows; None: all
    """
    if count is None:
        return first + number
    return first + k.least(k.index(number) if isinstance(number, int) else number, count - 1)
