"""CUDA texts that are written by hand: what specifications cannot say, such as asynchronous copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.gpu_emulator.emulation import EmulatedKernel
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, lane_functions_text
from treadle.backends.tvm.kernels.devices.group_kernel import GroupKernel
from treadle.backends.tvm.kernels.devices.kernel_text import KernelPrinter
from treadle.backends.tvm.kernels.devices.preludes import PRELUDES
from treadle.backends.tvm.kernels.devices.statements import GLOBAL, Memory
from treadle.ir.types import DType

_PIPELINE = """
static __device__ __forceinline__ void __pipeline_memcpy_async(void* to, const void* from, int bytes, int zeros = 0) {
  const unsigned int place = (unsigned int)__cvta_generic_to_shared(to), read = bytes - zeros;
  if (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(place), "l"(from), "r"(read) : "memory");
  else if (bytes == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" :: "r"(place), "l"(from), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(place), "l"(from), "r"(read) : "memory");
}
#define __pipeline_commit() asm volatile("cp.async.commit_group;" ::: "memory")
#define __pipeline_wait_prior(n) asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory")
"""  # CUDA's <cuda_pipeline.h>, which is not in the packages of NVRTC and ptxas


def cuda_text(kernel: EmulatedKernel) -> str:
    """Return the whole text of a kernel for CUDA's compiler."""
    return PRELUDES["cuda"] + lane_functions_text(kernel.kernel.group_kernel, "cuda") + _PIPELINE + kernel.text


def hand_written(
    statements: str, reads: Mapping[str, DType], writes: Mapping[str, DType], *sizes: str
) -> EmulatedKernel:
    """Return a kernel of these statements, for groups of 32 threads; `lane` is a thread's number.

    reads, writes  buffers by name
    sizes          names of integers
    """
    pointers = [Memory(name, dtype, place=GLOBAL) for name, dtype in reads.items()]
    pointers += [Memory(name, dtype, place=GLOBAL, is_written=True) for name, dtype in writes.items()]
    no_specification: Any = None
    written = GroupKernel(no_specification, DEVICES["cuda"], "hand_written", pointers, list(sizes))
    head, end = KernelPrinter(written).text().rsplit("}", 1)
    return EmulatedKernel(DeviceKernel(written), f"{head}{statements}}}{end}")
