"""Bandwidth of plain reads on this machine, for amounts of memory that fit into its caches and for larger ones.

    measure_read(1 << 20, host_isa(), threads=2)     # bytes per second

The array is read again and again, so an array that fits into a cache is read from that cache. A kernel that touches an
operand for the first time after as many other bytes have passed cannot read it faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter

_SUMS = 8  # number of sums: enough to hide the latency of an addition
_SECONDS = 0.05
_PER_CALL = 1 << 23  # bytes that a thread reads in a call, so that the start of threads does not count
LEAST, MOST = 1 << 14, 1 << 28
"""The smallest and the largest number of bytes for which the rate is measured; the largest is beyond every cache."""


@dataclass(frozen=True)
class ReadRate(Kernel):
    """sums += numbers, for each task over its part of the numbers, repeatedly.

    Arguments: numbers, f32[tasks, blocks, 8, lanes]; sums, f32[tasks, 8, lanes]; the number of tasks, of blocks, and of
    passes.
    """

    def emit(self, k: Emitter) -> None:
        lanes = k.isa.lanes()
        numbers, sums = k.pointer("numbers", f32), k.pointer("sums", f32)
        tasks, blocks, passes = k.size("tasks"), k.size("blocks"), k.size("passes")
        numbers, sums = k.view(numbers, [tasks, blocks, _SUMS * lanes]), k.view(sums, [tasks, _SUMS * lanes])
        with k.parallel(tasks, "task") as task:
            acc = k.registers(_SUMS * lanes, f32)
            with k.unroll(_SUMS, "r") as r:
                k.store(acc, [r * lanes], k.number(0, f32, lanes), lanes)
            with k.loop(passes, "turn"), k.loop(blocks, "block") as block:
                for i in range(_SUMS):
                    at = [i * lanes]
                    added = k.load(acc, at, lanes) + k.load(numbers, [task, block, i * lanes], lanes)
                    k.store(acc, at, added, lanes)
            with k.unroll(_SUMS, "r") as r:
                k.store(sums, [task, r * lanes], k.load(acc, [r * lanes], lanes), lanes)


def measure_read(count: int, isa: Isa, threads: int) -> float:
    """Return the bytes per second of a plain read of `count` bytes, on this number of threads.

    At least 16 KiB a thread and at most 256 MiB are read. With one thread, CPU time is measured, else wall-clock time;
    the result is the best of several calls.
    """
    block = _SUMS * isa.lanes()
    blocks = max(min(count, MOST), LEAST * threads) // (4 * block * threads)
    numbers = np.ones((threads, blocks, block), np.float32)
    passes = max(_PER_CALL * threads // numbers.nbytes, 1)
    tvm_runtime.set_threads(threads)
    run = bind(ReadRate(), [numbers, np.zeros((threads, block), np.float32)], [threads, blocks, passes], isa)
    clock = time.process_time if threads == 1 else time.perf_counter
    run()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        started = clock()
        run()
        best = min(best, clock() - started)
    return passes * numbers.nbytes / best
