"""Softmax and log-softmax over the last axis, with any stride between rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic.exponentials import exp_nonpositive, log
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.reduction import Accumulator, Span, lanes_of
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class Softmax(Kernel):
    """y = e^(x - m) / sum of e^(x - m) over the last axis, m the maximum of x; or its logarithm x - m - ln(sum)

    log    True for the logarithm
    dtype  dtype of x and y, by name: f32, f16 or bf16. Computed in f32
    zeros  True if a row in which all elements are -inf becomes zeros instead of NaN; not for the logarithm

    Arguments: x, y; the sizes of the three dimensions; the strides of x and then of y over the first two. Both are
    contiguous along the last dimension.
    """

    log: bool
    dtype: str
    zeros: bool = False

    @property
    def title(self) -> str:
        return f"{'log_' if self.log else 'masked_' if self.zeros else ''}softmax_{self.dtype}"

    def emit(self, k: Emitter) -> None:
        held = DTYPES[self.dtype]
        x, y = k.pointer("x", held), k.pointer("y", held)
        m0, m1, d = shape = [k.size(name) for name in ("m0", "m1", "d")]
        strides: list[list[Expr]] = [[k.size(f"{n}_stride0"), k.size(f"{n}_stride1"), 1] for n in "xy"]
        x, y = k.view(x, shape, strides[0]), k.view(y, shape, strides[1])
        with k.parallel(m0 * m1, "row") as row:
            at = [k.let(k.floor_divide(row, m1), "i0"), k.let(k.floor_mod(row, m1), "i1")]
            self._row(k, x, y, at, Span(k, d, lanes_of(k, f32)))

    def _row(self, k: Emitter, x: Any, y: Any, at: list[Expr], span: Span) -> None:
        lanes = span.lanes
        tail = k.registers(lanes, f32, "x_tail")
        with span.has_tail():
            span.tail(x, at, f32, tail)

        def read(v: Expr) -> Expr:
            return span.read(x, at, v, f32)

        def ending() -> Expr:
            return span.inside(k.load(tail, [0], lanes), float("-inf"), f32)

        # The maximum may ignore a NaN, but the sum includes it.
        found = Accumulator(k, span, f32, lambda a, b, _: k.greatest(a, b), float("-inf"))
        found.take(read, ending)
        peak = k.let(found.total(), "peak")
        if self.zeros:  # e^(-inf - 0) is 0 as required, e^(-inf + inf) is NaN
            peak = k.let(k.select(peak > k.number(float("-inf"), f32), peak, k.number(0.0, f32)), "peak")
        most = k.splat(peak, lanes)

        def weight(value: Expr) -> Expr:
            return k.let(exp_nonpositive(k, lanes, k.let(value - most)))

        # A 16-bit result is not stored between the passes: it would be rounded twice, with a larger error than its
        # spacing.
        keeps = not self.log and x.dtype is f32

        def term(v: Expr) -> Expr:
            made = weight(read(v))
            if keeps:
                span.write(y, at, v, made, f32)
            return made

        sums = Accumulator(k, span, f32, lambda a, b, _: a + b, 0)
        sums.take(term, lambda: weight(ending()))
        total = k.let(sums.total(), "total")
        if self.zeros:  # not `total > 0`, which would hide a NaN
            total = k.let(k.select(k.equal(total, k.number(0.0, f32)), k.number(1.0, f32), total), "total")
        last = k.let(log(k, 1, total) if self.log else k.number(1.0, f32) / total, "last")
        last = k.splat(last, lanes)

        def finished(value: Expr) -> Expr:
            return value - most - last if self.log else weight(value) * last

        with k.loop(span.vectors, "v") as v:
            span.write(y, at, v, span.read(y, at, v, f32) * last if keeps else finished(read(v)), f32)
        with span.has_tail():
            span.write_tail(y, at, finished(ending()), f32)
