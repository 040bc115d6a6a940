"""Runtimes: what runs the kernels of a device. Each kind of device has one, in a module that is imported when it is
needed.

    runtime = find_runtime(Target("webgpu"))            # BackendError if the runtime or the device is missing
    loaded = runtime.load({"softmax": device_kernel(Softmax(False, "f32"), runtime.device, "softmax")})
    prepared = loaded.prepare(table.launches, buffers)  # may be run many times
    prepared.run()
    runtime.memory.read(buffers[Output("y")], nbytes)   # waits

`register_runtime` adds a runtime, or replaces one: tests run `cuda` on the emulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.runtimes.device_memory import DeviceBuffer, DeviceMemory
from treadle.backends.tvm.runtimes.launch_table import Launch
from treadle.backends.tvm.spaces import Space
from treadle.ir.errors import BackendError
from treadle.ir.target import Target


class PreparedLaunches(Protocol):
    """Launches whose buffers are bound."""

    def run(self) -> None:
        """Enqueue the launches, in order. Reading the device's memory waits for them."""
        ...


class LoadedKernels(Protocol):
    """Kernels that a device's compiler has compiled."""

    def prepare(self, launches: Sequence[Launch], buffers: Mapping[Space, DeviceBuffer]) -> PreparedLaunches:
        """Bind buffers to the spaces of the launches. A launch may name a buffer several times, also one that it
        writes.
        """
        ...


class Runtime(Protocol):
    """A device that runs kernels.

    device  its description, with the limits of the device that was found
    name    name of the hardware, as its driver reports it
    memory  its memory
    """

    device: Device
    name: str
    memory: DeviceMemory

    def load(self, kernels: Mapping[str, DeviceKernel]) -> LoadedKernels:
        """Compile kernels, by name. Raises BackendError, with the kernel and the compiler's message, if the device's
        compiler refuses one.
        """
        ...


Opened = Callable[[Target], Runtime]
"""A function that opens the device of a target. It raises BackendError, with what to install, if there is none."""

_RUNTIMES: dict[str, Opened] = {}


def register_runtime(kind: str, opened: Opened) -> None:
    """Set the runtime of a kind of device: `cuda`, `opencl`, `webgpu` or `metal`."""
    _RUNTIMES[kind] = opened


def find_runtime(target: Target) -> Runtime:
    """Return the runtime of a target's device. Raises BackendError, with what to install, if there is none."""
    opened = _RUNTIMES.get(target.kind)
    if opened is None:
        raise BackendError(f"no runtime runs kernels on {target}", hint="the torch backend, or target cpu")
    return opened(target)
