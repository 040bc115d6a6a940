"""The runtime of NVIDIA GPUs, by the CUDA driver's interface (`cuda_driver`), without another package.

A runtime uses the primary context of a GPU, as PyTorch does, and one stream of its own, so copies and launches run in
the order of the calls. The host copies through pinned memory and waits only to read. Launches whose buffers are bound
run as single launches the first time, and are captured as a CUDA graph the second time.

Tests run it on a stand-in for the driver, a C library on the host. It was never run on hardware.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from treadle.backends.refusals import other_gpu
from treadle.backends.tvm.kernels.devices.cuda_compiler import architecture_of, compile_cuda, compile_ptx
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.runtimes.cuda_driver import (
    DRIVER_IS_OLDER,
    ELSEWHERE,
    MAJOR,
    MAX_GRID,
    MAX_SHARED,
    MINOR,
    NON_BLOCKING,
    OUT_OF_MEMORY,
    RELAXED,
    WARP,
    CudaDriver,
    driver_library,
)
from treadle.backends.tvm.runtimes.device_memory import (
    Array,
    BufferPart,
    CountedMemory,
    DeviceBuffer,
    failed_allocation,
)
from treadle.backends.tvm.runtimes.launch_table import Launch
from treadle.backends.tvm.spaces import Space
from treadle.ir.device_limits import DeviceLimits
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

STAGING = 32 << 20
"""Bytes of pinned memory through which the host copies."""

Compiler = Callable[[str, tuple[int, int]], bytes]
"""A function that compiles a kernel's text for a compute capability. It returns an image that the driver loads: machine
code, or PTX."""


class CudaMemory(CountedMemory):
    """The memory of a GPU, and the stream of its copies, which it owns. See
    `treadle.backends.tvm.runtimes.device_memory.DeviceMemory`.
    """

    def __init__(self, driver: CudaDriver, context: int, stream: int) -> None:
        super().__init__()
        self._driver, self._context, self._stream = driver, context, stream
        self._pinned: Array | None = None
        self._filled = 0  # bytes of pinned memory that copies may still access
        weakref.finalize(self, driver.release, "cuStreamDestroy_v2", stream, context).atexit = False

    @property
    def free(self) -> int | None:
        with self._within():
            return self._free()

    def allocate(self, nbytes: int) -> DeviceBuffer:
        address = ctypes.c_uint64()
        with self._within():
            number = self._driver.result("cuMemAlloc_v2", ctypes.byref(address), max(1, nbytes))
            if number == OUT_OF_MEMORY:
                raise failed_allocation(nbytes, self._free())
        if number:
            raise BackendError("NVIDIA's driver failed", received=f"cuMemAlloc: {self._driver.describe(number)}")
        return self._buffer(address.value, nbytes)

    def write(self, buffer: DeviceBuffer, data: Array, at: int = 0) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        with self._within():
            for begin in range(0, flat.size, STAGING):
                piece = flat[begin : begin + STAGING]
                if self._filled + piece.size > STAGING:
                    self._wait()
                pinned = self._reserve(piece.size)
                pinned[:] = piece
                to = buffer.handle + at + begin
                self._driver.call("cuMemcpyHtoDAsync_v2", to, pinned.ctypes.data, piece.size, self._stream)

    def read(self, buffer: DeviceBuffer, nbytes: int, at: int = 0) -> Array:
        return self.read_parts([BufferPart(buffer, nbytes, at)])[0]

    def read_parts(self, parts: Sequence[BufferPart]) -> list[Array]:
        """See `DeviceMemory`. Parts that pinned memory cannot hold are copied without it."""
        copies = []
        with self._within():
            for part in parts:
                fits = self._filled + part.nbytes <= STAGING
                to = self._reserve(part.nbytes) if fits else np.empty(part.nbytes, np.uint8)
                copies.append((to, fits))
                if part.nbytes:
                    source = part.buffer.handle + part.at
                    self._driver.call("cuMemcpyDtoHAsync_v2", to.ctypes.data, source, part.nbytes, self._stream)
            self._wait()
        return [to.copy() if pinned else to for to, pinned in copies]

    def copy(self, source: BufferPart, to: DeviceBuffer, at: int = 0) -> None:
        if source.nbytes:
            begin = source.buffer.handle + source.at
            with self._within():
                self._driver.call("cuMemcpyDtoDAsync_v2", to.handle + at, begin, source.nbytes, self._stream)

    def fill(self, buffer: DeviceBuffer, byte: int, nbytes: int, at: int = 0) -> None:
        if nbytes:
            with self._within():
                self._driver.call("cuMemsetD8Async", buffer.handle + at, byte, nbytes, self._stream)

    def _within(self) -> AbstractContextManager[None]:
        return self._driver.within(self._context)

    def _free(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def _wait(self) -> None:
        """Wait for all launches and copies, after which pinned memory is free again."""
        self._driver.call("cuStreamSynchronize", self._stream)
        self._filled = 0

    def _reserve(self, nbytes: int) -> Array:
        """Return pinned memory that no copy accesses."""
        if self._pinned is None:
            address = self._driver.handle("cuMemAllocHost_v2", STAGING)
            self._pinned = np.ctypeslib.as_array((ctypes.c_ubyte * STAGING).from_address(address))
            weakref.finalize(self, self._driver.release, "cuMemFreeHost", address, self._context).atexit = False
        begin, self._filled = self._filled, self._filled + nbytes
        return self._pinned[begin : begin + nbytes]

    def _released(self, handle: Any, nbytes: int) -> None:
        self._driver.release("cuMemFree_v2", handle, self._context)
        super()._released(handle, nbytes)


class _BoundLaunch:
    """A launch with the memory of its arguments, to which the driver gets pointers."""

    def __init__(self, function: int, kernel: DeviceKernel, launch: Launch, buffers: Mapping[Space, DeviceBuffer]):
        words = []
        for argument in launch.arguments:
            words += [buffers[argument.space].handle + argument.begin, argument.at]
        words += launch.sizes
        self._words = (ctypes.c_longlong * len(words))(*words)
        first = ctypes.addressof(self._words)
        self._pointers = (ctypes.c_void_p * len(words))(*[first + 8 * n for n in range(len(words))])
        threads = kernel.group_kernel.device.threads
        grid = (launch.blocks, 1, 1, threads, 1, 1, 0)
        self.arguments = (function, *grid)

    def start(self, driver: CudaDriver, stream: int) -> None:
        driver.call("cuLaunchKernel", *self.arguments, stream, self._pointers, None)


class CudaLaunches:
    """Launches whose buffers are bound. See `treadle.backends.tvm.runtimes.runtime.PreparedLaunches`."""

    def __init__(self, runtime: CudaRuntime, launches: Sequence[_BoundLaunch], keep: Any) -> None:
        self._runtime, self._launches, self._keep = runtime, launches, keep
        self._has_run = False
        self._graph = 0

    def run(self) -> None:
        """Enqueue the launches: one after the other the first time, as a graph later. A plan that runs once would not
        repay the time to build a graph.
        """
        if not self._launches:
            return
        driver, stream = self._runtime.driver, self._runtime.stream
        with driver.within(self._runtime.context):
            if self._has_run and not self._graph and self._runtime.graphs:
                self._graph = self._captured(driver, stream)
            if self._graph:
                driver.call("cuGraphLaunch", self._graph, stream)
            else:
                self._start_all(driver, stream)
        self._has_run = True

    def _start_all(self, driver: CudaDriver, stream: int) -> None:
        for launch in self._launches:
            launch.start(driver, stream)

    def _captured(self, driver: CudaDriver, stream: int) -> int:
        """Return the launches as an instantiated graph."""
        graph = ctypes.c_void_p()
        driver.call("cuStreamBeginCapture_v2", stream, RELAXED)
        try:
            try:
                self._start_all(driver, stream)
            finally:  # a stream in capture mode accepts nothing else
                driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
            made = driver.handle("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            if graph.value:
                driver.release("cuGraphDestroy", graph.value, self._runtime.context)
        weakref.finalize(self, driver.release, "cuGraphExecDestroy", made, self._runtime.context).atexit = False
        return made


class _Module:
    """A kernel that the driver has loaded. It is unloaded when the last reference to it is gone."""

    def __init__(self, runtime: CudaRuntime, name: str, kernel: DeviceKernel, data: bytes) -> None:
        driver, module = runtime.driver, ctypes.c_void_p()
        number = driver.result("cuModuleLoadData", ctypes.byref(module), data)
        if number:
            raise BackendError(
                f"NVIDIA's driver does not load the kernel {name}",
                received=f"{driver.describe(number)}; the driver supports CUDA {driver.version}",
                hint="a newer driver of NVIDIA's" if number in DRIVER_IS_OLDER else None,
            )
        weakref.finalize(self, driver.release, "cuModuleUnload", module.value or 0, runtime.context).atexit = False
        self.function = driver.handle("cuModuleGetFunction", module, kernel.group_kernel.name.encode())


class CudaKernels:
    """Kernels, which are compiled when they are first launched. See
    `treadle.backends.tvm.runtimes.runtime.LoadedKernels`.
    """

    def __init__(self, runtime: CudaRuntime, kernels: Mapping[str, DeviceKernel]) -> None:
        self._runtime, self._kernels = runtime, kernels
        self._modules: dict[str, _Module] = {}

    def prepare(self, launches: Sequence[Launch], buffers: Mapping[Space, DeviceBuffer]) -> CudaLaunches:
        names = dict.fromkeys(launch.kernel for launch in launches)
        absent = {name: self._kernels[name] for name in names if name not in self._modules}
        self._modules |= self._runtime.modules(absent)
        made = [
            _BoundLaunch(self._modules[launch.kernel].function, self._kernels[launch.kernel], launch, buffers)
            for launch in launches
        ]
        return CudaLaunches(self._runtime, made, (dict(self._modules), dict(buffers)))


class CudaRuntime:
    """A GPU of this machine. See `treadle.backends.tvm.runtimes.runtime.Runtime`.

    graphs   True if launches that run again are captured as graphs
    compiler compiles a kernel's text
    """

    def __init__(
        self, driver: CudaDriver, number: int = 0, *, graphs: bool = True, compiler: Compiler | None = None
    ) -> None:
        """Open GPU `number` of those that the driver lists. Raises BackendError if there is none."""
        count = driver.integer("cuDeviceGetCount")
        if number >= count:
            what = f"there is no NVIDIA GPU {number}" if count else "there is no NVIDIA GPU"
            raise BackendError(what, received=f"the driver lists {count}", hint=ELSEWHERE)
        device = driver.integer("cuDeviceGet", number)
        name = ctypes.create_string_buffer(200)
        driver.call("cuDeviceGetName", name, len(name), device)
        self.driver, self.graphs, self.name = driver, graphs, name.value.decode(errors="replace")
        self.lock = threading.RLock()

        def attribute(which: int) -> int:
            return driver.integer("cuDeviceGetAttribute", which, device)

        self.capability = attribute(MAJOR), attribute(MINOR)
        limits = DeviceLimits(
            "cuda",
            group=attribute(WARP),
            shared=attribute(MAX_SHARED),
            matrix_unit=self.capability >= (7, 0),
            groups=attribute(MAX_GRID),
        )
        self.device = Device.of("cuda", limits)
        self.context = driver.handle("cuDevicePrimaryCtxRetain", device)
        with driver.within(self.context):
            self.stream = driver.handle("cuStreamCreate", NON_BLOCKING)
        self.memory = CudaMemory(driver, self.context, self.stream)
        self._compiler = compiler or image
        self._modules: weakref.WeakValueDictionary[str, _Module] = weakref.WeakValueDictionary()  # by text

    def load(self, kernels: Mapping[str, DeviceKernel]) -> CudaKernels:
        """See `Runtime`. `prepare` compiles kernels, and raises the errors of the compiler and the driver."""
        return CudaKernels(self, kernels)

    def modules(self, kernels: Mapping[str, DeviceKernel]) -> dict[str, _Module]:
        """Compile and load kernels. Kernels with the same text are loaded once."""
        loaded = {kernel.text: self._modules.get(kernel.text) for kernel in kernels.values()}
        absent = {kernel.text: (name, kernel) for name, kernel in kernels.items() if loaded[kernel.text] is None}
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            images = list(pool.map(self._compiled, absent, absent.values()))
        with self.driver.within(self.context):
            made = {text: _Module(self, *each, data) for (text, each), data in zip(absent.items(), images, strict=True)}
        self._modules.update(made)
        return {name: loaded[kernel.text] or made[kernel.text] for name, kernel in kernels.items()}

    def _compiled(self, text: str, named: tuple[str, DeviceKernel]) -> bytes:
        try:
            return self._compiler(text, self.capability)
        except BackendError as error:
            error.within = f"the kernel {named[0]}"
            raise

    def __repr__(self) -> str:
        return f"<{self.name}, compute capability {self.capability[0]}.{self.capability[1]}>"


def image(text: str, capability: tuple[int, int]) -> bytes:
    """Return a kernel for a GPU: machine code if NVRTC supports its architecture, else PTX of the latest one below.

    Raises BackendError, with the compiler's message, if the text is refused, and if NVRTC is not installed.
    """
    architecture = architecture_of(capability)
    if architecture == f"sm_{capability[0]}{capability[1]}":
        return compile_cuda(text, architecture).cubin
    return compile_ptx(text, architecture).encode()


def open_runtime(target: Target) -> CudaRuntime:
    """Return the runtime of a target's GPU. Raises BackendError, with what to install, if there is no driver or GPU, or
    if the target names another GPU.
    """
    runtime = CudaRuntime(CudaDriver(driver_library()), target.index or 0)
    if (other := other_gpu(target, runtime.name)) is not None:
        raise other
    return runtime
