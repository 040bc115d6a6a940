"""Layer norm and RMS norm over the last axis, with any stride between rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.reduction import Accumulator, Span, lanes_of
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class Normalize(Kernel):
    """y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias over the last axis

    centered      True if the mean is subtracted, as in layer norm; in RMS norm the mean is replaced by 0
    weight, bias  True if the operand is present
    dtype         dtype of all operands and of y, by name: f32, f16 or bf16. Computed in f32

    The mean is computed before the squares are summed, which avoids cancellation. A row is read three times, from the
    L1 cache.

    Arguments: x, weight, bias, y; the sizes of x's three dimensions; the strides of x and then of y over the first two.
    x and y are contiguous along the last dimension.
    """

    centered: bool
    weight: bool
    bias: bool
    eps: float
    dtype: str

    @property
    def title(self) -> str:
        return f"{'layer' if self.centered else 'rms'}_norm_{self.dtype}"

    def emit(self, k: Emitter) -> None:
        held = DTYPES[self.dtype]
        names = ["x", *(n for n, there in (("weight", self.weight), ("bias", self.bias)) if there), "y"]
        pointers = {name: k.pointer(name, held) for name in names}
        m0, m1, d = shape = [k.size(name) for name in ("m0", "m1", "d")]
        strides: dict[str, list[Expr]] = {n: [k.size(f"{n}_stride{i}") for i in range(2)] + [1] for n in "xy"}
        views = {name: k.view(pointers[name], shape, strides[name]) for name in "xy"}
        views |= {name: k.view(pointers[name], [d]) for name in names[1:-1]}
        with k.parallel(m0 * m1, "row") as row:
            at = [k.let(k.floor_divide(row, m1), "i0"), k.let(k.floor_mod(row, m1), "i1")]
            self._row(k, views, at, Span(k, d, lanes_of(k, f32)))

    def _row(self, k: Emitter, views: dict[str, Any], at: list[Expr], span: Span) -> None:
        lanes = span.lanes
        x = views["x"]
        tail = k.registers(lanes, f32, "x_tail")
        with span.has_tail():
            span.tail(x, at, f32, tail)
        count = k.cast(span.size, f32)

        def mean(term: Any, last: Any) -> Expr:
            found = Accumulator(k, span, f32, lambda a, b, _: a + b, 0)
            found.take(term, last)
            return found.total() / count

        def read(v: Expr) -> Expr:
            return span.read(x, at, v, f32)

        def ending() -> Expr:
            return k.load(tail, [0], lanes)

        middle = None
        if self.centered:
            middle = k.splat(k.let(mean(read, ending), "mean"), lanes)

        def centered(value: Expr) -> Expr:
            return value if middle is None else k.let(value - middle, "centered")

        def square(value: Expr) -> Expr:
            return value * value

        power = mean(
            lambda v: square(k.let(centered(read(v)))), lambda: square(span.inside(centered(ending()), 0, f32))
        )
        factor = k.splat(k.let(k.number(1.0, f32) / k.sqrt(power + k.number(self.eps, f32)), "factor"), lanes)

        def finished(value: Expr, weight: Expr | None, bias: Expr | None) -> Expr:
            y = centered(value) * factor
            y = y if weight is None else y * weight
            return y if bias is None else y + bias

        kept = [views.get(name) for name in ("weight", "bias")]
        with k.loop(span.vectors, "v") as v:
            extra = [None if p is None else span.read(p, [], v, f32) for p in kept]
            span.write(views["y"], at, v, finished(read(v), *extra), f32)
        with span.has_tail():
            extra = [None if p is None else k.load(span.tail(p, [], f32), [0], lanes) for p in kept]
            span.write_tail(views["y"], at, finished(ending(), *extra), f32)
