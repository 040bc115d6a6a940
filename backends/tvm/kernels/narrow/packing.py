"""Packing of a computed right operand into pairs, quads or blocks. (NumPy packs weights when they are bound.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.layouts import PAIR_SQUARE, PAIR_STEP, QUAD_HEAD, QUAD_STEP, ROW_HEAD
from treadle.ir.types import DTYPES, bf16, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_i32, _i8 = DTYPES["i32"], DTYPES["i8"]


@dataclass(frozen=True)
class PackPairs(Kernel):
    """w = x[n, k] in pairs(width), flat or not: see `treadle.ir.layouts`. Padded with zeros.

    Arguments: x, w; n, k; x's strides over n and k. w is contiguous.
    """

    width: int
    flat: bool = False

    @property
    def generic(self) -> bool:
        return True

    def emit(self, k: Emitter) -> None:
        px, pw = k.pointer("x", bf16), k.pointer("w", bf16)
        n, depth = k.size("n"), k.size("k")
        x = k.view(px, [n, depth], [k.size("x_n"), k.size("x_k")])
        steps = k.let(k.floor_divide(depth + (PAIR_STEP - 1), PAIR_STEP), "steps")
        panels = k.floor_divide(n + (self.width - 1), self.width)
        side = self.width if self.flat else PAIR_SQUARE
        w = k.view(pw, [panels, steps, self.width // side, PAIR_SQUARE, side, 2])
        with k.parallel(panels, "panel") as panel, k.loop(self.width, "i") as i:
            row = k.let(panel * self.width + i, "row")
            square, column = k.let(k.floor_divide(i, side)), k.let(k.floor_mod(i, side))
            with k.loop(steps, "step") as step, k.loop(PAIR_STEP, "j") as j:
                at = [panel, step, square, k.floor_divide(j, 2), column, k.floor_mod(j, 2)]
                k.store(w, at, k.number(0, bf16))
                with k.when(k.both(row < n, step * PAIR_STEP + j < depth)):
                    k.store(w, at, k.load(x, [row, step * PAIR_STEP + j]))


@dataclass(frozen=True)
class PackQuads(Kernel):
    """w = x[n, 4 + k], which are encoded rows of `int8_rows`, in quads(width), flat or not. Padded with zeros.

    Arguments: x, w; n, 4 + k; x's strides over both dimensions. w is contiguous.
    """

    width: int
    flat: bool = False

    @property
    def generic(self) -> bool:
        return True

    def emit(self, k: Emitter) -> None:
        px, pw = k.pointer("x", u8), k.pointer("w", u8)
        n, bytes = k.size("n"), k.size("bytes")
        x = k.view(px, [n, bytes], [k.size("x_n"), k.size("x_k")])
        depth = k.let(bytes - ROW_HEAD, "depth")
        steps = k.let(k.floor_divide(depth + (QUAD_STEP - 1), QUAD_STEP), "steps")
        panels = k.floor_divide(n + (self.width - 1), self.width)
        w = k.view(pw, [panels, steps * (self.width * QUAD_STEP) + self.width * QUAD_HEAD])
        with k.parallel(panels, "panel") as panel, k.loop(self.width, "i") as i:
            row = k.let(panel * self.width + i, "row")

            def put(at: Expr, byte: Expr, inside: Expr) -> None:
                k.store(w, [panel, at], k.number(0, u8))
                with k.when(inside):
                    k.store(w, [panel, at], k.load(x, [row, byte]))

            with k.loop(ROW_HEAD, "j") as j:
                put(i * ROW_HEAD + j, j, row < n)
            total = k.registers(1, _i32, "total")
            k.store(total, [0], k.number(0, _i32))
            with k.when(row < n), k.loop(depth, "j") as j:
                number = k.cast(k.bits(k.load(x, [row, j + ROW_HEAD]), _i8), _i32)
                k.store(total, [0], k.load(total, [0]) + number)
            for byte in range(QUAD_HEAD - ROW_HEAD):
                part = (k.load(total, [0]) >> k.number(8 * byte, _i32)) & k.number(255, _i32)
                k.store(w, [panel, self.width * ROW_HEAD + i * 4 + byte], k.cast(part, u8))
            side = self.width if self.flat else PAIR_SQUARE
            square, column = k.let(k.floor_divide(i, side)), k.let(k.floor_mod(i, side))
            first = k.let(self.width * QUAD_HEAD + square * (side * QUAD_STEP) + column * 4, "first")
            with k.loop(steps, "step") as step, k.loop(QUAD_STEP, "j") as j:
                four = k.floor_divide(j, 4) * (4 * side) + k.floor_mod(j, 4)
                at = first + step * (self.width * QUAD_STEP) + four
                element = step * QUAD_STEP + j
                put(at, element + ROW_HEAD, k.both(row < n, element < depth))


@dataclass(frozen=True)
class PackBlocks(Kernel):
    """w = x[n, bytes], which are encoded rows of blocks, in blocks(width, block, head, ...), padded with zeros.

    See `treadle.ir.layouts`. Arguments: x, w; n, bytes; x's strides over both dimensions. w is contiguous.
    """

    width: int
    block: int
    head: int
    tail: bool = False
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def generic(self) -> bool:
        return True

    def emit(self, k: Emitter) -> None:
        px, pw = k.pointer("x", u8), k.pointer("w", u8)
        n, bytes = k.size("n"), k.size("bytes")
        x = k.view(px, [n, bytes], [k.size("x_n"), k.size("x_k")])
        panels = k.floor_divide(n + (self.width - 1), self.width)
        w = k.view(pw, [panels, bytes * self.width])
        with k.parallel(panels, "panel") as panel, k.loop(self.width, "i") as i:
            row = k.let(panel * self.width + i, "row")

            def put(at: Expr, byte: Expr) -> None:
                k.store(w, [panel, at], k.number(0, u8))
                with k.when(row < n):
                    k.store(w, [panel, at], k.load(x, [row, byte]))

            with k.loop(k.floor_divide(bytes, self.block), "block") as block:
                base, to = k.let(block * self.block, "base"), 0
                for start, end, side in self._pieces():
                    with k.loop((end - start) // side, "each") as each:
                        for j in range(side):
                            at = k.let(base + to + each * side, "at")
                            put(at * self.width + side * i + j, base + start + each * side + j)
                    to += end - start

    def _pieces(self) -> list[tuple[int, int, int]]:
        """Return the pieces of a block's bytes in the order in which they are stored. Each has a number of contiguous
        bytes of a row: 2 for scales, else 4.
        """
        words = self.block - self.head
        scales, first = (words, 0) if self.tail else (0, self.head)
        runs = self.runs or ((0, words // 4),)
        return [(scales, scales + self.head, 2), *((first + 4 * start, first + 4 * end, 4) for start, end in runs)]
