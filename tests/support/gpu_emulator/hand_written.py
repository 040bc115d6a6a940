"""CUDA texts that are written by hand: what specifications cannot say, such as asynchronous copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.gpu_emulator.emulation import EmulatedKernel
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.kernels.devices.group_kernel import GroupKernel
from treadle.backends.tvm.kernels.devices.kernel_text import KernelPrinter
from treadle.backends.tvm.kernels.devices.statements import GLOBAL, Memory
from treadle.ir.types import DType


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
