"""Appending to the slots of a cache, each row at its own positions.

    y[rows[b], p, start[b] + i, d] = x[b, p, i, d]           `Append`

If a row's slot or positions are out of range, nothing is written for the row, and the kernel reports the first such row
in its status words (`lowering.program.STATUS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.gathering import MOVED, along
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class Append(Kernel):
    """y[rows[b], p, start[b] + i, d] = x[b, p, i, d], in a ring at start[b] + i modulo the capacity

    bytes  bytes of an element
    rows   True if x and y are contiguous along d
    ring   True if positions count modulo the capacity

    Arguments: x, rows, start, y, the status words; the sizes b, p, s and d of x; the numbers of slots and positions of
    y; the strides of x over b, p, s and d; the strides of rows and start; the strides of y over slots, p, positions and
    d. If `rows`, the strides over d are not passed.
    """

    bytes: int
    rows: bool
    ring: bool

    @property
    def title(self) -> str:
        return "append" + ("_rows" if self.rows else "") + ("_ring" if self.ring else "")

    def emit(self, k: Emitter) -> None:
        dtype = MOVED[self.bytes]
        given, rows, start = k.pointer("x", dtype), k.pointer("rows", i64), k.pointer("start", i64)
        written, status_pointer = k.pointer("y", dtype), k.pointer("status", i64)
        b, p, s, d, slots, capacity = (k.size(name) for name in ("b", "p", "s", "d", "slots", "capacity"))
        last: list[Expr] = [1] if self.rows else []
        outer_axes = ("b", "p", "s") if self.rows else ("b", "p", "s", "d")
        x_strides = [k.size(f"x_{a}") for a in outer_axes] + last
        row_stride, start_stride = k.size("rows_b"), k.size("start_b")
        y_strides = [k.size(f"y_{a}") for a in outer_axes] + last
        x = k.view(given, [b, p, s, d], x_strides)
        row_of, start_of = k.view(rows, [b], [row_stride]), k.view(start, [b], [start_stride])
        y, status = k.view(written, [slots, p, capacity, d], y_strides), k.view(status_pointer, [4])
        room = capacity - s

        def errors(row: Expr) -> tuple[Expr, Expr, Expr, Expr]:
            """Return a row's slot and first position, and the conditions that they are out of range."""
            slot = k.let(k.index(k.load(row_of, [row])), "slot")
            first = k.let(k.index(k.load(start_of, [row])), "first")
            before = first < k.index(0)
            no_room = before if self.ring else k.any_of(before, first > room)
            return slot, first, k.any_of(slot < k.index(0), slot >= slots), no_room

        with k.parallel(b * p * s, "task") as task:
            place, i = k.let(k.floor_divide(task, s), "place"), k.let(k.floor_mod(task, s), "i")
            row, outer = k.let(k.floor_divide(place, p), "row"), k.let(k.floor_mod(place, p), "outer")
            slot, first, no_slot, no_room = errors(row)
            at = k.let(k.floor_mod(first + i, capacity) if self.ring else first + i, "at")
            has_slot = k.both(slot >= k.index(0), slot < slots)
            has_room = first >= k.index(0) if self.ring else k.both(first >= k.index(0), first <= room)
            with k.when(k.both(has_slot, has_room)):
                if self.rows:
                    move = lambda c, n: k.store(y, [slot, outer, at, c], k.load(x, [row, outer, i, c], n), n)  # noqa: E731
                    along(k, d, k.isa.lanes(self.bytes), move)
                else:
                    with k.loop(d, "d") as c:
                        k.store(y, [slot, outer, at, c], k.load(x, [row, outer, i, c]))
            with k.when(k.any_of(no_slot, no_room)):
                # several tasks report at once: all of them report the first of these rows
                earlier = k.registers(1, i64, "earlier")
                k.store(earlier, [0], k.index(0))
                with k.loop(row, "r") as r, k.when(k.any_of(*errors(r)[2:])):
                    k.store(earlier, [0], k.index(1))
                with k.when(k.load(earlier, [0]) < k.index(1)):
                    with k.when(no_slot):
                        _tell(k, status, 1, slot, slots, row)
                    with k.when(k.both(has_slot, no_room)):
                        _tell(k, status, 2, first, capacity, row)


def _tell(k: Emitter, status: Any, what: int, index: Expr, size: Expr, row: Expr) -> None:
    """Write the status words. The first word is written last, since it marks the others as valid."""
    for word, value in (1, index), (2, size), (3, row), (0, k.index(what)):
        k.store(status, [word], value)
