"""Matrix products in bf16 without a matrix unit: by products of pairs, or by float32 ones of what registers widen.

    c[m, n] = epilogue(sum_k a[m, k] * w[n, k], ...)

A tile of rows and columns of sums stays in registers through all of k; w is read once a tile, a pair of its elements in
each lane, and a pair of a is broadcast. Each row is summed over k in one order, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.finishing import Finishing
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width, over_tiles
from treadle.backends.tvm.kernels.narrow.round_rows import form_for, held_dtype
from treadle.backends.tvm.kernels.pointwise import Chain
from treadle.ir.layouts import PAIR_SQUARE, PAIR_STEP
from treadle.ir.types import DTYPES, bf16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_HIGH_HALF = -0x10000


@dataclass(frozen=True)
class PairProduct(Kernel):
    """c = epilogue(a @ w), of bf16 numbers, with float32 sums.

    epilogue what is done with the sum, the chain's first input; None: it is stored as it is
    extras   how the chain's other inputs lie: see `Finishing`
    whole    whether n is a multiple of a panel's width at every call

    Passed: a, as `RoundRows` lays out the instruction set's form; w, in flat pairs (`pairs_for`); the extras, c; m, k,
    n; `m` and `mn` extras' and c's strides of rows.
    """

    epilogue: Chain | None = None
    extras: tuple[str, ...] = ()
    whole: bool = False

    @property
    def finishing(self) -> Finishing:
        """What is done with a sum."""
        return Finishing(self.epilogue, self.extras, self.whole)

    @property
    def title(self) -> str:
        return f"pair_product{self.finishing.title}"

    def flops(self, sizes: Sequence[int]) -> int:
        m, depth, columns = sizes[:3]
        return 2 * m * depth * columns

    def emit(self, k: Emitter) -> None:
        form = "pairs" if k.isa.multiplies_pairs else form_for(k.isa)
        given = [k.pointer("a", held_dtype(form)), k.pointer("w", bf16)]
        finished = self.finishing.pointers(k)
        m, depth, columns = k.size("m"), k.size("k"), k.size("n")
        rows = self.finishing.strides(k)
        steps = k.let(k.floor_divide(depth + (PAIR_STEP - 1), PAIR_STEP), "steps")
        width = narrow_width(k.isa)
        panels = k.let(k.floor_divide(columns + (width - 1), width), "panels")
        shapes = self.finishing.shapes(m, columns, rows)
        views = {p.name: k.view(p, *shapes[p.name]) for p in finished}
        views["a"] = k.view(given[0], [m, steps * PAIR_STEP])
        views["w"] = k.view(given[1], [panels, steps * PAIR_SQUARE, 2 * width])

        def tile(panel: Expr, start: int, wide: int, row: Expr, rows: int) -> None:
            self._tile(k, views, panel, start, wide, row, rows, columns, steps)

        over_tiles(k, m, panels, tile)

    def _tile(
        self,
        k: Emitter,
        views: Mapping[str, Any],
        panel: Expr,
        start: int,
        wide: int,
        first: Expr,
        high: int,
        columns: Expr,
        steps: Expr,
    ) -> None:
        """So many rows of so many columns of a panel, from `start` on."""
        lanes = k.isa.lanes()
        vectors = wide // lanes
        acc = k.registers(high * vectors * lanes, f32)
        with k.unroll(high * vectors, "r") as r:
            k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(steps * PAIR_SQUARE, "pair") as pair:
            at = k.let(pair * 2, "at")
            held = []
            for lane in range(start, start + wide, lanes):
                place = [panel, pair, 2 * lane]
                held.append(k.let(k.bits(k.load(views["w"], place, 2 * lanes), DTYPES["i32"], lanes), "w"))
            self._pairs(k, views["a"], first, high, at, held, acc)
        tile = k.registers(high * vectors * lanes, f32, "tile")
        with k.unroll(high * vectors, "r") as r:
            k.store(tile, [r * lanes], k.load(acc, [r * lanes], lanes), lanes)
        with k.loop(high, "i") as i, k.loop(vectors, "v") as v:
            value = k.load(tile, [(i * vectors + v) * lanes], lanes)
            column = k.let(panel * narrow_width(k.isa) + start + v * lanes, "column")
            self.finishing.store(k, views, [first + i], column, value, columns, lanes)

    def _pairs(self, k: Emitter, a: Any, first: Expr, high: int, at: Expr, held: Sequence[Expr], acc: Any) -> None:
        """Add a pair of each row, times vectors of pairs, to the sums. One pair at a time takes a register."""
        lanes, i32 = k.isa.lanes(), DTYPES["i32"]
        wide = [] if k.isa.multiplies_pairs else [_widened(k, w, lanes) for w in held]
        for i in range(high):
            places = [[(i * len(held) + v) * lanes] for v in range(len(held))]
            if k.isa.multiplies_pairs:
                pair = k.let(k.splat(k.bits(k.load(a, [first + i, at], 2), i32), lanes), "pair")
                for place, w in zip(places, held, strict=True):
                    k.store(acc, place, pairs_added(k, k.load(acc, place, lanes), pair, w), lanes)
                continue
            for n in range(2):
                x = k.let(k.splat(k.load(a, [first + i, at + n]), lanes), "x")
                for place, halves in zip(places, wide, strict=True):
                    k.store(acc, place, k.load(acc, place, lanes) + x * halves[n], lanes)


def _widened(k: Emitter, w: Expr, lanes: int) -> tuple[Expr, Expr]:
    """The first and the second number of each pair, in float32: a bf16 is the upper half of one."""
    i32 = DTYPES["i32"]
    low = k.bits(k.shift_left(w, k.number(16, i32, lanes)), f32, lanes)
    return k.let(low, "low"), k.let(k.bits(w & k.number(_HIGH_HALF, i32, lanes), f32, lanes), "up")


def pairs_added(k: Emitter, sums: Expr, left: Expr, right: Expr) -> Expr:
    """sums + left[0] right[0] + left[1] right[1], of a pair of bf16 numbers in each lane."""

    def text() -> str:
        return """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @treadle_pairs_added(<16 x float> %s, <16 x i32> %l, <16 x i32> %r) alwaysinline {
  %a = bitcast <16 x i32> %l to <32 x bfloat>
  %b = bitcast <16 x i32> %r to <32 x bfloat>
  %y = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %s, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %y
}"""

    return k.llvm("treadle_pairs_added", text, "float32x16", sums, left, right)
