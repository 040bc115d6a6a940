"""Kernels in the Metal Shading Language: their text as C++ on the emulator, and refusals."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.backend_checks import graph_of, needs_tvm
from tests.support.gpu_emulator.emulation import EmulatedKernel, EmulatorError, Region, compiler
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.runtimes.runtime import find_runtime
from treadle.entry_functions import compile
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
pytestmark = needs_tvm

METAL = DEVICES["metal"]


@needs_compiler
def test_a_program_gives_the_interpreters_results() -> None:
    """`python -m tests.fuzz.device_models --target metal` runs whole models."""
    from tests.support.gpu_emulator.emulator_runtime import runtime_of
    from tests.support.gpu_emulator.programs import build

    exe, inputs, wanted = build("rotary", "metal")
    for runtime_of(exe).seed, runtime_of(exe).blocks in ((1, 1), (2, 3)):
        for output, made in exe(**inputs).items():
            np.testing.assert_allclose(made, wanted[output], rtol=0, atol=1e-5)


def test_numbers_are_one_structure_after_the_buffers() -> None:
    written = device_kernel(Softmax(False, "f32"), METAL, "softmax")
    assert re.search(r"struct softmax_numbers \{\n  treadle_i64 x_0_at;\n  treadle_i64 y_0_at;", written.body)
    assert "TREADLE_GLOBAL(float) y_0 [[buffer(1)]]" in written.body
    assert "constant softmax_numbers& numbers [[buffer(2)]]" in written.body
    assert "double" not in written.text


@needs_compiler
def test_a_64_bit_integer_is_exchanged_in_two_halves() -> None:
    from tests.support.gpu_emulator.emulator_runtime import emulated

    graph = graph_of(lambda b: b.reduce_max(b.input("x", "i64[B, 70]"), axes=(-1,)))
    x = np.random.default_rng(0).integers(-(2**62), 2**62, (5, 70))
    (made,) = emulated(compile(graph, backend="tvm", target="metal"))(x=x).values()
    np.testing.assert_array_equal(made, x.max(-1))


@needs_compiler
def test_an_access_outside_an_array_is_found() -> None:
    kernel = EmulatedKernel(device_kernel(Softmax(False, "f32"), METAL))
    x = np.zeros((2, 32), np.float32)
    with pytest.raises(EmulatorError, match=r"index out of range: x_0, 64 of 64"):
        kernel.launch([Region(x), Region(np.empty_like(x))], [3, 1, *[32] * 5], blocks=1)


def test_what_metal_lacks_is_refused() -> None:
    from treadle.backends.registry import find_backend

    graph = graph_of(lambda b: b.exp(b.input("x", "f64[B, 40]")))
    with pytest.raises(LackingWord, match=r"exp does not run on metal: its kernel exp uses the word `pointer`"):
        find_backend("tvm").compile(graph, Target("metal"), {})
    with pytest.raises(BackendError, match=r"kernels for metal are not launched yet\n.*\n.*target=\"webgpu\""):
        find_runtime(Target("metal"))
