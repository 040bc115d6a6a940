"""Matrix products in bf16 on AMX whose right side lies in blocks, which are unpacked into tiles.

    c[m, n] = epilogue(sum_k a[m, k] bf16(d q[n, k] + c))

As `TileProduct`, but for a panel's chunk, which is unpacked into the first-level cache once for up to eight blocks of
rows: numbers are rounded to bf16 there, and stored nowhere else. A row's bits are those that it has alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.unpacking import INT8_ROWS, PackedForm
from treadle.backends.tvm.kernels.narrow.round_rows import two_rounded
from treadle.backends.tvm.kernels.narrow.tile_product import CHUNK, WIDTH, TileAt, TileProduct
from treadle.backends.tvm.kernels.narrow.tiles import ROWS
from treadle.ir.layouts import PAIR_STEP
from treadle.ir.types import DType, bf16, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_SQUARE = ROWS * PAIR_STEP
_AT_ONCE = 8  # blocks of rows that a chunk is unpacked for: their sums fill most of the first-level cache


@dataclass(frozen=True)
class TileBlockProduct(TileProduct):
    """c = epilogue(a @ decode(w, to=bf16)), with float32 sums.

    form    of w's blocks, which lie along k: 32 elements a block, or a line as one

    The rest, and what is passed, as for `TileProduct`; w is u8[panels, bytes of a line, 32].
    """

    form: PackedForm = INT8_ROWS

    @property
    def title(self) -> str:
        return f"{super().title}_of_{self.form.title}"

    @property
    def held(self) -> DType:
        return u8

    @property
    def group(self) -> int:
        return _AT_ONCE

    @property
    def prefetches(self) -> bool:
        return False

    def size(self, k: Emitter, here: Expr, steps: Expr) -> Expr:
        return k.index(CHUNK)

    def right(self, k: Emitter, pointer: Any, panels: Expr, steps: Expr, depth: Expr) -> Any:
        bytes = steps * self.form.bytes if self.form.group else depth + self.form.header
        return k.view(pointer, [panels, bytes, WIDTH])

    def tiles_of_chunk(self, k: Emitter, views: Mapping[str, Any], panel: Expr, done: Expr, count: Expr) -> TileAt:
        form, w = self.form, views["w"]
        made = k.registers(CHUNK * 2 * _SQUARE, bf16, "tiles")
        k.store(made, [k.opaque(0)], k.number(0, bf16))  # all of it is used, of which the code generator sees little
        pairs = PAIR_STEP // 2
        ahead = k.isa.ahead // WIDTH
        with k.loop(count, "s") as s:
            base = k.let((done + s) * (form.bytes if form.group else PAIR_STEP), "base")
            for j in range(2):

                def load(at: Expr, j: int = j) -> Expr:
                    return k.load(w, [panel, at, j * ROWS], ROWS)

                d, c = form.scales(k, load, base if form.group else k.index(0), ROWS)
                with k.loop(pairs * form.bits // 8, "pair") as pair:
                    place = k.let(base + (form.header + 2 * pair), "place")
                    if ahead and j == 0:
                        k.prefetch(w, [panel, place + ahead, 0])
                    first, second = (form.elements(k, load(place + n), ROWS) for n in range(2))
                    for half, both in enumerate(zip(first, second, strict=True)):
                        low, high = (x * d if c is None else x * d + c for x in both)
                        row = pair + half * (pairs // 2)
                        at = s * (2 * _SQUARE) + j * _SQUARE + row * PAIR_STEP
                        k.store(made, [at], _pairs_rounded(k, k.let(low, "low"), k.let(high, "high")), 2 * ROWS)
        return lambda s, j: (made, [s * (2 * _SQUARE) + j * _SQUARE])


def _pairs_rounded(k: Emitter, low: Expr, high: Expr) -> Expr:
    """Two vectors of 16 floats as 16 pairs of bf16 numbers, one of each side by side."""
    return k.shuffle([two_rounded(k, low, high)], [i + n for i in range(ROWS) for n in (0, ROWS)])
