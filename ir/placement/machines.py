"""Machines to plan for: the figures of hardware (`treadle.ir.hardware`) that a sharding plan reads and records."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.ir.errors import UsageError
from treadle.ir.hardware import HARDWARE
from treadle.ir.placement.mesh import Mesh, SubAxes


@dataclass(frozen=True)
class Machine:
    """One device of a mesh, and its links.

    flops      floating-point operations per second
    bandwidth  bytes of its memory per second
    memory     bytes of its memory
    node       number of devices joined by the fast link
    fast       bytes per second that a device sends within its node
    slow       bytes per second that a device sends out of its node
    latency    least seconds per message
    """

    flops: float
    bandwidth: float
    memory: float
    node: int
    fast: float
    slow: float
    latency: float

    def seconds(self, flops: float, bytes: float) -> float:
        """Return the least time in seconds for `flops` operations on `bytes` of memory (the roofline of Williams et al.
        2009).
        """
        return max(flops / self.flops, bytes / self.bandwidth)

    def link(self, mesh: Mesh, over: SubAxes) -> float:
        """Return the bytes per second of the link along parts of a mesh. If a group extends beyond its node, this is
        the slow link.
        """
        reach, stride = 1, 1
        for name, size in mesh.axes:
            for part in over:
                if part.axis == name:
                    reach = max(reach, stride * (size // part.outer))
            stride *= size
        return self.fast if reach <= self.node else self.slow


def find_machine(name: str) -> Machine:
    """Return the figures of the hardware of that name. Raises UsageError if the name is unknown."""
    found = HARDWARE.get(name)
    if found is None:
        raise UsageError(f"unknown device {name!r}", hint="one of " + ", ".join(HARDWARE))
    return Machine(found.product_rate, found.bandwidth, found.memory, found.node, found.fast, found.slow, found.latency)
