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

import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Protocol

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.runtimes.device_memory import DeviceBuffer, DeviceMemory
from treadle.backends.tvm.runtimes.launch_table import Launch
from treadle.backends.tvm.spaces import Space
from treadle.ir.errors import BackendError, Hint
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
    """A device that runs kernels. A process has one runtime for a device, which all executables share.

    device  its description, with the limits of the device that was found
    name    name of the hardware, as its driver reports it
    memory  its memory
    lock    held by a caller from the first copy to the device until the results are read, so that a runtime's methods
            need not be safe for several threads. Buffers may be released at any time, by any thread
    """

    device: Device
    name: str
    memory: DeviceMemory
    lock: threading.RLock

    def load(self, kernels: Mapping[str, DeviceKernel]) -> LoadedKernels:
        """Compile kernels, by name. Raises BackendError, with the kernel and the compiler's message, if the device's
        compiler refuses one.
        """
        ...


Opened = Callable[[Target], Runtime]
"""A function that opens the device of a target. It raises BackendError, with what to install, if there is none."""

_MODULES = {kind: f"{kind}_runtime" for kind in ("cuda", "metal", "opencl")} | {"webgpu": "wgpu_runtime"}
"""The modules of our runtimes, which are imported when they are needed. Each has a function `open_runtime`."""
_RUNTIMES: dict[str, Opened] = {}
_OPEN: dict[Target, Runtime] = {}
_opening = threading.Lock()


def register_runtime(kind: str, opened: Opened) -> None:
    """Set the runtime of a kind of device: `cuda`, `opencl`, `webgpu` or `metal`."""
    with _opening:
        _RUNTIMES[kind] = opened
        for target in [target for target in _OPEN if target.kind == kind]:
            del _OPEN[target]


def find_runtime(target: Target) -> Runtime:
    """Return the runtime of a target's device, which is opened once. Raises BackendError, with what to install, if
    there is none.
    """
    with _opening:
        if target not in _OPEN:
            opened = _RUNTIMES.get(target.kind)
            if opened is None and target.kind in _MODULES:
                module = import_module(f"treadle.backends.tvm.runtimes.{_MODULES[target.kind]}")
                opened = _RUNTIMES[target.kind] = module.open_runtime
            if opened is None:
                hint = Hint('backend="torch", or target="cpu"', "--backend torch, or --target cpu")
                raise BackendError(f"no runtime runs kernels on {target}", hint=hint)
            _OPEN[target] = opened(target)
        return _OPEN[target]


def forget_runtime(runtime: Runtime) -> None:
    """Open the device again in the next call of `find_runtime`, because it was lost."""
    with _opening:
        for target in [target for target, each in _OPEN.items() if each is runtime]:
            del _OPEN[target]
