"""Targets: the hardware that a graph is compiled for. Plans ask the target, never the machine directly."""

from __future__ import annotations

import os
from dataclasses import dataclass

from treadle.ir.errors import UsageError

TARGETS = {
    "cpu": "the processor of this machine",
    "cuda": "an NVIDIA GPU, the current one",
}
"""Every known target's name, with a line on what it is."""


@dataclass(frozen=True)
class Target:
    """Hardware by name: `Target("cpu")`, `Target("cuda")`. Making one touches no device and loads no library.

    Raises UsageError for a name that is not in `TARGETS`.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in TARGETS:
            raise UsageError(f"unknown target {self.name!r}", hint="one of " + ", ".join(TARGETS))

    @property
    def kind(self) -> str:
        """The kind of device, `cpu` or `cuda`."""
        return self.name

    @property
    def description(self) -> str:
        """What the target is, in a line."""
        return TARGETS[self.name]

    def cores(self) -> int | None:
        """How many cores this process may use, read from the machine; None where the target is not this machine."""
        if self.kind != "cpu":
            return None
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count()

    def __str__(self) -> str:
        return self.name
