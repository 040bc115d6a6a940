"""Matrix products in bf16 on AMX.

    c[m, n] = epilogue(sum_k a[m, k] * w[n, k], ...)

Two times two tiles of sums stay in registers, so that each loaded tile of a and w is multiplied twice. k is split into
chunks. A panel's chunk of w stays in the L1 cache while up to four blocks of 32 rows use it. Between chunks, their sums
are stored in memory, which preserves their bits. While a chunk is used, the cache lines of the next chunk are
prefetched, a few at each step: if they were prefetched all at once, or too close to their use, the CPU would stall. A
single block runs at memory bandwidth and prefetches nothing. Each row is summed over k in the same order, in its own
row of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.finishing import FinishedProduct
from treadle.backends.tvm.kernels.narrow import tiles
from treadle.backends.tvm.kernels.narrow.round_rows import BLOCK, two_rounded
from treadle.backends.tvm.kernels.narrow.tiles import ROWS
from treadle.backends.tvm.kernels.pointwise import Chain
from treadle.ir.layouts import PAIR_STEP
from treadle.ir.types import DType, bf16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

WIDTH = 2 * ROWS
"""Number of columns of a panel."""
CHUNK = 8
"""Number of steps of k in a chunk of a panel, which uses 16 KiB of the L1 cache."""
GROUP = 4
"""Number of blocks of rows that use a chunk."""
TASKS = 32
"""Number of runs of panels to divide among threads, for each part of the rows."""
PART_BYTES = 3 << 18
"""Bytes of a's tiles that stay in the L2 cache next to two panels; every panel reads them again."""
_LINES = 32  # cache lines of one step of a panel
_STEP_BYTES = 2 * ROWS * tiles.ROW_BYTES

TileAt = Callable[["Expr", int], "tuple[Any, list[Expr]]"]
"""A function that returns, for a step of a chunk and a square of the step, the view and the index at which the tile
begins.
"""


@dataclass(frozen=True)
class TileProduct(FinishedProduct):
    """c = epilogue(a @ w) for bf16 tiles, with float32 accumulation.

    epilogue a chain whose first input is the accumulator; None: the accumulator is stored unchanged
    extras   form of the chain's other inputs: see `Finishing`
    whole    True if n is a multiple of a panel's width at every call
    tiled    True if c is rounded to bf16 and stored in tiles, as the next product's a; requires `whole`

    Arguments, in order:
        a        tiles, as `RoundRows` writes them
        w        layout pairs(32)
        extras   the chain's other inputs
        c        the output
        m, k, n  the sizes
        strides  row strides of the `m` and `mn` extras and of c (unused for tiles)
    """

    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    whole: bool = False
    tiled: bool = False

    @property
    def title(self) -> str:
        return f"tile_product{self.finishing.title}{'_tiled' * self.tiled}"

    @property
    def multiplies(self) -> str:
        return "bf16"

    # -- specific to a dtype ---------------------------------------------------------------------------------------

    @property
    def factors(self) -> DType:
        """Dtype of the factors. A row of a tile holds 64 bytes of them."""
        return bf16

    @property
    def held(self) -> DType:
        """Dtype of the elements in w's panels."""
        return self.factors

    @property
    def summed(self) -> DType:
        """Dtype of the sums."""
        return f32

    def scales(self, k: Emitter) -> list[Any]:
        """Declare the pointers of the factors of sums. Each pointer has the name of its view."""
        return []

    def multiply(self, k: Emitter, sums: int, left: int, right: int) -> None:
        """Emit sums += left right, for the tiles with these numbers."""
        tiles.multiply(k, sums, left, right)

    def panel(self, steps: Expr) -> list[Expr]:
        """Return the shape of a panel of w."""
        return [steps, 2, ROWS * PAIR_STEP]

    def square(self, step: Expr, number: Expr, element: Expr) -> list[Expr]:
        """Return the index in a panel of an element of a square in a step."""
        return [step, number, element]

    @property
    def group(self) -> int:
        """Number of blocks of rows that use a chunk."""
        return GROUP

    @property
    def prefetches(self) -> bool:
        """True if the cache lines of w are prefetched between products."""
        return True

    def right(self, k: Emitter, pointer: Any, panels: Expr, steps: Expr, depth: Expr) -> Any:
        """Return w as a view of panels."""
        return k.view(pointer, [panels, *self.panel(steps)])

    def size(self, k: Emitter, here: Expr, steps: Expr) -> Expr:
        """Return the number of steps of a chunk that is used by `here` blocks of rows."""
        return k.either(here > k.index(1), k.index(CHUNK), steps)

    def tiles_of_chunk(self, k: Emitter, views: Mapping[str, Any], panel: Expr, done: Expr, count: Expr) -> TileAt:
        """Return the tiles of a chunk: `count` steps of a panel after the first `done`. A subclass may compute the
        tiles here.
        """
        return lambda s, j: (views["w"], [panel, *self.square(done + s, j, 0)])

    def float_sums(self, k: Emitter, views: Mapping[str, Any], sums: Sequence[Expr], panel: Expr, row: Expr) -> Any:
        """Return the vectors of a row's sums for a panel, as float32."""
        return sums

    # -- the loops -------------------------------------------------------------------------------------------

    def emit(self, k: Emitter) -> None:
        given = [k.pointer("a", self.factors), k.pointer("w", self.held)]
        scales = self.scales(k)
        finished = self.finishing.pointers(k, bf16 if self.tiled else None)
        m, depth, columns = k.size("m"), k.size("k"), k.size("n")
        rows = self.finishing.strides(k)
        wide = tiles.ROW_BYTES // self.factors.bytes
        steps = k.let(k.floor_divide(depth + (wide - 1), wide), "steps")
        panels = k.let(k.floor_divide(columns + (WIDTH - 1), WIDTH), "panels")
        blocks = k.let(k.floor_divide(m + (BLOCK - 1), BLOCK), "blocks")
        shapes = self.finishing.shapes(m, columns, rows)
        views = {p.name: k.view(p, *shapes[p.name]) for p in finished if not self.tiled or p.name != "c"}
        if self.tiled:
            views["c"] = k.view(finished[-1], [blocks, panels, 2, ROWS, PAIR_STEP])
        views["a"] = k.view(given[0], [blocks, steps, 2, ROWS * wide])
        views["w"] = self.right(k, given[1], panels, steps, depth)
        views |= {p.name: k.view(p, [m, 2]) for p in scales}
        one = k.index(1)  # avoids division by zero: m, n and k may be 0
        most = k.floor_divide(k.index(PART_BYTES), k.greatest(steps, one) * _STEP_BYTES)
        part = k.opaque(k.greatest(k.least(blocks, most), one), "part")
        run = k.opaque(k.greatest(k.floor_divide(panels + (TASKS - 1), TASKS), one), "run")
        runs = k.opaque(k.floor_divide(panels + run - 1, run), "runs")
        parts = k.floor_divide(blocks + part - 1, part)
        with k.parallel(parts * runs, "task") as task:
            tiles.configure(k)
            held = k.registers(self.group * BLOCK * WIDTH, self.summed, "held")
            k.store(
                held, [k.opaque(0)], k.number(0, self.summed)
            )  # shows the code generator that this memory is used: tiles access it by address
            number = k.opaque(k.floor_divide(task, runs), "number")
            first = k.opaque(number * part, "first")
            last = k.opaque(k.least(first + part, blocks), "last")
            start = k.opaque((task - number * runs) * run, "start")
            with k.loop(k.least(panels - start, run), "p") as p:
                self._panel(k, views, held, k.opaque(start + p, "panel"), first, last, m, columns, steps)
            tiles.release(k)

    def _panel(
        self,
        k: Emitter,
        views: Mapping[str, Any],
        held: Any,
        panel: Expr,
        first: Expr,
        last: Expr,
        m: Expr,
        columns: Expr,
        steps: Expr,
    ) -> None:
        """Emit the blocks of rows from `first` to below `last` for one panel."""
        most = self.group
        with k.loop(k.floor_divide(last - first + (most - 1), most), "group") as group:
            before = k.opaque(first + group * most, "before")
            here = k.opaque(k.least(last - before, k.index(most)), "here")
            size = k.opaque(k.greatest(self.size(k, here, steps), k.index(1)), "size")
            # There is at least one chunk, which clears the sums even if there is nothing to add.
            chunks = k.greatest(k.floor_divide(steps + size - 1, size), k.index(1))
            with k.loop(chunks, "chunk") as chunk:
                done = k.opaque(chunk * size, "done")
                count = k.opaque(k.least(steps - done, size), "count")
                tile_at = self.tiles_of_chunk(k, views, panel, done, count)
                with k.loop(here, "b") as b:
                    block = k.opaque(before + b, "block")
                    few = k.either(group < k.index(1), here, k.index(0))
                    with k.when(m - block * BLOCK > k.index(ROWS)):
                        self._chunk(k, views, held, panel, block, b, few, done, count, tile_at, 2)
                    with k.when(m - block * BLOCK <= k.index(ROWS)):
                        self._chunk(k, views, held, panel, block, b, few, done, count, tile_at, 1)
            with k.loop(here, "b") as b:
                block = k.opaque(before + b, "block")
                row = k.let(block * BLOCK, "row")
                with k.loop(k.opaque(k.least(m - row, k.index(BLOCK)), "rows"), "i") as i:
                    sums = [k.let(k.load(held, [b * (BLOCK * WIDTH) + i * WIDTH + j * ROWS], ROWS)) for j in range(2)]
                    sums = self.float_sums(k, views, sums, panel, k.let(row + i, "at"))
                    at = [k.let(panel * WIDTH + j * ROWS, "column") for j in range(2)]
                    if self.tiled:
                        halves = [
                            k.let(self.finishing.finished(k, views, [row + i], c, x, ROWS))
                            for c, x in zip(at, sums, strict=True)
                        ]
                        place = [block, panel, k.floor_divide(i, ROWS), k.floor_mod(i, ROWS), 0]
                        k.store(views["c"], place, two_rounded(k, *halves), 2 * ROWS)
                    else:
                        for c, x in zip(at, sums, strict=True):
                            self.finishing.store(k, views, [row + i], c, x, columns, ROWS)

    def _chunk(
        self,
        k: Emitter,
        views: Mapping[str, Any],
        held: Any,
        panel: Expr,
        block: Expr,
        b: Expr,
        few: Expr,
        done: Expr,
        count: Expr,
        tile_at: TileAt,
        high: int,
    ) -> None:
        """Emit `count` steps of k for a block of `high` times 16 rows. `few` blocks share the prefetching of the
        panel.
        """
        sums = [(i, j, [b * (BLOCK * WIDTH) + i * ROWS * WIDTH + j * ROWS]) for i in range(high) for j in range(2)]
        apart = WIDTH * self.summed.bytes
        elements = tiles.ROW_BYTES // self.factors.bytes
        with k.when(done < k.index(1)):
            for i, j, _ in sums:
                tiles.clear(k, 2 * i + j)
        with k.when(done >= k.index(1)):
            for i, j, at in sums:
                tiles.load(k, 2 * i + j, held, at, apart)

        def products(lines: int) -> None:
            with k.loop(count, "s") as s:
                step = k.let(done + s, "step")
                for n in range(lines):
                    line = k.let(b * lines + n, "line")
                    k.prefetch(views["w"], [panel, *self.square(step + CHUNK, 0, line * elements)])
                for j in range(2):
                    tiles.load(k, 6 + j, *tile_at(s, j))
                for i in range(high):
                    tiles.load(k, 4 + i, views["a"], [block, step, i, 0])
                    for j in range(2):
                        self.multiply(k, 2 * i + j, 4 + i, 6 + j)

        if self.prefetches:
            shared = k.opaque(few, "shared")
            for lines, fits in (
                (_LINES // GROUP, shared > k.index(2)),
                (_LINES // 2, k.both(shared > k.index(1), shared <= k.index(2))),
                (0, shared <= k.index(1)),
            ):
                with k.when(fits):
                    products(lines)
        else:
            products(0)
        for i, j, at in sums:
            tiles.store(k, 2 * i + j, held, at, apart)
