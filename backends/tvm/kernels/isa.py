"""Instruction sets: what a kernel generator may count on, and how the code generator is told.

A generator asks the `Isa` for lanes, registers and features; nothing else in it depends on the machine.
"""

from __future__ import annotations

import ctypes
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
    def multiplies_tiles(self) -> bool:
        """Whether there is a matrix unit, AMX, for bf16 and bytes: tiles of 16 rows of 64 (`kernels.narrow.tiles`)."""
        return "amx_bf16" in self.needs

    @property
    def multiplies_pairs(self) -> bool:
        """Whether one instruction multiplies bf16 pairs and adds to a vector of float32 sums, and one makes bf16."""
        return "avx512_bf16" in self.needs

    @property
    def multiplies_quads(self) -> bool:
        """Whether one instruction multiplies four bytes with four bytes and adds to a vector of 32-bit sums: VNNI."""
        return "avx512_vnni" in self.needs

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
_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}  # every processor that has the first has the second
_AMX = _BF16 | {"amx_tile", "amx_bf16", "amx_int8"}
_WIDE = "-prefer-256-bit"  # LLVM would rather split 64-byte vectors; our kernels mean them as they are written
_DOTS = ("+avx512bf16", "+avx512vnni")
_TILES = ("+amx-tile", "+amx-bf16", "+amx-int8")

ISAS: Mapping[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("x86-64-amx", "x86_64", 64, 32, True, _AMX, "x86-64-v4", (_WIDE, *_DOTS, *_TILES), ahead=8192),
        Isa("x86-64-v4-bf16", "x86_64", 64, 32, True, _BF16, "x86-64-v4", (_WIDE, *_DOTS)),
        Isa("x86-64-v4", "x86_64", 64, 32, True, _AVX512, "x86-64-v4", (_WIDE,)),
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
    """Whether this machine has all that an instruction set needs, and lets this process use it."""
    machine = platform.machine().lower()
    known = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return isa.machine == known and isa.needs <= cpu_flags() and (not isa.multiplies_tiles or may_use_tiles())


_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@cache
def may_use_tiles() -> bool:
    """Ask the system, once a process, for the registers of AMX: without that the first tile instruction ends it.

    All threads may use them from then on, older ones as well, and so may forked children. Linux refuses a process in
    which a thread has a signal stack of its own that is too small for these registers.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA)) == 0


def refused_here(isa: Isa) -> str | None:
    """What this machine has, and keeps from this process; None where it keeps nothing from it."""
    best = next(iter(ISAS.values()))
    if isa is not best and best.needs <= cpu_flags() and not runs_here(best):
        return f"this process may not use the machine's matrix unit, so that {isa} stands for {best}"
    return None


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
