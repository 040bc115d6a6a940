"""Targets: the hardware that a graph is compiled for. Plans read the target, and never query the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from treadle.ir.errors import Hint, UsageError
from treadle.ir.hardware import Hardware, find_hardware
from treadle.ir.wording.checked_calls import with_checked_constructor

MOST_THREADS = 1024
"""The largest number of threads of a target: the operating system kills a process that starts a million."""


@with_checked_constructor({"num_threads": "threads=...", "device": "name=..."})
@dataclass(frozen=True)
class Target:
    """Hardware by name: `Target("cpu")`, `Target("cuda:1")`, `Target("h100")`. Creating a target touches no device and
    loads no library.

    `cuda` is this machine's GPU, and `cuda:1` selects one of several. Other names of GPUs describe hardware that may be
    elsewhere.

    threads   the number of threads on a CPU; None: one for each core that the process may use

    Raises UsageError for a name that is not text or not in `treadle.ir.hardware.HARDWARE`, for threads that are not an
    integer from 1 to `MOST_THREADS`, and for threads of a GPU.
    """

    name: str
    threads: int | None = None

    def __post_init__(self) -> None:
        name: object = self.name
        if not isinstance(name, str):
            hint = Hint('t.Target("cpu", threads=4), t.Target("cuda")', "--target cpu, or --target cuda")
            raise UsageError("the name of a target is text", received=f"{name!r:.80}", hint=hint)
        base, colon, index = name.partition(":")
        selects = base == "cuda" and index.isdecimal()
        find_hardware(base if not colon or selects else self.name, "target")
        if self.threads is not None and (type(self.threads) is not int or not 1 <= self.threads <= MOST_THREADS):
            raise UsageError(
                f"the number of threads of a target must be an integer from 1 to {MOST_THREADS}",
                received=f"threads={self.threads!r}"[:80],
                hint="leave it out for one thread per core",
            )
        if self.threads is not None and self.kind not in ("cpu", "isa"):
            raise UsageError(
                f"threads apply to CPUs, not to {self.name}",
                received=f"threads={self.threads}",
                hint=Hint("leave threads= out", "leave --threads out"),
            )

    @property
    def kind(self) -> str:
        """The kind of device: `cpu` for this machine's CPU, `cuda`, `opencl`, `webgpu`, `metal`, or `isa` for CPUs by
        their instruction set.
        """
        return self.hardware.kind

    @property
    def hardware(self) -> Hardware:
        """The record of the hardware."""
        return find_hardware(self.name.partition(":")[0], "target")

    @property
    def index(self) -> int | None:
        """The number of the GPU in `cuda:1`; None: the current one."""
        _, _, index = self.name.partition(":")
        return int(index) if index else None

    @property
    def is_elsewhere(self) -> bool:
        """True if the target describes hardware, and does not select a device of this machine."""
        return self.name.partition(":")[0] not in ("cpu", "cuda", "opencl", "webgpu", "metal")

    @property
    def description(self) -> str:
        """A description of the target, in one line."""
        return self.hardware.description

    def cores(self) -> int | None:
        """Return the number of cores to use: `threads`, or all that this process may use. Return None if the target is
        another machine.
        """
        if self.threads is not None or self.kind != "cpu":
            return self.threads
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count()

    def seconds(self, flops: float, bytes: float) -> float:
        """Return the least time in seconds for `flops` float32 operations on `bytes` of memory (the roofline of
        Williams et al. 2009).

        The rates are orders of magnitude that need no measurement on the machine. They serve to compare, not to
        predict.
        """
        hardware = self.hardware
        return hardware.seconds(flops, bytes, hardware.rates["f32"]) / (self.threads or 1)

    def __str__(self) -> str:
        return self.name
