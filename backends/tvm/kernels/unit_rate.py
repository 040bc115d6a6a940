"""Peak rate of multiplications on this machine, measured on operands in registers.

    measure_unit("int8", host_isa(), threads=1)      # operations per second

A kernel also loads, stores and branches, so it takes at least its operations divided by this rate. This is the
horizontal line of a roofline. The memory bandwidth determines the sloped line.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.bfloat16 import rounded
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.calling import Array, bind
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow import tiles
from treadle.backends.tvm.kernels.narrow.byte_product import quads_added
from treadle.backends.tvm.kernels.narrow.pair_product import pairs_added
from treadle.ir.types import DTYPES, DType, f32, u8

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_TIMES = 1 << 20  # number of steps in a call
_SECONDS = 0.2
_LINE = 64  # bytes of a vector, and of a row of a tile
_RIGHTS = 3  # number of right factors, which stay in registers
_TURNS = 4  # number of groups of left factors, one for each step
_SQUARE = tiles.ROWS * tiles.ROW_BYTES


def unit_of(dtype: str, isa: Isa) -> str:
    """Return the unit that multiplies numbers of a dtype: `tiles`, `pairs` or `quads`, or `floats` if numbers are
    widened.
    """
    if dtype != "f32" and isa.multiplies_tiles:
        return "tiles"
    if dtype == "bf16" and isa.multiplies_pairs:
        return "pairs"
    return "quads" if dtype == "int8" and isa.multiplies_quads else "floats"


@dataclass(frozen=True)
class UnitRate(Kernel):
    """sums += left * right, repeatedly, with enough sums to hide the latency of a product.

    of    f32, bf16 or int8
    unit  the unit that multiplies them, from `unit_of`

    Arguments: factors, 4 tiles of bytes; memory for the sums of each task; the number of tasks, and of steps.
    """

    of: str
    unit: str

    @property
    def multiplies(self) -> str:
        return self.of

    def step_flops(self, isa: Isa) -> int:
        """Return the number of operations of a step."""
        if self.unit == "tiles":
            return 4 * 2 * tiles.ROWS * tiles.ROWS * tiles.ROW_BYTES // (2 if self.of == "bf16" else 1)
        terms = {"floats": 1, "pairs": 2, "quads": 4}[self.unit]
        return 2 * terms * isa.lanes() * _sums(isa)

    def emit(self, k: Emitter) -> None:
        factors, sums = k.pointer("factors", u8), k.pointer("sums", u8)
        tasks, steps = k.size("tasks"), k.size("steps")
        factors, sums = k.view(factors, [4 * _SQUARE]), k.view(sums, [tasks, 4 * _SQUARE])
        with k.parallel(tasks, "task") as task:
            if self.unit == "tiles":
                self._tiles(k, factors, sums, task, steps)
            else:
                self._vectors(k, factors, sums, task, steps)

    def _vectors(self, k: Emitter, factors: Any, sums: Any, task: Expr, steps: Expr) -> None:
        lanes, width, dtype = k.isa.lanes(), k.isa.vector, f32 if self.unit != "quads" else DTYPES["i32"]
        count = _sums(k.isa)
        acc = k.registers(count * lanes, dtype)

        def vector(line: Expr) -> Expr:
            return k.let(k.bits(k.load(factors, [line * _LINE], width), self._taken, lanes), "x")

        with k.unroll(count, "r") as r:
            k.store(acc, [r * lanes], k.number(0, dtype, lanes), lanes)
        rights = [vector(k.index(j)) for j in range(_RIGHTS)]
        with k.loop(steps, "step") as step:
            # Each step uses different factors, since LLVM would compute a repeated product only once.
            first = k.let((step & k.index(_TURNS - 1)) * (count // _RIGHTS) + _RIGHTS, "first")
            for i in range(count // _RIGHTS):
                left = vector(first + i)
                for j, right in enumerate(rights):
                    at = [(i * _RIGHTS + j) * lanes]
                    k.store(acc, at, self._added(k, k.load(acc, at, lanes), left, right), lanes)
        for i in range(count):
            k.store(sums, [task, i * width], k.bits(k.load(acc, [i * lanes], lanes), u8, width), width)

    @property
    def _taken(self) -> DType:
        return f32 if self.unit == "floats" else DTYPES["i32"]

    def _added(self, k: Emitter, total: Expr, left: Expr, right: Expr) -> Expr:
        if self.unit == "floats":
            return total + left * right
        return (pairs_added if self.unit == "pairs" else quads_added)(k, total, left, right)

    def _tiles(self, k: Emitter, factors: Any, sums: Any, task: Expr, steps: Expr) -> None:
        tiles.configure(k)
        for i in range(4):
            tiles.clear(k, i)
            tiles.load(k, 4 + i, factors, [i * _SQUARE])
        with k.loop(steps, "step"):
            for i in range(4):
                left, right = 4 + i // 2, 6 + i % 2
                if self.of == "bf16":
                    tiles.multiply(k, i, left, right)
                else:
                    tiles.multiply_bytes(k, i, left, right, signed=False)
        for i in range(4):
            tiles.store(k, i, sums, [task, i * _SQUARE])
        tiles.release(k)


def measure_unit(dtype: str, isa: Isa, threads: int) -> float:
    """Return the operations per second of the unit that multiplies numbers of a dtype, on this number of threads.

    With one thread, CPU time is measured, else wall-clock time; the result is the best of several calls.
    """
    kernel = UnitRate(dtype, unit_of(dtype, isa))
    factors = _factors(kernel.unit, dtype)
    tvm_runtime.set_threads(threads)
    run = bind(kernel, [factors, np.zeros((threads, 4 * _SQUARE), np.uint8)], [threads, _TIMES], isa)
    clock = time.process_time if threads == 1 else time.perf_counter
    least, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        started = clock()
        run()
        least = min(least, clock() - started)
    return kernel.step_flops(isa) * _TIMES * threads / least


def _sums(isa: Isa) -> int:
    """Return the number of sums: enough to hide an addition's latency, but few enough to leave registers for
    factors.
    """
    return _RIGHTS * (isa.registers // 4 if isa.fused else 2)


def _factors(unit: str, dtype: str) -> Array:
    """Return random numbers, since AMX is faster on zeros. Floats are small, so that sums stay finite."""
    drawn = np.random.default_rng(0).uniform(-1, 1, 4 * _SQUARE)
    if dtype == "int8" and unit != "floats":
        return (drawn * 127).astype(np.int8).view(np.uint8)
    numbers = drawn.astype(np.float32)
    made = numbers if unit == "floats" else rounded(numbers)
    return np.ascontiguousarray(made).view(np.uint8)[: 4 * _SQUARE].copy()
