"""Plans for devices: placed calls (`treadle.backends.tvm.placed_calls`) become a table of launches.

A pointer becomes a storage in a space, and an index in elements. The begin of a storage is a multiple of the device's
alignment, so that a runtime can bind the storage. The number of thread blocks follows from the sizes of a launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.program import KernelStep
from treadle.backends.tvm.placed_calls import STATUS_WORDS, Freed, PlacedCalls
from treadle.backends.tvm.runtimes.launch_table import Argument, Launch, LaunchTable
from treadle.backends.tvm.spaces import Arena, MemoryForm, Pointer, Space, Status
from treadle.ir.storage.views import Storage
from treadle.ir.types import i64


def memory_form(device: Device) -> MemoryForm:
    """Return the form of values in a device's memory."""
    return MemoryForm(device.limits.alignment, device.limits.index == "i32")


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """An entry at one set of sizes, for a device.

    table    the launches, and the bytes of each space
    steps    the step of each launch
    tellers  the steps that report errors, in the order of their status words
    shapes   shapes of the outputs by name
    freed    memory that becomes unused, in the order of the launches
    """

    table: LaunchTable
    steps: Sequence[KernelStep]
    tellers: Sequence[KernelStep]
    shapes: Mapping[str, tuple[int, ...]]
    freed: Sequence[Freed]

    def parts(self, begin: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """Return consecutive launches in parts that run without the host, as pairs of the first number and the number
        after the last. A collective is a part of its own.
        """
        found, end = list[tuple[int, int]](), len(self.steps) if end is None else end
        for at in range(begin, end):
            if self.steps[at].kernel.on_host:
                found += [(begin, at), (at, at + 1)]
                begin = at + 1
        return [(a, b) for a, b in [*found, (begin, end)] if b > a]

    def addresses(self, number: int) -> tuple[int, ...]:
        """Return a number for the storage of each pointer of a launch, as if all spaces were consecutive in one memory.
        Addresses of a device's memory are not known on the host.
        """
        starts, end = dict[Space, int](), 0
        for space, nbytes in self.table.spaces.items():
            starts[space], end = end, end + nbytes
        return tuple([starts[a.space] + a.begin for a in self.table.launches[number].arguments])


class DeviceEncoder:
    """An encoder of placed calls as a table of launches.

    device   the device
    titles   the names of the kernels
    kernels  the device's kernels by name. A collective has none, nor has a kernel that the device refuses
    """

    def __init__(
        self,
        device: Device,
        titles: Mapping[Kernel, str],
        kernels: Mapping[str, DeviceKernel],
    ) -> None:
        self.form = memory_form(device)
        self.titles, self.kernels = titles, kernels

    def plan(self, placed: PlacedCalls, sizes: Mapping[str, int]) -> DevicePlan:
        """Return the plan of calls that were placed for these sizes, in the form of the device's memory."""
        launches: list[Launch] = []
        tellers: list[KernelStep] = []
        spaces: dict[Space, int] = {Arena(): placed.arena} if placed.arena else {}
        known: dict[Storage, int] = {}
        blocks: dict[tuple[Kernel, tuple[int, ...]], int] = {}

        def argument(pointer: Pointer, step: KernelStep) -> Argument:
            space, begin, storage, offset = pointer
            element = self.form.element(storage.dtype)
            if isinstance(space, Status):
                tellers.append(step)
                return Argument(space, 0, 0, offset // element + STATUS_WORDS * (len(tellers) - 1))
            if storage not in known:
                known[storage] = self.form.nbytes(storage).evaluate(sizes)
            spaces[space] = max(spaces.get(space, 0), begin + known[storage])
            return Argument(space, begin, known[storage], offset // element)

        for step, pointers, numbers in placed.calls:
            arguments = tuple([argument(pointer, step) for pointer in pointers])
            key = step.kernel, tuple(numbers)
            if key not in blocks:
                kernel = self.kernels.get(self.titles[step.kernel])
                blocks[key] = 0 if kernel is None else kernel.group_kernel.blocks(numbers)
            launches.append(Launch(self.titles[step.kernel], blocks[key], arguments, key[1]))
        words = len(tellers) * STATUS_WORDS * self.form.element(i64)
        if tellers:
            spaces[Status()] = words
            launches = [_with_status(launch, words) for launch in launches]
        table = LaunchTable(launches, {space: self.form.size(nbytes) for space, nbytes in spaces.items()})
        return DevicePlan(table, [call.step for call in placed.calls], tellers, placed.shapes, placed.freed)


def _with_status(launch: Launch, nbytes: int) -> Launch:
    """Return a launch whose status words are in a storage of this size."""
    if not any(isinstance(argument.space, Status) for argument in launch.arguments):
        return launch
    arguments = [replace(a, nbytes=nbytes) if isinstance(a.space, Status) else a for a in launch.arguments]
    return replace(launch, arguments=tuple(arguments))
