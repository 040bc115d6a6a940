"""Sampling of a token from logits, as an op of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Operand
from treadle.ir.ops.along_axes import widened
from treadle.ir.samples import S
from treadle.ir.types import Type, f32, i64


@op("sample_token", axes="... [n], ..., ..., ..., ..., ... -> ...", dtypes="f, f, i64, f, f, f -> i64")
class SampleToken(Composite):
    """y = an id drawn from softmax(x / temperature), restricted to the `top_k` greatest elements, to the smallest set
    whose probability reaches `top_p` (Holtzman et al. 2020), and to probabilities of at least `min_p` times the
    greatest one (Nguyen et al. 2024)

    The candidates are ordered, greatest first, and of equal ones the lower id first. y is the first candidate at which
    the running sum of probabilities is greater than `draw` times their total, so `draw`, which is uniform in [0, 1),
    determines the result. Without a temperature above 0, y is the greatest element; `top_k` of 0 keeps all. y is -1 if
    x has a NaN, or if its greatest element is infinite. 16-bit floats are computed in f32.
    """

    x = Operand()
    temperature = Operand()
    top_k = Operand()
    top_p = Operand()
    min_p = Operand()
    draw = Operand()
    stops_gradient = True
    accumulates = f32

    def check(self, types: Sequence[Type | None]) -> None:
        x = types[0]
        assert x is not None
        size = x.shape[-1].constant if x.rank else 0
        if not size:
            raise RuleError("the last axis of x must have a constant size of 1 or more", received=f"x: {x}")

    def body(self, b: Builder, x: Expr, temperature: Expr, top_k: Expr, top_p: Expr, min_p: Expr, draw: Expr) -> Any:
        size = x.shape[-1].constant
        assert size is not None
        last = (x.rank - 1,)
        temperature, top_p, min_p, draw, top_k = (
            b.rearrange(each if each.dtype is i64 else widened(each), pattern="... -> ... 1")
            for each in (temperature, top_p, min_p, draw, top_k)
        )
        values, ids = b.top_k(widened(x), k=size)
        rank, zero = b.iota(size=size, dtype=i64), b.constant(0, values.dtype)
        greatest = b.slice(values, axis=-1, start=0, stop=1)
        is_greedy = b.logical_not(temperature > 0)
        scaled = (values - greatest) / b.where(is_greedy, b.constant(1, values.dtype), temperature)
        weights = b.where((top_k <= 0) | (rank < top_k), b.exp(scaled), zero)  # exp(0) = 1 for the greatest
        before = b.cumsum(weights, axis=-1, exclusive=True)
        is_likely = (before < top_p * b.reduce_sum(weights, axes=last, keep=True)) & (weights >= min_p)
        is_candidate = b.equal(rank, 0) | (is_likely & (weights > 0))
        sums = b.cumsum(b.where(is_candidate, weights, zero), axis=-1)
        total = b.slice(sums, axis=-1, start=size - 1, stop=size)
        passed = b.reduce_sum((sums <= draw * total).cast(i64), axes=last, keep=True)
        most = b.reduce_sum(is_candidate.cast(i64), axes=last, keep=True) - 1
        place = b.where(is_greedy, b.constant(0, i64), b.minimum(passed, most))
        token = b.take_along_axis(ids, place, axis=-1)
        is_finite = b.equal(greatest - greatest, 0)
        return b.rearrange(b.where(is_finite, token, -1), pattern="... 1 -> ...")

    samples = [
        S("f32[3,5] distinct", "f32[3] > 0", "i64[3] < 4", "f32[3] > 0", "f32[3]", "f32[3] > 0"),
        S("f32[2,3,7] distinct", "f32[]", "i64[] < 3", "f32[2,1] > 0", "f32[]", "f32[2,3]"),
        S("f32[6] distinct", "f32[]", "i64[]", "f32[]", "f32[]", "f32[]"),
    ]
    errors = [
        (S("f32[2,0]", "f32[2]", "i64[2]", "f32[2]", "f32[2]", "f32[2]"), "a constant size of 1 or more"),
        (S("f32[2,3]", "f32[2]", "f32[2]", "f32[2]", "f32[2]", "f32[2]"), "top_k must be"),
        (S("f32[2,3]", "f32[4]", "i64[2]", "f32[2]", "f32[2]", "f32[2]"), "sizes disagree"),
    ]
