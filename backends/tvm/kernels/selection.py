"""Argmax and top-k along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic.conversions import working
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.reduction import PARTIAL, Span, converted, lanes_of, neutral
from treadle.ir.types import DTYPES, DType, f32, i32, i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


def _greater(k: Emitter, x: Expr, y: Expr, dtype: DType, lanes: int = 1) -> Expr:
    """Return a condition that is true in each lane in which x is greater than y. NaN counts as greater than every
    number.
    """
    if not dtype.is_float:
        return x > y
    number = y <= k.number(float("inf"), dtype, lanes)  # y is not NaN
    return k.any_of(x > y, k.both(k.is_nan(x), number))


def _precedes(k: Emitter, x: Expr, i: Expr, y: Expr, j: Expr, dtype: DType, lanes: int = 1) -> Expr:
    """Return a condition that is true if x at index i comes before y at index j. Greater values come first, and equal
    values are ordered by index.
    """
    equal = k.equal(x, y)
    if dtype.is_float:
        equal = k.any_of(equal, k.both(k.is_nan(x), k.is_nan(y)))
    return k.any_of(_greater(k, x, y, dtype, lanes), k.both(equal, i < j))


def _views(k: Emitter, dtype: DType, vector: bool, results: Sequence[tuple[str, DType]], count: int | None) -> Any:
    """Return views of the operand [m0, m1, n] and of the results [m0, m1] or [m0, m1, count], and the three sizes."""
    pointers = [k.pointer("x", dtype), *(k.pointer(*result) for result in results)]
    shape = [k.size(name) for name in ("m0", "m1", "n")]
    inner = shape[:2] if count is None else [*shape[:2], k.index(count)]
    shapes = [shape, *[inner for _ in results]]
    strides: list[list[Expr]] = [
        [k.size(f"{pointer.name}_stride{i}") for i in range(len(dims))]
        for pointer, dims in zip(pointers, shapes, strict=True)
    ]
    if vector:
        strides[0][2] = 1
    return [k.view(*taken) for taken in zip(pointers, shapes, strides, strict=True)], shape


@dataclass(frozen=True)
class ArgMax(Kernel):
    """y[i0, i1] = the position of the maximum of x[i0, i1, ...], the first of equal ones; NaN counts as the maximum

    dtype   dtype of x, by name
    vector  True if x is contiguous along the last dimension, which then is read in vectors

    Arguments: x, y; x's three sizes; x's three strides; y's two strides.
    """

    dtype: str
    vector: bool

    @property
    def title(self) -> str:
        return f"argmax_{self.dtype}"

    @property
    def generic(self) -> bool:
        return not self.vector

    def emit(self, k: Emitter) -> None:
        held = DTYPES[self.dtype]
        (x, y), (m0, m1, n) = _views(k, held, self.vector, [("y", i64)], None)
        with k.parallel(m0 * m1, "row") as row:
            at = [k.let(k.floor_divide(row, m1), "i0"), k.let(k.floor_mod(row, m1), "i1")]
            found = (self._vectors if self.vector else self._elements)(k, x, at, n, working(held))
            k.store(y, at, found)

    def _elements(self, k: Emitter, x: Any, at: list[Expr], n: Expr, dtype: DType) -> Expr:
        best, place = k.registers(1, dtype, "best"), k.registers(1, i64, "place")
        k.store(best, [0], converted(k, k.load(x, [*at, 0]), x.dtype, dtype))
        k.store(place, [0], k.index(0))
        with k.loop(n, "j") as j:
            value = k.let(converted(k, k.load(x, [*at, j]), x.dtype, dtype), "value")
            with k.when(_greater(k, value, k.load(best, [0]), dtype)):
                k.store(best, [0], value)
                k.store(place, [0], j)
        return k.load(place, [0])

    def _vectors(self, k: Emitter, x: Any, at: list[Expr], n: Expr, dtype: DType) -> Expr:
        """Find the greatest element of each lane and the number of its vector, then compare the lanes. Return the
        position.

        A lane without elements has the lowest number, in vector 0. If all lanes have only this number, element 0 wins,
        which is correct.
        """
        lanes = lanes_of(k, dtype)
        span = Span(k, n, lanes)
        least = neutral("max", dtype)
        best, place = k.registers(PARTIAL * lanes, dtype, "best"), k.registers(PARTIAL * lanes, i32, "place")
        with k.unroll(PARTIAL, "j") as j:
            k.store(best, [j * lanes], k.number(least, dtype, lanes), lanes)
            k.store(place, [j * lanes], k.number(0, i32, lanes), lanes)

        def take(to: Expr, value: Expr, v: Expr) -> None:
            value, old = k.let(value), k.let(k.load(best, [to], lanes))
            taken = _greater(k, value, old, dtype, lanes)  # no `let`: TVM does not support it for vectors of conditions
            number = k.splat(k.cast(v, i32), lanes)
            k.store(best, [to], k.select(taken, value, old), lanes)
            k.store(place, [to], k.select(taken, number, k.load(place, [to], lanes)), lanes)

        blocks = k.let(k.floor_divide(span.vectors, PARTIAL), "blocks")
        with k.loop(blocks, "block") as block, k.unroll(PARTIAL, "j") as j:
            take(j * lanes, span.read(x, at, block * PARTIAL + j, dtype), block * PARTIAL + j)
        with k.loop(span.vectors - blocks * PARTIAL, "v") as v:
            take(0, span.read(x, at, blocks * PARTIAL + v, dtype), blocks * PARTIAL + v)
        with span.has_tail():
            take(0, span.inside(k.load(span.tail(x, at, dtype), [0], lanes), least, dtype), span.vectors)
        for j in range(1, PARTIAL):
            # These values are loaded from memory each time: TVM's analysis follows nested selects through variables, in
            # exponential time.
            (x1, i1), (x0, i0) = (
                (k.let(k.load(best, [n * lanes], lanes)), k.let(k.load(place, [n * lanes], lanes))) for n in (j, 0)
            )
            first = _precedes(k, x1, i1, x0, i0, dtype, lanes)
            k.store(best, [0], k.select(first, x1, x0), lanes)
            k.store(place, [0], k.select(first, i1, i0), lanes)
        return self._best_lane(k, k.load(best, [0], lanes), k.load(place, [0], lanes), dtype, lanes)

    def _best_lane(self, k: Emitter, values: Expr, places: Expr, dtype: DType, lanes: int) -> Expr:
        value, vector = k.registers(lanes, dtype, "value"), k.registers(lanes, i32, "vector")
        k.store(value, [0], values, lanes)
        k.store(vector, [0], places, lanes)
        best, place = k.registers(1, dtype, "most"), k.registers(1, i64, "at")
        k.store(best, [0], k.load(value, [0]))
        k.store(place, [0], k.cast(k.load(vector, [0]), i64) * lanes)
        with k.loop(k.index(lanes), "lane") as lane:
            index = k.let(k.cast(k.load(vector, [lane]), i64) * lanes + lane, "index")
            x = k.let(k.load(value, [lane]))
            with k.when(_precedes(k, x, index, k.load(best, [0]), k.load(place, [0]), dtype)):
                k.store(best, [0], x)
                k.store(place, [0], index)
        return k.load(place, [0])


@dataclass(frozen=True)
class TopK(Kernel):
    """values, indices = the k greatest of x[i0, i1, ...], greatest first, and their positions; see the op `top_k`

    k       number of results, at most the last dimension's size
    dtype   dtype of x and the values, by name
    vector  True if x is contiguous along the last dimension, which then is read in vectors

    The results hold a heap whose root is the last of the k in order. The elements of x are compared with the root,
    several vectors at a time; only few replace it. At the end, the heap is sorted in place by removing its root
    repeatedly.

    Arguments: x, values, indices; x's three sizes; the three strides of each array.
    """

    k: int
    dtype: str
    vector: bool

    @property
    def title(self) -> str:
        return f"top_{self.k}_{self.dtype}"

    @property
    def generic(self) -> bool:
        return not self.vector

    def emit(self, k: Emitter) -> None:
        held = DTYPES[self.dtype]
        (x, values, indices), (m0, m1, n) = _views(k, held, self.vector, [("values", held), ("indices", i64)], self.k)
        with k.parallel(m0 * m1, "row") as row:
            at = [k.let(k.floor_divide(row, m1), "i0"), k.let(k.floor_mod(row, m1), "i1")]
            heap = _Heap(k, values, indices, at, working(held), self.k)
            heap.build(x)
            if not self.vector:
                with k.loop(n - self.k, "j") as j:
                    heap.offer(x, j + self.k)
            else:
                self._scan(k, x, at, n, heap)
            heap.sort()

    def _scan(self, k: Emitter, x: Any, at: list[Expr], n: Expr, heap: _Heap) -> None:
        dtype = heap.dtype
        lanes = lanes_of(k, dtype)
        width = PARTIAL * lanes
        blocks = k.let(k.floor_divide(n - self.k, width), "blocks")
        with k.loop(blocks, "block") as block:
            first = k.let(block * width + self.k, "first")
            root = k.let(k.splat(heap.value(0), lanes), "root")
            flags = None
            for j in range(PARTIAL):
                value = k.let(converted(k, k.load(x, [*at, first + j * lanes], lanes), x.dtype, dtype, lanes))
                past = _greater(k, value, root, dtype, lanes)
                flag = k.let(k.select(past, k.number(1, f32, lanes), k.number(0, f32, lanes)))
                flags = flag if flags is None else k.let(k.greatest(flags, flag))
            with k.when(k.maximum_of_lanes(flags, lanes) > k.number(0, f32)), k.loop(k.index(width), "j") as j:
                heap.offer(x, first + j)
        done = k.let(blocks * width + self.k, "done")
        with k.loop(n - done, "j") as j:
            heap.offer(x, done + j)


class _Heap:
    """A heap stored in a row of the top-k results. Each element ranks below its children, so the root is the
    lowest-ranked element.
    """

    def __init__(self, k: Emitter, values: Any, indices: Any, at: list[Expr], dtype: DType, size: int) -> None:
        self.k, self.values, self.indices, self.at, self.dtype, self.size = k, values, indices, at, dtype, size

    def value(self, i: Expr) -> Expr:
        return converted(self.k, self.k.load(self.values, [*self.at, i]), self.values.dtype, self.dtype)

    def index(self, i: Expr) -> Expr:
        return self.k.load(self.indices, [*self.at, i])

    def put(self, i: Expr, value: Expr, index: Expr) -> None:
        self.k.store(self.values, [*self.at, i], converted(self.k, value, self.dtype, self.values.dtype))
        self.k.store(self.indices, [*self.at, i], index)

    def build(self, x: Any) -> None:
        """Build the heap from the first elements of x."""
        k = self.k
        with k.loop(k.index(self.size), "j") as j:
            self.put(j, converted(k, k.load(x, [*self.at, j]), x.dtype, self.dtype), j)
        parents = self.size // 2
        if parents:
            with k.loop(k.index(parents), "p") as p:
                place = k.let(parents - 1 - p, "place")
                self._sink(place, k.let(self.value(place)), k.let(self.index(place)), k.index(self.size))

    def offer(self, x: Any, j: Expr) -> None:
        """Replace the root by element j of x if it is greater. j must exceed the index of every element in the heap."""
        k = self.k
        value = k.let(converted(k, k.load(x, [*self.at, j]), x.dtype, self.dtype), "value")
        with k.when(_greater(k, value, self.value(0), self.dtype)):
            self._sink(k.index(0), value, j, k.index(self.size))

    def sort(self) -> None:
        """Sort the heap by repeatedly moving the root behind the remaining heap."""
        k = self.k
        if self.size == 1:
            return
        with k.loop(k.index(self.size - 1), "t") as t:
            last = k.let(self.size - 1 - t, "last")
            value, index = k.let(self.value(last)), k.let(self.index(last))
            self.put(last, k.let(self.value(0)), k.let(self.index(0)))
            self._sink(k.index(0), value, index, last)

    def _sink(self, place: Expr, value: Expr, index: Expr, size: Expr) -> None:
        """Insert an element into the heap below `place`, which is free. Elements that it passes move up.

        The loop runs once for each level of the heap; below the element's final place it changes nothing.
        """
        k = self.k
        hole, child = k.registers(1, i64, "hole"), k.registers(1, i64, "child")
        k.store(hole, [0], place)
        with k.loop(k.index(self.size.bit_length() - 1), "level"):
            left = k.let(k.load(hole, [0]) * 2 + 1, "left")
            with k.when(left < size):
                right = k.let(k.least(left + 1, size - 1), "right")
                k.store(child, [0], left)
                with k.when(self._precedes(left, right)):
                    k.store(child, [0], right)
                later = k.let(k.load(child, [0]), "later")
                later_value, later_index = k.let(self.value(later)), k.let(self.index(later))
                with k.when(_precedes(k, value, index, later_value, later_index, self.dtype)):
                    self.put(k.load(hole, [0]), later_value, later_index)
                    k.store(hole, [0], later)
        self.put(k.load(hole, [0]), value, index)

    def _precedes(self, i: Expr, j: Expr) -> Expr:
        k = self.k
        x, y = k.let(self.value(i)), k.let(self.value(j))
        return _precedes(k, x, k.let(self.index(i)), y, k.let(self.index(j)), self.dtype)
