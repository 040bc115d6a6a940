"""Hardware: one record for each device that targets, costs, sharding and code generation name.

Figures of GPUs are those of NVIDIA's data sheets, without sparsity (A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, L4 and
GeForce RTX 4090). In November 2026 rates, bandwidths, memory, links within a node, multiprocessors and shared memory
were compared with several pages that quote the sheets and NVIDIA's guides; the sheets themselves were not at hand. Two
figures rest on a choice: pages give the L4 58 or 60 multiprocessors, and 58 fit its 30.3 TFLOP/s; pages give the B200
7.7 or 8 TB/s, and its driver reports 7.7. Latencies, links between nodes and PCIe are estimates. Figures of CPUs and of
the targets `cuda`, `opencl` and `webgpu` are orders of magnitude, for one core or for a device. No figure was measured:
they give lower bounds of times, and serve to compare plans.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from treadle.ir.device_limits import DeviceLimits
from treadle.ir.errors import UsageError


@dataclass(frozen=True)
class Hardware:
    """A device: one core of a CPU, or a whole GPU.

    name           the name by which targets and plans refer to it
    kind           `cpu` for this machine's CPU, `isa` for CPUs with an instruction set, `cuda` for NVIDIA GPUs,
                   `opencl`, `webgpu` and `metal` for devices of these interfaces
    description    a description in one line
    bandwidth      bytes of memory per second
    rates          operations per second by number format: f32, tf32, bf16, f16, fp8, int8; formats that the device's
                   units lack are missing. f32 is always included.
    memory         bytes of memory
    capability     compute capability of an NVIDIA GPU; None if it is unknown
    shared_memory  bytes of shared memory that a thread block can use; 0 if unknown
    cores          number of multiprocessors; 0 if unknown
    node           number of devices joined by the fast link
    fast           bytes per second that a device sends within its node
    slow           bytes per second that a device sends out of its node
    latency        least seconds per message
    limits         limits of a device that runs kernels in groups of threads; None: those of its kind (`device_limits`)
    """

    name: str
    kind: str
    description: str
    bandwidth: float
    rates: Mapping[str, float]
    memory: float = 16e9
    capability: tuple[int, int] | None = None
    shared_memory: int = 0
    cores: int = 0
    node: int = 1
    fast: float = 5e9
    slow: float = 5e9
    latency: float = 30e-6
    limits: DeviceLimits | None = None

    @property
    def product_rate(self) -> float:
        """Operations per second of float32 products, in the tensor cores' tf32 if the device has it."""
        return self.rates.get("tf32", self.rates["f32"])

    def seconds(self, flops: float, bytes: float, rate: float | None = None) -> float:
        """Return the least time in seconds for `flops` operations on `bytes` of memory (the roofline of Williams et al.
        2009). `rate` is the number of operations per second, by default `product_rate`.
        """
        return max(flops / (rate or self.product_rate), bytes / self.bandwidth)

    def link(self, reach: int) -> float:
        """Return the bytes per second of the link between devices. `reach` is the number of consecutive devices that
        the group extends over (`Mesh.reach`); beyond the node, the link is the slow one.
        """
        return self.fast if reach <= self.node else self.slow


def _cpu(name: str, kind: str, description: str, rate: float, bandwidth: float) -> Hardware:
    return Hardware(name, kind, description, bandwidth, MappingProxyType({"f32": rate}))


def _device(kind: str, description: str) -> Hardware:
    return Hardware(kind, kind, description, 100e9, MappingProxyType({"f32": 2e12}))


def _gpu(
    name: str,
    description: str,
    bandwidth: float,
    memory: float,
    capability: tuple[int, int],
    shared_kib: int,
    cores: int,
    links: tuple[int, float, float],
    rates: Mapping[str, float],
) -> Hardware:
    node, fast, slow = links
    return Hardware(
        name,
        "cuda",
        description,
        bandwidth,
        MappingProxyType(dict(rates)),
        memory=memory,
        capability=capability,
        shared_memory=shared_kib * 1024,
        cores=cores,
        node=node,
        fast=fast,
        slow=slow,
        latency=5e-6,
    )


_NVLINK3, _NVLINK4, _NVLINK5, _PCIE4 = (8, 300e9, 25e9), (8, 450e9, 50e9), (8, 900e9, 50e9), (1, 25e9, 25e9)
_A100 = {"f32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "f16": 312e12, "int8": 624e12}
_B200 = {"f32": 75e12, "tf32": 1.1e15, "bf16": 2.25e15, "f16": 2.25e15, "fp8": 4.5e15, "int8": 4.5e15}
_L4 = {"f32": 30.3e12, "tf32": 60e12, "bf16": 121e12, "f16": 121e12, "fp8": 242e12, "int8": 242e12}
_RTX4090 = {"f32": 82.6e12, "tf32": 82.6e12, "bf16": 165e12, "f16": 165e12, "fp8": 330e12, "int8": 660e12}
_HOPPER = {"f32": 67e12, "tf32": 495e12, "bf16": 989e12, "f16": 989e12, "fp8": 1979e12, "int8": 1979e12}

_ROWS = (
    _cpu("cpu", "cpu", "the CPU of this machine", 60e9, 20e9),
    Hardware("cuda", "cuda", "an NVIDIA GPU", 2e12, MappingProxyType({"f32": 60e12})),
    _device("opencl", "an OpenCL device"),
    _device("webgpu", "a GPU through WebGPU: Vulkan, Direct3D 12 or Metal"),
    _device("metal", "an Apple GPU: kernels as text, which is not launched yet"),
    _cpu("x86-64-amx", "isa", "an Intel CPU with AVX-512 and AMX", 150e9, 16e9),
    _cpu("x86-64-v4-bf16", "isa", "a CPU with AVX-512 and its products of bf16 pairs", 100e9, 20e9),
    _cpu("x86-64-v4", "isa", "a CPU with AVX-512", 100e9, 20e9),
    _cpu("x86-64-v3", "isa", "a CPU with AVX2 and FMA", 50e9, 20e9),
    _cpu("x86-64-v2", "isa", "a CPU with SSE4.2", 15e9, 15e9),
    _cpu("x86-64", "isa", "any 64-bit x86 CPU", 15e9, 15e9),
    _cpu("arm64", "isa", "a 64-bit Arm CPU, with NEON", 30e9, 20e9),
    _gpu("a100", "NVIDIA A100 SXM with 80 GB", 2.039e12, 80e9, (8, 0), 163, 108, _NVLINK3, _A100),
    _gpu("h100", "NVIDIA H100 SXM with 80 GB", 3.35e12, 80e9, (9, 0), 227, 132, _NVLINK4, _HOPPER),
    _gpu("h200", "NVIDIA H200 SXM with 141 GB", 4.8e12, 141e9, (9, 0), 227, 132, _NVLINK4, _HOPPER),
    _gpu("b200", "NVIDIA B200 with 180 GB", 7.7e12, 180e9, (10, 0), 227, 148, _NVLINK5, _B200),
    _gpu("l4", "NVIDIA L4 with 24 GB", 300e9, 24e9, (8, 9), 99, 58, _PCIE4, _L4),
    _gpu("rtx4090", "NVIDIA GeForce RTX 4090 with 24 GB", 1.008e12, 24e9, (8, 9), 99, 128, _PCIE4, _RTX4090),
)

HARDWARE: dict[str, Hardware] = {row.name: row for row in _ROWS}
"""All hardware by name. `add_hardware` adds a row. The levels of x86-64 are defined by its psABI."""

_OTHER_NAMES = {
    other: name
    for name, others in {
        "cpu": "native host",
        "cuda": "gpu nvidia",
        "webgpu": "wgpu mps",  # kernels for metal are not launched
        "x86-64-amx": "amx",
        "x86-64-v4": "avx512",
        "x86-64-v3": "avx2",
        "arm64": "arm aarch64 neon",
    }.items()
    for other in others.split()
}
"""Names of hardware by the names in other tools."""


def find_hardware(name: str, what: str = "device") -> Hardware:
    """Return the hardware of that name. Raises UsageError if the name is unknown; `what` is the name's role."""
    found = HARDWARE.get(name)
    if found is None:
        near = (
            [_OTHER_NAMES[name]] if name in _OTHER_NAMES else difflib.get_close_matches(name.lower(), HARDWARE, 1, 0.7)
        )
        meant = f"{near[0]}? " if near else ""
        raise UsageError(f"unknown {what} {name!r}", hint=f"{meant}one of {', '.join(HARDWARE)}")
    return found


def add_hardware(hardware: Hardware) -> None:
    """Add a row to the table of hardware. Raises UsageError for a name that is taken or has a colon, for an unknown
    kind, and for a row without a rate of float32.
    """
    kinds = sorted({row.kind for row in _ROWS})
    if hardware.name in HARDWARE or ":" in hardware.name or not hardware.name:
        raise UsageError(f"hardware cannot be named {hardware.name!r}", hint="a new name, without a colon")
    if hardware.kind not in kinds or "f32" not in hardware.rates:
        raise UsageError(
            f"hardware {hardware.name} needs a known kind and a rate of f32",
            received=f"kind={hardware.kind!r}, rates of {', '.join(hardware.rates) or 'nothing'}",
            hint="a kind out of " + ", ".join(kinds),
        )
    HARDWARE[hardware.name] = hardware
