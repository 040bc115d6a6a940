"""Gather and scatter-add at positions that another array holds.

    y[p, i, d] = x[p, indices[p, i, d], d]           `Take`
    y[p, indices[p, i, d], d] += x[p, i, d]          `ScatterAdd`

p stands for the axes before the indexed axis, d for the axes after it. If all elements of a row share one index, whole
rows are moved (`rows`). For an index outside the axis, nothing is read or written, and the kernel reports the index in
its status words (`lowering.program.STATUS`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DTYPES, i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

MOVED = {1: DTYPES["u8"], 2: DTYPES["i16"], 4: DTYPES["i32"], 8: i64}
"""Dtypes in which elements are copied, by the size of an element in bytes."""

COLUMNS = 64  # columns of a row that a thread updates at a time


@dataclass(frozen=True)
class Take(Kernel):
    """y[p, i, d] = x[p, indices[p, i, d], d]

    bytes       bytes of an element
    indices     dtype of the indices by name
    rows        True if all elements of a row (along d) share an index, and rows are contiguous in x and y
    width       width of x's panels; 0: x is not in panels. Only with `rows`, and without p
    transposed  True if the panels hold x's columns instead of its rows. See `treadle.ir.layouts`

    Arguments: x, indices, y, the status words; the sizes p, v, d, i, where v is the size of x's indexed axis; the
    strides of x over p, v and d; the strides of the indices over p, i and d; the strides of y over p, i and d. With
    `rows`, only the strides of x over p and v, of the indices over i, and of y over p and i.
    """

    bytes: int
    indices: str
    rows: bool
    width: int = 0
    transposed: bool = False

    @property
    def title(self) -> str:
        return "gather" + ("_rows" if self.rows else "") + ("_of_panels" if self.width else "")

    def emit(self, k: Emitter) -> None:
        dtype = MOVED[self.bytes]
        pointers = [k.pointer("x", dtype), k.pointer("indices", DTYPES[self.indices]), k.pointer("y", dtype)]
        status_pointer = k.pointer("status", i64)
        p, v, d, i = (k.size(name) for name in "pvdi")
        x_strides, index_strides, y_strides = _strides(k, "pvd", "pid", self.rows)
        packed = k.floor_divide((d if self.transposed else v) + (self.width - 1), self.width) if self.width else 0
        shape = [p, v, d] if not self.width else [packed, v if self.transposed else d, self.width]
        x = k.view(pointers[0], shape, None if self.width else x_strides)
        indices = k.view(pointers[1], [p, i, d], index_strides)
        y = k.view(pointers[2], [p, i, d], y_strides)
        status = k.view(status_pointer, [4])
        with k.parallel(p * i, "task") as task:
            at = [k.let(k.floor_divide(task, i), "outer"), k.let(k.floor_mod(task, i), "place")]
            if self.rows:
                index = k.let(k.index(k.load(indices, [*at, 0])), "index")
                checked(k, status, index, v, lambda: self._row(k, x, y, at, index, d))
            else:
                with k.loop(d, "d") as c:
                    index = k.let(k.index(k.load(indices, [*at, c])), "index")
                    move = lambda: k.store(y, [*at, c], k.load(x, [at[0], index, c]))  # noqa: E731
                    checked(k, status, index, v, move)

    def _row(self, k: Emitter, x: Any, y: Any, at: list[Expr], index: Expr, d: Expr) -> None:
        """Copy row `index` of x to row `at` of y."""
        if not self.width:
            along(k, d, k.isa.lanes(self.bytes), lambda c, n: k.store(y, [*at, c], k.load(x, [at[0], index, c], n), n))
            return
        if not self.transposed:
            panel, column = k.floor_divide(index, self.width), k.floor_mod(index, self.width)
            panel, column = k.let(panel, "panel"), k.let(column, "column")
            with k.loop(d, "d") as c:
                k.store(y, [*at, c], k.load(x, [panel, c, column]))
            return
        with k.loop(k.floor_divide(d + (self.width - 1), self.width), "panel") as panel:
            first = k.let(panel * self.width, "first")
            with k.loop(k.least(d - first, k.index(self.width)), "c") as c:
                k.store(y, [*at, first + c], k.load(x, [panel, index, c]))


@dataclass(frozen=True)
class ScatterAdd(Kernel):
    """y[p, indices[p, i, d], d] += x[p, i, d], for each i in order, also for repeated indices

    dtype    dtype of y, which holds the target before the call
    added    dtype of x
    indices  dtype of the indices by name
    rows     as in `Take`

    Arguments: x, indices, y, the status words; the sizes p, v, d, i, where v is the size of y's indexed axis; the
    strides of x over p, i and d; the strides of the indices over p, i and d; the strides of y over p, v and d. With
    `rows`, only the strides of x over p and i, of the indices over i, and of y over p and v.
    """

    dtype: str
    added: str
    indices: str
    rows: bool

    def emit(self, k: Emitter) -> None:
        dtype = DTYPES[self.dtype]
        pointers = [k.pointer("x", DTYPES[self.added]), k.pointer("indices", DTYPES[self.indices])]
        pointers.append(k.pointer("y", dtype))
        status_pointer = k.pointer("status", i64)
        p, v, d, i = (k.size(name) for name in "pvdi")
        x_strides, index_strides, y_strides = _strides(k, "pid", "pvd", self.rows)
        x = k.view(pointers[0], [p, i, d], x_strides)
        indices = k.view(pointers[1], [p, i, d], index_strides)
        y = k.view(pointers[2], [p, v, d], y_strides)
        status = k.view(status_pointer, [4])
        blocks = k.let(k.floor_divide(d + (COLUMNS - 1), COLUMNS), "blocks")
        with k.parallel(p * blocks, "task") as task:
            outer = k.let(k.floor_divide(task, blocks), "outer")
            first = k.let(k.floor_mod(task, blocks) * COLUMNS, "first")
            count = k.let(k.least(d - first, k.index(COLUMNS)), "count")
            with k.loop(i, "i") as place:

                def add(index: Expr, c: Expr, lanes: int) -> None:
                    value = k.load(x, [outer, place, c], lanes)
                    value = value if self.added == self.dtype else k.cast(value, dtype, lanes)
                    k.store(y, [outer, index, c], k.load(y, [outer, index, c], lanes) + value, lanes)

                if self.rows:
                    index = k.let(k.index(k.load(indices, [outer, place, 0])), "index")
                    lanes = k.isa.lanes(max(4, dtype.bytes))
                    body = lambda c, n: add(index, first + c, n)  # noqa: E731
                    checked(k, status, index, v, lambda: along(k, count, lanes, body))
                else:
                    with k.loop(count, "c") as c:
                        index = k.let(k.index(k.load(indices, [outer, place, first + c])), "index")
                        checked(k, status, index, v, lambda: add(index, first + c, 1))


def checked(k: Emitter, status: Any, index: Expr, size: Expr, inside: Callable[[], None]) -> None:
    """Emit `inside` under the condition that the index is inside an axis of that size. Otherwise the index is reported
    in the status words.
    """
    with k.when(k.both(index >= k.index(0), index < size)):
        inside()
    with k.when(k.any_of(index < k.index(0), index >= size)):
        k.store(status, [1], index)
        k.store(status, [2], size)
        k.store(status, [0], k.index(1))


def along(k: Emitter, count: Expr, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """Emit `body(c, n)` for n elements from c on: full vectors, then single elements."""
    vectors = k.let(k.floor_divide(count, lanes), "vectors")
    with k.loop(vectors, "v") as v:
        body(v * lanes, lanes)
    with k.loop(count - vectors * lanes, "t") as t:
        body(vectors * lanes + t, 1)


def _strides(k: Emitter, x: str, y: str, rows: bool) -> tuple[list[Expr], list[Expr], list[Expr]]:
    """Declare the strides of x and y over the dimensions with these letters, and of the indices over p, i and d. Return
    the strides of x, the indices and y.

    rows  True if rows are contiguous, and each has one index
    """
    if rows:
        of_x: list[Expr] = [*(k.size(f"x_{letter}") for letter in x[:2]), 1]
        of_indices: list[Expr] = [0, k.size("indices_i"), 0]
        return of_x, of_indices, [*(k.size(f"y_{letter}") for letter in y[:2]), 1]
    of_x, of_indices = [k.size(f"x_{letter}") for letter in x], [k.size(f"indices_{letter}") for letter in "pid"]
    return of_x, of_indices, [k.size(f"y_{letter}") for letter in y]
