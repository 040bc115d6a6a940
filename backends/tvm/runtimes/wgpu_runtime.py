"""The runtime of WebGPU, by the package `wgpu`: Vulkan, Metal or D3D12.

A run encodes its launches as compute passes, in which WebGPU orders launches that use the same buffer. Pipelines, bind
groups and the uniform buffer of prepared launches are created once. The arguments of a launch that are in one buffer
share a binding: `launch_bindings` and `treadle.backends.tvm.kernels.devices.wgsl_kernel_text`.

`wgpu` raises an error in the call that causes it, and logs errors that belong to no call, such as the loss of a device.
Here, both become typed errors.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.kernels.devices.wgsl_kernel_text import Sharing
from treadle.backends.tvm.runtimes.device_memory import (
    BufferPart,
    CountedMemory,
    DeviceBuffer,
    DeviceLostError,
    failed_allocation,
)
from treadle.backends.tvm.runtimes.launch_bindings import LaunchBindings, bind_launch
from treadle.backends.tvm.runtimes.launch_table import Launch
from treadle.backends.tvm.spaces import Space
from treadle.files.installation import pip_install
from treadle.ir.device_limits import LIMITS
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

Array = np.ndarray[Any, Any]

_REQUIRED = (
    "max-buffer-size",
    "max-compute-workgroup-storage-size",
    "max-storage-buffer-binding-size",
    "max-storage-buffers-per-shader-stage",
)
"""Limits in which a device may have more than the specification's defaults, if it is asked for."""

_WORD = 4  # copies and bindings have multiples of it
_ALIGNED = 256  # of a binding
_PIECE = 32 << 20  # bytes that are copied to the device at once
_PASS = 256  # launches in a compute pass: the device begins while later ones are encoded


class _Logged(logging.Handler):
    """The errors that `wgpu` logs instead of raising them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


_LOGGED = _Logged()


def open_runtime(target: Target) -> WgpuRuntime:
    """Open the device that `wgpu` prefers. Raises BackendError if the package or a device is missing."""
    try:
        wgpu = import_module("wgpu")
    except ImportError as error:
        raise BackendError(f"target {target} needs the package wgpu", hint=pip_install("webgpu")) from error
    logger = logging.getLogger("wgpu")
    if _LOGGED not in logger.handlers:
        logger.addHandler(_LOGGED)
    _LOGGED.messages.clear()
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except Exception as error:  # `wgpu` raises several types, RuntimeError among them
        raise _no_device(target, str(error)) from error
    if adapter is None:
        raise _no_device(target, "no adapter")
    return WgpuRuntime(wgpu, adapter)


def _no_device(target: Target, received: str) -> BackendError:
    return BackendError(
        f"there is no device for target {target}",
        received=received,
        hint="install a driver for Vulkan; without a GPU, on Debian: apt install mesa-vulkan-drivers",
    )


class WgpuRuntime:
    """A `treadle.backends.tvm.runtimes.runtime.Runtime` for WebGPU."""

    def __init__(self, wgpu: Any, adapter: Any) -> None:
        self.wgpu, self.lock = wgpu, threading.RLock()
        self.name = str(adapter.info["device"] or adapter.info["description"])
        self.is_cpu = adapter.info["adapter_type"] == "CPU"
        limits = adapter.limits
        try:
            self.gpu = adapter.request_device_sync(required_limits={name: limits[name] for name in _REQUIRED})
        except Exception as error:
            raise BackendError(f"the device {self.name} does not start", received=str(error)) from error
        limits = self.gpu.limits
        self.device = Device.of(
            "webgpu",
            replace(
                LIMITS["webgpu"],
                shared=limits["max-compute-workgroup-storage-size"],
                buffers=limits["max-storage-buffers-per-shader-stage"],
                largest=limits["max-storage-buffer-binding-size"] // _ALIGNED * _ALIGNED,
                allocation=limits["max-buffer-size"] // _ALIGNED * _ALIGNED,
                groups=limits["max-compute-workgroups-per-dimension"],
            ),
        )
        self.memory = WgpuMemory(self)
        self.pipelines: weakref.WeakValueDictionary[tuple[str, tuple[bool, ...]], _Pipeline]
        self.pipelines = weakref.WeakValueDictionary()
        """Compiled kernels that are in use, by their text and the kinds of their bindings."""

    def load(self, kernels: Mapping[str, DeviceKernel]) -> WgpuKernels:
        return WgpuKernels(self, kernels)

    @contextmanager
    def errors(self, action: str) -> Iterator[None]:
        """Raise errors of `wgpu` as our own: DeviceLostError, or BackendError with `action`, what was not possible."""
        try:
            yield
        except self.wgpu.GPUError as error:
            raise self._typed(action, str(error)) from error
        if _LOGGED.messages:
            self._raise_logged(action)

    def _raise_logged(self, action: str) -> None:
        """Raise the errors that were logged. A message that a device was lost may be about another one."""
        messages = list(_LOGGED.messages)
        _LOGGED.messages.clear()
        try:
            self.gpu.create_buffer(size=_WORD, usage=self.wgpu.BufferUsage.COPY_DST).destroy()
        except self.wgpu.GPUError as error:
            raise self._typed(action, "\n".join([*messages, str(error)])) from error
        others = [message for message in messages if "lost" not in message.lower()]
        if others:
            raise self._typed(action, "\n".join(others))

    def _typed(self, action: str, message: str) -> BackendError:
        if "lost" in message.lower():
            return DeviceLostError(f"the device {self.name} was lost", received=message)
        return BackendError(f"WebGPU cannot {action}", received=message)


class WgpuMemory(CountedMemory):
    """A `treadle.backends.tvm.runtimes.device_memory.DeviceMemory` of storage buffers."""

    def __init__(self, runtime: WgpuRuntime) -> None:
        super().__init__()
        self._runtime = runtime
        usage = runtime.wgpu.BufferUsage
        self._usage = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST

    @property
    def free(self) -> int | None:
        return None

    @property
    def _queue(self) -> Any:
        return self._runtime.gpu.queue

    def allocate(self, nbytes: int) -> DeviceBuffer:
        wgpu = self._runtime.wgpu
        try:
            with self._runtime.errors("allocate a buffer"):
                try:
                    handle = self._runtime.gpu.create_buffer(size=max(16, _up(nbytes)), usage=self._usage)
                except (wgpu.GPUOutOfMemoryError, OverflowError) as error:
                    raise failed_allocation(nbytes, None) from error
        except DeviceLostError:
            raise
        except BackendError as error:
            if nbytes > self._runtime.gpu.limits["max-buffer-size"]:
                raise failed_allocation(nbytes, None) from error
            raise
        return self._buffer(handle, nbytes)

    def write(self, buffer: DeviceBuffer, data: Array, at: int = 0) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        begin, end = at // _WORD * _WORD, at + flat.size
        if not flat.size:
            return
        if begin != at or end % _WORD:  # words of which only some bytes are written
            last = np.zeros(0, np.uint8) if end == buffer.nbytes else self.read(buffer, _up(end) - end, end)
            flat = np.concatenate([self.read(buffer, at - begin, begin), flat, last])
            flat = np.concatenate([flat, np.zeros(-flat.size % _WORD, np.uint8)])
        with self._runtime.errors("write to a buffer"):
            for first in range(0, flat.size, _PIECE):
                self._queue.write_buffer(buffer.handle, begin + first, flat[first : first + _PIECE])
                if flat.size > _PIECE:
                    self._queue.submit([])  # releases the memory from which the piece is copied

    def read(self, buffer: DeviceBuffer, nbytes: int, at: int = 0) -> Array:
        return self.read_parts([BufferPart(buffer, nbytes, at)])[0]

    def read_parts(self, parts: Sequence[BufferPart]) -> list[Array]:
        usage, gpu = self._runtime.wgpu.BufferUsage, self._runtime.gpu
        ranges = [(part.at // _WORD * _WORD, _up(part.at + part.nbytes) if part.nbytes else 0) for part in parts]
        sizes = [max(0, end - begin) for begin, end in ranges]
        offsets = [0, *np.cumsum(sizes).tolist()]
        if not offsets[-1]:
            return [np.empty(0, np.uint8) for _ in parts]
        with self._runtime.errors("read a buffer"):
            copy = gpu.create_buffer(size=offsets[-1], usage=usage.COPY_DST | usage.MAP_READ)
            encoder = gpu.create_command_encoder()
            for part, (begin, _), size, offset in zip(parts, ranges, sizes, offsets, strict=False):
                if size:
                    encoder.copy_buffer_to_buffer(part.buffer.handle, begin, copy, offset, size)
            self._queue.submit([encoder.finish()])
            copy.map_sync("READ")
            data = np.frombuffer(copy.read_mapped(copy=True), np.uint8)
            copy.destroy()
        made = []
        for part, (begin, _), offset in zip(parts, ranges, offsets, strict=False):
            first = offset + part.at - begin
            made.append(np.array(data[first : first + part.nbytes]))
        return made

    def copy(self, source: BufferPart, to: DeviceBuffer, at: int = 0) -> None:
        if source.at % _WORD or at % _WORD or source.nbytes % _WORD:
            self.write(to, self.read(*source), at)
            return
        if not source.nbytes:
            return
        with self._runtime.errors("copy a buffer"):
            gpu, usage = self._runtime.gpu, self._runtime.wgpu.BufferUsage
            encoder, begin, handle = gpu.create_command_encoder(), source.at, source.buffer.handle
            if handle is to.handle:  # WebGPU copies between two buffers only
                between = gpu.create_buffer(size=source.nbytes, usage=usage.COPY_SRC | usage.COPY_DST)
                encoder.copy_buffer_to_buffer(handle, begin, between, 0, source.nbytes)
                handle, begin = between, 0
            encoder.copy_buffer_to_buffer(handle, begin, to.handle, at, source.nbytes)
            self._queue.submit([encoder.finish()])

    def fill(self, buffer: DeviceBuffer, byte: int, nbytes: int, at: int = 0) -> None:
        if byte or at % _WORD or nbytes % _WORD:
            piece = np.full(min(nbytes, _PIECE), byte, np.uint8)
            for first in range(0, nbytes, _PIECE):
                self.write(buffer, piece[: nbytes - first], at + first)
        elif nbytes:
            with self._runtime.errors("clear a buffer"):
                encoder = self._runtime.gpu.create_command_encoder()
                encoder.clear_buffer(buffer.handle, at, nbytes)
                self._queue.submit([encoder.finish()])


class _Pipeline:
    """A compiled kernel, and the layout of its bind group."""

    def __init__(self, runtime: WgpuRuntime, name: str, entry: str, text: str, written: Sequence[bool]) -> None:
        gpu, stage = runtime.gpu, runtime.wgpu.ShaderStage.COMPUTE
        types = ["storage" if each else "read-only-storage" for each in written]
        entries = [
            {"binding": i, "visibility": stage, "buffer": {"type": type}} for i, type in enumerate([*types, "uniform"])
        ]
        with runtime.errors(f"compile kernel {name}"):
            module = gpu.create_shader_module(label=name, code=text)
            self.layout = gpu.create_bind_group_layout(entries=entries)
            self.pipeline = gpu.create_compute_pipeline(
                layout=gpu.create_pipeline_layout(bind_group_layouts=[self.layout]),
                compute={"module": module, "entry_point": entry},
            )


class WgpuKernels:
    """Kernels by name. A kernel is compiled for each sharing of bindings in which it is launched."""

    def __init__(self, runtime: WgpuRuntime, kernels: Mapping[str, DeviceKernel]) -> None:
        self._runtime, self._kernels = runtime, dict(kernels)
        self._pipelines: dict[tuple[str, Sharing], _Pipeline] = {}

    def _pipeline(self, name: str, sharing: Sharing) -> _Pipeline:
        key = name, sharing
        if key not in self._pipelines:
            kernel = self._kernels[name]
            text = kernel.shared_text(sharing, keeps_loops=self._runtime.is_cpu)
            of = text, sharing.written
            made = self._runtime.pipelines.get(of)
            if made is None:
                entry = kernel.group_kernel.name
                made = self._runtime.pipelines[of] = _Pipeline(self._runtime, name, entry, text, sharing.written)
            self._pipelines[key] = made
        return self._pipelines[key]

    def prepare(self, launches: Sequence[Launch], buffers: Mapping[Space, DeviceBuffer]) -> WgpuLaunches:
        device, gpu, usage = self._runtime.device, self._runtime.gpu, self._runtime.wgpu.BufferUsage
        found = [
            bind_launch(
                launch, self._kernels[launch.kernel].group_kernel, device, lambda space: id(buffers[space].handle)
            )
            for launch in launches
        ]
        data, offsets = _uniform(found)
        commands = []
        with self._runtime.errors("prepare launches"):
            numbers = gpu.create_buffer_with_data(data=data, usage=usage.UNIFORM)
            for launch, bound, offset in zip(launches, found, offsets, strict=True):
                made = self._pipeline(launch.kernel, bound.sharing)
                ranges = [(buffers[each.space].handle, each.begin, each.nbytes) for each in bound.bindings]
                ranges.append((numbers, offset, _up(_WORD * len(bound.numbers), 16)))
                entries = [
                    {"binding": i, "resource": dict(buffer=buffer, offset=begin, size=size)}  # noqa: C408
                    for i, (buffer, begin, size) in enumerate(ranges)
                ]
                group = gpu.create_bind_group(layout=made.layout, entries=entries)
                commands.append((made.pipeline, group, min(launch.blocks, device.limits.groups)))
        return WgpuLaunches(self._runtime, commands, list(buffers.values()))


class WgpuLaunches:
    """A `treadle.backends.tvm.runtimes.runtime.PreparedLaunches`: a pipeline, a bind group and a grid for each launch.

    buffers  the buffers that the bind groups use, which exist as long as this object
    """

    def __init__(
        self, runtime: WgpuRuntime, commands: Sequence[tuple[Any, Any, int]], buffers: Sequence[DeviceBuffer]
    ) -> None:
        self._runtime, self._commands, self.buffers = runtime, commands, buffers

    def run(self) -> None:
        gpu = self._runtime.gpu
        with self._runtime.errors("run launches"):
            for first in range(0, len(self._commands), _PASS):
                encoder = gpu.create_command_encoder()
                commands = encoder.begin_compute_pass()
                last = None
                for pipeline, group, blocks in self._commands[first : first + _PASS]:
                    if pipeline is not last:
                        commands.set_pipeline(pipeline)
                        last = pipeline
                    commands.set_bind_group(0, group)
                    commands.dispatch_workgroups(blocks)
                commands.end()
                gpu.queue.submit([encoder.finish()])


def _uniform(launches: Sequence[LaunchBindings]) -> tuple[Array, list[int]]:
    """Return the content of the uniform buffer, and the byte at which each launch's numbers begin."""
    sizes = [_up(_WORD * len(launch.numbers), _ALIGNED) for launch in launches]
    offsets = [0, *np.cumsum(sizes).tolist()]
    data = np.zeros(max(offsets[-1], _ALIGNED) // _WORD, np.int32)
    for launch, offset in zip(launches, offsets, strict=False):
        data[offset // _WORD :][: len(launch.numbers)] = launch.numbers
    return data, offsets[:-1]


def _up(nbytes: int, unit: int = _WORD) -> int:
    return -(-nbytes // unit) * unit
