"""The machine's highest rate of multiplications: the kernels that measure it, and the measured rates."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tiles_in_memory import stand_in
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.tvm.kernels import read_rate, unit_rate
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import ISAS, Isa, host_isa, runs_here
from treadle.backends.tvm.kernels.read_rate import ReadRate, measure_read
from treadle.backends.tvm.kernels.unit_rate import UnitRate, measure_unit, unit_of

DTYPES = ("f32", "bf16", "int8")
HERE = [isa for isa in ISAS.values() if runs_here(isa) and not isa.multiplies_tiles]
UNITS = {
    "x86-64-amx": ("floats", "tiles", "tiles"),
    "x86-64-v4-bf16": ("floats", "pairs", "quads"),
    **dict.fromkeys(("x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64", "arm64"), ("floats",) * 3),
}


def run(cache: KernelCache, kernel: UnitRate, factors: np.ndarray, tasks: int, steps: int) -> np.ndarray:
    assert factors.dtype == np.uint8 and factors.shape == (4096,)
    sums = np.zeros((tasks, 4096), np.uint8)
    bind(kernel, [factors, sums], [tasks, steps], cache=cache)()
    return sums


@pytest.mark.parametrize("name", ISAS)
def test_ops_that_multiply_a_dtype(name: str) -> None:
    assert tuple(unit_of(dtype, ISAS[name]) for dtype in DTYPES) == UNITS[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", HERE, ids=str)
def test_a_step_multiplies_vectors_with_three(isa: Isa, dtype: str) -> None:
    """A step uses the counted number of vectors. Steps use different vectors, and a task uses all of them."""
    kernel = UnitRate(dtype, unit_of(dtype, isa))
    drawn = unit_rate._factors(kernel.unit, dtype)
    lines = drawn.reshape(-1, 64)[:, : isa.vector]
    if kernel.unit == "floats":
        left = right = lines.view(np.float32).astype(np.float64)[..., None]
    elif kernel.unit == "pairs":
        left = right = widened(lines.view(np.uint16)).astype(np.float64).reshape(len(lines), -1, 2)
    else:  # unsigned bytes, and signed bytes
        left, right = (lines.view(t).astype(np.float64).reshape(len(lines), -1, 4) for t in (np.uint8, np.int8))
    high = isa.registers // 4 if isa.fused else 2
    steps, wanted = 6, []
    for i in range(high):
        for j in range(3):
            wanted.append(sum((left[3 + s % 4 * high + i] * right[j]).sum(-1) for s in range(steps)))
    assert kernel.step_flops(isa) == 2 * high * 3 * left[0].size
    kind = np.int32 if kernel.unit == "quads" else np.float32
    for task in run(KernelCache(isa), kernel, drawn, 2, steps):
        found = task.reshape(-1)[: len(wanted) * isa.vector].view(kind).reshape(len(wanted), -1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_step_of_a_matrix_unit_has_four_products(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are in memory here."""
    cache = KernelCache(stand_in(monkeypatch), folder=None)  # no kernel is cached in a file
    kernel = UnitRate(dtype, "tiles")
    drawn = unit_rate._factors("tiles", dtype).reshape(4, 16, 64)
    if dtype == "int8":
        lefts, rights = drawn[:2].astype(np.float64), drawn[2:].view(np.int8).astype(np.float64)
        wide = [right.reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16) for right in rights]
    else:
        numbers = widened(drawn.reshape(4, 1024).view(np.uint16)).astype(np.float64).reshape(4, 16, 32)
        lefts, rights = numbers[:2], numbers[2:]
        wide = [right.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16) for right in rights]
    (found,) = run(cache, kernel, drawn.reshape(-1), 1, 3)
    kind = np.int32 if dtype == "int8" else np.float32
    wanted = [3 * (left @ right) for left in lefts for right in wide]
    np.testing.assert_allclose(found.view(kind).reshape(4, 16, 16), wanted, rtol=1e-5, atol=1e-5)
    assert kernel.step_flops(cache.isa) == 4 * 2 * 16 * 16 * lefts.shape[-1]


@pytest.mark.parametrize(
    ("isa", "dtype", "instruction", "count"),
    [
        ("x86-64-amx", "bf16", "tdpbf16ps", 4),
        ("x86-64-amx", "int8", "tdpbusd", 4),
        ("x86-64-amx", "f32", "vfmadd", 24),
        ("x86-64-v4-bf16", "bf16", "vdpbf16ps", 24),
        ("x86-64-v4-bf16", "int8", "vpdpbusd", 24),
        ("x86-64-v3", "bf16", "vfmadd", 12),
        ("x86-64", "f32", "mulps", 6),
        ("arm64", "int8", "fmla", 24),
    ],
)
def test_no_register_is_put_away_in_the_loop(isa: str, dtype: str, instruction: str, count: int) -> None:
    """The loop contains all products of one or several steps, and stores nothing on the stack."""
    text = assembly(UnitRate(dtype, unit_of(dtype, ISAS[isa])), ISAS[isa])
    loops = [part for part in re.split(r"\n\.L\w+:[^\n]*", text) if len(re.findall(instruction, part)) >= count]
    assert loops
    body = min(loops, key=len)
    assert len(re.findall(instruction, body)) == count * max(1, len(re.findall(instruction, body)) // count)
    assert not re.search(r"rsp\).*[xyz]mm|[xyz]mm.*rsp\)|\[sp", body), body


def test_a_rate_is_of_the_best_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    costs = iter([0.125, 0.0625, 0.25])

    def call() -> None:
        now[0] += next(costs)

    threads: list[int] = []
    monkeypatch.setattr(unit_rate.tvm_runtime, "set_threads", threads.append)
    monkeypatch.setattr(unit_rate, "bind", lambda *given: calls.append(given) or call)
    clocks: dict[str, Any] = {"process_time": lambda: now[0], "perf_counter": lambda: now[0]}
    monkeypatch.setattr(unit_rate, "time", type("Clocks", (), {n: staticmethod(f) for n, f in clocks.items()}))
    isa = ISAS["x86-64-v3"]
    assert measure_unit("bf16", isa, 3) == 12 * 8 * 2 * 2**20 * 3 / 0.0625
    ((kernel, (factors, sums), sizes, given),) = calls
    assert threads == [3]
    assert (kernel, sizes, given) == (UnitRate("bf16", "floats"), [3, 2**20], isa)
    assert sums.nbytes == 3 * 4096 and np.isfinite(factors.view(np.float32)).all()


def test_rates_of_this_machine() -> None:
    """A pair of bf16 products takes the time of one float32 product, and so do four products of bytes."""
    f32, bf16, int8 = (measure_unit(dtype, host_isa(), 1) for dtype in DTYPES)
    assert f32 > 1e9
    for rate, unit, times in ((bf16, unit_of("bf16", host_isa()), 2), (int8, unit_of("int8", host_isa()), 4)):
        if unit in ("pairs", "quads"):
            assert 0.6 * times < rate / f32 < 1.7 * times


def test_factors_are_drawn() -> None:
    """The factors are not zeros, with which a matrix unit is faster. Bytes have both signs, and bf16 numbers are
    rounded.
    """
    for unit, dtype in (("tiles", "bf16"), ("pairs", "bf16"), ("quads", "int8"), ("tiles", "int8"), ("floats", "int8")):
        found = unit_rate._factors(unit, dtype)
        assert found.dtype == np.uint8 and found.shape == (4096,) and len(np.unique(found)) > 100
    values = widened(unit_rate._factors("pairs", "bf16").view(np.uint16))
    assert np.abs(values).max() <= 1 and np.array_equal(
        rounded(values), unit_rate._factors("pairs", "bf16").view(np.uint16)
    )
    signed = unit_rate._factors("quads", "int8").view(np.int8)
    assert signed.min() < -100 and signed.max() > 100


@pytest.mark.parametrize("isa", HERE, ids=str)
def test_a_plain_read_reads_every_number_in_each_pass(isa: Isa) -> None:
    block = 8 * isa.lanes()
    numbers = np.random.default_rng(2).integers(-9, 9, (2, 5, block)).astype(np.float32)
    sums = np.zeros((2, block), np.float32)
    bind(ReadRate(), [numbers, sums], [2, 5, 3], cache=KernelCache(isa))()
    np.testing.assert_array_equal(sums, 3 * numbers.sum(1))


def test_the_rate_of_a_read_counts_the_bytes_of_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, list[int]]] = []

    def bound(kernel: Any, arrays: Any, sizes: list[int], isa: Isa) -> Any:
        calls.append((arrays[0].nbytes, sizes))
        return lambda: None

    times = iter([0.0, 0.0, 1.0, 1.5, 2.0])  # the end of the search, then a call of half a second
    monkeypatch.setattr(read_rate, "bind", bound)
    monkeypatch.setattr(read_rate, "time", SimpleNamespace(perf_counter=lambda: next(times), process_time=None))
    isa = host_isa()
    rate = measure_read(1 << 20, isa, 2)
    ((held, (tasks, blocks, passes)),) = calls
    assert (tasks, held) == (2, 2 * blocks * 8 * isa.lanes() * 4)
    assert held <= 1 << 20 < held + 2 * 8 * isa.lanes() * 4
    assert rate == held * passes / 1.0 or rate == held * passes / 0.5
