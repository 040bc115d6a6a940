"""Which tiles of sums a product without a matrix unit keeps in registers, and the tasks that go over them.

A task has some tiles of rows of one panel. Full tiles come first, then what is left, in halves, as in `Matmul`: each
row is summed in one order, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.isa import Isa
from treadle.ir.layouts import PAIR_SQUARE, Layout, pairs, quads

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

PART = 128
"""About how many rows a task has."""

Tile = Callable[["Expr", int, int, "Expr", int], None]
"""Writes one tile: its panel, its first column of the panel and how many, its first row and how many."""


def narrow_width(isa: Isa) -> int:
    """Columns of a panel of pairs or quads: two tiles of a matrix unit, or a few vectors."""
    return 3 * PAIR_SQUARE if _is_widest(isa) else 2 * PAIR_SQUARE


def pairs_for(isa: Isa, transposed: bool = False) -> Layout:
    """How products read a bf16 weight: in squares where they are tiles of a matrix unit."""
    return pairs(narrow_width(isa), transposed, flat=not isa.multiplies_tiles)


def quads_for(isa: Isa) -> Layout:
    """How products read 8-bit rows of a weight: in squares where they are tiles of a matrix unit."""
    return quads(narrow_width(isa), flat=not isa.multiplies_tiles)


def tile_of(isa: Isa) -> tuple[int, int]:
    """Rows of a tile, and its columns: as many sums as leave some registers for a and w."""
    if _is_widest(isa):
        return 8, narrow_width(isa)
    columns = PAIR_SQUARE * (2 if isa.registers >= 32 else 1)
    return max(1, min(12, (isa.registers - 8) * isa.lanes() // columns)), columns


Many = Callable[["Expr", "Expr", "Expr"], None]
"""Writes all rows that a task has of a panel: the panel, its first row and how many."""


def over_tiles(
    k: Emitter,
    m: Expr,
    panels: Expr,
    tile: Tile,
    shape: tuple[int, int] | None = None,
    many: tuple[int, Many] | None = None,
) -> None:
    """Every tile of m rows and of so many panels, shared out among tasks.

    shape  rows of a tile, and its columns, those of a panel; None: what `tile_of` says, of panels of `narrow_width`
    many   what is done in place of that from so many rows on; tasks then begin at multiples of 16 rows
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


def over_rows(k: Emitter, start: Expr, m: Expr, high: int, tile: Callable[[Expr, int], None]) -> None:
    """m rows: full tiles, then what is left, in halves."""
    blocks = k.let(k.floor_divide(m, high), "blocks")
    rest = k.let(k.floor_mod(m, high), "rest")
    with k.loop(blocks, "block") as block:
        tile(k.let(start + block * high, "row"), high)
    for count in (8, 4, 2, 1):
        if count < high:
            with k.when(k.floor_mod(rest, 2 * count) >= k.index(count)):
                before = blocks * high + k.floor_divide(rest, 2 * count) * (2 * count)
                tile(k.let(start + before, "row"), count)
