"""Attention over a cache. Operations have the same order, and so results the same bits, as in attention over whole
sequences.

    out[b, h, i] = sum_j p_j v[rows[b], h // r, j]
    p = softmax over j of softcap(scale q[b, h, i] · k[rows[b], h // r, j]) + biases

The queries of row b have positions from start[b] on; the slot rows[b] determines the positions of its keys. Blocks of
keys begin at positions that are multiples of `BLOCK`, as in `treadle.backends.tvm.kernels.attention.flash_attention`.
So every product, sum and maximum of a query is the same in both kernels, and does not depend on other queries and rows
in the call.

The time of a task depends on the length of its row, so tasks are divided among threads by their number of keys.

A step has one query in each row. Its tasks are spans of keys, so that all threads work on a row even if there are few
key heads (Dao et al. 2023, Flash-Decoding). When all tasks are done, the calling thread merges them. A step packs
nothing: keys are transposed in registers, a square of lanes at a time, and values are read in place. Both are read
once, at memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.attention.attention_writer import AttentionWriter
from treadle.backends.tvm.kernels.attention.flash_attention import FlashAttention
from treadle.backends.tvm.kernels.attention.scratch import BLOCK, PANEL, SPAN
from treadle.backends.tvm.kernels.gathering import checked
from treadle.backends.tvm.kernels.isa import Isa
from treadle.ir.types import DTYPES, DType, f32, i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_LINE = 64  # bytes
_AHEAD = 16  # prefetch distance in keys, if several heads share a key
_AHEAD_ALONE = 12  # prefetch distance if one head reads a key; both as measured
_AROUND = 32  # fixed cost of a task, as a number of keys


def steps_at_once(isa: Isa) -> int:
    """Return the largest number of heads that may share keys in a step. Their scores must fit into registers."""
    return isa.registers // 4


@dataclass(frozen=True)
class CachedFlashAttention(FlashAttention):
    """Attention of any number of queries per row over slots of keys and values.

    cache   dtype of keys and values, f32, bf16 or f16; they are widened in registers
    ring    True if cache slots are ring buffers; no mask or bias may then have an operand with one element per key
    shared  the number of query heads that share keys (r), if the decoding-step kernel is used; else 0. That kernel
            requires one query per row, d and e that are multiples of a vector, and r <= `steps_at_once`

    Arguments: as in `FlashAttention`, with these additions. rows and start follow the values. The status words follow
    all other pointers. The number of cache slots follows t, which is the capacity of a cache slot. If `shared` is not
    0, the number of workspace slots is followed by n, the largest number of spans of a row's keys; `sums` and `rows`
    then have n parts for each row and key head.
    """

    cache: str = "f32"
    ring: bool = False
    shared: int = 0

    @property
    def title(self) -> str:
        held = [self.cache] if self.cache != "f32" else []
        return "_".join(["cached", super().title, *held, *["ring"] * self.ring, *["step"] * bool(self.shared)])

    def emit(self, k: Emitter) -> None:
        (_StepWriter if self.shared else _CacheWriter)(self, k).write()


class _CacheWriter(AttentionWriter):
    """A writer of kernels that pack keys and values."""

    spec: CachedFlashAttention

    @property
    def _held(self) -> DType:
        return DTYPES[self.spec.cache]

    def __init__(self, spec: CachedFlashAttention, k: Emitter) -> None:
        super().__init__(spec, k)
        self.slot_of, self.start_of = (k.view(pointer, [self.b]) for pointer in self._read)
        self.status = k.view(self._status, [4])

    def _ask_read(self) -> None:
        self._read = [self.k.pointer(name, i64) for name in ("rows", "start")]

    def _ask_written(self) -> None:
        self._status = self.k.pointer("status", i64)

    def _ask_key_rows(self) -> Expr:
        return self.k.size("R")

    # -- tasks -----------------------------------------------------------------------------------------------

    def _share(self, slot: Expr, tasks: Expr, active: Expr, chunks: Expr) -> None:
        """Emit the tasks whose beginning is in the slot's share of the total cost. The costs of all rows are added in
        their order.
        """
        k = self.k
        held = k.registers(2, i64, "costs")
        k.store(held, [0], k.index(0))
        alike = self._index(self.g * chunks, "alike")  # tasks per row
        with k.loop(self.b, "b") as b:
            k.store(held, [0], k.load(held, [0]) + self._cost(b) * alike)
        total = k.let(k.load(held, [0]), "total")
        begin = self._index(k.floor_divide(slot * total, active), "share")
        end = self._index(k.floor_divide((slot + 1) * total, active), "share_end")
        k.store(held, [1], k.index(0))
        with k.loop(self.b, "b") as b:
            cost = self._index(self._cost(b), "cost")
            before = self._index(k.load(held, [1]), "before")
            whole = self._index(cost * alike, "whole")
            k.store(held, [1], before + whole)
            low, high = (self._index(k.greatest(k.least(x - before, whole), k.index(0)), "edge") for x in (begin, end))
            with k.when(low < high):
                row = self._index(k.load(self.slot_of, [b]), "slot_of_row")
                checked(k, self.status, row, self.key_rows, lambda: self._tasks(b, row, cost, low, high, chunks))

    def _tasks(self, b: Expr, row: Expr, cost: Expr, low: Expr, high: Expr, chunks: Expr) -> None:
        """Emit the tasks of a row that begin at `low` to below `high` of the row's costs. The row's keys are in slot
        `row`.

        In a step, emit the tasks whose middle is in that range.
        """
        k = self.k
        self.key_row = row
        self._stand(b)
        first, last = (self._index(self._ceil(x, cost), "part") for x in (low, high))
        with k.loop(k.greatest(last - first, k.index(0)), "n") as n:
            g = self._index(k.floor_divide(first + n, chunks), "g")
            self._task(b, g, self._index(k.floor_mod(first + n, chunks), "part"))

    def _stand(self, b: Expr) -> None:
        """Set the positions of the queries and keys of row b."""
        k = self.k
        self.origin = self._index(k.load(self.start_of, [b]), "start")
        newest = self._index(self.origin + self.s, "newest")
        self._oldest = self._index(k.greatest(newest - self.t, k.index(0)), "oldest") if self.spec.ring else k.index(0)
        self.limit = self._limited(b, newest if self.spec.ring else self.t)

    def _cost(self, b: Expr) -> Expr:
        """Return the cost of a task of row b: the number of keys that its queries see, plus the fixed cost."""
        self._stand(b)
        begin, end = self._seen(self.k.index(0), self.s)
        return self.k.greatest(end - begin, self.k.index(0)) + _AROUND

    # -- rings -----------------------------------------------------------------------------------------------

    @property
    def oldest(self) -> Expr:
        return self._oldest

    def _first_seen(self, position: Expr) -> Expr:
        first = super()._first_seen(position)
        return self.k.greatest(first, self._oldest) if self.spec.ring else first

    def _enter(self, begin: Expr, end: Expr) -> None:
        if self.spec.ring:
            self.begin, self.last = begin, self._index(end - 1, "last")
            self.first_key = self._index(self.k.floor_mod(begin, self.t), "first_key")

    def _keys_at(self, column: Expr) -> list[Expr]:
        if not self.spec.ring:
            return super()._keys_at(column)
        k = self.k
        first = self._index(self.base + column, "first")
        return [self._in_ring(k.greatest(k.least(first + x, self.last), self.begin)) for x in range(self.lanes)]

    def _value_at(self, column: Expr) -> Expr:
        return self._in_ring(self.base + column) if self.spec.ring else super()._value_at(column)

    def _in_ring(self, position: Expr) -> Expr:
        """Return the index in a ring of a position that the task's queries see. The position is less than a ring's
        length after the first one.
        """
        k = self.k
        key = self._index(self.first_key + (position - self.begin), "key")
        return self._index(k.select(key < self.t, key, key - self.t), "key")


class _StepWriter(_CacheWriter):
    """A writer of kernels for one query in each row. Row i of a task's scores belongs to the task's i-th head."""

    def write(self) -> None:
        """Emit the tasks: spans of a row's keys for the heads that share them, each with its own part. Then emit their
        merging.

        Every slot has a share even if there are fewer tasks, since each thread takes the same number of shares. All
        shares have equal costs.
        """
        k = self.k
        self.chunk = k.index(1)
        with k.parallel(self.slots, "slot") as slot:
            self.slot = slot
            self._share(slot, self.slots, self.slots, k.index(1))
        with k.loop(self.b, "b") as b:
            self._stand(b)
            _, spans = self._spans(*self._seen(k.index(0), self.s))
            with k.loop(self.g, "g") as g:
                self.at_b, self.at_g, self.first = b, g, k.index(0)
                self.part = self.previous = self._part(k.index(0))
                with k.when(k.equal(spans, k.index(1))):
                    self._finish(k.index(1))
                with k.when(spans > k.index(1)), k.loop(spans, "n") as n, k.loop(self.r, "r") as r:
                    self.part = self._part(n)
                    self._merge(r, k.index(0), k.index(1), n, spans, again=False)

    def _ask_parts(self) -> Expr:
        self.parts = self.k.size("parts")
        return self.b * self.g * self.parts

    def _part(self, n: Expr) -> Expr:
        """Return the index of the n-th part of the current row and key head."""
        return self._index((self.at_b * self.g + self.at_g) * self.parts + n, "part")

    def _tasks(self, b: Expr, row: Expr, cost: Expr, low: Expr, high: Expr, chunks: Expr) -> None:
        k = self.k
        self.key_row, self.at_b = row, b
        self._stand(b)
        begin, end = self._seen(k.index(0), self.s)
        self._enter(begin, end)
        span, spans = self._spans(begin, end)

        def before(cost: Expr) -> Expr:
            """Return the number of spans of one head whose midpoint has a cumulative cost below `cost`."""
            some = k.select(cost < end - begin, self._ceil(begin + cost - SPAN // 2, SPAN) - span, spans)
            some = k.select(cost > k.index(0), some, k.index(0))
            return self._index(k.greatest(k.least(some, spans), k.index(0)), "before")  # positions may overflow

        pair = self._index(k.floor_divide(low, cost), "pair")
        with k.loop(self._ceil(high, cost) - pair, "n") as n:
            self.at_g = self._index(pair + n, "g")
            first, last = (before(self._index(x - self.at_g * cost, "edge")) for x in (low, high))
            with k.loop(k.greatest(last - first, k.index(0)), "task") as task:
                at = self._index(first + task, "at")
                self.part = self._part(at)
                self._begin(k.index(1))
                self._keys(*self._within(begin, end, self._index(span + at, "span")))

    def _begin(self, rows: Expr) -> None:
        super()._begin(rows)
        k, lanes = self.k, self.lanes
        with k.loop(self.r, "r") as r:
            head = self._head(r)
            with k.loop(self.spec.d // lanes, "v") as v:
                x = k.load(self.q, [self.at_b, head, 0, v * lanes], lanes)
                k.store(self.queries, [self.slot, r, v * lanes], x * k.number(self.spec.scale, f32, lanes), lanes)

    def _keys(self, begin: Expr, end: Expr) -> None:
        """Emit attention of the heads' queries to the keys from `begin` to below `end`, block by block."""
        k = self.k
        block = self._index(k.floor_divide(begin, BLOCK), "first_block")
        most = max(1, (self.k.isa.registers - 8) // self.spec.shared)
        with k.loop(k.greatest(self._ceil(end, BLOCK) - block, k.index(0)), "block") as n:
            self.base = self._index((block + n) * BLOCK, "base")
            c0, c1 = self._columns(begin, end)
            p0 = self._index(k.floor_divide(c0, self.width), "from_panel")
            p1 = self._index(self._ceil(c1, self.width), "to_panel")
            with k.loop((p1 - p0) * PANEL, "n") as vector:
                self._score_keys(self._index(p0 * self.width + vector * self.lanes, "column"))
            with k.loop(self.r, "r") as r:
                self._softmax(self._head(r), k.index(0), r, r, p0 * self.width, p1 * self.width)
            for first in range(0, self.vectors, most):
                self._sum_values(first, min(most, self.vectors - first), c0, c1)

    def _score_keys(self, column: Expr) -> None:
        """Compute the scores of a vector of keys for every head's query. Accumulators stay in registers during the loop
        over d.
        """
        k, lanes, heads = self.k, self.lanes, range(self.spec.shared)
        keys = self._keys_at(column)
        acc = k.registers(len(heads) * lanes, f32)
        for i in heads:
            k.store(acc, [i * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(self.spec.d // lanes, "c") as c:
            start = self._index(c * lanes, "start")
            self._fetch_keys(keys[0], c)
            square = k.transposed([self._widened(self.key, [self.key_row, self.at_g, j, start], lanes) for j in keys])
            for x, vector in enumerate(square):
                for i in heads:
                    query = k.splat(k.load(self.queries, [self.slot, i, start + x]), lanes)
                    k.store(acc, [i * lanes], k.load(acc, [i * lanes], lanes) + query * vector, lanes)
        for i in heads:
            k.store(self.scores, [self.slot, i, column], k.load(acc, [i * lanes], lanes), lanes)

    @property
    def _a_line(self) -> int:
        """Number of vectors of keys or values in a cache line."""
        return max(1, _LINE // (self.lanes * self._held.bytes))

    @property
    def _ahead(self) -> int:
        return _AHEAD if self.spec.shared > 1 else _AHEAD_ALONE

    def _fetch_keys(self, key: Expr, c: Expr) -> None:
        """Prefetch part c of keys that are needed later, in memory order. Each vector of a key is one part.

        A square is read with a stride, which the hardware prefetcher does not predict.
        """
        k, vectors = self.k, self.spec.d // self.lanes
        for x in range(0, self.lanes, self._a_line):
            part = self._index(c * self.lanes + x, "part")
            ahead = key + self._ahead + k.floor_divide(part, vectors)
            k.prefetch(self.key, [self.key_row, self.at_g, ahead, k.floor_mod(part, vectors) * self.lanes])

    def _sum_values(self, first: int, vectors: int, c0: Expr, c1: Expr) -> None:
        """Compute sums = sums * factor + weights @ values for some vectors of the values and every head."""
        k, lanes = self.k, self.lanes
        held = [(i, v, (i * vectors + v) * lanes) for i in range(self.spec.shared) for v in range(vectors)]
        acc = k.registers(len(held) * lanes, f32)

        def at(i: int, v: int) -> list[Any]:
            return [self.part, i, (first + v) * lanes]

        for i, v, place in held:
            factor = k.splat(k.load(self.rows, [self.part, i, 2]), lanes)
            k.store(acc, [place], k.load(self.sums, at(i, v), lanes) * factor, lanes)
        with k.loop(c1 - c0, "n") as n:
            column = self._index(c0 + n, "column")
            key = self._value_at(column)
            for v in range(0, vectors, self._a_line):
                k.prefetch(self.value, [self.key_row, self.at_g, key + self._ahead, (first + v) * lanes])
            values = [
                k.let(self._widened(self.value, [self.key_row, self.at_g, key, (first + v) * lanes], lanes), "value")
                for v in range(vectors)
            ]
            weights = [
                k.let(k.splat(k.load(self.scores, [self.slot, i, column]), lanes), "weight")
                for i in range(self.spec.shared)
            ]
            for i, v, place in held:
                k.store(acc, [place], k.load(acc, [place], lanes) + weights[i] * values[v], lanes)
        for i, v, place in held:
            k.store(self.sums, at(i, v), k.load(acc, [place], lanes), lanes)
