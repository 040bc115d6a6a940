"""Kernels of a device as text: the form of each kernel, its arguments, and its text with everything it needs.

made = device_kernel(Softmax(False, "f32"), DEVICES["cuda"])
print(made.text)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.c_text import prelude
from treadle.backends.tvm.kernels.arithmetic.wgsl_text import PRELUDE
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.group_emitter import write_kernel
from treadle.backends.tvm.kernels.devices.group_kernel import GroupKernel, LackingWord, refuse_dtype
from treadle.backends.tvm.kernels.devices.kernel_text import KernelPrinter
from treadle.backends.tvm.kernels.devices.metal_kernel_text import MetalPrinter
from treadle.backends.tvm.kernels.devices.preludes import PRELUDES, functions
from treadle.backends.tvm.kernels.devices.wgsl_kernel_text import Sharing, wgsl_text
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.errors import BackendError

if TYPE_CHECKING:
    from treadle.backends.tvm.lowering.program import KernelProgram


@dataclass(frozen=True)
class DeviceKernel:
    """A kernel of a device.

    group_kernel  arguments, memory and statements
    why_slow      the reason why each thread runs a task of its own; empty if a group runs a task
    """

    group_kernel: GroupKernel
    why_slow: str = ""

    @cached_property
    def body(self) -> str:
        """The kernel's own text, without the prelude and the lane functions."""
        language = self.group_kernel.device.limits.language
        if language == "wgsl":
            return wgsl_text(self.group_kernel)
        return (MetalPrinter if language == "metal" else KernelPrinter)(self.group_kernel).text()

    @property
    def text(self) -> str:
        """The whole text that a compiler of the device's language takes."""
        language = self.group_kernel.device.limits.language
        if language == "wgsl":
            return self.shared_text()
        return PRELUDES[language] + lane_functions_text(self.group_kernel, language) + self.body

    def shared_text(self, sharing: Sharing | None = None, *, keeps_loops: bool = False) -> str:
        """Return the whole text in WGSL, for a launch whose pointers share bindings (`wgsl_kernel_text`)."""
        functions = "".join(function.wgsl() for function in self.group_kernel.functions.values())
        return PRELUDE + functions + wgsl_text(self.group_kernel, sharing, keeps_loops=keeps_loops)


def lane_functions_text(kernel: GroupKernel, language: str) -> str:
    """Return the functions that a kernel calls, in a C dialect, with their prelude."""
    made = prelude(language) + functions(f64="f64" not in kernel.device.limits.lacks)
    return made + "".join(function.c(language) for function in kernel.functions.values())


def device_kernel(kernel: Kernel, device: Device, name: str | None = None) -> DeviceKernel:
    """Return a kernel for a device: for groups of threads, or in the slow form if a group cannot run it.

    Raises LackingWord if neither form can express the kernel, and BackendError for a language without a printer.
    """
    if device.limits.language not in (*PRELUDES, "wgsl"):
        known = ", ".join((*PRELUDES, "wgsl"))
        raise BackendError(f"kernels are not printed in {device.limits.language}", hint=f"a device with one of {known}")
    name = name or f"treadle_{kernel.title}"
    try:
        return DeviceKernel(write_kernel(kernel, device, name))
    except LackingWord as lacking:
        if device.group == 1:
            raise
        reason = f"`{lacking.word}`: {lacking.why}"
    return DeviceKernel(write_kernel(kernel, device.slow, name), reason)


def refuse_kernels(program: KernelProgram, device: Device) -> None:
    """Raise LackingWord for the first step whose kernel the device cannot express, with the op and the user's line.

    Kernels that move elements of any dtype move them as integers, so the dtypes of the storages are checked, too.
    """
    written: set[Kernel] = set()
    for routine in program.routines:
        for step in routine.walk():
            if step.kernel.on_host:
                continue
            try:
                for view in step.pointers:
                    refuse_dtype(device, "pointer", view.storage.dtype)
                if step.kernel not in written:
                    device_kernel(step.kernel, device)
            except LackingWord as lacking:
                raise lacking.located(step.node, step.kernel.title, device) from None
            written.add(step.kernel)
