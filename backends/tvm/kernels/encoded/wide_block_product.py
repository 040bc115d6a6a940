"""Products of float32 rows with weights in blocks that are read by words: each number is unpacked, then multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.encoded.block_words import column_lanes
from treadle.backends.tvm.kernels.encoded.word_product import WordProduct, WordTile
from treadle.backends.tvm.kernels.narrow.encode_groups import GROUP
from treadle.ir.types import f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class WideBlockProduct(WordProduct):
    """c = epilogue(a @ decode(w)), over float32.

    Arguments: a, w, in the form's layout; the extras, c; m, k, n; the strides of rows of a, of `m` and `mn` extras, and
    of c.
    """

    @property
    def title(self) -> str:
        return f"wide_{super().title}"

    def ask(self, k: Emitter) -> list[Any]:
        return [k.pointer("a", f32)]

    def stride(self, k: Emitter, depth: Expr) -> Expr:
        return k.size("a_stride")

    def views(self, k: Emitter, given: Sequence[Any], m: Expr, depth: Expr, stride: Expr) -> dict[str, Any]:
        return {"a": k.view(given[0], [m, depth], [stride, 1])}

    def group(self, k: Emitter, views: dict[str, Any], tile: WordTile, chunk: Expr, part: int, group: Expr) -> None:
        form, blocks = self.form, tile.blocks
        for half in range(2):
            span = half * form.halves // 2
            scales = [tile.scales.whole(k, v, chunk, part, span) for v in range(len(blocks))]
            with k.loop(k.index(4), "four") as i:
                first = k.let(group * GROUP + (16 * half + 4 * i), "first")
                words = self.words(k, tile, chunk, part, half, i)
                numbers = []
                for block, word, (d, c) in zip(blocks, words, scales, strict=True):
                    found = [block.number(word, n) * d for n in range(4)]
                    numbers.append([k.let(y if c is None else y + c, "y") for y in found])
                self._add(k, views["a"], tile, first, numbers)

    def _add(self, k: Emitter, a: Any, tile: WordTile, first: Expr, numbers: Sequence[Sequence[Expr]]) -> None:
        """Add the products of four consecutive elements. They are summed first, so that a row's sum has one dependent
        addition, not four.
        """
        lanes = column_lanes(k.isa)
        for i in range(tile.high):
            row = tile.row(k, i)
            four = [k.let(k.splat(k.load(a, [row, first + n]), lanes), "x") for n in range(4)]
            for v, ys in enumerate(numbers):
                made = None
                for x, y in zip(four, ys, strict=True):
                    made = k.let(x * y if made is None else made + x * y, "sum")
                at = [(i * len(numbers) + v) * lanes]
                k.store(tile.sums, at, k.load(tile.sums, at, lanes) + made, lanes)
