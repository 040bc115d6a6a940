"""Kernels for devices: their CUDA text on the emulator, the places of registers and of barriers, and refused words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of, needs_tvm
from tests.support.gpu_emulator.emulation import EmulatedKernel, EmulatorError, Region, compiler
from treadle.backends.registry import find_backend
from treadle.backends.tvm import backend as tvm_backend
from treadle.backends.tvm.kernels.devices.device import DEVICES, Device
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord
from treadle.backends.tvm.kernels.emitter import Emitter
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.entry_functions import compile
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, f32, u8

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
CUDA = DEVICES["cuda"]

pytestmark = needs_tvm


@dataclass(frozen=True)
class Written(Kernel):
    """A kernel that a test writes; `code` names it."""

    code: str

    def emit(self, k: Emitter) -> None:
        KERNELS[self.code](k)


def _reversed(k: Emitter) -> None:
    """y[i] = x[31 - i] through registers, which therefore are shared."""
    x, y = (k.view(k.pointer(n, f32), [k.index(32)]) for n in "xy")
    with k.parallel(1):
        tile = k.registers(32, f32, "tile")
        k.store(tile, [0], k.load(x, [0], 32), 32)
        with k.loop(32, "i") as i:
            k.store(y, [i], k.load(tile, [31 - i]))


def _turned_halves(k: Emitter) -> None:
    """y[i] = x[i ^ 16]"""
    x, y = (k.view(k.pointer(n, f32), [k.index(32)]) for n in "xy")
    with k.parallel(1):
        k.store(y, [0], k.shuffle([k.load(x, [0], 32)], [i ^ 16 for i in range(32)]), 32)


def _words(k: Emitter) -> None:
    """y[i] = bytes 4 i to 4 i + 3 of x as an integer, and their sum"""
    i32 = DTYPES["i32"]
    x, y = k.view(k.pointer("x", u8), [k.index(128)]), k.view(k.pointer("y", i32), [k.index(33)])
    with k.parallel(1):
        words = k.let(k.bits(k.load(x, [0], 128), i32, 32))
        k.store(y, [0], words, 32)
        k.store(y, [32], k.sum_of_lanes(words, 32, i32))


def _outside(k: Emitter) -> None:
    x, n = k.pointer("x", f32), k.size("n")
    view = k.view(x, [n])
    with k.parallel(n, "i") as i:
        k.store(view, [i + 1], k.number(1.0, f32))


def _shared_scratch(k: Emitter) -> None:
    """y[i] = x[i] through an element of a buffer, which all tasks use."""
    px, ps, py, n = (*(k.pointer(name, f32) for name in ("x", "scratch", "y")), k.size("n"))
    x, scratch, y = k.view(px, [n]), k.view(ps, [k.index(1)]), k.view(py, [n])
    with k.parallel(n, "i") as i:
        k.store(scratch, [0], k.load(x, [i]))
        k.store(y, [i], k.load(scratch, [0]))


def _intrinsic(k: Emitter) -> None:
    x = k.view(k.pointer("x", f32), [k.index(1)])
    with k.parallel(1):
        k.store(x, [0], k.llvm("treadle_one", lambda: "", "float32"))


KERNELS: dict[str, Callable[[Emitter], None]] = {
    "reversed": _reversed,
    "turned_halves": _turned_halves,
    "words": _words,
    "outside": _outside,
    "shared_scratch": _shared_scratch,
    "intrinsic": _intrinsic,
}


def with_limits(**limits: Any) -> Device:
    return Device.of("cuda", replace(CUDA.limits, **limits))


def launched(code: str, *arrays: np.ndarray[Any, Any], sizes: tuple[int, ...] = (), device: Device = CUDA) -> None:
    EmulatedKernel(device_kernel(Written(code), device)).launch([Region(a) for a in arrays], sizes)


# -- programs ----------------------------------------------------------------------------------------------------------

NAMES = [
    "softmax",
    "layer_norm",
    "linear",
    "matmul",
    "attention",
    "rows",
    "columns",
    "running",
    "argmax",
    "embedding",
    "slice",
    "strided",
    "division",
    "f16",
    "rotary",
]


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_a_program_gives_the_interpreters_results_in_any_order_of_threads(name: str) -> None:
    from tests.support.gpu_emulator.programs import program, runs

    runtime, run = runs(name)
    wanted = program(name)[2]
    bits = set()
    for runtime.seed, runtime.blocks, runtime.together in ((1, 1, 1), (2, 3, 1), (3, None, 8)):
        made = run()
        for output, expected in wanted.items():
            bound = 1e-5 * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(np.asarray(made[output], np.float64), expected, rtol=0, atol=bound)
        bits.add(b"".join(made[output].tobytes() for output in wanted))
    assert len(bits) == 1
    assert not runtime.slow


def test_every_program_is_tested() -> None:
    from tests.support.gpu_emulator.programs import PROGRAMS

    assert list(PROGRAMS) == NAMES


@needs_compiler
def test_a_small_model_on_the_emulator() -> None:
    from tests.fuzz.device_models import MODELS, check
    from treadle.models.registry import find_family

    model = find_family("gpt2").model.configure(**{**MODELS["gpt2"], "layers": 1})
    assert "slow" not in check(model, {}, "f32")


@needs_compiler
def test_the_emulator_finds_planted_faults() -> None:
    """Every fourth fault; `python -m tests.support.gpu_emulator.faults` plants them all."""
    from tests.support.gpu_emulator.faults import FAULTS, UNOBSERVABLE, observed

    for fault in FAULTS[::4]:
        assert bool(observed(fault)) != (fault in UNOBSERVABLE), fault


@needs_compiler
@pytest.mark.parametrize("name", ["softmax", "attention"])
def test_the_slow_form_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without shared memory, each thread runs a task of its own."""
    from tests.support.gpu_emulator.programs import build

    monkeypatch.setattr(tvm_backend, "isa_of", lambda _: with_limits(shared=0))
    exe, inputs, wanted = build(name)
    assert "one task for each thread, because of `registers`" in exe.source
    for output, made in exe(**inputs).items():
        np.testing.assert_allclose(made, wanted[output], rtol=0, atol=1e-5)


# -- words -------------------------------------------------------------------------------------------------------------


@needs_compiler
def test_words_across_lanes() -> None:
    x = np.arange(32, dtype=np.float32)
    for code, expected in (("reversed", x[::-1]), ("turned_halves", np.roll(x, 16))):
        y = np.full(32, np.nan, np.float32)
        launched(code, x, y)
        np.testing.assert_array_equal(y, expected)
    bytes = np.random.default_rng(0).integers(0, 256, 128).astype(np.uint8)
    y = np.zeros(33, np.int32)
    launched("words", bytes, y)
    np.testing.assert_array_equal(y, [*bytes.view(np.int32), bytes.view(np.int32).sum(dtype=np.int32)])


def test_registers_are_shared_if_scalars_and_vectors_access_them() -> None:
    made = device_kernel(Softmax(False, "f32"), CUDA)
    assert [memory.name for memory in made.group_kernel.shared] == ["x_tail_0", "y_made_0"]
    assert made.group_kernel.shared_bytes == 2 * 32 * 4
    assert re.search(r"TREADLE_PRIVATE\(float, acc_0, 4\)", made.body)


def test_a_barrier_is_between_accesses_of_different_threads() -> None:
    lines = [line.strip() for line in device_kernel(Written("reversed"), CUDA).body.splitlines()]
    stored = next(i for i, line in enumerate(lines) if line.startswith("tile_0[lane] ="))
    read = next(i for i, line in enumerate(lines) if "tile_0[31 - i_0]" in line)
    assert "TREADLE_BARRIER;" in lines[stored:read]
    assert "TREADLE_BARRIER" not in device_kernel(Written("reversed"), CUDA.slow).body


@needs_compiler
def test_an_access_outside_an_array_is_found() -> None:
    with pytest.raises(EmulatorError, match=r"index out of range: x_0, 3 of 3, in thread 0"):
        launched("outside", np.zeros(3, np.float32), sizes=(3,))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_word_that_a_device_lacks_is_refused_by_name() -> None:
    with pytest.raises(LackingWord, match=r"the device lacks the word `llvm`\n.*the function treadle_one is LLVM text"):
        device_kernel(Written("intrinsic"), CUDA)


def test_a_program_is_refused_with_the_op_the_word_and_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_backend, "isa_of", lambda _: with_limits(lacks=frozenset({"f64"})))
    graph = graph_of(lambda b: b.linear(b.input("x", "f64[B, 40]"), b.input("w", "f64[8, 40]")))
    with pytest.raises(LackingWord) as caught:
        find_backend("tvm").compile(graph, Target("cuda"), {})
    assert "linear does not run on cuda: its kernel contraction uses the word `pointer`" in str(caught.value)
    assert "test_device_kernels.py" in str(caught.value)


def test_the_source_of_a_target_has_the_text_of_its_kernels() -> None:
    graph = graph_of(lambda b: b.softmax(b.input("x", "f32[B, 70]")))
    source = compile(graph, backend="tvm", target="h100").source
    assert "for the tvm backend on cuda: 1 kernels." in source
    assert "TREADLE_KERNEL(32) softmax_f32(" in source
