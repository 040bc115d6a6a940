"""The emulator as a runtime of devices (`treadle.backends.tvm.runtimes.runtime`), in the memory of the host.

    exe = emulated(treadle.compile("gpt2", backend="tvm", target="cuda", ...))
    exe(ids=ids)
    runtime_of(exe).memory.bytes_out

Every pointer of a launch is bound to the bytes of its storage, so that an access outside it is found even within the
arena. New memory is filled with NaN.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.support.gpu_emulator.emulation import EmulatedKernel, Region, build
from treadle.backends.poison import BYTE
from treadle.backends.tvm.kernels.devices.device import DEVICES, Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.runtimes.device_machine import DeviceMachine
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceBuffer, HostMemory
from treadle.backends.tvm.runtimes.launch_table import Launch
from treadle.backends.tvm.spaces import Space, Status

Array = np.ndarray[Any, Any]


class EmulatorMemory(HostMemory):
    """Memory that counts what the host does with it.

    copies_in, bytes_in    copies from the host, and their bytes
    copies_out, bytes_out  copies to the host, and their bytes
    waits                  number of times that the host waits for the device
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__(size)
        self.forget_counts()

    def forget_counts(self) -> None:
        """Set all counts to 0."""
        self.copies_in = self.bytes_in = self.copies_out = self.bytes_out = self.waits = 0

    def allocate(self, nbytes: int) -> DeviceBuffer:
        buffer = super().allocate(nbytes)
        buffer.handle[:] = BYTE
        return buffer

    def write(self, buffer: DeviceBuffer, data: Array, at: int = 0) -> None:
        assert at + data.nbytes <= buffer.nbytes
        super().write(buffer, data, at)
        self.copies_in += 1
        self.bytes_in += data.nbytes

    def read(self, buffer: DeviceBuffer, nbytes: int, at: int = 0) -> Array:
        return self.read_parts([BufferPart(buffer, nbytes, at)])[0]

    def read_parts(self, parts: Sequence[BufferPart]) -> list[Array]:
        self.waits += 1
        self.copies_out += len(parts)
        self.bytes_out += sum(part.nbytes for part in parts)
        return [super(EmulatorMemory, self).read(*part) for part in parts]

    def copy(self, source: BufferPart, to: DeviceBuffer, at: int = 0) -> None:
        to.handle[at : at + source.nbytes] = source.buffer.handle[source.at : source.at + source.nbytes].copy()


class EmulatorRuntime:
    """A runtime whose kernels run on the emulator.

    blocks    number of blocks of every launch; None: the table's
    seed      determines the order of threads and of blocks
    together  number of blocks that are alive at once
    races     True if races between blocks are errors
    launches  number of launches so far
    loads     the kernels of each call of `load`
    """

    name = "emulator"

    def __init__(self, device: Device = DEVICES["cuda"], *, size: int | None = None, **limits: Any) -> None:
        """Create a device.

        size    bytes of its memory; None: no limit
        limits  fields of its `DeviceLimits`, other than the device's
        """
        self.device = replace(device, limits=replace(device.limits, **limits)) if limits else device
        self.memory = EmulatorMemory(size)
        self.lock = threading.RLock()
        self.blocks: int | None = None
        self.seed, self.launches = 1, 0
        self.together, self.races = 1, True
        self.loads: list[EmulatorKernels] = []

    def load(self, kernels: Mapping[str, DeviceKernel]) -> EmulatorKernels:
        loaded = EmulatorKernels(self, {name: EmulatedKernel(kernel) for name, kernel in kernels.items()})
        self.loads.append(loaded)
        return loaded

    @property
    def slow(self) -> dict[str, str]:
        """The kernels in the slow form by name, with the reasons."""
        kernels = {name: each.kernel for loaded in self.loads for name, each in loaded.kernels.items()}
        return {name: kernel.why_slow for name, kernel in kernels.items() if kernel.why_slow}


class EmulatorKernels:
    """Loaded kernels. They are compiled when they are first launched.

    kernels  the kernels by name; a test may replace one
    """

    def __init__(self, runtime: EmulatorRuntime, kernels: dict[str, EmulatedKernel]) -> None:
        self.runtime, self.kernels = runtime, kernels

    def prepare(self, launches: Sequence[Launch], buffers: Mapping[Space, DeviceBuffer]) -> EmulatorLaunches:
        build([self.kernels[name] for name in dict.fromkeys(launch.kernel for launch in launches)])
        return EmulatorLaunches(self, launches, buffers)


class EmulatorLaunches:
    """Launches on buffers."""

    def __init__(
        self, loaded: EmulatorKernels, launches: Sequence[Launch], buffers: Mapping[Space, DeviceBuffer]
    ) -> None:
        self.loaded = loaded
        self.launches = [
            (
                launch,
                [
                    # the emulator checks the bounds; any block that finds an error may report it
                    Region(buffers[a.space].handle[a.begin : a.begin + a.nbytes], a.at, a.space != Status())
                    for a in launch.arguments
                ],
            )
            for launch in launches
        ]
        limits = loaded.runtime.device.limits
        for launch in launches:
            assert 0 < launch.blocks <= limits.groups, launch
            for a in launch.arguments:
                assert a.begin % limits.alignment == 0, (launch.kernel, a)
                assert a.begin + a.nbytes <= buffers[a.space].nbytes, (launch.kernel, a)

    def run(self) -> None:
        runtime = self.loaded.runtime
        for launch, regions in self.launches:
            self.loaded.kernels[launch.kernel].launch(
                regions,
                launch.sizes,
                blocks=launch.blocks if runtime.blocks is None else runtime.blocks,
                seed=runtime.seed + runtime.launches,
                together=runtime.together,
                races=runtime.races,
            )
            runtime.launches += 1


def emulated(exe: Any, runtime: EmulatorRuntime | None = None) -> Any:
    """Let an executable or a compiled model of a device run on the emulator, and return it.

    runtime  the emulator; None: a new one, with the limits of the executable's device
    """
    machine = _machine_of(exe)
    assert isinstance(machine, DeviceMachine)
    machine.open = _opened(runtime or EmulatorRuntime(machine.program.device))
    return exe


def _machine_of(exe: Any) -> Any:
    return getattr(exe, "executable", exe).machine


def _opened(runtime: EmulatorRuntime) -> Callable[[], EmulatorRuntime]:
    return lambda: runtime


def runtime_of(exe: Any) -> EmulatorRuntime:
    """Return the emulator of an executable."""
    runtime = _machine_of(exe).open()
    assert isinstance(runtime, EmulatorRuntime)
    return runtime
