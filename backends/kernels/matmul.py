"""Matrix products with a packed right side, and what is done with each element before it is stored.

    c[b, m, n] = epilogue(sum_k a[b, m, k] * w[b, n // width, k, n % width], ...)

The tile of rows x panel stays in registers through all of k; w is read one full vector at a time and a is broadcast.
Every row sums over k in one order, so a row's bits depend neither on how many rows there are nor on its place
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.kernels.isa import Isa
from treadle.backends.kernels.kernel import Kernel
from treadle.backends.kernels.pointwise import Chain
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.kernels.emitter import Emitter, Expr


def panel_width(columns: int | None, isa: Isa) -> int:
    """How many columns a panel of a matrix has: one to four vectors, the most that leave the fewest empty columns.

    None: the number of columns is not known before the call.
    """
    lanes = isa.lanes()
    choices = (3, 4, 2, 1) if isa.registers >= 32 else (2, 1)
    if columns is None:
        return lanes * choices[0]
    return lanes * min(choices, key=lambda vectors: -(-columns // (lanes * vectors)) * vectors)


def tile_rows(width: int, isa: Isa) -> int:
    """How many rows a tile has: as many as leave registers for a vector of each column of a panel and of a."""
    vectors = width // isa.lanes()
    return {4: 6, 3: 8, 2: 12, 1: 12}[vectors] if isa.registers >= 32 else {2: 6, 1: 12}[vectors]


@dataclass(frozen=True)
class Matmul(Kernel):
    """c = epilogue(a @ w), over float32.

    k, n     the sizes, where they are known when the kernel is made; None: passed
    width    of a panel of w
    epilogue what is done with the sum, the chain's first input; None: it is stored as it is
    extras   for each further input of the chain how it lies: `n` a vector over n, `m` one number a row, `mn` a matrix
             like c, `1` one number
    batch    whether there are two batch dimensions, over which all of them may have strides

    Passed: a, w, the extras, c; m, then k and n where they are not known; a's stride of rows, `m` and `mn` extras' and
    c's strides of rows; with batch: the two sizes, then for each pointer its two strides.
    """

    k: int | None
    n: int | None
    width: int
    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    batch: bool = False

    @property
    def title(self) -> str:
        done = f"_{self.epilogue.title}" if self.epilogue else ""
        return f"matmul_{self.k or 'k'}x{self.n or 'n'}{done}"

    def flops(self, sizes: Sequence[int]) -> int:
        m, *rest = sizes
        depth = self.k or rest.pop(0)
        columns = self.n or rest.pop(0)
        return 2 * m * depth * columns

    def emit(self, k: Emitter) -> None:
        result = self.epilogue.dtype if self.epilogue else f32
        dtypes = [DTYPES[name] for name in self.epilogue.inputs[1:]] if self.epilogue else []
        pointers = [k.pointer("a", f32), k.pointer("w", f32)]
        pointers += [k.pointer(f"x{i}", d) for i, d in enumerate(dtypes)] + [k.pointer("c", result)]
        m = k.size("m")
        depth = k.size("k") if self.k is None else self.k
        columns = k.size("n") if self.n is None else self.n
        rows = {"a": k.size("a_stride")}
        rows |= {f"x{i}": k.size(f"x{i}_stride") for i, how in enumerate(self.extras) if "m" in how}
        rows["c"] = k.size("c_stride")
        panels = k.floor_divide(k.index(columns) + (self.width - 1), self.width)
        shapes: dict[str, tuple[list[Expr], list[Expr] | None]] = {
            "a": ([m, depth], [rows["a"], 1]),
            "w": ([panels, depth, self.width], None),
            "c": ([m, columns], [rows["c"], 1]),
        }
        for i, how in enumerate(self.extras):
            shape: list[Expr] = {"n": [columns], "m": [m], "mn": [m, columns], "1": [1]}[how]
            shapes[f"x{i}"] = shape, [rows[f"x{i}"], 1][: len(how)] if "m" in how else None
        if not self.batch:
            views = {p.name: k.view(p, *shapes[p.name]) for p in pointers}
            with k.parallel(panels, "panel") as panel:
                self._panel(k, views, panel, m, depth, columns)
            return
        b0, b1 = k.size("b0"), k.size("b1")
        batched = {p.name: (k.size(f"{p.name}_b0"), k.size(f"{p.name}_b1")) for p in pointers}
        views = {}
        for p in pointers:
            shape, strides = shapes[p.name]
            if strides is None:
                strides = [depth * self.width, self.width, 1][-len(shape) :] if len(shape) == 3 else [1]
            views[p.name] = k.view(p, [b0, b1, *shape], [*batched[p.name], *strides])
        with k.parallel(b0 * b1 * panels, "task") as task:
            panel = k.let(k.floor_mod(task, panels), "panel")
            b = k.let(k.floor_divide(task, panels), "b")
            first = [k.let(k.floor_divide(b, b1), "i0"), k.let(k.floor_mod(b, b1), "i1")]
            self._panel(k, views, panel, m, depth, columns, first)

    def _panel(
        self,
        k: Emitter,
        views: dict[str, Any],
        panel: Expr,
        m: Expr,
        depth: Expr,
        columns: Expr,
        batch: Sequence[Expr] = (),
    ) -> None:
        """All rows of one panel: full tiles, then one of the rows that are left."""
        rows = tile_rows(self.width, k.isa)
        blocks = k.let(k.floor_divide(m, rows), "blocks")
        rest = k.let(k.floor_mod(m, rows), "rest")
        with k.loop(blocks, "block") as block:
            self._tile(k, views, panel, k.let(block * rows, "first"), rows, depth, columns, batch)
        for count in range(1, rows):
            with k.when(rest == count):
                self._tile(k, views, panel, k.let(blocks * rows, "first"), count, depth, columns, batch)

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
    ) -> None:
        lanes = k.isa.lanes()
        vectors = self.width // lanes
        a, w = views["a"], views["w"]
        acc = k.registers(rows * self.width, f32)
        with k.unroll(rows * vectors, "r") as r:
            k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(depth, "k") as step, k.unroll(rows, "i") as i:
            x = k.splat(k.load(a, [*batch, first + i, step]), lanes)
            with k.unroll(vectors, "j") as j:
                at = (i * vectors + j) * lanes
                product = x * k.load(w, [*batch, panel, step, j * lanes], lanes)
                k.store(acc, [at], k.load(acc, [at], lanes) + product, lanes)
        with k.unroll(rows, "i") as i, k.unroll(vectors, "j") as j:
            value = k.load(acc, [(i * vectors + j) * lanes], lanes)
            column = panel * self.width + j * lanes
            self._store(k, views, batch, first + i, column, value, columns, lanes)

    def _store(
        self,
        k: Emitter,
        views: dict[str, Any],
        batch: Sequence[Expr],
        row: Expr,
        column: Expr,
        value: Expr,
        columns: Expr,
        lanes: int,
    ) -> None:
        """Store a vector of c; of the last panel only what is inside the matrix."""
        whole = self.n is not None and self.n % self.width == 0
        if whole:
            k.store(
                views["c"], [*batch, row, column], self._finished(k, views, batch, row, column, value, lanes), lanes
            )
            return
        inside = k.index(columns) - column
        with k.when(inside >= k.index(lanes)):
            k.store(
                views["c"], [*batch, row, column], self._finished(k, views, batch, row, column, value, lanes), lanes
            )
        with k.when(k.both(inside > k.index(0), inside < k.index(lanes))):
            made = k.registers(lanes, views["c"].dtype, "made")
            tails = {name: self._padded(k, view, batch, row, column, inside, lanes) for name, view in views.items()}
            k.store(made, [0], self._finished(k, views, batch, row, column, value, lanes, tails), lanes)
            with k.loop(inside, "t") as t:
                k.store(views["c"], [*batch, row, column + t], k.load(made, [t]))

    def _padded(
        self, k: Emitter, view: Any, batch: Sequence[Expr], row: Expr, column: Expr, inside: Expr, lanes: int
    ) -> Any:
        """The last vector of an extra over n, filled up with zeros; None for anything else."""
        kinds = dict(zip([f"x{i}" for i in range(len(self.extras))], self.extras, strict=True))
        how = kinds.get(view.name, "1")
        if "n" not in how:
            return None
        padded = k.registers(lanes, view.dtype, "tail")
        k.store(padded, [0], k.number(0, view.dtype, lanes), lanes)
        with k.loop(inside, "t") as t:
            at = [*batch, column + t] if how == "n" else [*batch, row, column + t]
            k.store(padded, [t], k.load(view, at))
        return k.load(padded, [0], lanes)

    def _finished(
        self,
        k: Emitter,
        views: dict[str, Any],
        batch: Sequence[Expr],
        row: Expr,
        column: Expr,
        value: Expr,
        lanes: int,
        tails: dict[str, Any] | None = None,
    ) -> Expr:
        if self.epilogue is None:
            return value
        read = [value]
        for i, how in enumerate(self.extras):
            view = views[f"x{i}"]
            if how == "1":
                read.append(k.splat(k.load(view, [*batch, 0]), lanes))
            elif how == "m":
                read.append(k.splat(k.load(view, [*batch, row]), lanes))
            elif tails is not None:
                read.append(tails[f"x{i}"])
            else:
                read.append(k.load(view, [*batch, column] if how == "n" else [*batch, row, column], lanes))
        return self.epilogue.emit(k, read, lanes)


@dataclass(frozen=True)
class Pack(Kernel):
    """w[b, n // width, k, n % width] = x[b, n, k], for a right side that is computed. Filled up with zeros.

    Passed: x, w; n, k; x's strides over n and k; the two batch sizes, x's two batch strides. w is contiguous.
    """

    width: int

    def emit(self, k: Emitter) -> None:
        x, w = k.pointer("x", f32), k.pointer("w", f32)
        n, depth = k.size("n"), k.size("k")
        strides = [k.size("x_n"), k.size("x_k")]
        b0, b1 = k.size("b0"), k.size("b1")
        outer = [k.size("x_b0"), k.size("x_b1")]
        panels = k.floor_divide(n + (self.width - 1), self.width)
        source = k.view(x, [b0, b1, n, depth], [*outer, *strides])
        packed = k.view(w, [b0, b1, panels, depth, self.width])
        with k.parallel(b0 * b1 * panels, "task") as task:
            panel = k.let(k.floor_mod(task, panels), "panel")
            b = k.let(k.floor_divide(task, panels), "b")
            at = [k.let(k.floor_divide(b, b1), "i0"), k.let(k.floor_mod(b, b1), "i1")]
            inside = k.let(k.least(n - panel * self.width, k.index(self.width)), "inside")
            with k.loop(depth, "d") as d:
                with k.loop(inside, "j") as j:
                    k.store(packed, [*at, panel, d, j], k.load(source, [*at, panel * self.width + j, d]))
                with k.loop(k.index(self.width) - inside, "j") as j:
                    k.store(packed, [*at, panel, d, inside + j], k.number(0.0, f32))
