"""Matrix products in bf16 without AMX: by products of pairs, or by float32 products of widened operands.

    c[m, n] = epilogue(sum_k a[m, k] * w[n, k], ...)

Each lane holds a pair of w's elements, and a pair of a's elements is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.narrow.register_product import ProductSizes, RegisterProduct, RegisterTile
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width
from treadle.backends.tvm.kernels.narrow.round_rows import form_for, held_dtype
from treadle.ir.layouts import PAIR_SQUARE, PAIR_STEP
from treadle.ir.types import DTYPES, DType, bf16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_HIGH_HALF = -0x10000

AddPairs = Callable[["Expr", "Sequence[Expr]"], None]
"""A function of the number of a pair along k, and a vector of w's pairs for each vector of columns."""


@dataclass(frozen=True)
class PairProduct(RegisterProduct):
    """c = epilogue(a @ w), for bf16 numbers, with float32 sums.

    Pointers: a, as `RoundRows` writes it for the instruction set; w, in flat pairs (`pairs_for`).
    """

    @property
    def multiplies(self) -> str:
        return "bf16"

    @property
    def held(self) -> DType:
        """Dtype of the elements in w's panels."""
        return bf16

    def ask(self, k: Emitter) -> dict[str, Any]:
        form = "pairs" if k.isa.multiplies_pairs else form_for(k.isa)
        return {"a": k.pointer("a", held_dtype(form)), "w": k.pointer("w", self.held)}

    def steps(self, k: Emitter, depth: Expr) -> Expr:
        return k.floor_divide(depth + (PAIR_STEP - 1), PAIR_STEP)

    def shapes(self, k: Emitter, sizes: ProductSizes, width: int) -> Mapping[str, list[Expr]]:
        steps = sizes.steps
        return {"a": [sizes.m, steps * PAIR_STEP], "w": [sizes.panels, steps * PAIR_SQUARE, 2 * width]}

    def sum(self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, sizes: ProductSizes) -> Any:
        lanes = k.isa.lanes()
        count = tile.high * tile.vectors
        rows = [tile.row(k, i) for i in range(tile.high)]
        acc = k.registers(count * lanes, f32)
        with k.unroll(count, "r") as r:
            k.store(acc, [r * lanes], k.number(0.0, f32, lanes), lanes)

        def add(pair: Expr, held: Sequence[Expr]) -> None:
            self._pairs(k, views["a"], rows, k.let(pair * 2, "at"), held, acc)

        self.over_pairs(k, views, tile, sizes, add)
        made = k.registers(count * lanes, f32, "tile")
        with k.unroll(count, "r") as r:
            k.store(made, [r * lanes], k.load(acc, [r * lanes], lanes), lanes)
        return made

    def over_pairs(
        self, k: Emitter, views: Mapping[str, Any], tile: RegisterTile, sizes: ProductSizes, add: AddPairs
    ) -> None:
        """Call `add` for each pair of a tile's columns, in order."""
        self.over_held(k, views["w"], tile.panel, tile, sizes.steps, add, ahead=k.isa.ahead)

    def over_held(
        self, k: Emitter, w: Any, at: Expr, tile: RegisterTile, steps: Expr, add: AddPairs, *, ahead: int = 0
    ) -> None:
        """Call `add` for each pair of a panel that is stored in flat pairs. `ahead` is a prefetch distance in bytes."""
        lanes, width = k.isa.lanes(), narrow_width(k.isa)
        with k.loop(steps * PAIR_SQUARE, "pair") as pair:
            held = []
            for line in range(0, 2 * width, 32) if ahead else ():
                k.prefetch(w, [at, pair, line + ahead // 2])
            for v in range(tile.vectors):
                place = [at, pair, 2 * (tile.start + v * lanes)]
                held.append(k.let(k.bits(k.load(w, place, 2 * lanes), DTYPES["i32"], lanes), "w"))
            add(pair, held)

    def _pairs(self, k: Emitter, a: Any, rows: Sequence[Expr], at: Expr, held: Sequence[Expr], acc: Any) -> None:
        """Add the products of a pair of each row and vectors of w's pairs to the sums. One pair at a time is in a
        register.
        """
        lanes, i32 = k.isa.lanes(), DTYPES["i32"]
        wide = [] if k.isa.multiplies_pairs else [_widened(k, w, lanes) for w in held]
        for i, row in enumerate(rows):
            places = [[(i * len(held) + v) * lanes] for v in range(len(held))]
            if k.isa.multiplies_pairs:
                pair = k.let(k.splat(k.bits(k.load(a, [row, at], 2), i32), lanes), "pair")
                for place, w in zip(places, held, strict=True):
                    k.store(acc, place, pairs_added(k, k.load(acc, place, lanes), pair, w), lanes)
                continue
            for n in range(2):
                x = k.let(k.splat(k.load(a, [row, at + n]), lanes), "x")
                for place, halves in zip(places, wide, strict=True):
                    k.store(acc, place, k.load(acc, place, lanes) + x * halves[n], lanes)


def _widened(k: Emitter, w: Expr, lanes: int) -> tuple[Expr, Expr]:
    """Return the first and the second number of each pair in float32: a bf16 is the upper half of a float32."""
    i32 = DTYPES["i32"]
    low = k.bits(k.shift_left(w, k.number(16, i32, lanes)), f32, lanes)
    return k.let(low, "low"), k.let(k.bits(w & k.number(_HIGH_HALF, i32, lanes), f32, lanes), "up")


def pairs_added(k: Emitter, sums: Expr, left: Expr, right: Expr) -> Expr:
    """Return sums + left[0] right[0] + left[1] right[1] for the pair of bf16 numbers in each lane."""

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
