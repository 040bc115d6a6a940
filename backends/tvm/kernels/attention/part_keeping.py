"""Partial results of attention for each query, one per part, and merging them into the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.attention.merging import Merge, share_of
from treadle.backends.tvm.kernels.attention.row_softmax import INFINITY
from treadle.ir.types import boolean, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.attention.flash_attention import FlashAttention
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


class PartKeeper:
    """A code generator for storing and merging the partial results of attention.

    A task has a range of queries, for all r heads that share keys.

    at_b, at_g   the row and the key head of the task
    first        the task's first query
    chunk        number of rows of sums per head
    part         the buffer for m, l and the sums of the current part
    previous     the buffer for m and l of the preceding parts, whose sums are in out
    """

    r: Expr
    at_b: Expr
    at_g: Expr
    first: Expr
    chunk: Expr
    part: Expr
    previous: Expr
    sums: Any
    rows: Any
    out: Any

    def __init__(self, spec: FlashAttention, k: Emitter) -> None:
        self.spec, self.k = spec, k
        self.lanes = k.isa.lanes()
        self.vectors = -(-spec.e // self.lanes)

    def _begin(self, rows: Expr) -> None:
        """Emit the initialization of `rows` queries of each head, before the first key."""
        k = self.k
        with k.loop(self.r, "r") as r, k.loop(rows, "i") as i:
            row = self._index(r * self.chunk + i, "state")
            self._empty(row)
            with k.loop(self.vectors, "v") as v:
                k.store(self.sums, [self.part, row, v * self.lanes], k.number(0.0, f32, self.lanes), self.lanes)

    def _empty(self, row: Expr) -> None:
        """Set m and l to their values without keys."""
        self.k.store(self.rows, [self.part, row, 0], self.k.number(-INFINITY, f32))
        self.k.store(self.rows, [self.part, row, 1], self.k.number(0.0, f32))

    def _finish(self, count: Expr) -> None:
        """Emit out = sums / l for a single part; zeros for a query without visible keys."""
        k = self.k
        with k.loop(self.r, "r") as r, k.loop(count, "i") as i:
            row, at = self._query(r, i)
            share = share_of(k, k.load(self.rows, [self.part, row, 1]))
            self._write(at, lambda c, n: k.load(self.sums, [self.part, row, c], n) * k.splat(share, n))

    def _merge(self, r: Expr, first: Expr, count: Expr, at: Expr, spans: Expr, *, again: bool) -> None:
        """Emit merging of the current part, number `at`, into out, for some queries of a head. The last part also
        divides by l.

        again: True if the part's memory must be initialized again for the next part
        """
        k = self.k
        last = k.kept(at > spans - 2, boolean, name="last")
        with k.loop(count, "i") as i:
            row, to = self._query(r, self._index(first + i, "i"))
            new_m, new_l = (k.let(k.load(self.rows, [self.part, row, x]), "new") for x in (0, 1))
            old_m, old_l = (k.let(k.load(self.rows, [self.previous, row, x]), "old") for x in (3, 4))

            def sums(c: Expr, n: int, row: Expr = row) -> Expr:
                new = k.let(k.load(self.sums, [self.part, row, c], n), "sums")
                if again:
                    k.store(self.sums, [self.part, row, c], k.number(0.0, f32, n), n)
                return new

            with k.when(k.equal(at, k.index(0))):
                self._write(to, sums)
                self._keep(row, new_m, new_l)
            with k.when(at > k.index(0)):
                merge = Merge.of(k, old_m, new_m)
                total = k.kept(merge.both(old_l, new_l), f32, name="l")
                share = k.kept(k.select(last, share_of(k, total), k.number(1.0, f32)), f32, name="share")

                def both(c: Expr, n: int, merge: Merge = merge, share: Expr = share) -> Expr:
                    return merge.both(k.load(self.out, [*to, c], n), sums(c, n), n) * k.splat(share, n)

                self._write(to, both)
                self._keep(row, merge.peak, total)
            if again:
                self._empty(row)

    def _keep(self, row: Expr, peak: Expr, total: Expr) -> None:
        """Store m and l of all parts so far."""
        self.k.store(self.rows, [self.previous, row, 3], peak)
        self.k.store(self.rows, [self.previous, row, 4], total)

    def _query(self, r: Expr, i: Expr) -> tuple[Expr, list[Expr]]:
        """Return the row of a query's sums, and its index in out."""
        return self._index(r * self.chunk + i, "state"), [self.at_b, self.at_g * self.r + r, self.first + i]

    def _write(self, at: list[Expr], value: Callable[[Expr, int], Expr]) -> None:
        """Emit writing of a row of out: whole vectors, then single elements."""
        k, lanes = self.k, self.lanes
        whole, rest = divmod(self.spec.e, lanes)
        # Unrolled: in a loop, LLVM would turn the selects of `Merge` into branches, which are often mispredicted.
        with k.loop(whole // 4, "u") as u, k.unroll(4, "v") as v:
            c = (u * 4 + v) * lanes
            k.store(self.out, [*at, c], value(c, lanes), lanes)
        with k.unroll(whole % 4, "v") as v:
            c = (whole // 4 * 4 + v) * lanes
            k.store(self.out, [*at, c], value(c, lanes), lanes)
        if rest:
            with k.loop(rest, "v") as v:
                k.store(self.out, [*at, whole * lanes + v], value(whole * lanes + v, 1))

    def _index(self, value: Expr, name: str) -> Expr:
        return self.k.opaque(value, name)
