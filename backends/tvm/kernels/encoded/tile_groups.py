"""Products of many rows of groups with a panel in blocks, on AMX tiles of bytes.

A group has 32 elements. A tile holds a group of 16 rows, or of 16 columns (by fours). Their 16 times 16 sums are
integers. These are scaled and added to float32 sums in registers, block after block, in the same way as in
`QuadBlockProduct` without tiles, so results are bitwise identical. A panel's numbers are unpacked once for all rows of
a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.narrow import tiles
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP
from treadle.backends.tvm.kernels.narrow.tiles import ROW_BYTES, ROWS
from treadle.ir.types import DTYPES, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr
    from treadle.backends.tvm.kernels.encoded.quad_block_product import QuadBlockProduct

MANY = 16
"""Minimum number of rows for which tiles are faster than instructions that multiply fours."""
_CHUNK = 64  # number of groups that are unpacked at a time: 32 KiB
_FOURS = GROUP // 4
_GROUP_BYTES = ROWS * GROUP  # bytes of a group of 16 columns
_SQUARE = ROWS * ROWS
_i32, _i8 = DTYPES["i32"], DTYPES["i8"]

_SUMS, _LEFT, _RIGHT = 0, 2, 4
_SHAPES = [(ROWS, ROW_BYTES)] * 2 + [(ROWS, GROUP)] * 2 + [(_FOURS, ROW_BYTES)] * 2 + [(ROWS, ROW_BYTES)] * 2
"""Shapes of the tiles of sums, of rows and of columns. There are two of each, so that one group is multiplied while the
sums of another are added.
"""


class PanelOnTiles:
    """A writer of the product of a task's rows and a panel: `count` rows from `first` on, at most `most`."""

    def __init__(self, product: QuadBlockProduct, k: Emitter, views: Mapping[str, Any], most: int) -> None:
        self.product, self.k, self.views, self.most = product, k, views, most
        self.each = product.form.elements // GROUP  # groups in a block

    def __call__(self, panel: Expr, first: Expr, count: Expr, columns: Expr, depth: Expr) -> None:
        k = self.k
        tiles.configure(k, _SHAPES)
        self.numbers = self._room(_CHUNK * _GROUP_BYTES, u8, "numbers")
        self.scales = self._room(_CHUNK * 2 * ROWS, f32, "scales")
        self.sums = self._room(2 * _SQUARE, _i32, "sums")
        self.held = self._room(self.most * ROWS, f32, "held")
        groups = k.let(k.floor_divide(depth, GROUP), "groups")
        with k.loop(k.floor_divide(groups + (_CHUNK - 1), _CHUNK), "chunk") as chunk:
            done = k.opaque(chunk * _CHUNK, "done")
            here = k.opaque(k.least(groups - done, k.index(_CHUNK)), "here")
            self._unpack(panel, done, here)
            with k.loop(k.floor_divide(count + (ROWS - 1), ROWS), "sixteen") as sixteen:
                self._rows(first, sixteen, done, here, depth)
        with k.loop(count, "i") as i:
            value = k.load(self.held, [i * ROWS], ROWS)
            self.product.finishing.store(k, self.views, [first + i], panel * ROWS, value, columns, ROWS)
        tiles.release(k)

    def _room(self, count: int, dtype: Any, name: str) -> Any:
        made = self.k.registers(count, dtype, name)
        # This shows the code generator that the memory is used: tile instructions access it by address.
        self.k.store(made, [self.k.opaque(0)], self.k.number(0, dtype))
        return made

    def _unpack(self, panel: Expr, done: Expr, here: Expr) -> None:
        """Unpack the numbers of `here` groups as signed bytes, by fours, and the scales of the groups."""
        k, product, form = self.k, self.product, self.product.form
        with k.loop(k.floor_divide(here, self.each), "block") as number:
            base = k.let((k.floor_divide(done, self.each) + number) * (form.bytes * ROWS), "base")
            (block,) = product.blocks(k, self.views["w"], panel, base)
            spans, groups = form.spans(block), k.let(number * self.each, "groups")
            for group in range(self.each):
                for at, scale in enumerate(spans[group * GROUP // form.span]):
                    if scale is not None:
                        k.store(self.scales, [(2 * (groups + group) + at) * ROWS], scale, ROWS)
            with k.loop(k.index(form.chunks), "part") as chunk:
                for part in range(form.parts):
                    begin = k.let((groups + chunk * form.parts + part) * _GROUP_BYTES, "begin")
                    for element, word in form.fours(block, chunk, part):
                        bytes = k.bits(k.let(word, "w"), _i8, ROW_BYTES) - k.number(_as_i8(form.zero), _i8, ROW_BYTES)
                        k.store(
                            self.numbers, [begin + element // 4 * ROW_BYTES], k.bits(bytes, u8, ROW_BYTES), ROW_BYTES
                        )

    def _rows(self, first: Expr, sixteen: Expr, done: Expr, here: Expr, depth: Expr) -> None:
        """Add `here` groups to the sums of 16 rows."""
        k = self.k
        row = k.opaque(first + sixteen * ROWS, "row")
        rest = k.let(sixteen * _SQUARE, "rest")
        acc = k.registers(_SQUARE, f32)
        with k.when(done < k.index(1)), k.unroll(ROWS, "i") as i:
            k.store(acc, [i * ROWS], k.number(0.0, f32, ROWS), ROWS)
        with k.when(done >= k.index(1)), k.unroll(ROWS, "i") as i:
            k.store(acc, [i * ROWS], k.load(self.held, [rest + i * ROWS], ROWS), ROWS)
        with k.loop(k.floor_divide(here, 2), "pair") as pair:
            for number in range(2):
                self._multiply(row, done, k.let(2 * pair + number, "group"), number, depth)
            for number in range(2):
                self._add(row, done, k.let(2 * pair + number, "group"), number, acc)
        with k.when(k.floor_mod(here, 2) > k.index(0)):
            self._multiply(row, done, here - 1, 0, depth)
            self._add(row, done, here - 1, 0, acc)
        with k.unroll(ROWS, "i") as i:
            k.store(self.held, [rest + i * ROWS], k.load(acc, [i * ROWS], ROWS), ROWS)

    def _multiply(self, row: Expr, done: Expr, group: Expr, number: int, depth: Expr) -> None:
        """Compute the integer sums of a group, for 16 rows and 16 columns."""
        k = self.k
        tiles.clear(k, _SUMS + number)
        tiles.load(k, _LEFT + number, self.views["a"], [row, (done + group) * GROUP], depth)
        tiles.load(k, _RIGHT + number, self.numbers, [group * _GROUP_BYTES])
        tiles.multiply_bytes(k, _SUMS + number, _LEFT + number, _RIGHT + number, signed=True)
        tiles.store(k, _SUMS + number, self.sums, [k.index(number * _SQUARE)])

    def _add(self, row: Expr, done: Expr, group: Expr, number: int, acc: Any) -> None:
        """Scale the integer sums of a group and add them to the float32 sums of all groups."""
        k, scales = self.k, self.views["scales"]
        d = k.let(k.load(self.scales, [2 * group * ROWS], ROWS), "d")
        least = k.let(k.load(self.scales, [(2 * group + 1) * ROWS], ROWS), "c") if self.product.form.least else None
        for i in range(ROWS):
            total = k.cast(k.load(self.sums, [number * _SQUARE + i * ROWS], ROWS), f32, ROWS)
            at = [i * ROWS]
            k.store(
                acc,
                at,
                self.product.added(k, scales, row + i, done + group, 0, k.load(acc, at, ROWS), total, d, least),
                ROWS,
            )


def _as_i8(zero: int) -> int:
    """Return the signed byte that equals `zero` modulo 256. Subtracting it has the same effect."""
    return (zero + 128) % 256 - 128
