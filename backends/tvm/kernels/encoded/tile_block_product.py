"""Matrix products in bf16 on AMX whose right operand is stored in blocks, which are unpacked into tiles.

    c[m, n] = epilogue(sum_k a[m, k] bf16(d q[n, k] + c))

This is like `TileProduct`, except that a chunk of a panel is unpacked into the L1 cache once for up to eight blocks of
rows. There, numbers are rounded to bf16; they are not stored elsewhere. A row's bits do not depend on other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.pair_unpacking import unpack_pairs
from treadle.backends.tvm.kernels.encoded.unpacking import INT8_ROWS, PackedForm
from treadle.backends.tvm.kernels.narrow.tile_product import CHUNK, WIDTH, TileAt, TileProduct
from treadle.backends.tvm.kernels.narrow.tiles import ROWS
from treadle.ir.layouts import PAIR_STEP
from treadle.ir.types import DType, bf16, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_SQUARE = ROWS * PAIR_STEP
_AT_ONCE = 8  # blocks of rows per unpacked chunk: their sums fill most of the L1 cache


@dataclass(frozen=True)
class TileBlockProduct(TileProduct):
    """c = epilogue(a @ decode(w, to=bf16)), with float32 sums.

    form    form of w's blocks, which extend along k: 32 elements in a block, or a line as one block

    The other fields and the arguments are the same as for `TileProduct`; w's bytes are in panels(32, twos).
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
        return k.view(pointer, [panels, k.floor_divide(bytes, 2), 2 * WIDTH])

    def tiles_of_chunk(self, k: Emitter, views: Mapping[str, Any], panel: Expr, done: Expr, count: Expr) -> TileAt:
        form, w = self.form, views["w"]
        made = k.registers(CHUNK * 2 * _SQUARE, bf16, "tiles")
        k.store(made, [k.opaque(0)], k.number(0, bf16))  # marks the memory as used: tiles access it by address
        ahead = k.isa.ahead // (2 * WIDTH)
        with k.loop(count, "s") as s:
            base = k.let((done + s) * (form.bytes // 2 if form.group else ROWS), "base")
            for j in range(2):

                def load(place: Expr, at: int, bytes: int, j: int = j) -> Expr:
                    return k.load(w, [panel, place, j * (2 * ROWS) + at], bytes)

                def bring(place: Expr, j: int = j) -> None:
                    if ahead and j == 0:
                        k.prefetch(w, [panel, place + ahead, 0])

                def put(row: Expr, vectors: Sequence[Expr], s: Expr = s, j: int = j) -> None:
                    at = s * (2 * _SQUARE) + j * _SQUARE + row * PAIR_STEP
                    k.store(made, [at], vectors[0], 2 * ROWS)

                begin, pairs = base if form.group else k.index(0), k.index(ROWS * form.bits // 8)
                unpack_pairs(k, form, [load], begin, base + form.header // 2, pairs, put, before=bring)
        return lambda s, j: (made, [s * (2 * _SQUARE) + j * _SQUARE])
