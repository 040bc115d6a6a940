"""Devices, as instruction sets whose lanes are threads.

A specification queries `lanes`, `registers` and `multiplies_*`, as it does for a CPU
(`treadle.backends.tvm.kernels.isa`). On a device, the lanes of a vector are the threads of a group. What a device
supports is in its record of hardware (`treadle.ir.device_limits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from treadle.backends.tvm.kernels.isa import Isa
from treadle.ir.device_limits import LIMITS, DeviceLimits

SLOW_TASKS = 64
"""Number of tasks in a block in the slow form."""


@dataclass(frozen=True)
class Device(Isa):
    """A device for which kernels are generated as text.

    limits  its features and limits
    group   number of lanes of a group of threads: the device's in the normal form, 1 in the slow form, in which each
            thread runs a task of its own
    tasks   number of tasks in a block of threads: 1 in the normal form, `SLOW_TASKS` in the slow form
    """

    limits: DeviceLimits = LIMITS["cuda"]
    group: int = 32
    tasks: int = 1

    @staticmethod
    def of(name: str, limits: DeviceLimits) -> Device:
        """Return the device with these limits, in the normal form."""
        return Device(
            name, "device", 4 * limits.group, limits.registers, True, frozenset(), "", (), 0, limits, limits.group
        )

    def lanes(self, width: int = 4) -> int:
        """Return the number of lanes of a vector, for elements of any width."""
        return self.group

    @property
    def joins_tasks(self) -> bool:
        return False  # thread blocks do not wait for each other

    @property
    def widest(self) -> int:
        return self.limits.group

    @property
    def threads(self) -> int:
        """Number of threads of a block."""
        return self.group * self.tasks

    @property
    def slow(self) -> Device:
        """The same device in the slow form, for kernels that a group cannot run."""
        return replace(self, vector=4, group=1, tasks=SLOW_TASKS)

    def __str__(self) -> str:
        return self.name


DEVICES: Mapping[str, Device] = {name: Device.of(name, limits) for name, limits in LIMITS.items()}
"""A device of each kind by its name."""
