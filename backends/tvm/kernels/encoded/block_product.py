"""Matrix products whose right operand is stored in blocks, which are unpacked in registers.

    c[m, n] = epilogue(sum_k a[m, k] * (d q[n, k] + c))

Tiles and panels are the same as in `Matmul`; the panels hold bytes. A tile unpacks a vector of elements once for all of
its rows. Every row sums over k in the same order, the order of the blocks, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.unpacking import INT8_ROWS, PackedForm
from treadle.backends.tvm.kernels.matmul import Matmul
from treadle.backends.tvm.kernels.narrow.register_tiles import row_of
from treadle.ir.types import DType, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class BlockProduct(Matmul):
    """c = epilogue(a @ decode(w)), over float32.

    form    form of w's blocks, which extend along k

    The other fields and the arguments are the same as for `Matmul`; w is u8[panels, bytes of a line, width].
    """

    form: PackedForm = INT8_ROWS

    @property
    def title(self) -> str:
        done = f"_{self.epilogue.title}" if self.epilogue else ""
        return f"block_product{'_batch' * self.batch}_{self.form.title}_{self.width}{done}"

    @property
    def held(self) -> DType:
        return u8

    def held_rows(self, k: Emitter, depth: Expr) -> Expr:
        if not self.form.group:
            return depth + self.form.header
        return k.floor_divide(depth, self.form.group) * self.form.bytes

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
        form, w, lanes = self.form, views["w"], k.isa.lanes()
        vectors = self.width // lanes
        ahead = k.isa.ahead // self.width if brings else 0  # distance in bytes of each of the panel's `width` lines
        acc = k.registers(rows * self.width, f32)
        row = partial(row_of, k, first, count=count)
        with k.unroll(rows * vectors, "r") as r:
            k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)

        def scales(base: Expr, j: int) -> tuple[Expr, Expr | None]:
            return form.scales(k, lambda at: k.load(w, [*batch, panel, at, j * lanes], lanes), base, lanes)

        if form.group:
            with k.loop(k.floor_divide(depth, form.group), "group") as group:
                base = k.let(group * form.bytes, "base")
                held = [scales(base, j) for j in range(vectors)]
                start = k.let(group * form.group, "start")
                with k.loop(form.group * form.bits // 8, "b") as b:
                    place = k.let(base + (b + form.header), "place")
                    if ahead:
                        k.prefetch(w, [*batch, panel, place + ahead, 0])
                    self._products(k, views, panel, row, rows, place, acc, batch, held, start + b)
        else:
            with k.loop(depth, "k") as step:
                place = k.let(step + form.header, "place")
                if ahead:
                    k.prefetch(w, [*batch, panel, place + ahead, 0])
                self._products(k, views, panel, row, rows, place, acc, batch, None, step)
        tile = k.registers(rows * self.width, f32, "tile")
        for j in range(vectors):
            d = None if form.group else scales(k.index(0), j)[0]  # a single scale per line is applied after the sum
            for i in range(rows):
                at = [(i * vectors + j) * lanes]
                total = k.load(acc, at, lanes)
                k.store(tile, at, total if d is None else total * d, lanes)
        with k.loop(rows if count is None else count, "i") as i, k.loop(vectors, "j") as j:
            value = k.load(tile, [i * self.width + j * lanes], lanes)
            column = k.let(panel * self.width + j * lanes, "column")
            self.finishing.store(k, views, [*batch, first + i], column, value, columns, lanes)

    def _products(  # type: ignore[override]
        self,
        k: Emitter,
        views: dict[str, Any],
        panel: Expr,
        row: Callable[[int], Expr],
        rows: int,
        place: Expr,
        acc: Any,
        batch: Sequence[Expr],
        held: Sequence[tuple[Expr, Expr | None]] | None,
        step: Expr,
    ) -> None:
        """Add the products of one byte of each line to a tile's sums: element `step` and, in 4-bit forms, the element
        half a group later.
        """
        lanes, form = k.isa.lanes(), self.form
        vectors = self.width // lanes
        found = []
        for j in range(vectors):
            byte = k.load(views["w"], [*batch, panel, place, j * lanes], lanes)
            elements = form.elements(k, byte, lanes)
            if held is not None:
                d, c = held[j]
                elements = [form.number(e, d, c) for e in elements]
            found.append([k.let(e, "y") for e in elements])
        for i in range(rows):
            for half in range(len(found[0])):
                x = k.splat(k.load(views["a"], [*batch, row(i), step + half * (form.group // 2)]), lanes)
                x = k.let(x, "x")
                for j in range(vectors):
                    at = [(i * vectors + j) * lanes]
                    k.store(acc, at, k.load(acc, at, lanes) + x * found[j][half], lanes)
