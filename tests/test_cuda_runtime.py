"""The runtime of NVIDIA GPUs on a stand-in for the driver: copies, launches, graphs, waits, and failures."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import needs_tvm
from tests.support.gpu_emulator.emulation import compiler
from tests.support.stand_in_driver import StandInDriver
from treadle.backends.tvm.kernels.devices.cuda_compiler import missing_compiler
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.runtimes import cuda_driver, cuda_runtime
from treadle.backends.tvm.runtimes import runtime as runtimes
from treadle.backends.tvm.runtimes.cuda_driver import CudaDriver
from treadle.backends.tvm.runtimes.cuda_runtime import CudaRuntime, open_runtime
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceLostError
from treadle.backends.tvm.runtimes.launch_table import Argument, Launch
from treadle.backends.tvm.runtimes.runtime import register_runtime
from treadle.backends.tvm.spaces import Arena, Input, Output
from treadle.entry_functions import compile
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

pytestmark = [needs_tvm, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]

ROWS, WIDE = 5, 100
NBYTES = 4 * ROWS * WIDE


@pytest.fixture
def driver() -> Iterator[StandInDriver]:
    """A driver. After each test, the thread's own context is current again, also after a failure."""
    driver = StandInDriver()
    yield driver
    assert driver.depth == 0


def _softmax_of_softmax() -> list[Launch]:
    """Return two launches: from the input to the arena at an offset, and from there to the output."""
    sizes = (ROWS, 1, *[WIDE] * 5)
    between = Argument(Arena(), 256, NBYTES + 4 * WIDE, WIDE)
    return [
        Launch("softmax", 3, (Argument(Input("x"), 0, NBYTES), between), sizes),
        Launch("softmax", 2, (between, Argument(Output("y"), 0, NBYTES)), sizes),
    ]


def _prepared(runtime: CudaRuntime) -> tuple[Any, dict[Any, Any]]:
    memory = runtime.memory
    buffers = {
        Input("x"): memory.allocate(NBYTES),
        Arena(): memory.allocate(256 + NBYTES + 4 * WIDE),
        Output("y"): memory.allocate(NBYTES),
    }
    kernel = device_kernel(Softmax(False, "f32"), runtime.device, "kernel_of_softmax")
    loaded = runtime.load({"softmax": kernel, "never": kernel})
    return loaded.prepare(_softmax_of_softmax(), buffers), buffers


def _softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    made = np.exp(x - x.max(-1, keepdims=True))
    return made / made.sum(-1, keepdims=True)


@pytest.mark.parametrize("graphs", [True, False])
def test_launches_run_in_order_and_only_reads_wait(driver: StandInDriver, graphs: bool) -> None:
    runtime = driver.runtime(graphs=graphs)
    prepared, buffers = _prepared(runtime)
    rng = np.random.default_rng(0)
    for _ in range(4):
        x = rng.standard_normal((ROWS, WIDE)).astype(np.float32)
        wanted = _softmax(_softmax(x.astype(np.float64)))
        runtime.memory.write(buffers[Input("x")], x)
        x[:] = np.nan  # the caller may change the array at once
        prepared.run()
        made = runtime.memory.read(buffers[Output("y")], NBYTES).view(np.float32).reshape(ROWS, WIDE)
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6)
    one = ["to device", "launch", "launch", "to host", "wait"]
    replay = ["to device", "graph", "to host", "wait"]
    captured = ["to device", "launch captured", "launch captured", *replay[1:]]
    assert driver.log == (one + captured + 2 * replay if graphs else 4 * one)
    assert driver.count("cuGraphInstantiateWithFlags") == driver.count("cuGraphDestroy") == int(graphs)


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("capability", [(9, 0), (99, 0)])
def test_kernels_are_compiled_for_the_gpu_or_to_ptx(capability: tuple[int, int]) -> None:
    """A GPU that is later than NVRTC gets PTX."""
    images = []

    def compiler(text: str, capability: tuple[int, int]) -> bytes:
        images.append(cuda_runtime.image(text, capability))
        return images[-1]

    prepared, _ = _prepared(StandInDriver(capability=capability).runtime(compiler=compiler))
    prepared.run()
    (image,) = images
    assert image.startswith(b"\x7fELF") if capability == (9, 0) else b".entry kernel_of_softmax(" in image


def test_a_program_runs_by_its_target(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m tests.fuzz.runtime_models --target cuda` runs whole models, with sessions."""
    from tests.support.gpu_emulator.programs import program_inputs

    monkeypatch.setattr(runtimes, "_RUNTIMES", {})
    monkeypatch.setattr(runtimes, "_OPEN", {})
    register_runtime("cuda", lambda _: driver.runtime())
    graph, inputs, wanted = program_inputs("embedding")
    exe = compile(graph, backend="tvm", target="cuda")
    for number in range(3):
        for output, made in exe(**inputs).items():
            np.testing.assert_allclose(made, wanted[output], rtol=0, atol=1e-5)
        assert driver.count("cuStreamSynchronize") == number + 1
    assert driver.count("cuMemcpyHtoDAsync_v2") == 3 * len(inputs)
    assert driver.count("cuLaunchKernel") == 2 * len(exe.executable.launch_table(B=5, S=37).launches)
    assert driver.count("cuGraphLaunch") == 2


def test_everything_is_released(driver: StandInDriver) -> None:
    runtime = driver.runtime()
    prepared, buffers = _prepared(runtime)
    prepared.run(), prepared.run()
    runtime.memory.read(buffers[Output("y")], 4)
    assert runtime.memory.used == driver.used == runtime.memory.peak == 4 * NBYTES - NBYTES + 256 + 4 * WIDE
    del buffers
    assert driver.used > 0  # the launches hold their buffers
    del prepared
    gc.collect()
    assert runtime.memory.used == driver.used == 0
    assert driver.count("cuGraphExecDestroy") == driver.count("cuModuleUnload") == 1
    del runtime
    gc.collect()
    assert driver.handles == 0


def test_copies_through_little_pinned_memory(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runtime, "STAGING", 1000)
    memory = driver.runtime().memory
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    first, second = memory.allocate(5100), memory.allocate(5000)
    memory.fill(first, 7, 5100)
    memory.write(first, data, at=100)
    memory.write(first, np.arange(20, dtype=np.int16), at=50)
    memory.copy(BufferPart(first, 4000, 1100), second, at=1000)
    data[1000:1020] = np.arange(20)
    memory.write(second, data[:1000])
    parts = memory.read_parts([BufferPart(second, 5000), BufferPart(first, 100), BufferPart(first, 0)])
    assert driver.log[-4:-1] == ["to device", "to host", "to host"]
    np.testing.assert_array_equal(parts[0], np.concatenate([data[:1000], parts[0][1000:]]))
    np.testing.assert_array_equal(parts[0][1020:], data[1020:])
    np.testing.assert_array_equal(parts[1][50:90].view(np.int16), np.arange(20))
    assert (parts[1][:50] == 7).all()
    assert parts[2].size == 0
    np.testing.assert_array_equal(memory.read(second, 10, at=4990), data[-10:])


def test_the_device_has_the_limits_that_the_driver_reports() -> None:
    runtime = StandInDriver(capability=(6, 1)).runtime()
    limits = runtime.device.limits
    assert (limits.language, limits.group, limits.shared, limits.groups) == ("cuda", 32, 49152, 2**31 - 1)
    assert not limits.matrix_unit
    assert repr(runtime) == "<stand-in GPU, compute capability 6.1>"


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_buffer_that_does_not_fit_is_refused_with_the_bytes_that_are_free() -> None:
    memory = StandInDriver(memory=10_000).runtime().memory
    held = memory.allocate(4_000)
    with pytest.raises(
        BackendError, match=r"not enough memory on the device\n.*7,000 bytes required, 6,000 bytes free"
    ):
        memory.allocate(7_000)
    assert memory.used == held.nbytes == memory.allocate(0).nbytes + 4_000


def test_no_gpu_and_no_driver_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"there is no NVIDIA GPU\n.*CUDA_ERROR_NO_DEVICE"):
        StandInDriver(devices=0).runtime()
    driver = StandInDriver()
    monkeypatch.setattr(cuda_runtime, "driver_library", lambda: driver.library)
    assert open_runtime(Target("cuda:0")).name == "stand-in GPU"
    with pytest.raises(BackendError, match=r"there is no NVIDIA GPU 1\n.*the driver lists 1"):
        open_runtime(Target("cuda:1"))
    with pytest.raises(BackendError, match=r"the GPU of this machine is not h100\n.*stand-in GPU"):
        open_runtime(Target("h100"))
    monkeypatch.undo()
    monkeypatch.setattr(cuda_driver.sys, "platform", "win32")
    with pytest.raises(BackendError, match="there is no NVIDIA driver on this machine"):
        open_runtime(Target("cuda"))


def test_an_old_driver_is_refused(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = StandInDriver(version=11040).runtime()
    driver.fail("cuModuleLoadData", 222)
    with pytest.raises(
        BackendError, match=r"(?s)UNSUPPORTED_PTX_VERSION; the driver supports CUDA 11.4.*a newer driver"
    ):
        _prepared(runtime)
    monkeypatch.setattr(cuda_driver, "FUNCTIONS", {**cuda_driver.FUNCTIONS, "cuLaunchKernelOfTomorrow": ()})
    with pytest.raises(BackendError, match=r"too old\n.*a driver without cuLaunchKernelOfTomorrow"):
        CudaDriver(driver.library)


def test_a_kernel_that_accesses_other_memory_loses_the_device(driver: StandInDriver) -> None:
    runtime = driver.runtime()
    prepared, buffers = _prepared(runtime)
    kernel = device_kernel(Softmax(False, "f32"), runtime.device, "kernel_of_softmax")
    outside = Argument(Output("y"), 0, NBYTES, 3 * NBYTES)
    broken = Launch("softmax", 3, (Argument(Input("x"), 0, NBYTES), outside), (ROWS, 1, *[WIDE] * 5))
    runtime.load({"softmax": kernel}).prepare([broken], buffers).run()
    for _ in range(2):  # the error stays
        with pytest.raises(DeviceLostError, match=r"the GPU was lost\n.*CUDA_ERROR_ILLEGAL_ADDRESS, an illegal memory"):
            runtime.memory.read(buffers[Output("y")], 4)
    with pytest.raises(DeviceLostError):
        prepared.run()


def test_a_failed_capture_leaves_the_stream_usable(driver: StandInDriver) -> None:
    runtime = driver.runtime()
    prepared, buffers = _prepared(runtime)
    runtime.memory.fill(buffers[Input("x")], 0, NBYTES)
    prepared.run()
    driver.fail("cuLaunchKernel", 1)
    with pytest.raises(BackendError, match="cuLaunchKernel: error 1"):
        prepared.run()
    prepared.run()
    made = runtime.memory.read(buffers[Output("y")], NBYTES).view(np.float32)
    np.testing.assert_allclose(made, np.full(ROWS * WIDE, 1 / WIDE), rtol=1e-6)
