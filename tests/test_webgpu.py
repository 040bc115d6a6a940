"""WebGPU: the text of kernels in WGSL, the bindings of launches, and the runtime on a device."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of, needs_tvm
from tests.error_texts import raises_freely
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.devices.device import DEVICES, Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, device_kernel
from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord
from treadle.backends.tvm.kernels.devices.wgsl_kernel_text import Sharing
from treadle.backends.tvm.kernels.emitter import Emitter
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.runtimes import runtime as runtimes
from treadle.backends.tvm.runtimes import wgpu_runtime
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceBuffer, DeviceLostError, HostMemory
from treadle.backends.tvm.runtimes.launch_bindings import BufferRange, bind_launch
from treadle.backends.tvm.runtimes.launch_table import Argument, Launch
from treadle.backends.tvm.runtimes.wgpu_runtime import WgpuRuntime, open_runtime
from treadle.backends.tvm.spaces import Arena, Held, Output, Space
from treadle.entry_functions import compile
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import BackendError
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, f32, i64, u8

pytestmark = needs_tvm
WEBGPU = DEVICES["webgpu"]
TARGET = Target("webgpu")


@cache
def missing() -> str:
    """Return the reason why there is no device, or an empty text."""
    if importlib.util.find_spec("wgpu") is None:
        return "wgpu is not installed"
    try:
        runtimes.find_runtime(TARGET)
    except BackendError as error:
        return f"WebGPU has no device: {error.what}"
    return ""


@pytest.fixture
def runtime() -> WgpuRuntime:
    if missing():
        pytest.skip(missing())
    found = runtimes.find_runtime(TARGET)
    assert isinstance(found, WgpuRuntime)
    return found


@dataclass(frozen=True)
class Written(Kernel):
    """A kernel that a test writes; `code` names it."""

    code: str

    def emit(self, k: Emitter) -> None:
        KERNELS[self.code](k)


def _doubled(k: Emitter) -> None:
    """y[i] = 2 x[i] for i < n, in bytes"""
    x, y, n = k.pointer("x", u8), k.pointer("y", u8), k.size("n")
    x, y = k.view(x, [n]), k.view(y, [n])
    with k.parallel(n) as i:
        value = k.load(x, [i])
        k.store(y, [i], value + value)


def _counted(k: Emitter) -> None:
    """y[j] = x[31 - j] for each j < n[0], through registers that threads share"""
    x, n, y = k.pointer("x", f32), k.pointer("n", i64), k.pointer("y", f32)
    x, n, y = k.view(x, [32]), k.view(n, [1]), k.view(y, [32])
    with k.parallel(1), k.loop(k.load(n, [0])) as j:
        tile = k.registers(32, f32, "tile")
        k.store(tile, [0], k.load(x, [0], 32), 32)
        k.store(y, [j], k.load(tile, [31 - j]))


def _wide(k: Emitter) -> None:
    y = k.view(k.pointer("y", DTYPES["f64"]), [1])
    with k.parallel(1):
        k.store(y, [0], k.number(1.0, DTYPES["f64"]))


KERNELS: dict[str, Callable[[Emitter], None]] = {"doubled": _doubled, "counted": _counted, "wide": _wide}


def written(code: str, device: Device = WEBGPU) -> DeviceKernel:
    return device_kernel(Written(code), device, f"treadle_{code}")


# -- text --------------------------------------------------------------------------------------------------------------


def test_pointers_share_a_binding() -> None:
    kernel = device_kernel(Softmax(False, "f32"), WEBGPU)
    apart, together = kernel.text, kernel.shared_text(Sharing((0, 0), (True,)))
    assert re.findall(r"@binding\((\d)\) var<(.+?)> (\w+)", apart) == [
        ("0", "storage, read", "x_0"),
        ("1", "storage, read_write", "y_0"),
        ("2", "uniform", "numbers"),
    ]
    assert re.findall(r"@binding\((\d)\) var<(.+?)> (\w+)", together) == [
        ("0", "storage, read_write", "words_0"),
        ("1", "uniform", "numbers"),
    ]


def test_a_part_of_a_word_is_stored_by_an_atomic_operation() -> None:
    text = written("doubled").text
    assert "x_0: array<u32>" in text
    assert "y_0: array<atomic<u32>>" in text
    assert "let changed: u32 = ((atomicLoad(&y_0[at >> 2u]) >> shift) ^ bits) & 255u;" in text
    together = written("doubled").shared_text(Sharing((0, 0), (True,)))
    assert "extractBits(atomicLoad(&words_0[at >> 2u]), u32(at & 3) * 8u, 8u)" in together


def test_a_count_from_memory_that_is_written_becomes_uniform() -> None:
    """A loop with a barrier inside may depend on read-only memory, and on the result of workgroupUniformLoad."""
    assert "workgroupUniformLoad" not in written("counted").text
    text = written("counted").shared_text(Sharing((0, 0, 0), (True,)))
    (variable,) = re.findall(r"let (\w+): i32 = workgroupUniformLoad\(&\w+_cell\);", text)
    assert f"< {variable}; " in text


def test_loops_stay_loops_on_a_cpu() -> None:
    kernel = device_kernel(Softmax(False, "f32"), WEBGPU)
    assert "< 4; " in kernel.text
    kept = kernel.shared_text(keeps_loops=True)
    assert "< 4 + zero; " in kept
    assert "< 4; " not in kept


def test_a_kernel_is_not_named_as_a_lane_function_that_it_calls() -> None:
    graph = graph_of(lambda b: b.logical_and(b.input("x", "bool[B]"), b.input("y", "bool[B]")))
    executable = compile(graph, backend="tvm", target="webgpu").executable
    assert isinstance(executable, KernelExecutable)
    (kernel,) = executable.device_kernels.values()
    names = re.findall(r"fn (\w+)\(", kernel.text)
    assert len(set(names)) == len(names)
    assert kernel.group_kernel.name in names


def test_numbers_that_webgpu_lacks_are_refused_by_name() -> None:
    with pytest.raises(LackingWord, match=r"the device lacks the word `pointer`\n.*a buffer of f64 numbers"):
        written("wide")
    moved = graph_of(lambda b: b.embedding(b.input("x", "f64[7, 4]"), b.input("i", "i64[S]")))
    with pytest.raises(LackingWord, match=r"kernel gather_rows uses the word `pointer`\n.*a buffer of f64 numbers"):
        compile(moved, backend="tvm", target="webgpu")


# -- bindings ----------------------------------------------------------------------------------------------------------


def _bound(arguments: list[Argument], largest: int) -> tuple[Sharing, tuple[BufferRange, ...], tuple[int, ...]]:
    device = Device.of("webgpu", replace(WEBGPU.limits, largest=largest))
    launch = Launch("doubled", 1, tuple(arguments), (5,))
    found = bind_launch(launch, written("doubled").group_kernel, device, lambda space: space)
    return found.sharing, found.bindings, found.numbers


def test_arguments_in_one_buffer_share_a_binding() -> None:
    arguments = [Argument(Arena(), 1024, 5, 2), Argument(Arena(), 256, 5)]
    sharing, bindings, numbers = _bound(arguments, 2048)
    assert sharing == Sharing((0, 0), (True,))
    assert bindings == (BufferRange(Arena(), 256, 1024 + 8 - 256),)
    assert numbers == (768 + 2, 0, 5, 0)
    sharing, bindings, _ = _bound([arguments[0], Argument(Output("y"), 0, 5)], 2048)
    assert sharing == Sharing((0, 1), (False, True))


def test_a_range_that_is_too_large_is_bound_in_parts() -> None:
    """All parts of a buffer that is written are `read_write`: WebGPU refuses a buffer that is also bound to be read."""
    sharing, bindings, numbers = _bound([Argument(Arena(), 1024, 5, 2), Argument(Arena(), 256, 5)], 512)
    assert sharing == Sharing((1, 0), (True, True))
    assert bindings == (BufferRange(Arena(), 256, 8), BufferRange(Arena(), 1024, 8))
    assert numbers == (2, 0, 5, 0)


# -- the runtime -------------------------------------------------------------------------------------------------------


def test_memory_behaves_as_the_hosts(runtime: WgpuRuntime) -> None:
    """The same random copies and fills, at any byte, leave the same bytes."""
    rng, size = np.random.default_rng(0), 300
    memories = [runtime.memory, HostMemory()]
    used = runtime.memory.used
    pairs = [[memory.allocate(size) for memory in memories] for _ in range(2)]
    for buffers in pairs:
        for memory, buffer in zip(memories, buffers, strict=True):
            memory.fill(buffer, 0, size)
    for _ in range(60):
        at, to = rng.integers(0, size, 2).tolist()
        count = int(rng.integers(0, size - max(at, to)))
        kind, which = rng.integers(0, 3), rng.integers(0, 2)
        data = rng.integers(0, 256, count, np.uint8)
        for memory, first, second in zip(memories, *pairs, strict=True):
            if kind == 0:
                memory.write(first, data, at)
            elif kind == 1:
                memory.fill(second, 7 * int(which), count, at)
            elif abs(at - to) >= count or which:
                memory.copy(BufferPart(first, count, at), second if which else first, to)
        read = [memory.read_parts([BufferPart(b[i], size) for b in pairs]) for i, memory in enumerate(memories)]
        for a, b in zip(*read, strict=True):
            np.testing.assert_array_equal(a, b)
    assert runtime.memory.used == used + 2 * size
    del pairs, buffers, buffer, first, second, read
    assert runtime.memory.used == used


@pytest.mark.parametrize("together", [True, False])
def test_bytes_are_written_beside_others(runtime: WgpuRuntime, together: bool) -> None:
    """Blocks write the bytes of one word; the bytes around them stay."""
    x = np.arange(37, dtype=np.uint8)
    spaces: tuple[Space, Space] = (Arena(), Arena()) if together else (Held("x"), Output("y"))
    buffers: dict[Space, DeviceBuffer] = {space: runtime.memory.allocate(1024) for space in dict.fromkeys(spaces)}
    begin = 256
    runtime.memory.write(buffers[spaces[0]], x)
    runtime.memory.write(buffers[spaces[1]], np.full(64, 255, np.uint8), begin)
    arguments = (Argument(spaces[0], 0, 37), Argument(spaces[1], begin, 64, 3))
    loaded = runtime.load({"doubled": written("doubled", runtime.device)})
    loaded.prepare([Launch("doubled", 5, arguments, (37,))], buffers).run()
    made = runtime.memory.read(buffers[spaces[1]], 64, begin)
    np.testing.assert_array_equal(made, [255] * 3 + (2 * x).tolist() + [255] * 24)


def test_a_program_gives_the_interpreters_results(runtime: WgpuRuntime) -> None:
    """Halves and bf16 numbers, a softmax, and an index that is out of range."""

    def build(b: Any) -> Any:
        h = b.cast(b.add(b.input("h", "f16[B, 70]"), b.cast(b.input("g", "bf16[70]"), to="f16")), to="f32")
        return b.embedding(b.softmax(h), b.input("i", "i64[S]"))

    graph = graph_of(build)
    inputs = draw_inputs(graph, {"B": 5, "S": 3}, [0])
    exe = compile(graph, backend="tvm", target="webgpu")
    for output, expected in interpret(graph, inputs).items():
        np.testing.assert_allclose(exe(**inputs)[output], expected, rtol=0, atol=1e-6)
    with pytest.raises(BackendError, match="is outside"):
        exe(**{**inputs, "i": np.array([0, 5, 1])})
    with pytest.raises(BackendError, match="does not fit into 32 bits"):
        exe(**{**inputs, "i": np.array([0, 2**40, 1])})


def test_a_text_that_the_compiler_refuses(runtime: WgpuRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = written("doubled", runtime.device)
    monkeypatch.setattr(DeviceKernel, "shared_text", lambda *_, **__: "fn treadle_doubled( {")
    buffer = runtime.memory.allocate(256)
    launch = Launch("doubled", 1, (Argument(Arena(), 0, 4), Argument(Arena(), 0, 4)), (4,))
    with raises_freely(BackendError, match=r"cannot compile kernel doubled\n(.*\n)*.*expected"):
        runtime.load({"doubled": kernel}).prepare([launch], {Arena(): buffer})


def test_a_buffer_that_is_too_large(runtime: WgpuRuntime) -> None:
    with pytest.raises(BackendError, match=r"not enough memory on the device\n.*1,099,511,627,776 bytes required"):
        runtime.memory.allocate(2**40)


@pytest.fixture
def own(runtime: WgpuRuntime) -> WgpuRuntime:
    """A runtime of its own, which a test may lose."""
    return open_runtime(TARGET)


def test_a_lost_device(own: WgpuRuntime, runtime: WgpuRuntime) -> None:
    """Every use of it raises. Another device in this process works on."""
    buffer, other = own.memory.allocate(256), runtime.memory.allocate(256)
    own.gpu.destroy()
    runtime.memory.fill(other, 7, 4)
    assert runtime.memory.read(other, 4).tolist() == [7] * 4
    with raises_freely(DeviceLostError, match="was lost"):
        own.memory.read(buffer, 4)
    with raises_freely(DeviceLostError):
        own.memory.allocate(4)
    with raises_freely(DeviceLostError):
        own.memory.write(buffer, np.zeros(4, np.uint8))


def test_a_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(wgpu_runtime, "import_module", refused)
    with pytest.raises(BackendError, match=r"needs the package wgpu\n(.*\n)*.*webgpu"):
        open_runtime(TARGET)


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        @staticmethod
        def request_adapter_sync(**_: Any) -> None:
            return None

    module = type("wgpu", (), {"gpu": Found})
    monkeypatch.setattr(wgpu_runtime, "import_module", lambda _: module)
    with pytest.raises(BackendError, match=r"no device for target webgpu\n(.*\n)*.*mesa-vulkan-drivers"):
        open_runtime(TARGET)
