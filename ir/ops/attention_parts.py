"""Attention over some of the keys, with the results needed to merge it with attention over the other keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Grid,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Window,
)
from treadle.ir.attention.seen_keys import reach_of
from treadle.ir.builder import Builder, Expr
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Demand, Operand
from treadle.ir.ops.along_axes import not_empty, wide_array, widened
from treadle.ir.ops.attending import Attending, masked, of_row, weighted, weighted_array
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type, f32

_SELF = ("f32[2,4,5,3]", "f32[2,4,3,3]", "f32[2,4,3,3]", "i64[2] < 1")
_GROUPED = ("f32[2,4,5,3]", "f32[2,2,4,3]", "f32[2,2,4,2]", "i64[2] < 1")
_CROSS = ("f32[2,2,3,4]", "f32[2,1,9,4]", "f32[2,1,9,2]", "i64[2] < 1")


@op("attention_parts")
class AttentionParts(Attending):
    """out, max, sum = attention over some of a row's keys, and for each query the maximum m of its scores among them
    and the sum l of exp(score - m)        (Dao et al. 2022)

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e], offset i64[b] -> [b, h, s, e], [b, h, s], [b, h, s]

    Query i of a row has position i, key j of row b has position offset[b] + j, which may be below 0. Terms have the
    same meaning as in `attention`, at these positions; operands with an axis of keys have an element for each of these
    keys. For a query that may see none of the keys, out, max and sum are zeros, -inf and 0. If the keys are split in
    any way, `merge_parts` merges the parts to attention over all keys. Attributes are the same as in `attention`.
    """

    q = Operand()
    k = Operand()
    v = Operand()
    offset = Operand()
    operand = Operand(variadic=True, optional=True)

    first = ("q", "k", "v", "offset")

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        operands = ["b (g r) s [d]", "b g [t] [d]", "b g [t] e", "b", *self._term_rules()]
        return f"{', '.join(operands)} -> b (g r) s e, b (g r) s, b (g r) s"

    def dtypes(self) -> str:
        return f"{', '.join(['f', 'f', 'f', 'i64', *self._term_dtypes()])} -> f, f, f"

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        k = types[1]
        return not_empty(k, (2,), "maximum") if k is not None and k.rank == 4 else []

    # -- meaning ---------------------------------------------------------------------------------------------

    def reference(self, q: Any, k: Any, v: Any, offset: Any, *given: Any) -> Any:
        made = []
        for b, first in enumerate(offset.tolist()):
            one, i, j = slice(b, b + 1), np.arange(q.shape[2])[:, None], first + np.arange(k.shape[2])
            own = [of_row(x, taken.axes, one, slice(None)) for taken, x in zip(self._taken, given, strict=True)]
            scores = self._seen_scores(q[one], k[one], i, j, own)
            peak = scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores - np.where(peak > -np.inf, peak, 0))
            total = weights.sum(axis=-1, keepdims=True)
            out = weighted_array((weights / np.where(total > 0, total, 1)).astype(q.dtype), v[one])
            made.append((out, peak[..., 0], total[..., 0]))
        shapes = ((*q.shape[:3], v.shape[-1]), q.shape[:3], q.shape[:3])
        parts = zip(*made, strict=True) if made else ((), (), ())
        return tuple(
            np.concatenate([np.zeros((0, *shape[1:])), *part]).astype(q.dtype)
            for shape, part in zip(shapes, parts, strict=True)
        )

    def body(self, b: Builder, q: Expr, k: Expr, v: Expr, offset: Expr, *given: Expr) -> tuple[Expr, Expr, Expr]:
        grid = _PartGrid(b, k.shape[1], q.shape[2], k.shape[2], offset)
        scores = widened(masked(b, self._scored(grid, q, k, given), self._kept(grid, given)))
        zero, one = (b.constant(x, scores.dtype) for x in (0, 1))
        peak = b.reduce_max(scores, axes=(4,), keep=True)
        weights = b.exp(scores - b.where(peak > -math.inf, peak, zero))
        total = b.reduce_sum(weights, axes=(4,), keep=True)
        shares = (weights / b.where(total > 0, total, one)).cast(q.dtype)
        of_query = "b g r s 1 -> b (g r) s"
        largest, summed = (b.rearrange(x, pattern=of_query).cast(q.dtype) for x in (peak, total))
        return weighted(b, shares, v), largest, summed

    # -- cost ------------------------------------------------------------------------------------------------

    def flops_at(self, types: Sequence[Type | None], values: Mapping[str, int]) -> int | None:
        """Return an upper bound, since the positions of keys are data: each query is assumed to see all keys, or the
        largest number that its terms allow.
        """
        q, k, v = (t.evaluate(values) for t in types[:3] if t is not None)
        low, high = reach_of(self.terms)
        pairs = k[2] if low is None or high is None else min(k[2], max(0, high - low + 1))
        return q[0] * q[1] * q[2] * pairs * self.pair_flops(q[3], v[3])

    samples = [
        S(*_SELF),
        S(*_SELF[:3], "i64[2] < 4", terms=(Window(4),)),
        S(*_SELF, terms=(Causal(),)),
        S(*_GROUPED, terms=(Causal(), Window(2)), softcap=2.0),
        S(*_CROSS, "i64[2] > 0", terms=(Padding(),), scale=-0.5),
        S(*_CROSS, "i64[2,3] < 2", "i64[2,9] < 2", terms=(Segments(),)),
        S(*_CROSS, "bool[2,9]", "f32[3,9]", terms=(BooleanMask("b t"), TensorBias("s t"))),
        S(*_GROUPED, "f32[8,4]", "f32[4]", terms=(T5Relative(8, 4, True), Alibi(), Causal())),
    ]
    errors = [
        (S(*_SELF[:3]), "takes q, k, v, offset, received 3 operands"),
        (S(*_SELF[:3], "i32[2]"), "offset must be i64, is i32"),
        (S(*_SELF[:3], "i64[3]"), "axis b sizes disagree: 2 in q, 3 in offset"),
        (S(*_SELF[:2], "f32[2,4,4,3]", "i64[2]"), "axis t sizes disagree: 3 in k, 4 in v"),
        (S(_SELF[0], "f32[2,4,0,3]", "f32[2,4,0,3]", "i64[2]"), "an axis of size 0 has no maximum"),
    ]


class _PartGrid(Grid):
    """The positions of queries and keys of a part: i i64[s, 1], j i64[b, 1, 1, 1, t]."""

    def __init__(self, b: Builder, groups: Size, queries: Size, keys: Size, offset: Expr) -> None:
        super().__init__(b, groups, queries, keys)
        self.offset = b.rearrange(offset, pattern="b -> b 1 1 1 1")

    @cached_property
    def j(self) -> Expr:
        return self.offset + super().j


@op("merge_parts", axes="[p] ... e, [p] ..., [p] ... -> ... e, ..., ...", dtypes="f, f, f -> f, f, f")
class MergeParts(Composite):
    """out, max, sum of attention over all keys, from out, max and sum of attention over p parts of the keys
            (Dao et al. 2022, 2023)

    m = max_p m_p,   l = sum_p l_p exp(m_p - m),   out = sum_p out_p l_p exp(m_p - m) / l

    out [p, ..., e], max [p, ...], sum [p, ...] -> [..., e], [...], [...]

    The parts are results of `attention_parts`. They may be merged in any grouping: the result is a part again. For a
    query that sees no key in any part, out, max and sum are zeros, -inf and 0. 16-bit floats are computed in f32, and
    the results are rounded.
    """

    out = Operand()
    max = Operand()
    sum = Operand()
    accumulates = f32

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        return not_empty(types[1], (0,), "maximum")

    def body(self, b: Builder, out: Expr, max: Expr, sum: Expr) -> tuple[Expr, Expr, Expr]:
        peaks, sums = widened(max), widened(sum)
        zero, one = (b.constant(x, peaks.dtype) for x in (0, 1))
        peak = b.reduce_max(peaks, axes=(0,), keep=True)
        weights = sums * b.exp(peaks - b.where(peak > -math.inf, peak, zero))
        total = b.reduce_sum(weights, axes=(0,), keep=True)
        shares = weights / b.where(total > 0, total, one)
        spread = b.rearrange(shares, pattern="... -> ... 1")
        merged = b.reduce_sum(widened(out) * spread, axes=(0,))
        largest, summed = (b.rearrange(x, pattern="1 ... -> ...") for x in (peak, total))
        return merged.cast(out.dtype), largest.cast(max.dtype), summed.cast(sum.dtype)

    def reference(self, out: Any, max: Any, sum: Any) -> Any:
        peaks = wide_array(max)
        peak = peaks.max(axis=0)
        weights = wide_array(sum) * np.exp(peaks - np.where(peak > -np.inf, peak, 0))
        total = weights.sum(axis=0)
        merged = (wide_array(out) * (weights / np.where(total > 0, total, 1))[..., None]).sum(axis=0)
        return merged.astype(out.dtype), peak.astype(max.dtype), total.astype(sum.dtype)

    samples = [
        S("f32[3,2,2,4,5]", "f32[3,2,2,4] > 0", "f32[3,2,2,4] > 0"),
        S("f32[1,4,2]", "f32[1,4]", "f32[1,4] > 0"),
        S("f32[2,3]", "f32[2]", "f32[2] > 0"),
    ]
    errors = [
        (S("f32[2,3,4]", "f32[3,3]", "f32[2,3]"), "axis p sizes disagree: 2 in out, 3 in max"),
        (S("f32[2,3,4]", "f32[2,4]", "f32[2,3]"), "sizes disagree"),
        (S("f32[0,3]", "f32[0]", "f32[0]"), "an axis of size 0 has no maximum"),
        (S("f32[2,3]", "f16[2]", "f32[2]"), "dtypes disagree: out is f32, max is f16"),
    ]
