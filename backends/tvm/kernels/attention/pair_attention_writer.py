"""Attention of bf16 numbers by products of pairs: neighbors along d for scores, two keys for weighted values.

Scores, the softmax and all sums are in float32. A softmax weight is added to the sum of weights before it is rounded to
bf16; its exponential has a few more correct bits than bf16. Scores are scaled instead of queries, since scaling would
round the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.exponentials import exp_for_pairs
from treadle.backends.tvm.kernels.attention.attention_writer import AttentionWriter
from treadle.backends.tvm.kernels.attention.row_softmax import ScoreRow
from treadle.backends.tvm.kernels.attention.scratch import BLOCK, PANEL, Scratch
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.narrow.pair_product import pairs_added
from treadle.backends.tvm.kernels.narrow.round_rows import two_rounded
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_I32 = DTYPES["i32"]
_HALF = 16  # bits of half a word


def multiplies_pairs(d: int, operands: str, isa: Isa) -> bool:
    """Return True if attention multiplies pairs for operands of this dtype, with heads of `d` elements."""
    return operands == "bf16" and d % 2 == 0 and isa.multiplies_pairs


class PairAttentionWriter(AttentionWriter):
    """A writer of kernels whose words are pairs of bf16 numbers, stored as 32-bit words."""

    @property
    def _exp(self) -> Callable[[Emitter, Expr, int], Expr]:
        return exp_for_pairs

    def _scratch(self) -> Scratch:
        return Scratch.of(self.spec.d, self.spec.e, self.k.isa, pairs=True)

    @property
    def _depth(self) -> int:
        return self.spec.d // 2

    @property
    def _block(self) -> int:
        return BLOCK // 2

    def _key_words(self, key: Expr, start: Expr, lanes: int = 1) -> Expr:
        read = self.k.load(self.key, [self.key_row, self.at_g, key, 2 * start], 2 * lanes)
        return self.k.let(self.k.bits(read, f32, lanes))

    def _query_words(self, at: Sequence[Expr], start: int, lanes: int) -> Expr:
        return self.k.bits(self.k.load(self.q, [*at, 2 * start], 2 * lanes), f32, lanes)

    def _added(self, sums: Expr, x: Expr, y: Expr) -> Expr:
        k, lanes = self.k, self.lanes
        return pairs_added(k, sums, k.bits(x, _I32, lanes), k.bits(y, _I32, lanes))

    def _scaled(self, scores: Expr) -> Expr:
        return scores * self.k.number(self.spec.scale, f32, self.lanes)

    # -- weights and values, by two keys -------------------------------------------------------------------------

    def _words_of(self, c0: Expr, c1: Expr) -> tuple[Expr, Expr]:
        """Return the words of whole pairs of keys. If only one key of a pair is visible, the other has weight 0."""
        k = self.k
        begin = self._index(k.floor_divide(c0, 2), "from_pair")
        return begin, self._index(self._ceil(c1, 2) - begin, "pairs_here")

    def _weight(self, row: Expr, word: Expr) -> Expr:
        return self.k.load(self.queries, [self.slot, row, self._depth + word])

    def _keep_weights(self, at: ScoreRow, column: Expr, weights: Sequence[Expr]) -> None:
        k = self.k
        for n in range(0, PANEL, 2):
            word = k.bits(two_rounded(k, weights[n], weights[n + 1]), f32, self.lanes)
            start = self._depth + k.floor_divide(column, 2) + n // 2 * self.lanes
            k.store(self.queries, [at.slot, at.row, start], word, self.lanes)

    def _pack_values(self, c0: Expr, c1: Expr) -> None:
        """Pack pairs of rows; a row outside the block is replaced by the nearest row inside."""
        k, lanes = self.k, self.lanes
        whole, rest = divmod(self.spec.e, lanes)
        begin, count = self._words_of(c0, c1)
        with k.loop(count, "n") as n:
            pair = self._index(begin + n, "pair")
            first = self._index(k.greatest(pair * 2, c0), "first_of_pair")
            second = self._index(k.least(pair * 2 + 1, c1 - 1), "second_of_pair")
            rows = [[self.key_row, self.at_g, self._value_at(column)] for column in (first, second)]
            for v in range(whole):
                self._pack_vector(
                    pair, v, self._word([self._widened(self.value, [*at, v * lanes], lanes) for at in rows])
                )
            if rest:
                padded = k.registers(lanes, f32, "padded")
                k.store(padded, [0], k.number(0.0, f32, lanes), lanes)
                with k.unroll(rest, "c") as c:
                    ends = [self._widened(self.value, [*at, whole * lanes + c]) for at in rows]
                    k.store(padded, [c], self._word(ends, 1))
                self._pack_vector(pair, whole, k.load(padded, [0], lanes))

    def _word(self, ends: Sequence[Expr], lanes: int = 0) -> Expr:
        """Return words that pair the numbers of two rows, which are bf16 numbers in float32."""
        k, lanes = self.k, lanes or self.lanes
        low, high = (k.let(k.bits(x, _I32, lanes)) for x in ends)
        low = (low >> k.number(_HALF, _I32, lanes)) & k.number((1 << _HALF) - 1, _I32, lanes)
        return k.let(k.bits(low | high, f32, lanes))
