"""Instruction sets: the features that a kernel generator may use, and the options of the code generator.

A generator queries the `Isa` for lanes, registers and features. No other part of it depends on the machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from treadle.backends.tvm.kernels.host.cpu_features import cpu_flags, executes
from treadle.backends.tvm.kernels.host.platforms import this_platform
from treadle.ir.errors import BackendError, Hint
from treadle.ir.target import Target


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    name        as targets name it, the x86-64 psABI's level or the architecture
    machine     the name of machines that run it, as `Platform.machine`
    vector      bytes of a vector register
    registers   number of vector registers
    fused       True if a * b + c is one instruction, rounded once
    needs       the CPU flags, as Linux names them, that a machine must have
    llvm        the options of the code generator: mcpu, mattr, and mtriple where TVM's default does not fit
    ahead       prefetch distance in bytes of weights that a product reads from memory; 0: no prefetching
    """

    name: str
    machine: str
    vector: int
    registers: int
    fused: bool
    needs: frozenset[str]
    mcpu: str
    mattr: tuple[str, ...] = ()
    ahead: int = 0

    def lanes(self, width: int = 4) -> int:
        """Return the number of elements of `width` bytes in a vector register."""
        return self.vector // width

    @property
    def widest(self) -> int:
        """Number of float32 lanes of the widest vector that a kernel may load. The sizes of arrays that several kernels
        access depend on it, and not on `lanes`, which differs between kernels for a device.
        """
        return self.lanes()

    @property
    def joins_tasks(self) -> bool:
        """True if statements after a parallel loop run when all its tasks have ended, and run once."""
        return True

    @property
    def multiplies_tiles(self) -> bool:
        """True if there is a matrix unit, AMX, for bf16 and bytes: tiles of 16 rows of 64 bytes (`narrow.tiles`)."""
        return "amx_bf16" in self.needs

    @property
    def multiplies_pairs(self) -> bool:
        """True if there are instructions that add products of bf16 pairs to float32 sums, and that convert to bf16."""
        return "avx512_bf16" in self.needs

    @property
    def multiplies_quads(self) -> bool:
        """True if one instruction multiplies four bytes by four bytes and adds to a vector of 32-bit sums: VNNI."""
        return "avx512_vnni" in self.needs

    @property
    def permutes(self) -> bool:
        """True if an instruction selects lanes of a vector of floats by a vector of lane numbers."""
        return "avx2" in self.needs

    @property
    def llvm(self) -> dict[str, object]:
        """The description of the target in TVM's form."""
        made: dict[str, object] = {"kind": "llvm", "mcpu": self.mcpu}
        if self.mattr:
            made["mattr"] = list(self.mattr)
        triple = this_platform().triple(self.machine)
        if triple:
            made["mtriple"] = triple
        return made

    def __str__(self) -> str:
        return self.name


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}  # every CPU with the first has the second
_AMX = _BF16 | {"amx_tile", "amx_bf16", "amx_int8"}
_WIDE = "-prefer-256-bit"  # keeps LLVM from splitting the 64-byte vectors of our kernels
_DOTS = ("+avx512bf16", "+avx512vnni")
_TILES = ("+amx-tile", "+amx-bf16", "+amx-int8")

ISAS: Mapping[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("x86-64-amx", "x86_64", 64, 32, True, _AMX, "x86-64-v4", (_WIDE, *_DOTS, *_TILES), ahead=8192),
        Isa("x86-64-v4-bf16", "x86_64", 64, 32, True, _BF16, "x86-64-v4", (_WIDE, *_DOTS), ahead=8192),
        Isa("x86-64-v4", "x86_64", 64, 32, True, _AVX512, "x86-64-v4", (_WIDE,), ahead=8192),
        Isa("x86-64-v3", "x86_64", 32, 16, True, _AVX2, "x86-64-v3", ahead=8192),
        Isa("x86-64-v2", "x86_64", 16, 16, False, frozenset({"sse4_2", "popcnt"}), "x86-64-v2"),
        Isa("x86-64", "x86_64", 16, 16, False, frozenset(), "x86-64"),
        Isa("arm64", "aarch64", 16, 32, True, frozenset(), "generic", ("+neon",)),
    )
}
"""Every instruction set for which kernels are generated, the most capable one of a machine first."""


def isa_of(target: Target) -> Isa:
    """Return the instruction set of a target; for `cpu` the best one of this machine.

    Raises BackendError for a target without code generation.
    """
    from treadle.backends.tvm.kernels.devices.device import (  # a device is an Isa: it imports this module
        DEVICES,
        Device,
    )

    if target.name in ISAS:
        return ISAS[target.name]
    if target.hardware.limits is not None:
        return Device.of(target.name, target.hardware.limits)
    if target.kind in DEVICES:
        return DEVICES[target.kind]
    if target.kind != "cpu":
        raise BackendError(
            f"the tvm backend generates no code for {target.name}",
            received=str(target),
            hint="one of " + ", ".join(("cpu", *ISAS)),
        )
    return host_isa()


CHOICE = "TREADLE_ISA"
"""The environment variable that names the instruction set of the target `cpu`, in place of the best one."""


@cache
def host_isa() -> Isa:
    """Return the best instruction set of this machine, or the one that `TREADLE_ISA` names.

    Raises BackendError if none of ours runs on it, and if `TREADLE_ISA` names no instruction set, or one that this
    machine lacks.
    """
    if chosen := os.environ.get(CHOICE):
        return _chosen(chosen)
    for isa in ISAS.values():
        if runs_here(isa):
            return isa
    raise BackendError(
        f"the tvm backend has no kernels for {this_platform().machine}",
        hint=Hint(
            f'backend="numpy" or "torch"; or target=, to generate code: {", ".join(ISAS)}',
            f"--backend numpy or torch; or --target, to generate code: {', '.join(ISAS)}",
        ),
    )


def _chosen(name: str) -> Isa:
    ours = [isa.name for isa in ISAS.values() if isa.machine == this_platform().machine]
    if name not in ours:
        raise BackendError(
            f"{CHOICE} names no instruction set of this machine", received=name, hint="one of " + ", ".join(ours)
        )
    isa = ISAS[name]
    if not runs_here(isa) or ((lacking := sorted(isa.needs - cpu_flags())) and executes(lacking) is False):
        raise BackendError(
            f"{CHOICE} names an instruction set that this machine lacks",
            received=f"{name}, which needs {', '.join(sorted(isa.needs - cpu_flags())) or 'permission of the system'}",
            hint="one of " + ", ".join(each for each in ours if ISAS[each].needs <= cpu_flags()),
        )
    return isa


def runs_here(isa: Isa) -> bool:
    """Return True if this machine has an instruction set's features and this process may use them."""
    if isa.machine != this_platform().machine or (isa.multiplies_tiles and not may_use_tiles()):
        return False
    return isa.needs <= cpu_flags() or isa.name == os.environ.get(CHOICE)


_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@cache
def may_use_tiles() -> bool:
    """Request the AMX registers from the system, once a process; a tile instruction before that ends it.

    The permission covers all threads, including existing ones, and forked children. Linux refuses it if a thread of the
    process has its own signal stack that is too small for these registers.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA)) == 0


def refused_here(isa: Isa) -> str | None:
    """Return a message about a feature that the machine has but this process may not use, or None."""
    best = next(iter(ISAS.values()))
    if isa is not best and CHOICE not in os.environ and best.needs <= cpu_flags() and not runs_here(best):
        return f"this process may not use the machine's matrix unit, so {best} is used instead of {isa}"
    return None
