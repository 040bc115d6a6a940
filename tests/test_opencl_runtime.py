"""The runtime of OpenCL devices, on PoCL: copies, launches, the form of kernels, and failures."""

from __future__ import annotations

import gc
import re
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of, needs_tvm
from tests.error_texts import raises_freely
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, device_kernel
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.runtimes import opencl_runtime
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceLostError
from treadle.backends.tvm.runtimes.launch_table import Argument, Launch
from treadle.backends.tvm.runtimes.opencl_runtime import OpenclRuntime, form_of, open_runtime
from treadle.backends.tvm.spaces import Arena, Input, Output
from treadle.entry_functions import compile
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

cl = pytest.importorskip("pyopencl")


def _reason() -> str:
    try:
        open_runtime(Target("opencl"))
    except BackendError as error:
        return str(error)
    return ""


REASON = _reason()
pytestmark = [needs_tvm, pytest.mark.skipif(bool(REASON), reason=REASON)]

ROWS, WIDE = 5, 100
NBYTES = 4 * ROWS * WIDE


@pytest.fixture(scope="module")
def runtime() -> OpenclRuntime:
    return open_runtime(Target("opencl"))


def test_launches_on_offsets_of_buffers(runtime: OpenclRuntime) -> None:
    """Softmax of softmax, by the arena at an offset."""
    memory, sizes = runtime.memory, (ROWS, 1, *[WIDE] * 5)
    between = Argument(Arena(), 256, NBYTES + 4 * WIDE, WIDE)
    launches = [
        Launch("softmax", 3, (Argument(Input("x"), 0, NBYTES), between), sizes),
        Launch("softmax", 1, (between, Argument(Output("y"), 0, NBYTES)), sizes),
    ]
    before, nbytes = memory.used, {Input("x"): NBYTES, Arena(): 256 + NBYTES + 4 * WIDE, Output("y"): NBYTES}
    buffers: dict[Any, Any] = {space: memory.allocate(size) for space, size in nbytes.items()}
    kernel = device_kernel(Softmax(False, "f32"), runtime.device, "softmax")
    prepared = runtime.load({"softmax": kernel, "never": kernel}).prepare(launches, buffers)
    assert runtime.program("another", kernel) is runtime.program("softmax", kernel)
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = rng.standard_normal((ROWS, WIDE)).astype(np.float32)
        wanted = np.exp(x.astype(np.float64))
        wanted = np.exp(wanted / wanted.sum(-1, keepdims=True))
        memory.write(buffers[Input("x")], x)
        x[:] = np.nan  # the caller may change the array at once
        prepared.run()
        made = memory.read(buffers[Output("y")], NBYTES).view(np.float32).reshape(ROWS, WIDE)
        np.testing.assert_allclose(made, wanted / wanted.sum(-1, keepdims=True), rtol=0, atol=1e-6)
    assert memory.used == before + sum(nbytes.values()) <= memory.peak
    del buffers
    gc.collect()
    assert memory.used == before


def test_a_program_runs_by_its_target() -> None:
    """`python -m tests.fuzz.runtime_models` runs whole models, with sessions."""
    from tests.support.gpu_emulator.programs import program_inputs

    graph, inputs, wanted = program_inputs("embedding")
    exe = compile(graph, backend="tvm", target="opencl")
    for _ in range(2):
        for output, made in exe(**inputs).items():
            np.testing.assert_allclose(made, wanted[output], rtol=0, atol=1e-5)


def test_a_kernel_and_a_lane_function_have_different_names() -> None:
    """C has no two functions of one name."""
    graph = graph_of(lambda b: b.logical_and(b.input("x", "bool[B, 40]"), b.input("y", "bool[B, 40]")))
    (kernel,) = compile(graph, backend="tvm", target="opencl").executable.device_kernels.values()
    assert re.findall(r"(treadle_logical_and\w*)\((?:\n|bool)", kernel.text) == [
        "treadle_logical_and",
        "treadle_logical_and_kernel",
    ]


def test_functions_of_c_have_one_name_for_all_types() -> None:
    graph = graph_of(lambda b: b.mod(b.input("x", "f32[B]"), b.input("y", "f32[B]")))
    exe = compile(graph, backend="tvm", target="opencl")
    (made,) = exe(x=np.array([7.5, -7.5], np.float32), y=np.array([2, 2], np.float32)).values()
    np.testing.assert_array_equal(made, np.array([1.5, 0.5], np.float32))


def test_copies(runtime: OpenclRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = runtime.memory
    monkeypatch.setattr(opencl_runtime, "_BLOCKING", 3000)
    monkeypatch.setattr(opencl_runtime, "_PENDING", 3)
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    first, second = memory.allocate(5100), memory.allocate(5000)
    memory.fill(first, 7, 5100)
    memory.write(first, data, at=100)
    for n in range(20):
        memory.write(first, np.asarray([n], np.int16), at=50 + 2 * n)
    memory.copy(BufferPart(first, 4000, 1100), second, at=1000)
    memory.write(second, data[:1000])
    parts = memory.read_parts(
        [BufferPart(second, 5000), BufferPart(first, 100), BufferPart(first, 0), BufferPart(second, 10, 4990)]
    )
    np.testing.assert_array_equal(parts[0], data)
    np.testing.assert_array_equal(parts[1][50:90].view(np.int16), np.arange(20))
    assert (parts[1][:50] == 7).all()
    assert parts[2].size == memory.allocate(0).nbytes == 0
    np.testing.assert_array_equal(parts[3], data[-10:])


def test_the_form_of_kernels_depends_on_the_device(runtime: OpenclRuntime) -> None:
    device = DEVICES["opencl"]
    assert form_of(device, is_cpu=False, threads=256) == device
    assert form_of(device, is_cpu=True, threads=4096) == device.slow
    assert form_of(device, is_cpu=False, threads=16).threads == 16
    is_cpu = runtime.context.devices[0].type == cl.device_type.CPU
    assert runtime.device.group == (1 if is_cpu else 32)
    assert runtime.device.limits.largest == runtime.context.devices[0].max_mem_alloc_size


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_buffer_that_does_not_fit_is_refused(runtime: OpenclRuntime) -> None:
    with pytest.raises(
        BackendError, match=r"not enough memory on the device\n.*1,099,511,627,776 bytes required, .* free"
    ):
        runtime.memory.allocate(1 << 40)


def test_a_kernel_that_does_not_build_is_reported_with_the_compilers_message(runtime: OpenclRuntime) -> None:
    class Damaged(DeviceKernel):
        text = "__kernel void softmax(int x) { x = undeclared; }"  # type: ignore[assignment]

    kernel = device_kernel(Softmax(False, "f32"), runtime.device, "softmax")
    with raises_freely(BackendError, match=r"(?s)OpenCL does not build the kernel damaged for .*undeclared") as caught:
        runtime.load({"damaged": Damaged(kernel.group_kernel)}).prepare([Launch("damaged", 1, (), ())], {})
    assert isinstance(caught.value.__cause__, cl.Error)


def test_a_lost_device_has_an_error_of_its_own(runtime: OpenclRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(cl.Error):
        code = cl.status_code.DEVICE_NOT_AVAILABLE

    monkeypatch.setattr(runtime, "name", "gpu")
    with pytest.raises(DeviceLostError, match="was lost"), runtime.errors("launch a kernel"):
        raise Lost("clFinish failed")


def test_a_missing_package_and_a_missing_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cl, "get_platforms", list)
    with pytest.raises(
        BackendError, match=r"there is no device for target opencl\n(.*\n)*.*apt install pocl-opencl-icd"
    ):
        open_runtime(Target("opencl"))
    monkeypatch.setitem(__import__("sys").modules, "pyopencl", None)
    with pytest.raises(BackendError, match=r"needs the package pyopencl\n.*pip install .*\[opencl\]"):
        open_runtime(Target("opencl"))
