"""Attention of one query a row over a cache: the bytes of keys and values that it reads a second, compared with a plain
read.

    python benchmarks/cached_attention.py [f32 | bf16 | f16] [--json]

Slots are visited in random order, in caches of 250 MB, so that no core's own cache holds the data. They hold the named
dtype, by default f32. The plain read sums the same slots. On one thread a number is that of a fast call (the slowest of
the fastest eighth), in thread CPU time. On two threads it is that of the fastest call in wall-clock time, which other
work on the machine increases.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from treadle.backends.bfloat16 import rounded
from treadle.backends.tvm.kernels.attention.cached_attention import CachedFlashAttention
from treadle.backends.tvm.kernels.attention.scratch import SPAN, Scratch
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import host_isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter

MODELS = {"SmolLM2-135M": (9, 3, 64), "GPT-2": (12, 12, 64)}  # query heads, key heads, width
LENGTHS = (256, 1024, 4096)
ROWS = (1, 2, 8)
CACHE = 250e6  # bytes
FAR = 2**40  # keys: no window


@dataclass(frozen=True)
class Read(Kernel):
    """y[p] = the sum of x[p], a vector of eight sums at a time"""

    def emit(self, k: Emitter) -> None:
        px, py = k.pointer("x", f32), k.pointer("y", f32)
        parts, n = k.size("parts"), k.size("n")
        lanes = k.isa.lanes()
        x, y = k.view(px, [parts, n]), k.view(py, [parts, lanes])
        with k.parallel(parts, "p") as p:
            acc = k.registers(8 * lanes, f32)
            with k.unroll(8, "u") as u:
                k.store(acc, [u * lanes], k.number(0.0, f32, lanes), lanes)
            with k.loop(k.floor_divide(n, 8 * lanes), "i") as i, k.unroll(8, "u") as u:
                held = k.load(acc, [u * lanes], lanes)
                k.store(acc, [u * lanes], held + k.load(x, [p, i * (8 * lanes) + u * lanes], lanes), lanes)
            total = k.load(acc, [0], lanes)
            for u in range(1, 8):
                total = total + k.load(acc, [u * lanes], lanes)
            k.store(y, [p, 0], total, lanes)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return numbers as a cache of the dtype stores them."""
    return rounded(x).copy() if dtype == "bf16" else x.astype(DTYPES[dtype].numpy)  # in large pages, as NumPy allocates


class Cache:
    """Keys and values of many slots, all full."""

    def __init__(self, heads: int, groups: int, width: int, length: int, dtype: str = "f32") -> None:
        self.heads, self.groups, self.width, self.length, self.dtype = heads, groups, width, length, dtype
        self.bytes = groups * length * width * 2 * DTYPES[dtype].bytes
        self.slots = max(16, int(CACHE / self.bytes))
        self.k, self.v = (stored(np.full((self.slots, groups, length, width), x, np.float32), dtype) for x in (0.01, 1))

    def attention(self, rows: np.ndarray, at_once: int) -> Callable[[], None]:
        """Return a function for a step of these rows, a view that a caller may change.

        at_once: the largest number of concurrent tasks.
        """
        count, shared, isa = len(rows), self.heads // self.groups, host_isa()
        q, out = (np.ones((count, self.heads, 1, self.width), np.float32) for _ in range(2))
        start, status = np.full(count, self.length - 1), np.zeros(4, np.int64)
        part = Scratch.of(self.width, self.width, isa, packs=False)
        parts = self.length // SPAN + 1
        work = [np.zeros(at_once * n, np.float32) for n in (1, 1, part.queries, part.scores)]
        work += [np.zeros(count * self.groups * parts * shared * n, np.float32) for n in (part.sums, part.rows)]
        kernel = CachedFlashAttention(self.width, self.width, self.width**-0.5, cache=self.dtype, shared=shared)
        sizes = [count, self.groups, shared, 1, self.length, self.slots, -FAR, 0, 1, at_once, parts]
        sizes += [stride // x.itemsize for x in (q, self.k, self.v, out) for stride in x.strides[:3]]
        return bind(kernel, [q, self.k, self.v, rows, start, out, *work, status], sizes)

    def read(self, rows: Sequence[int], parts: int) -> list[Callable[[], None]]:
        """Return a function that sums the same slots."""
        y = np.zeros((parts, 64), np.float32)
        size = self.bytes // 8 // parts
        return [bind(Read(), [x[row].view(np.float32), y], [parts, size]) for row in rows for x in (self.k, self.v)]


def fast(calls: Sequence[Callable[[], object]], threads: int) -> float:
    """Return the seconds of the fast calls."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    taken = []
    for call in calls:
        started = clock()
        call()
        taken.append(clock() - started)
    return sorted(taken)[len(taken) // 8 if threads == 1 else 0]


def rates(cache: Cache, count: int, threads: int) -> tuple[float, float]:
    """Return the bytes a second of a step of `count` rows, and of the plain read."""
    rng = np.random.default_rng(0)
    rows = np.zeros(count, np.int64)
    step = cache.attention(rows, 1 if threads == 1 else 32)
    times = max(3, -(-100 * count // cache.slots))
    order = np.tile(rng.permutation(cache.slots), times)  # none is visited again before all others
    batches = [order[at : at + count] for at in range(0, len(order) - count + 1, count)]

    def stepped(batch: np.ndarray) -> Callable[[], None]:
        def call() -> None:
            rows[:] = batch
            step()

        return call

    def summed(batch: np.ndarray) -> Callable[[], None]:
        sums = cache.read(batch.tolist(), threads)
        return lambda: [each() for each in sums] and None

    moved = count * cache.bytes
    tvm_runtime.set_threads(threads)
    seconds = [fast([make(batch) for batch in batches], threads) for make in (stepped, summed)]
    return moved / seconds[0], moved / seconds[1]


def main() -> None:
    found, dtype = [], next((x for x in sys.argv[1:] if x in DTYPES), "f32")
    for name, (heads, groups, width) in MODELS.items():
        for length in LENGTHS:
            cache = Cache(heads, groups, width, length, dtype)
            for count in ROWS:
                for threads in (1, 2):
                    step, read = rates(cache, count, threads)
                    found.append({"model": name, "cache": dtype, "length": length, "rows": count, "threads": threads})
                    found[-1] |= {"GB/s": round(step / 1e9, 1), "read": round(read / 1e9, 1)}
                    if "--json" not in sys.argv:
                        print(*(f"{key} {value}" for key, value in found[-1].items()), f"{step / read:.0%}", flush=True)
    if "--json" in sys.argv:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
