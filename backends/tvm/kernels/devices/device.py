"""Devices for which kernels are generated as text: the features that a kernel generator may use, and their limits.

A specification queries `lanes`, `registers` and `multiplies_*`, as it does for a CPU (`treadle.backends.tvm.kernels.isa`).
On a device, the lanes of a vector are the threads of a group. See docs/devices.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from treadle.backends.tvm.kernels.isa import Isa


@dataclass(frozen=True)
class Device(Isa):
    """A device, as an instruction set whose lanes are threads. The fields of `Isa` come first.

    language    language of the kernels' text: cuda, opencl, metal or wgsl
    group       number of lanes of a group of threads: 32 in the normal form. 1 in the slow form, in which each thread
                runs a task of its own
    tasks       number of tasks in a block of threads: 1 in the normal form
    shared      bytes of shared memory of a block
    index       dtype of indices and sizes by name: i64, or i32 for a device without 64-bit integers
    lacks       names of the dtypes with which the device cannot compute
    subgroups   True if threads of a group exchange values by instructions; otherwise they use shared memory
    matrix_unit True if there is a matrix unit; no kernel uses it yet
    buffers     largest number of buffers of a kernel; 0: no limit
    alignment   bytes to which the beginning of a buffer's range is aligned
    largest     bytes of the largest buffer; 0: no limit
    groups      largest number of blocks along one dimension of the grid
    """

    language: str = "cuda"
    group: int = 32
    tasks: int = 1
    shared: int = 48 * 1024
    index: str = "i64"
    lacks: frozenset[str] = frozenset()
    subgroups: bool = True
    matrix_unit: bool = False
    buffers: int = 0
    alignment: int = 256
    largest: int = 0
    groups: int = 2**31 - 1

    def lanes(self, width: int = 4) -> int:
        """Return the number of lanes of a vector, for elements of any width."""
        return self.group

    @property
    def threads(self) -> int:
        """Number of threads of a block."""
        return self.group * self.tasks

    @property
    def slow(self) -> Device:
        """The same device with one lane and 64 tasks in a block, for kernels that a group cannot run."""
        return replace(self, name=f"{self.name}-slow", group=1, tasks=SLOW_TASKS, vector=4)

    def __str__(self) -> str:
        return self.name


SLOW_TASKS = 64
"""Number of tasks in a block in the slow form."""

_MIB = 1 << 20


def _device(name: str, language: str, **limits: object) -> Device:
    """Return a device with 32 lanes. Registers: half of the 255 that a thread of an NVIDIA GPU can have hold a tile."""
    lacks = limits.pop("lacks", frozenset())
    return Device(name, "device", 128, 32, True, frozenset(), "", language=language, lacks=lacks, **limits)  # type: ignore[arg-type]


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _device("cuda", "cuda", matrix_unit=True, groups=2**31 - 1),
        _device("opencl", "opencl", subgroups=False, shared=32 * 1024),
        _device("metal", "metal", shared=32 * 1024, lacks=frozenset({"f64"})),
        _device(
            "webgpu",
            "wgsl",
            shared=16 * 1024,
            index="i32",
            lacks=frozenset({"f64", "i64", "f16", "bf16", "u8", "i8", "i16"}),
            subgroups=False,
            buffers=8,
            largest=128 * _MIB,
            groups=65535,
        ),
    )
}
"""The devices by the names of their targets. The limits of WebGPU are the defaults that every implementation supports
(WebGPU, section 3.6.2); local memory of OpenCL is the least that its full profile requires."""
