"""The runtime of OpenCL devices, by the package `pyopencl`, which also stores compiled programs by their content.

Kernels take whole buffers and an element offset, so no sub-buffers are needed. Copies and launches run in the order of
one queue, and the host waits only to read.

The form of kernels depends on the device (`form_of`): GPUs run a task by a group of threads. On CPUs, each thread runs
a task of its own: their compilers turn barriers in loops into loops over threads, which takes minutes.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.devices.device import SLOW_TASKS, Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.runtimes.device_memory import (
    Array,
    BufferPart,
    CountedMemory,
    DeviceBuffer,
    DeviceLostError,
    failed_allocation,
)
from treadle.backends.tvm.runtimes.launch_table import Launch
from treadle.backends.tvm.spaces import Space
from treadle.files.installation import pip_install
from treadle.ir.device_limits import LIMITS
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

CHOICE = "PYOPENCL_CTX"
"""The environment variable of pyopencl that selects a device: `0:1` is the second device of the first platform."""

_BLOCKING = 1 << 20  # bytes of an array that is copied to the device before `write` returns, without another copy
_PENDING = 256  # number of copies to the device that may be pending
_MESSAGE = 2000  # characters of the compiler's message in an error


def open_runtime(target: Target) -> OpenclRuntime:
    """Open the device that `PYOPENCL_CTX` selects, or else the first GPU, or else the first device.

    Raises BackendError if the package or a device is missing.
    """
    try:
        cl = import_module("pyopencl")
    except ImportError as error:
        raise BackendError(f"target {target} needs the package pyopencl", hint=pip_install("opencl")) from error
    try:
        if os.environ.get(CHOICE):
            return OpenclRuntime(cl, cl.create_some_context(interactive=False).devices[0])
        devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    except (cl.Error, RuntimeError) as error:
        raise _no_device(target, str(error)) from error
    if not devices:
        raise _no_device(target, "no platform has a device")
    return OpenclRuntime(cl, min(devices, key=lambda device: not device.type & cl.device_type.GPU))


def _no_device(target: Target, received: str) -> BackendError:
    return BackendError(
        f"there is no device for target {target}",
        received=received,
        hint="install a driver with OpenCL; without a GPU, on Debian: apt install pocl-opencl-icd",
    )


def form_of(device: Device, *, is_cpu: bool, threads: int) -> Device:
    """Return a device in the form in which its kernels are written: for groups of threads, or in the slow form if it is
    a CPU or if a group may have fewer threads than a vector has lanes.

    threads  largest number of threads of a group
    """
    if not is_cpu and threads >= device.group:
        return device
    return replace(device.slow, tasks=min(SLOW_TASKS, threads))


class OpenclRuntime:
    """A device with OpenCL. See `treadle.backends.tvm.runtimes.runtime.Runtime`."""

    def __init__(self, cl: Any, device: Any) -> None:
        """Open a device of pyopencl."""
        self.cl, self.lock, self.name = cl, threading.RLock(), str(device.name)
        self.largest, self.size = int(device.max_mem_alloc_size), int(device.global_mem_size)
        limits = replace(
            LIMITS["opencl"],
            shared=int(device.local_mem_size),
            largest=self.largest,
            allocation=self.largest,
            lacks=frozenset() if int(device.double_fp_config) else frozenset({"f64"}),
        )
        is_cpu = bool(device.type & cl.device_type.CPU)
        threads = int(device.max_work_group_size)
        self.device = form_of(Device.of("opencl", limits), is_cpu=is_cpu, threads=threads)
        self.options = ["-cl-std=CL1.2"]
        if int(device.single_fp_config) & cl.device_fp_config.CORRECTLY_ROUNDED_DIVIDE_SQRT:
            self.options.append("-cl-fp32-correctly-rounded-divide-sqrt")
        with self.errors("open the device"):
            self.context = cl.Context([device])
            self.queue = cl.CommandQueue(self.context, device)
        self._programs: weakref.WeakValueDictionary[str, _Program] = weakref.WeakValueDictionary()  # by text
        self.memory = OpenclMemory(self)

    def load(self, kernels: Mapping[str, DeviceKernel]) -> OpenclKernels:
        """See `Runtime`. `prepare` builds kernels, and raises the errors of the compiler."""
        return OpenclKernels(self, kernels)

    def program(self, name: str, kernel: DeviceKernel) -> _Program:
        """Return a kernel's program. Kernels with the same text are built once."""
        made = self._programs.get(kernel.text)
        if made is None:
            made = self._programs[kernel.text] = _Program(self, name, kernel.text)
        return made

    @contextmanager
    def errors(self, action: str) -> Iterator[None]:
        """Raise errors of pyopencl as our own: DeviceLostError, or BackendError with `action`, which failed."""
        try:
            yield
        except self.cl.Error as error:
            if error.code == self.cl.status_code.DEVICE_NOT_AVAILABLE:
                raise DeviceLostError(f"the device {self.name} was lost", received=str(error)) from error
            raise BackendError(f"OpenCL cannot {action}", received=str(error)) from error

    def __repr__(self) -> str:
        return f"<{self.name}, {self.device.threads} threads for {self.device.tasks} tasks>"


class OpenclMemory(CountedMemory):
    """The memory of a device. See `treadle.backends.tvm.runtimes.device_memory.DeviceMemory`."""

    def __init__(self, runtime: OpenclRuntime) -> None:
        super().__init__()
        self._runtime, self._cl = runtime, runtime.cl
        self._pending: list[Any] = []  # events of copies, which own the memory that they read

    @property
    def free(self) -> int | None:
        """Bytes of the device, without those of this process's buffers."""
        return max(0, self._runtime.size - self.used)

    def allocate(self, nbytes: int) -> DeviceBuffer:
        cl, free = self._cl, self.free
        if nbytes > min(self._runtime.largest, self._runtime.size - self.used):
            raise failed_allocation(nbytes, free)
        try:
            handle = cl.Buffer(self._runtime.context, cl.mem_flags.READ_WRITE, size=max(1, nbytes))
        except cl.Error as error:  # MemoryError of pyopencl among them
            raise failed_allocation(nbytes, free) from error
        return self._buffer(handle, nbytes)

    def write(self, buffer: DeviceBuffer, data: Array, at: int = 0) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if not flat.size:
            return
        waits = flat.size >= _BLOCKING
        source = flat if waits else flat.copy()
        if len(self._pending) >= _PENDING:
            self._wait()
        with self._runtime.errors("write to a buffer"):
            event = self._copied(buffer.handle, source, dst_offset=at, is_blocking=waits)
        if not waits:
            self._pending.append(event)

    def read(self, buffer: DeviceBuffer, nbytes: int, at: int = 0) -> Array:
        return self.read_parts([BufferPart(buffer, nbytes, at)])[0]

    def read_parts(self, parts: Sequence[BufferPart]) -> list[Array]:
        made = [np.empty(part.nbytes, np.uint8) for part in parts]
        with self._runtime.errors("read a buffer"):
            copies = [
                self._copied(array, part.buffer.handle, src_offset=part.at, is_blocking=False)
                for part, array in zip(parts, made, strict=True)
                if part.nbytes
            ]
        self._wait()
        del copies
        return made

    def copy(self, source: BufferPart, to: DeviceBuffer, at: int = 0) -> None:
        if source.nbytes:
            offsets = {"src_offset": source.at, "dst_offset": at, "byte_count": source.nbytes}
            with self._runtime.errors("copy a buffer"):
                self._copied(to.handle, source.buffer.handle, **offsets)

    def fill(self, buffer: DeviceBuffer, byte: int, nbytes: int, at: int = 0) -> None:
        if nbytes:
            with self._runtime.errors("fill a buffer"):
                self._cl.enqueue_fill_buffer(self._runtime.queue, buffer.handle, np.uint8(byte), at, nbytes)

    def _copied(self, to: Any, source: Any, **options: Any) -> Any:
        return self._cl.enqueue_copy(self._runtime.queue, to, source, **options)

    def _wait(self) -> None:
        with self._runtime.errors("finish its work"):
            self._runtime.queue.finish()
        self._pending.clear()


class _Program:
    """A kernel's text that the device's compiler has compiled."""

    def __init__(self, runtime: OpenclRuntime, name: str, text: str) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of compilers
                self.built = runtime.cl.Program(runtime.context, text).build(runtime.options)
        except runtime.cl.Error as error:
            raise BackendError(
                f"OpenCL does not build the kernel {name} for {runtime.name}", received=str(error)[:_MESSAGE]
            ) from error


class OpenclKernels:
    """Kernels, which are built when they are first launched. See
    `treadle.backends.tvm.runtimes.runtime.LoadedKernels`.
    """

    def __init__(self, runtime: OpenclRuntime, kernels: Mapping[str, DeviceKernel]) -> None:
        self._runtime, self._kernels = runtime, kernels
        self._programs: dict[str, _Program] = {}

    def prepare(self, launches: Sequence[Launch], buffers: Mapping[Space, DeviceBuffer]) -> OpenclLaunches:
        for name in dict.fromkeys(launch.kernel for launch in launches):
            if name not in self._programs:
                self._programs[name] = self._runtime.program(name, self._kernels[name])
        with self._runtime.errors("set the arguments of a kernel"):
            made = [self._bound(launch, buffers) for launch in launches]
        return OpenclLaunches(self._runtime, made)

    def _bound(self, launch: Launch, buffers: Mapping[Space, DeviceBuffer]) -> tuple[Any, tuple[int], tuple[int]]:
        """Return a kernel with its arguments, and the numbers of threads of all blocks and of one."""
        written = self._kernels[launch.kernel].group_kernel
        arguments: list[Any] = []
        for memory, argument in zip(written.pointers, launch.arguments, strict=True):
            begin, rest = divmod(argument.begin, memory.dtype.bytes)
            assert not rest, (launch, memory.dtype)
            arguments += [buffers[argument.space].handle, np.int64(begin + argument.at)]
        bound = self._runtime.cl.Kernel(self._programs[launch.kernel].built, written.name)
        bound.set_args(*arguments, *map(np.int64, launch.sizes))
        threads = written.device.threads
        return bound, (launch.blocks * threads,), (threads,)


class OpenclLaunches:
    """Kernels with their arguments. See `treadle.backends.tvm.runtimes.runtime.PreparedLaunches`."""

    def __init__(self, runtime: OpenclRuntime, launches: Sequence[tuple[Any, tuple[int], tuple[int]]]) -> None:
        self._runtime, self._launches = runtime, launches

    def run(self) -> None:
        """Enqueue the launches, in order."""
        cl, queue = self._runtime.cl, self._runtime.queue
        with self._runtime.errors("launch a kernel"):
            for kernel, everything, block in self._launches:
                cl.enqueue_nd_range_kernel(queue, kernel, everything, block)
            queue.flush()
