"""Merging of the parts of attention, one part per span of keys, in the order of positions (Flash-Decoding).

    (m, l, sums) of both:   m = max(m_old, m_new)
                            l = l_old exp(m_old - m) + l_new exp(m_new - m),   sums likewise

A part is the result of attention of a query to the keys of one span (Dao et al. 2023): the maximum m of the scores, the
sum l of exp(score - m), and the sum of the weighted values. One of the two factors is 1, so only one part is scaled:
one product and one sum, which every kernel rounds in the same way. If the factor of a part is 0, the part changes
nothing, not even the sign of a zero. So results are the same if a span without a visible key is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.vector_math import exp_nonpositive
from treadle.backends.tvm.kernels.attention.row_softmax import INFINITY
from treadle.ir.types import boolean, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class Merge:
    """The rule by which a query's new part is merged with the old parts.

    newer   true if the new part has the larger maximum
    factor  factor of the part with the smaller maximum
    peak    the maximum of both
    """

    k: Emitter
    newer: Expr
    factor: Expr
    peak: Expr

    @staticmethod
    def of(k: Emitter, old: Expr, new: Expr) -> Merge:
        """Return the merge for the maxima `old` of the old parts and `new` of the new one. A part without visible keys
        has -inf.
        """
        lanes = k.isa.lanes()
        newer = k.kept(new > old, boolean, name="newer")
        peak = k.kept(k.select(newer, new, old), f32, name="peak")
        least = k.kept(k.select(newer, old, new), f32, name="least")
        shift = k.let(k.select(peak > k.number(-INFINITY, f32), peak, k.number(0.0, f32)), "shift")
        factor = k.registers(lanes, f32, "factor")
        k.store(factor, [0], exp_nonpositive(k, lanes, k.let(k.splat(least - shift, lanes), "apart")), lanes)
        return Merge(k, newer, k.let(k.load(factor, [0]), "factor"), peak)

    def both(self, old: Expr, new: Expr, lanes: int = 1) -> Expr:
        """Return the merged value of l, or of some lanes of the sums."""
        k = self.k
        old, new = k.let(old, "old"), k.let(new, "new")
        newer = k.splat(self.newer, lanes)
        most, least = k.select(newer, new, old), k.select(newer, old, new)
        merged = most + least * k.splat(self.factor, lanes)
        return k.select(k.equal(k.splat(self.factor, lanes), k.number(0.0, f32, lanes)), most, merged)


def share_of(k: Emitter, total: Expr) -> Expr:
    """Return the factor of the sums: 1 / l; 0 for a query without visible keys."""
    zero, one = k.number(0.0, f32), k.number(1.0, f32)
    return k.let(k.select(k.equal(total, zero), zero, one / total), "share")
