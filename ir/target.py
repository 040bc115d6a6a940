"""Targets: the hardware that a graph is compiled for. Plans read the target, and never query the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from treadle.ir.errors import UsageError

TARGETS = {
    "cpu": "the CPU of this machine",
    "cuda": "an NVIDIA GPU, the current one",
    "x86-64-amx": "an Intel CPU with AVX-512 and AMX",
    "x86-64-v4-bf16": "a CPU with AVX-512 and its products of bf16 pairs",
    "x86-64-v4": "a CPU with AVX-512",
    "x86-64-v3": "a CPU with AVX2 and FMA",
    "x86-64-v2": "a CPU with SSE4.2",
    "x86-64": "any 64-bit x86 CPU",
    "arm64": "a 64-bit Arm CPU, with NEON",
}
"""Every known target's name, with a description. The levels of x86-64 are defined by its psABI."""

MOST_THREADS = 1024
"""The largest number of threads of a target: the operating system kills a process that starts a million."""

_RATES = {
    "cpu": (60e9, 20e9),
    "cuda": (60e12, 2e12),
    "x86-64-amx": (150e9, 16e9),
    "x86-64-v4-bf16": (100e9, 20e9),
    "x86-64-v4": (100e9, 20e9),
    "x86-64-v3": (50e9, 20e9),
    "x86-64-v2": (15e9, 15e9),
    "x86-64": (15e9, 15e9),
    "arm64": (30e9, 20e9),
}
"""Floating-point operations per second, and bytes of memory per second, of one CPU core or a whole GPU. The rates are
orders of magnitude.
"""


@dataclass(frozen=True)
class Target:
    """Hardware by name: `Target("cpu")`, `Target("cuda")`. Creating a target touches no device and loads no library.

    threads   the number of threads on a CPU; None: one for each core that the process may use

    Raises UsageError for a name that is not in `TARGETS`, and for threads that are not an integer from 1 to
    `MOST_THREADS`.
    """

    name: str
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.name not in TARGETS:
            raise UsageError(f"unknown target {self.name!r}", hint="one of " + ", ".join(TARGETS))
        if self.threads is not None and (type(self.threads) is not int or not 1 <= self.threads <= MOST_THREADS):
            raise UsageError(
                f"the number of threads of a target must be an integer from 1 to {MOST_THREADS}",
                received=f"threads={self.threads!r}"[:80],
                hint="leave it out for one thread per core",
            )

    @property
    def kind(self) -> str:
        """The kind of device: `cpu` for this machine's CPU, `cuda`, or `isa` for CPUs by their instruction set."""
        return self.name if self.name in ("cpu", "cuda") else "isa"

    @property
    def description(self) -> str:
        """A description of the target, in one line."""
        return TARGETS[self.name]

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
        rate, bandwidth = _RATES[self.name]
        return max(flops / rate, bytes / bandwidth) / (self.threads or 1)

    def __str__(self) -> str:
        return self.name
