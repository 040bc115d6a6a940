"""Bindings of a launch on WebGPU: which arguments share one, its bytes, and the numbers of the uniform buffer.

Arguments in one buffer share a binding, from the first byte of the least to the last byte of the greatest one. If these
are more bytes than a binding may have, the buffer is bound in several parts that do not overlap. WebGPU allows it, if
all of them are `read_write`, or none is. Limits of the device are checked before (`plan_limits`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.group_kernel import GroupKernel
from treadle.backends.tvm.kernels.devices.wgsl_kernel_text import Sharing, stored_bytes
from treadle.backends.tvm.runtimes.launch_table import Argument, Launch
from treadle.backends.tvm.spaces import Space


@dataclass(frozen=True)
class BufferRange:
    """A range of a buffer, in bytes. `begin` is a multiple of the device's alignment, and `nbytes` of 4."""

    space: Space
    begin: int
    nbytes: int


@dataclass(frozen=True)
class LaunchBindings:
    """The bindings of a launch.

    sharing   determines the kernel's text
    bindings  the range of each binding
    numbers   the numbers of the uniform buffer
    """

    sharing: Sharing
    bindings: tuple[BufferRange, ...]
    numbers: tuple[int, ...]


def bind_launch(
    launch: Launch, kernel: GroupKernel, device: Device, buffer_of: Callable[[Space], Hashable]
) -> LaunchBindings:
    """Return the bindings of a launch.

    buffer_of  returns a key of the buffer of a space; spaces in one buffer have the same key
    """
    largest = device.limits.largest
    found: dict[Hashable, list[Argument]] = {}
    for argument in launch.arguments:
        found.setdefault(buffer_of(argument.space), []).append(argument)
    is_written = {
        buffer_of(argument.space)
        for argument, memory in zip(launch.arguments, kernel.pointers, strict=True)
        if memory.is_written
    }
    parts: list[tuple[Hashable, list[Argument]]] = []
    for key, arguments in found.items():
        first = len(parts)
        for argument in sorted(arguments, key=lambda each: each.begin):
            if len(parts) == first or (largest and _end(argument) - parts[-1][1][0].begin > largest):
                parts.append((key, []))
            parts[-1][1].append(argument)
    places = {argument: number for number, (_, arguments) in enumerate(parts) for argument in arguments}
    bindings = [
        BufferRange(arguments[0].space, arguments[0].begin, max(map(_end, arguments)) - arguments[0].begin)
        for _, arguments in parts
    ]
    sharing = Sharing(tuple(places[a] for a in launch.arguments), tuple(key in is_written for key, _ in parts))
    numbers = [
        (argument.begin - bindings[places[argument]].begin) // stored_bytes(memory.dtype) + argument.at
        for argument, memory in zip(launch.arguments, kernel.pointers, strict=True)
    ] + [*launch.sizes, 0]
    return LaunchBindings(sharing, tuple(bindings), tuple(numbers))


def _end(argument: Argument) -> int:
    return argument.begin + max(4, -(-argument.nbytes // 4) * 4)
