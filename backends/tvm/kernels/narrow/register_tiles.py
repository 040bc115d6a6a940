"""Which tiles of sums a product without a matrix unit keeps in registers, and the tasks that go over them.

A task has some tiles of rows of one panel. Full tiles come first, then what is left, in halves, as in `Matmul`: each
row is summed in one order, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.isa import Isa
from treadle.ir.layouts import PAIR_SQUARE

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

PART = 16
"""Tiles of rows that a task has."""

Tile = Callable[["Expr", int, int, "Expr", int], None]
"""Writes one tile: its panel, its first square of the panel and how many, its first row and how many."""


def tile_of(isa: Isa) -> tuple[int, int]:
    """Rows of a tile, and how many squares of 16 columns: as many sums as leave some registers for a and w."""
    squares = 2 if isa.registers >= 32 else 1
    vectors = squares * PAIR_SQUARE // isa.lanes()
    return max(1, min(12, (isa.registers - 8) // vectors)), squares


def over_tiles(k: Emitter, m: Expr, panels: Expr, tile: Tile) -> None:
    """Every tile of m rows and of panels of two squares, shared out among tasks."""
    high, squares = tile_of(k.isa)
    part = high * PART
    parts = k.let(k.floor_divide(m + (part - 1), part), "parts")
    with k.parallel(panels * parts, "task") as task:
        panel = k.opaque(k.floor_divide(task, parts), "panel")
        first = k.opaque((task - panel * parts) * part, "first")
        count = k.let(k.least(m - first, k.index(part)), "count")
        for square in range(0, 2, squares):
            _rows(k, first, count, high, partial(tile, panel, square, squares))


def _rows(k: Emitter, start: Expr, m: Expr, high: int, tile: Callable[[Expr, int], None]) -> None:
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
