"""Reductions over axes, cumulative sums, and the building blocks of all kernels that process rows.

A row is read in full vectors. Its tail is computed by the same vector code, from a padded copy (`Span`). A row is
folded into a fixed number of partial results that depend only on its length (`Accumulator`), so its bits depend neither
on the other rows nor on its index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic.conversions import working
from treadle.backends.tvm.kernels.arithmetic.vector_math import FUNCTIONS
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DTYPES, DType

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

PARTIAL = 4  # vectors of partial results of a row: an addition takes four cycles, and two start in each cycle
STRIP = 4  # vectors of columns that are reduced at a time
RUN = 64  # elements of a column per partial sum, which reduces the rounding error


def lanes_of(k: Emitter, dtype: DType) -> int:
    """Return the number of lanes in which the kernels of this module compute a dtype."""
    return k.isa.lanes(max(4, dtype.bytes))


# -- rows ----------------------------------------------------------------------------------------------------


class Span:
    """n contiguous elements as vectors: full vectors, and a tail."""

    def __init__(self, k: Emitter, size: Expr, lanes: int) -> None:
        self.k, self.size, self.lanes = k, size, lanes
        self.vectors = k.let(k.floor_divide(size, lanes), "vectors")
        self.rest = k.let(size - self.vectors * lanes, "rest")

    def read(self, view: Any, outer: Sequence[Expr], v: Expr, dtype: DType) -> Expr:
        """Load full vector number v of a row, and convert it to the dtype of the computation."""
        return converted(self.k, self.k.load(view, [*outer, v * self.lanes], self.lanes), view.dtype, dtype, self.lanes)

    def tail(self, view: Any, outer: Sequence[Expr], dtype: DType, padded: Any = None) -> Any:
        """Load the tail of a row, padded with zeros, into the registers `padded` or new ones."""
        k = self.k
        padded = padded or k.registers(self.lanes, dtype, f"{view.name}_tail")
        k.store(padded, [0], k.number(0, dtype, self.lanes), self.lanes)
        first = k.let(self.vectors * self.lanes, "first")
        with k.loop(self.rest, "r") as r:
            k.store(padded, [r], converted(k, k.load(view, [*outer, first + r]), view.dtype, dtype))
        return padded

    def inside(self, value: Expr, fill: float, dtype: DType) -> Expr:
        """Return the last vector, in which the padding is replaced by `fill`."""
        k, lanes = self.k, self.lanes
        kept = k.lane_indices(0, lanes) < k.splat(self.rest, lanes)
        return k.select(kept, value, k.number(fill, dtype, lanes))

    def write(self, view: Any, outer: Sequence[Expr], v: Expr, value: Expr, dtype: DType) -> None:
        """Store full vector number v of a row."""
        self.k.store(
            view, [*outer, v * self.lanes], converted(self.k, value, dtype, view.dtype, self.lanes), self.lanes
        )

    def write_tail(self, view: Any, outer: Sequence[Expr], value: Expr, dtype: DType) -> None:
        """Store the part of a vector that belongs to the tail of a row."""
        k = self.k
        made = k.registers(self.lanes, view.dtype, f"{view.name}_made")
        k.store(made, [0], converted(k, value, dtype, view.dtype, self.lanes), self.lanes)
        first = k.let(self.vectors * self.lanes, "first")
        with k.loop(self.rest, "r") as r:
            k.store(view, [*outer, first + r], k.load(made, [r]))

    def has_tail(self) -> Any:
        """A block that runs only if n is not a multiple of the vector length."""
        return self.k.when(self.rest > self.k.index(0))


class Accumulator:
    """The result of folding a row by an operation into PARTIAL vectors, which are combined in a fixed order at the end.

    combine  an associative operation on two vectors, or on two scalars, and the number of lanes
    start    the neutral element of the operation
    """

    def __init__(
        self, k: Emitter, span: Span, dtype: DType, combine: Callable[[Expr, Expr, int], Expr], start: float
    ) -> None:
        self.k, self.span, self.dtype, self.combine = k, span, dtype, combine
        self.tile = k.registers(PARTIAL * span.lanes, dtype)
        with k.unroll(PARTIAL, "j") as j:
            k.store(self.tile, [j * span.lanes], k.number(start, dtype, span.lanes), span.lanes)

    def take(self, term: Callable[[Expr], Expr], tail: Callable[[], Expr]) -> None:
        """Fold a row into the partial results: `term(v)` is the row's full vector number v, `tail()` its last vector,
        padded with `start`.
        """
        k, span = self.k, self.span
        blocks = k.let(k.floor_divide(span.vectors, PARTIAL), "blocks")
        with k.loop(blocks, "block") as block, k.unroll(PARTIAL, "j") as j:
            self._add(j * span.lanes, term(block * PARTIAL + j))
        with k.loop(span.vectors - blocks * PARTIAL, "v") as v:
            self._add(0, term(blocks * PARTIAL + v))
        with span.has_tail():
            self._add(0, tail())

    def _add(self, at: Expr, value: Expr) -> None:
        k, lanes = self.k, self.span.lanes
        k.store(self.tile, [at], self.combine(k.load(self.tile, [at], lanes), value, lanes), lanes)

    def total(self) -> Expr:
        """Return the combined result as a scalar."""
        k, lanes = self.k, self.span.lanes
        parts = [k.load(self.tile, [j * lanes], lanes) for j in range(PARTIAL)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [k.let(self.combine(a, b, lanes)) for a, b in zip(parts[:half], parts[half:], strict=True)]
        return k.folded_lanes(parts[0], lanes, self.dtype, self.combine)


def converted(k: Emitter, value: Expr, held: DType, wanted: DType, lanes: int = 1) -> Expr:
    """Return a value in another dtype, unchanged if it already has that dtype."""
    return value if held is wanted else k.cast(value, wanted, lanes)


# -- operations ----------------------------------------------------------------------------------------------


def combiner(k: Emitter, op: str, dtype: DType) -> Callable[[Expr, Expr, int], Expr]:
    """Return the operation `sum` (also for `mean`, which divides later), `max` or `min`. If an operand is NaN, the
    result is NaN.
    """

    def add(x: Expr, y: Expr, lanes: int) -> Expr:
        return x + y if dtype.is_float else FUNCTIONS["add"](k, dtype, lanes, x, y)

    def extremum(x: Expr, y: Expr, lanes: int) -> Expr:
        taken = y > x if op == "max" else y < x  # false if x is NaN, so that the result is x
        return k.select(k.any_of(taken, k.is_nan(y)) if dtype.is_float else taken, y, x)

    return add if op in ("sum", "mean") else extremum


def neutral(op: str, dtype: DType) -> float:
    """Return the neutral element of the operation: 0, or the lowest or greatest number of a dtype."""
    if op in ("sum", "mean"):
        return 0
    if dtype.is_float:
        return float("-inf") if op == "max" else float("inf")
    bits = 8 * dtype.bytes
    least, greatest = (0, 2**bits - 1) if dtype.name == "u8" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return least if op == "max" else greatest


# -- kernels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduce(Kernel):
    """y[i0, i1] = op over j0, j1 of x[i0, i1, j0, j1]

    op       sum, mean, max or min; integer sums wrap around in their own dtype, sums of 16-bit floats are accumulated
             in f32
    dtype    dtype of x and y, by name
    along    `rows` if x is contiguous along j1, `columns` if x and y are contiguous along i1

    Arguments: x, y; the sizes of i0, i1, j0, j1; x's four strides, y's two. The stride of a contiguous dimension is
    passed as well.
    """

    op: str
    dtype: str
    along: str

    @property
    def title(self) -> str:
        return f"{self.op}_{self.along}_{self.dtype}"

    def emit(self, k: Emitter) -> None:
        held = DTYPES[self.dtype]
        dtype = working(held)
        x, y = k.pointer("x", held), k.pointer("y", held)
        shape = [k.size(name) for name in ("m0", "m1", "n0", "n1")]
        x_strides: list[Expr] = [k.size(f"x_stride{i}") for i in range(4)]
        y_strides: list[Expr] = [k.size(f"y_stride{i}") for i in range(2)]
        if self.along == "rows":
            x_strides[3] = 1
            self._rows(k, k.view(x, shape, x_strides), k.view(y, shape[:2], y_strides), shape, dtype)
        else:
            x_strides[1] = y_strides[1] = 1
            order = (0, 2, 3, 1)  # the columns last: vectors are loaded along them
            turned = k.view(x, [shape[i] for i in order], [x_strides[i] for i in order])
            self._columns(k, turned, k.view(y, shape[:2], y_strides), shape, dtype)

    def _rows(self, k: Emitter, x: Any, y: Any, shape: Sequence[Expr], dtype: DType) -> None:
        m0, m1, n0, n1 = shape
        combine, start = combiner(k, self.op, dtype), neutral(self.op, dtype)
        with k.parallel(m0 * m1, "row") as row:
            at = [k.let(k.floor_divide(row, m1), "i0"), k.let(k.floor_mod(row, m1), "i1")]
            span = Span(k, n1, lanes_of(k, dtype))
            found = Accumulator(k, span, dtype, combine, start)
            with k.loop(n0, "j0") as j0:
                outer = [*at, j0]
                found.take(
                    lambda v: span.read(x, outer, v, dtype),
                    lambda: span.inside(k.load(span.tail(x, outer, dtype), [0], span.lanes), start, dtype),
                )
            self._store(k, y, at, found.total(), n0 * n1, dtype, 1)

    def _columns(self, k: Emitter, x: Any, y: Any, shape: Sequence[Expr], dtype: DType) -> None:
        m0, m1, _, _ = shape
        lanes = lanes_of(k, dtype)
        width = STRIP * lanes
        strips = k.floor_divide(m1 + (width - 1), width)
        with k.parallel(m0 * strips, "task") as task:
            i0 = k.let(k.floor_divide(task, strips), "i0")
            first = k.let(k.floor_mod(task, strips) * width, "first")
            count = k.let(k.least(m1 - first, k.index(width)), "count")
            with k.when(count == k.index(width)):
                self._strip(k, x, y, i0, first, STRIP, lanes, shape, dtype)
            with k.when(count < k.index(width)):
                vectors = k.let(k.floor_divide(count, lanes), "vectors")
                with k.loop(vectors, "v") as v:
                    self._strip(k, x, y, i0, first + v * lanes, 1, lanes, shape, dtype)
                with k.loop(count - vectors * lanes, "r") as r:  # single elements, in the same order
                    self._strip(k, x, y, i0, first + vectors * lanes + r, 1, 1, shape, dtype)

    def _strip(
        self,
        k: Emitter,
        x: Any,
        y: Any,
        i0: Expr,
        column: Expr,
        vectors: int,
        lanes: int,
        shape: Sequence[Expr],
        dtype: DType,
    ) -> None:
        """Reduce `vectors` vectors of columns, starting at `column`."""
        _, _, n0, n1 = shape
        combine, start = combiner(k, self.op, dtype), k.number(neutral(self.op, dtype), dtype, lanes)
        total, part = (k.registers(vectors * lanes, dtype, name) for name in ("total", "part"))

        def each(emit: Callable[[Expr], None]) -> None:
            with k.unroll(vectors, "j") as j:
                emit(j * lanes)

        def add(to: Any, at: Expr, value: Expr) -> None:
            k.store(to, [at], combine(k.load(to, [at], lanes), value, lanes), lanes)

        each(lambda at: k.store(total, [at], start, lanes))
        runs = k.let(k.floor_divide(n1 + (RUN - 1), RUN), "runs")
        with k.loop(n0, "j0") as j0, k.loop(runs, "run") as run:
            each(lambda at: k.store(part, [at], start, lanes))
            begin = k.let(run * RUN, "begin")
            with k.loop(k.least(n1 - begin, k.index(RUN)), "j1") as j1:
                index = [i0, column, j0, begin + j1]
                each(lambda at: add(part, at, self._column_vector(k, x, index, at, lanes, dtype)))
            each(lambda at: add(total, at, k.load(part, [at], lanes)))
        each(lambda at: self._store(k, y, [i0, column + at], k.load(total, [at], lanes), n0 * n1, dtype, lanes))

    def _column_vector(self, k: Emitter, x: Any, index: Sequence[Expr], at: Expr, lanes: int, dtype: DType) -> Expr:
        i0, column, j0, j1 = index
        return converted(k, k.load(x, [i0, j0, j1, column + at], lanes), x.dtype, dtype, lanes)

    def _store(
        self, k: Emitter, y: Any, at: Sequence[Expr], value: Expr, terms: Expr, dtype: DType, lanes: int
    ) -> None:
        if self.op == "mean":
            value = value / k.splat(k.cast(terms, dtype), lanes)
        k.store(y, at, converted(k, value, dtype, y.dtype, lanes), lanes)


@dataclass(frozen=True)
class RunningSum(Kernel):
    """y[i, j, c] = sum of x[i, j', c] over j' <= j

    dtype      dtype of x and y, by name; 16-bit floats are summed in f32
    exclusive  True: sum over j' < j instead
    reverse    True: sum from the end
    vector     True if x and y are contiguous along c, which then is computed in vectors

    Arguments: x, y; the sizes of i, j, c; the three strides of x; the three strides of y.
    """

    dtype: str
    exclusive: bool
    reverse: bool
    vector: bool

    @property
    def title(self) -> str:
        return f"running_sum_{self.dtype}"

    @property
    def generic(self) -> bool:
        return not self.vector

    def emit(self, k: Emitter) -> None:
        held = DTYPES[self.dtype]
        dtype = working(held)
        pointers = k.pointer("x", held), k.pointer("y", held)
        m, n, c = shape = [k.size(name) for name in ("m", "n", "c")]
        strides: list[list[Expr]] = [[k.size(f"{name}_stride{i}") for i in range(3)] for name in "xy"]
        if self.vector:
            strides[0][2] = strides[1][2] = 1
        x, y = (k.view(p, shape, s) for p, s in zip(pointers, strides, strict=True))
        lanes = lanes_of(k, dtype) if self.vector else 1
        vectors = k.floor_divide(c + (lanes - 1), lanes)
        with k.parallel(m * vectors, "task") as task:
            i = k.let(k.floor_divide(task, vectors), "i")
            first = k.let(k.floor_mod(task, vectors) * lanes, "first")
            if lanes == 1:
                self._scan(k, x, y, i, first, n, dtype, 1)
                return
            with k.when(c - first >= k.index(lanes)):
                self._scan(k, x, y, i, first, n, dtype, lanes)
            with k.when(c - first < k.index(lanes)), k.loop(c - first, "r") as r:
                self._scan(k, x, y, i, first + r, n, dtype, 1)

    def _scan(self, k: Emitter, x: Any, y: Any, i: Expr, column: Expr, n: Expr, dtype: DType, lanes: int) -> None:
        total = k.registers(lanes, dtype, "total")
        k.store(total, [0], k.number(0, dtype, lanes), lanes)
        with k.loop(n, "j") as j:
            at = [i, n - 1 - j if self.reverse else j, column]
            before = k.let(k.load(total, [0], lanes), "before")
            value = converted(k, k.load(x, at, lanes), x.dtype, dtype, lanes)
            after = k.let(combiner(k, "sum", dtype)(before, value, lanes), "after")
            k.store(total, [0], after, lanes)
            k.store(y, at, converted(k, before if self.exclusive else after, dtype, y.dtype, lanes), lanes)


@dataclass(frozen=True)
class SizeValue(Kernel):
    """y[0] = n

    Arguments: y; n.
    """

    dtype: str

    def emit(self, k: Emitter) -> None:
        dtype = DTYPES[self.dtype]
        y, n = k.pointer("y", dtype), k.size("n")
        y = k.view(y, [1])
        with k.parallel(1) as i:
            k.store(y, [i], converted(k, k.cast(n, working(dtype)), working(dtype), dtype))
