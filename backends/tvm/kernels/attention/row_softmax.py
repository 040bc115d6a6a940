"""The softmax of a query's scores over a block of keys. It turns scores into weights, and updates the running maximum
and sum.

Soft-cap, biases and masks are applied before the softmax, as vectors; a key that the query does not see has the score
-inf. A subnormal weight is replaced by 0, since arithmetic on a subnormal number takes a CPU as long as a whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic.vector_math import exp
from treadle.backends.tvm.kernels.attention.attention_masks import TermWriter, lane_numbers
from treadle.backends.tvm.kernels.attention.scratch import BLOCK, PANEL
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

INFINITY = float("inf")

_I32 = DTYPES["i32"]


@dataclass(frozen=True)
class ScoreRow:
    """The scores of one query of one head, and the places of its values.

    slot      the slot of memory that holds the scores
    row       the row of the scores in this slot
    part      the part whose m, l and factor are updated
    state     the row of m, l and factor
    b, head   indices of the row and the head in the terms' operands
    query     index of the query in these operands
    position  position of the query
    lo, hi    the range of the block's columns that the query sees by position, lo <= column < hi; may exceed the block
    base      the position of the block's first key
    inside    number of the block's columns that have a key
    """

    slot: Expr
    row: Expr
    part: Expr
    state: Expr
    b: Expr
    head: Expr
    query: Expr
    position: Expr
    lo: Expr
    hi: Expr
    base: Expr
    inside: Expr


class RowSoftmax:
    """A writer of the softmax of scores [slots, GROUP, BLOCK]. Rows [parts, n, 5] begin with m, l, and the factor of
    the old sums.

    exp   emits e^x for x <= 0
    keep  stores a panel of weights of a row, from a column on
    """

    def __init__(
        self,
        k: Emitter,
        softcap: float | None,
        terms: Sequence[TermWriter],
        scores: Any,
        rows: Any,
        exp: Callable[[Emitter, int, Expr], Expr],
        keep: Callable[[ScoreRow, Expr, Sequence[Expr]], None],
    ) -> None:
        self.k, self.softcap, self.terms, self.scores, self.rows = k, softcap, terms, scores, rows
        self.exp, self.keep = exp, keep
        self.lanes = k.isa.lanes()
        self.width = PANEL * self.lanes

    def write(self, at: ScoreRow, c0: Expr, c1: Expr) -> None:
        """Turn the scores of columns c0 to below c1, which are whole panels, into weights exp(score - m).

        Also update m, l and the factor of the old sums.
        """
        k, lanes = self.k, self.lanes
        peak = k.registers(self.width, f32, "peak")
        with k.unroll(PANEL, "u") as u:
            k.store(peak, [u * lanes], k.number(-INFINITY, f32, lanes), lanes)
        pairs = k.opaque(k.floor_divide(c1 - c0, self.width), "pairs")
        if self.softcap is None and not self.terms:
            whole = k.let(k.both(at.lo <= c0, c1 <= at.hi), "whole")
            with k.when(whole), k.loop(pairs, "n") as n, k.unroll(PANEL, "u") as u:
                x = k.load(self.scores, [at.slot, at.row, c0 + n * self.width + u * lanes], lanes)
                k.store(peak, [u * lanes], k.greatest(k.load(peak, [u * lanes], lanes), x), lanes)
            with k.when(k.any_of(at.lo > c0, c1 > at.hi)):
                self._masked(at, c0, pairs, peak)
        else:
            self._masked(at, c0, pairs, peak)
        old = k.let(k.load(self.rows, [at.part, at.state, 0]), "old")
        both = k.load(peak, [0], lanes)
        for u in range(1, PANEL):
            both = k.greatest(both, k.load(peak, [u * lanes], lanes))
        new = k.let(k.greatest(old, k.maximum_of_lanes(both, lanes)), "new")
        # Without a visible key the maximum is -inf; -inf - -inf would be NaN.
        shift = k.let(k.select(new > k.number(-INFINITY, f32), new, k.number(0.0, f32)), "shift")
        total = k.registers(self.width, f32, "total")
        with k.unroll(PANEL, "u") as u:
            k.store(total, [u * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(pairs, "n") as n:
            column, weights = c0 + n * self.width, []
            for u in range(PANEL):
                place = [at.slot, at.row, column + u * lanes]
                score = k.let(k.load(self.scores, place, lanes) - k.splat(shift, lanes), "score")
                weights.append(k.let(self.exp(k, lanes, score), "weight"))
                k.store(total, [u * lanes], k.load(total, [u * lanes], lanes) + weights[-1], lanes)
            self.keep(at, column, weights)
        summed = k.load(total, [0], lanes)
        for u in range(1, PANEL):
            summed = summed + k.load(total, [u * lanes], lanes)
        factor = k.registers(lanes, f32, "factor")
        k.store(factor, [0], k.number(0.0, f32, lanes), lanes)
        with k.when(old > k.number(-INFINITY, f32)):  # false at a query's first block of keys
            k.store(factor, [0], self.exp(k, lanes, k.let(k.splat(old - shift, lanes), "apart")), lanes)
        scaled = k.load(self.rows, [at.part, at.state, 1]) * k.load(factor, [0])
        k.store(self.rows, [at.part, at.state, 1], scaled + k.sum_of_lanes(summed, lanes))
        k.store(self.rows, [at.part, at.state, 2], k.load(factor, [0]))
        k.store(self.rows, [at.part, at.state, 0], new)

    def _masked(self, at: ScoreRow, c0: Expr, pairs: Expr, peak: Any) -> None:
        """Apply soft-cap, biases and masks to a row of scores, and compute the maximum of the row."""
        k, lanes = self.k, self.lanes
        for term in self.terms:
            term.begin(at.b, at.head, at.query, at.position)
        bounds = [k.cast(k.least(k.greatest(x, k.index(0)), k.index(BLOCK)), _I32) for x in (at.lo, at.hi)]
        first, past = (k.splat(k.let(x, "bound"), lanes) for x in bounds)
        numbers = lane_numbers(k, _I32, lanes)

        def one(column: Expr, u: Any, read: Any) -> None:
            place = [at.slot, at.row, column]
            x = self._biased(k.load(self.scores, place, lanes), at.base + column, read)
            here = k.let(k.splat(k.cast(column, _I32), lanes) + numbers, "columns")
            keep = k.both(first <= here, here < past)
            for term in self.terms:
                if term.is_mask:
                    keep = k.both(keep, term.vector(at.base + column, lanes, read))
            x = k.let(k.select(keep, x, k.number(-INFINITY, f32, lanes)), "score")
            k.store(self.scores, place, x, lanes)
            k.store(peak, [u * lanes], k.greatest(k.load(peak, [u * lanes], lanes), x), lanes)

        def whole(view: Any, index: Sequence[Any]) -> Any:
            return k.load(view, index, lanes)

        if not any(term.reads_keys for term in self.terms):
            with k.loop(pairs, "n") as n:
                for u in range(PANEL):
                    one(c0 + n * self.width + u * lanes, u, whole)
            return
        # An operand ends at the last key, so it must not be read after that.
        vectors = k.opaque(pairs * PANEL, "vectors")
        full = k.opaque(k.greatest(k.least(vectors, k.floor_divide(at.inside - c0, lanes)), k.index(0)), "full")
        with k.loop(full, "n") as n:
            one(k.opaque(c0 + n * lanes, "column"), 0, whole)
        with k.loop(vectors - full, "n") as n:
            column = k.opaque(c0 + (full + n) * lanes, "column")
            left = k.opaque(k.greatest(k.least(at.inside - column, k.index(lanes)), k.index(0)), "left")

            def part(view: Any, index: Sequence[Any]) -> Any:
                padded = k.registers(lanes, view.dtype, "padded")
                k.store(padded, [0], k.number(0, view.dtype, lanes), lanes)
                with k.loop(left, "c") as c:
                    k.store(padded, [c], k.load(view, [*index[:-1], index[-1] + c]))
                return k.load(padded, [0], lanes)

            one(column, 0, part)

    def _biased(self, x: Expr, j: Expr, read: Any) -> Expr:
        k, lanes, cap = self.k, self.lanes, self.softcap
        if cap is not None:
            # tanh z = 1 - 2 / (exp(2 z) + 1); exp overflows only for z whose tanh is 1 in float32.
            twice = k.registers(lanes, f32, "twice")  # TVM's simplifier fails on the minimum of a product
            k.store(twice, [0], x * k.number(2.0 / cap, f32, lanes), lanes)
            bent = exp(k, lanes, k.load(twice, [0], lanes))
            one = k.number(1.0, f32, lanes)
            x = k.number(cap, f32, lanes) * (one - k.number(2.0, f32, lanes) / (bent + one))
        for term in self.terms:
            if not term.is_mask:
                x = x + term.vector(j, lanes, read)
        return x
