"""Fusion of softmax written in primitives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle.ir.builder import Builder
from treadle.passes.framework.pattern import Vocabulary
from treadle.passes.framework.rewrite import Match, Refusal, Rewrite


@dataclass(frozen=True)
class FuseSoftmax(Rewrite):
    """exp(x - max(x)) / sum(exp(x - max(x)))   -->   softmax(x)        max and sum over one axis

    If the maximum is not subtracted first, the two sides differ where exp overflows, so that form is not fused.
    Refuses: a maximum or a sum over several axes, or over two different axes; an inner value that is used elsewhere.
    """

    def pattern(self, p: Vocabulary, x: Any, max_axes: Any, sum_axes: Any, ties: Any) -> Any:
        weights = p.exp(x - p.reduce_max(x, axes=max_axes, keep=True, ties=ties))
        return weights / p.reduce_sum(weights, axes=sum_axes, keep=True)

    def check(self, m: Match) -> Refusal | None:
        over_max, over_sum = ({axis % m.x.rank for axis in axes} for axes in (m.max_axes, m.sum_axes))
        if over_max != over_sum:
            return Refusal(f"the maximum is over axes {m.max_axes}, but the sum over {m.sum_axes}")
        if len(over_sum) != 1:
            return Refusal(f"the sum is over axes {m.sum_axes}, but softmax needs one axis")
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        (axis,) = m.sum_axes
        return b.softmax(m.x, axis=-1 if axis == m.x.rank - 1 else axis)
