"""Limits of a device: what the code generator has to know about a GPU, a part of a record of hardware."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceLimits:
    """The features and limits of a device that runs kernels in groups of threads.

    language    source language of kernels: cuda, opencl, metal or wgsl
    group       number of threads of a subgroup (warp), which are the lanes of a vector: 32 or 64
    registers   number of vector registers that a tile of accumulators may use
    shared      bytes of shared memory of a block
    index       name of the dtype of indices and sizes: i64, or i32 for a device without 64-bit integers
    lacks       names of the dtypes with which the device cannot compute
    subgroups   True if threads of a subgroup exchange values by shuffle instructions; otherwise they use shared memory
    matrix_unit True if there is a matrix unit; no kernel uses it yet
    buffers     largest number of buffers that a launch is bound to; pointers into one buffer share it; 0: no limit
    alignment   required alignment of a buffer's offset in bytes
    largest     bytes of the largest part of a buffer that is bound to a kernel; 0: no limit
    allocation  bytes of the largest buffer; 0: no limit
    groups      largest number of thread blocks along one dimension of the grid
    """

    language: str
    group: int = 32
    registers: int = 32
    shared: int = 48 * 1024
    index: str = "i64"
    lacks: frozenset[str] = frozenset()
    subgroups: bool = True
    matrix_unit: bool = False
    buffers: int = 0
    alignment: int = 256
    largest: int = 0
    allocation: int = 0
    groups: int = 65535


_MIB = 1 << 20

LIMITS: dict[str, DeviceLimits] = {
    "cuda": DeviceLimits("cuda", matrix_unit=True, groups=2**31 - 1),
    "opencl": DeviceLimits("opencl", subgroups=False, shared=32 * 1024, groups=2**31 - 1),
    "metal": DeviceLimits("metal", shared=32 * 1024, lacks=frozenset({"f64"}), buffers=30),
    "webgpu": DeviceLimits(
        "wgsl",
        shared=16 * 1024,
        index="i32",
        lacks=frozenset({"f64", "i64"}),
        subgroups=False,
        buffers=8,
        largest=128 * _MIB,
        allocation=256 * _MIB,
    ),
}
"""The least that devices of each kind support. Shared memory of CUDA is what a kernel may declare without asking for
more. A kernel of Metal has 31 buffers, of which one has its numbers. Limits of WebGPU are the defaults of its
specification; local memory of OpenCL is what the full profile requires.
"""
