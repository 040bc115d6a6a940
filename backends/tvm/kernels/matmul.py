"""Matrix products with a packed right operand, and an epilogue for each element before it is stored.

    c[b, m, n] = epilogue(sum_k a[b, m, k] * w[b, n // width, k, n % width], ...)

The accumulators of a tile (some rows by one panel) stay in registers during the loop over k; w is read one full vector
at a time and a is broadcast. Every row sums over k in the same order, so a row's bits depend neither on the number of
rows nor on its index. The first tile of a panel loads the panel into the CPU cache for the other tiles, and prefetches
the following data (`Isa.ahead`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.finishing import Finishing
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.register_tiles import over_rest, row_of
from treadle.backends.tvm.kernels.pointwise import Chain
from treadle.ir.types import DType, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


PANELS = 32  # if there are fewer panels, rows are divided among tasks as well
CHUNK = 16  # number of tiles in a task in that case


def panel_width(columns: int | None, isa: Isa) -> int:
    """Return the number of columns of a panel: the one to four vectors that leave the fewest empty columns.

    columns  None: the number of columns is not known before the call
    """
    lanes = isa.lanes()
    choices = (3, 4, 2, 1) if isa.registers >= 32 else (2, 1)
    if columns is None:
        return lanes * choices[0]
    return lanes * min(choices, key=lambda vectors: -(-columns // (lanes * vectors)) * vectors)


def tile_rows(width: int, isa: Isa) -> int:
    """Return the number of rows of a tile, which fit into registers together with the vectors of one row of a panel
    and one element of a.
    """
    vectors = width // isa.lanes()
    if vectors > 4:  # a thread with one lane reads the panels of groups
        return 1
    return {4: 6, 3: 8, 2: 12, 1: 12}[vectors] if isa.registers >= 32 else {2: 6, 1: 12}[vectors]


@dataclass(frozen=True)
class Matmul(Kernel):
    """c = epilogue(a @ w), over float32.

    width    width of a panel of w
    epilogue a chain whose first input is the sum; None: the sum is stored unchanged
    extras   the form of each further input of the chain: `n` a vector over n, `m` one number for each row, `mn` a
             matrix like c, `1` one number
    batch    True if there are two batch dimensions, over which all arguments may have strides
    whole    True if n is a multiple of the width at every call

    Arguments: a, w, the extras, c; m, k, n; the row strides of a, of `m` and `mn` extras, and of c; with batch: the two
    sizes, then two strides for each pointer.
    """

    width: int
    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    batch: bool = False
    whole: bool = False

    @property
    def held(self) -> DType:
        """Dtype of the elements in w's panels."""
        return f32

    def held_rows(self, k: Emitter, depth: Expr) -> Expr:
        """Return the number of rows of a panel for `depth` elements of k."""
        return depth

    @property
    def finishing(self) -> Finishing:
        """Epilogue of the sums."""
        return Finishing(self.epilogue, self.extras, self.whole)

    @property
    def title(self) -> str:
        done = f"_{self.epilogue.title}" if self.epilogue else ""
        return f"matmul{'_batch' * self.batch}_{self.width}{done}"

    def flops(self, sizes: Sequence[int]) -> int:
        m, depth, columns = sizes[:3]
        return 2 * m * depth * columns

    def emit(self, k: Emitter) -> None:
        finishing = self.finishing
        pointers = [k.pointer("a", f32), k.pointer("w", self.held), *finishing.pointers(k)]
        m = k.size("m")
        depth, columns = k.size("k"), k.size("n")
        rows = {"a": k.size("a_stride"), **finishing.strides(k)}
        panels = k.floor_divide(k.index(columns) + (self.width - 1), self.width)
        shapes: dict[str, tuple[list[Expr], list[Expr] | None]] = {
            "a": ([m, depth], [rows["a"], 1]),
            "w": ([panels, self.held_rows(k, depth), self.width], None),
            **finishing.shapes(m, columns, rows),
        }
        if not self.batch:
            views = {p.name: k.view(p, *shapes[p.name]) for p in pointers}
            chunk, chunks = self._chunks(k, m, panels)
            with k.parallel(panels * chunks, "task") as task:
                panel, first, rows_here = self._share(k, task, m, chunk, chunks)
                self._panel(k, views, panel, first, rows_here, depth, columns)
            return
        b0, b1 = k.size("b0"), k.size("b1")
        batched = {p.name: (k.size(f"{p.name}_b0"), k.size(f"{p.name}_b1")) for p in pointers}
        views = {}
        for p in pointers:
            shape, strides = shapes[p.name]
            if strides is None:
                strides = [shape[1] * self.width, self.width, 1] if len(shape) == 3 else [1]
            views[p.name] = k.view(p, [b0, b1, *shape], [*batched[p.name], *strides])
        chunk, chunks = self._chunks(k, m, b0 * b1 * panels)
        with k.parallel(b0 * b1 * panels * chunks, "task") as task:
            both, first, rows_here = self._share(k, task, m, chunk, chunks)
            panel = k.let(k.floor_mod(both, panels), "panel")
            b = k.opaque(k.floor_divide(both, panels), "b")
            at = [k.let(k.floor_divide(b, b1), "i0"), k.let(k.floor_mod(b, b1), "i1")]
            self._panel(k, views, panel, first, rows_here, depth, columns, at)

    def _chunks(self, k: Emitter, m: Expr, panels: Expr) -> tuple[Expr, Expr]:
        """Return the number of rows of a task, and the number of tasks for each panel. It is one task, unless there are
        few panels.
        """
        few = tile_rows(self.width, k.isa) * CHUNK
        chunk = k.let(k.either(panels >= PANELS, m, k.index(few)), "chunk")
        return chunk, k.let(k.either(panels >= PANELS, k.index(1), k.floor_divide(m + (few - 1), few)), "chunks")

    def _share(self, k: Emitter, task: Expr, m: Expr, chunk: Expr, chunks: Expr) -> tuple[Expr, Expr, Expr]:
        """Return the panel of a task, its first row, and its number of rows. Tasks of one panel are consecutive."""
        panel = k.opaque(k.floor_divide(task, chunks), "panel")
        first = k.opaque((task - panel * chunks) * chunk, "first")
        return panel, first, k.let(k.least(m - first, chunk), "rows")

    def _panel(
        self,
        k: Emitter,
        views: dict[str, Any],
        panel: Expr,
        start: Expr,
        m: Expr,
        depth: Expr,
        columns: Expr,
        batch: Sequence[Expr] = (),
    ) -> None:
        """Emit the product of m rows and one panel: full tiles, then tiles of the remaining rows."""
        rows = tile_rows(self.width, k.isa)
        blocks = k.let(k.floor_divide(m, rows), "blocks")
        rest = k.let(k.floor_mod(m, rows), "rest")
        fetched = 0  # number of tiles that load the panel first
        if k.isa.ahead and not self.batch:
            fetched = k.let(k.least(blocks, k.index(1)), "fetched")
            with k.when(blocks >= k.index(1)):
                self._tile(k, views, panel, start, rows, depth, columns, batch, brings=True)
        with k.loop(blocks - fetched, "block") as block:
            self._tile(k, views, panel, k.let(start + (block + fetched) * rows, "first"), rows, depth, columns, batch)

        def tile(first: Expr, high: int, *, count: Expr | None = None) -> None:
            self._tile(k, views, panel, first, high, depth, columns, batch, brings=not self.batch, count=count)

        over_rest(k, start + blocks * rows, rest, rows, tile)

    def _tile(
        self,
        k: Emitter,
        views: dict[str, Any],
        panel: Expr,
        first: Expr,
        rows: int,
        depth: Expr,
        columns: Expr,
        batch: Sequence[Expr],
        *,
        brings: bool = False,
        count: Expr | None = None,
    ) -> None:
        """Emit the product of `rows` rows and a panel.

        brings  True if these rows are the first to read the panel
        count   number of existing rows, if fewer than `rows`
        """
        lanes = k.isa.lanes()
        ahead = k.isa.ahead // (self.width * f32.bytes) if brings else 0
        vectors = self.width // lanes
        w = views["w"]
        acc = k.registers(rows * self.width, f32)
        with k.unroll(rows * vectors, "r") as r:
            k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(depth, "k") as step:
            for j in range(vectors if ahead else 0):
                k.prefetch(w, [*batch, panel, step + ahead, j * lanes])
            self._products(k, views, panel, partial(row_of, k, first, count=count), rows, step, acc, batch)
        # The epilogue is emitted once for a vector of the panel, not once for each register.
        tile = k.registers(rows * self.width, f32, "tile")
        with k.unroll(rows * vectors, "r") as r:
            k.store(tile, [r * lanes], k.load(acc, [r * lanes], lanes), lanes)
        with k.loop(rows if count is None else count, "i") as i, k.loop(vectors, "j") as j:
            value = k.load(tile, [i * self.width + j * lanes], lanes)
            at = [*batch, first + i]
            column = k.let(panel * self.width + j * lanes, "column")
            self.finishing.store(k, views, at, column, value, columns, lanes)

    def _products(
        self,
        k: Emitter,
        views: dict[str, Any],
        panel: Expr,
        row: Callable[[Expr], Expr],
        rows: int,
        step: Expr,
        acc: Any,
        batch: Sequence[Expr],
    ) -> None:
        """Add the products of one step of k to the sums of a tile. `row` returns the index of a row of the tile."""
        lanes, a, w = k.isa.lanes(), views["a"], views["w"]
        vectors = self.width // lanes
        with k.unroll(rows, "i") as i:
            x = k.splat(k.load(a, [*batch, row(i), step]), lanes)
            with k.unroll(vectors, "j") as j:
                at = (i * vectors + j) * lanes
                product = x * k.load(w, [*batch, panel, step, j * lanes], lanes)
                k.store(acc, [at], k.load(acc, [at], lanes) + product, lanes)


@dataclass(frozen=True)
class Pack(Kernel):
    """w[b, n // width, k, n % width] = x[b, n, k], for a right operand that is computed. Padded with zeros.

    width    width of a panel
    near     True if x is contiguous along n, and is copied as vectors

    Arguments: x, w; n, k; x's strides over n and k; the two batch sizes, x's two batch strides. w is contiguous.
    """

    width: int
    near: bool = False

    def emit(self, k: Emitter) -> None:
        x, w = k.pointer("x", f32), k.pointer("w", f32)
        n, depth = k.size("n"), k.size("k")
        strides = [k.size("x_n"), k.size("x_k")]
        b0, b1 = k.size("b0"), k.size("b1")
        outer = [k.size("x_b0"), k.size("x_b1")]
        panels = k.floor_divide(n + (self.width - 1), self.width)
        source = k.view(x, [b0, b1, depth, n], [*outer, strides[1], 1 if self.near else strides[0]])
        packed = k.view(w, [b0, b1, panels, depth, self.width])
        with k.parallel(b0 * b1 * panels, "task") as task:
            panel = k.let(k.floor_mod(task, panels), "panel")
            b = k.opaque(k.floor_divide(task, panels), "b")
            at = [k.opaque(k.floor_divide(b, b1), "i0"), k.opaque(k.floor_mod(b, b1), "i1")]
            inside = k.let(k.least(n - panel * self.width, k.index(self.width)), "inside")
            if self.near:
                lanes = k.isa.lanes()
                with k.when(inside >= k.index(self.width)), k.loop(depth, "d") as d:
                    for j in range(0, self.width, lanes):
                        k.store(
                            packed, [*at, panel, d, j], k.load(source, [*at, d, panel * self.width + j], lanes), lanes
                        )
            with k.when(inside < k.index(self.width if self.near else self.width + 1)), k.loop(depth, "d") as d:
                with k.loop(inside, "j") as j:
                    k.store(packed, [*at, panel, d, j], k.load(source, [*at, d, panel * self.width + j]))
                with k.loop(k.index(self.width) - inside, "j") as j:
                    k.store(packed, [*at, panel, d, inside + j], k.number(0.0, f32))
