"""Instruction sets: what a kernel generator may count on, and how the code generator is told.

A generator asks the `Isa` for lanes, registers and features; nothing else in it depends on the machine.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from treadle.ir.errors import BackendError
from treadle.ir.target import Target


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    name        as targets name it, the x86-64 psABI's level or the architecture
    machine     what `platform.machine()` calls the machines that run it
    vector      bytes of a vector register
    registers   how many vector registers there are
    fused       whether a * b + c is one instruction, rounded once
    needs       the flags, as Linux names them, that a machine must have
    llvm        the options of the code generator: mcpu, mattr, and mtriple where it is another machine's
    ahead       how many bytes ahead a kernel asks for what it streams from memory; 0: the hardware does by itself
    """

    name: str
    machine: str
    vector: int
    registers: int
    fused: bool
    needs: frozenset[str]
    mcpu: str
    mattr: tuple[str, ...] = ()
    mtriple: str | None = None
    ahead: int = 0

    def lanes(self, width: int = 4) -> int:
        """How many elements of so many bytes a vector register holds."""
        return self.vector // width

    @property
    def llvm(self) -> dict[str, object]:
        """The description of the target that TVM takes."""
        made: dict[str, object] = {"kind": "llvm", "mcpu": self.mcpu}
        if self.mattr:
            made["mattr"] = list(self.mattr)
        if self.mtriple:
            made["mtriple"] = self.mtriple
        return made

    def __str__(self) -> str:
        return self.name


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX = _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"}

ISAS: Mapping[str, Isa] = {
    isa.name: isa
    for isa in (
        # LLVM would rather split 64-byte vectors on this level; our kernels mean them as they are written.
        Isa("x86-64-amx", "x86_64", 64, 32, True, _AMX, "x86-64-v4", ("-prefer-256-bit",), ahead=8192),
        Isa("x86-64-v4", "x86_64", 64, 32, True, _AVX512, "x86-64-v4", ("-prefer-256-bit",)),
        Isa("x86-64-v3", "x86_64", 32, 16, True, _AVX2, "x86-64-v3"),
        Isa("x86-64-v2", "x86_64", 16, 16, False, frozenset({"sse4_2", "popcnt"}), "x86-64-v2"),
        Isa("x86-64", "x86_64", 16, 16, False, frozenset(), "x86-64"),
        Isa("arm64", "aarch64", 16, 32, True, frozenset(), "generic", ("+neon",), "aarch64-unknown-linux-gnu"),
    )
}
"""Every instruction set that kernels are generated for, the most capable of a machine first."""


def isa_of(target: Target) -> Isa:
    """The instruction set of a target; for `cpu` the best that this machine has.

    Raises BackendError for a target whose instructions we do not generate.
    """
    if target.name in ISAS:
        return ISAS[target.name]
    if target.kind != "cpu":
        raise BackendError(
            f"the tvm backend generates no code for {target.name}",
            received=str(target),
            hint="one of " + ", ".join(("cpu", *ISAS)),
        )
    return host_isa()


@cache
def host_isa() -> Isa:
    """The best instruction set of this machine. Raises BackendError where we know none of it."""
    for isa in ISAS.values():
        if runs_here(isa):
            return isa
    raise BackendError(
        f"the tvm backend has no kernels for {platform.machine()}",
        hint="backend numpy or torch, or a target to generate code for: " + ", ".join(ISAS),
    )


def runs_here(isa: Isa) -> bool:
    """Whether this machine has all that an instruction set needs."""
    machine = platform.machine().lower()
    known = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return isa.machine == known and isa.needs <= cpu_flags()


@cache
def cpu_flags() -> frozenset[str]:
    """This machine's features, as Linux names them; none where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
