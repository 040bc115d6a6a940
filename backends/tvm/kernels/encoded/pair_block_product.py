"""Matrix products of bf16 pairs whose right operand is stored in blocks, which are unpacked into pairs.

    c[m, n] = epilogue(sum_k a[m, k] bf16(d q[n, k] + c))

A panel is unpacked once for all rows of a thread, into memory that stays in the L2 cache, and is multiplied as in
`PairProduct`. For few rows, pairs are multiplied in registers immediately after unpacking, while the hardware
prefetches the following data. In both cases, pairs are added in the order of k. So a row's bits do not depend on other
rows, and are the same as with a weight stored in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.block_words import WordBlock, WordForm
from treadle.backends.tvm.kernels.encoded.pair_unpacking import LANES, unpack_pairs, unpack_words
from treadle.backends.tvm.kernels.encoded.unpacking import INT8_ROWS, PackedForm
from treadle.backends.tvm.kernels.narrow.pair_product import AddPairs, PairProduct
from treadle.backends.tvm.kernels.narrow.register_product import ProductSizes, RegisterTile, Write
from treadle.backends.tvm.kernels.narrow.register_tiles import PART, narrow_width, over_rows, tile_of
from treadle.ir.types import DTYPES, DType, bf16, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

FEW = (1, 2, 4, 8)
"""Numbers of rows that are multiplied in registers, each as one tile."""


@dataclass(frozen=True)
class PairBlockProduct(PairProduct):
    """c = epilogue(a @ decode(w, to=bf16)), with float32 sums.

    form    form of w's blocks, which extend along k, a multiple of 32

    The arguments are the same as for `PairProduct`. w's bytes are stored in panels by twos, or in the form's layout if
    it is read by words. Each slot of memory holds one unpacked panel.
    """

    form: PackedForm | WordForm = INT8_ROWS

    @property
    def title(self) -> str:
        return f"pair_product{self.finishing.title}_of_{self.form.title}"

    @property
    def held(self) -> DType:
        return u8

    def memory(self, k: Emitter) -> dict[str, Any]:
        return {"unpacked": k.pointer("unpacked", bf16)}

    def shapes(self, k: Emitter, sizes: ProductSizes, width: int) -> Mapping[str, list[Expr]]:
        form, depth = self.form, sizes.depth
        if isinstance(form, WordForm):
            count = k.floor_divide(sizes.columns + (LANES - 1), LANES)
            w = [count, k.floor_divide(depth, form.elements) * (form.bytes * LANES)]
        else:
            bytes = k.floor_divide(depth, form.group) * form.bytes if form.group else depth + form.header
            w = [sizes.panels, k.floor_divide(bytes, 2), 2 * width]
        made = super().shapes(k, sizes, width)
        return {**made, "w": w, "unpacked": [sizes.slots, *made["w"][1:]]}

    def over(self, k: Emitter, views: Mapping[str, Any], sizes: ProductSizes, write: Write) -> None:
        """Emit the product: every slot runs its share of the tasks one after the other. A task has some rows of a
        panel.
        """
        (high, columns), width, m = tile_of(k.isa), narrow_width(k.isa), sizes.m
        part = PART // high * high
        parts = k.opaque(k.floor_divide(m + (part - 1), part), "parts")
        tasks = k.opaque(sizes.panels * parts, "tasks")
        active = k.opaque(k.least(sizes.slots, tasks), "active")
        with k.parallel(active, "slot") as slot:
            begin = k.opaque(k.floor_divide(slot * tasks, active), "begin")
            end = k.opaque(k.floor_divide((slot + 1) * tasks, active), "end")
            with k.loop(end - begin, "task") as task:
                panel = k.opaque(k.floor_divide(begin + task, parts), "panel")
                number = k.opaque(begin + task - panel * parts, "number")
                first = k.let(number * part, "first")
                count = k.let(k.least(m - first, k.index(part)), "count")
                for least, most in zip((0, *FEW), FEW, strict=False):
                    with k.when(k.both(m > k.index(least), m <= k.index(most))):
                        for column in range(0, width, columns):
                            write(panel, column, columns, first, most, count=count)
                with k.when(m > k.index(FEW[-1])):
                    with k.when(k.any_of(k.equal(task, k.index(0)), k.equal(number, k.index(0)))):
                        self._fill(k, views, panel, slot, width, sizes)
                    for column in range(0, width, columns):
                        over_rows(k, first, count, high, partial(write, panel, column, columns, slot=slot))

    def _fill(
        self, k: Emitter, views: Mapping[str, Any], panel: Expr, slot: Expr, width: int, sizes: ProductSizes
    ) -> None:
        """Unpack a panel into the memory of a slot."""

        def put(pair: Expr, vectors: Sequence[Expr]) -> None:
            for v, each in enumerate(vectors):
                k.store(views["unpacked"], [slot, pair, 2 * LANES * v], each, 2 * LANES)

        self._unpack(k, views["w"], panel, 0, width // LANES, sizes, put)

    def over_pairs(
        self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, sizes: ProductSizes, add: AddPairs
    ) -> None:
        if tile.slot is not None:
            self.over_held(k, views["unpacked"], tile.slot, tile, sizes.steps, add)
            return

        def add_words(pair: Expr, vectors: Sequence[Expr]) -> None:
            add(pair, [k.let(k.bits(each, DTYPES["i32"], LANES), "w") for each in vectors])

        self._unpack(k, views["w"], tile.panel, tile.start, tile.vectors, sizes, add_words, in_order=True)

    def _unpack(
        self,
        k: Emitter,
        w: Any,
        panel: Expr,
        start: int,
        vectors: int,
        sizes: ProductSizes,
        put: AddPairs,
        *,
        in_order: bool = False,
    ) -> None:
        """Unpack the pairs of `vectors` vectors of a panel's columns."""
        form = self.form
        if isinstance(form, WordForm):
            self._unpack_words(k, form, w, panel, start, vectors, sizes, put)
            return

        def load(place: Expr, at: int, count: int, v: int) -> Expr:
            return k.load(w, [panel, place, 2 * (start + v * LANES) + at], count)

        def bring(place: Expr) -> None:
            if k.isa.ahead:
                for byte in range(0, 2 * vectors * LANES, 64):
                    k.prefetch(w, [panel, place + k.isa.ahead // (2 * narrow_width(k.isa)), 2 * start + byte])

        loads = [partial(load, v=v) for v in range(vectors)]
        head = form.header // 2
        if not form.group:
            count = k.floor_divide(sizes.depth, 2)
            unpack_pairs(k, form, loads, k.index(0), k.index(head), count, put, in_order=in_order, before=bring)
            return
        with k.loop(k.floor_divide(sizes.depth, form.group), "block") as block:
            base = k.let(block * (form.bytes // 2), "base")
            of_block = partial(_put_from, k, k.let(block * (form.group // 2), "number"), put)
            count = k.index(form.bytes // 2 - head)
            unpack_pairs(k, form, loads, base, base + head, count, of_block, in_order=in_order, before=bring)

    def _unpack_words(
        self,
        k: Emitter,
        form: WordForm,
        w: Any,
        panel: Expr,
        start: int,
        vectors: int,
        sizes: ProductSizes,
        put: AddPairs,
    ) -> None:
        last = k.floor_divide(sizes.columns - 1, LANES)  # columns of the last panel past n are never stored
        first = panel * (narrow_width(k.isa) // LANES) + start // LANES
        lines = [k.opaque(k.least(first + v, last), "line") for v in range(vectors)]
        with k.loop(k.floor_divide(sizes.depth, form.elements), "block") as block:
            base = k.let(block * (form.bytes * LANES), "base")

            def load(at: Expr, count: int, line: Expr) -> Expr:
                return k.load(w, [line, base + at], count)

            if k.isa.ahead:  # the blocks of the next lines that are read together
                for line, byte in product(lines, range(0, form.bytes * LANES, 64)):
                    k.prefetch(w, [line + vectors, base + byte])
            blocks = [WordBlock(k, form, LANES, partial(load, line=line), k.index(0)) for line in lines]
            unpack_words(k, blocks, partial(_put_from, k, k.let(block * (form.elements // 2), "number"), put))


def _put_from(k: Emitter, first: Expr, put: AddPairs, pair: Expr, vectors: Sequence[Expr]) -> None:
    """Store a pair of a block whose first pair has the number `first`."""
    put(k.let(first + pair, "pair"), vectors)
