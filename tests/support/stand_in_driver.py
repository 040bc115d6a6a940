"""A stand-in for the CUDA driver, as a shared library: `stand_in_driver.cpp` has its rules."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from tests.support.gpu_emulator.emulation import EmulatedKernel, built
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.runtimes.cuda_driver import CudaDriver
from treadle.backends.tvm.runtimes.cuda_runtime import Compiler, CudaRuntime

SOURCE = Path(__file__).with_suffix(".cpp")


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(built(SOURCE)))
    library.stand_in_register.argtypes = (ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 3)
    library.stand_in_fail.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_long)
    library.stand_in_reset.argtypes = (*[ctypes.c_int] * 3, ctypes.c_size_t, ctypes.c_int)
    for name in ("count", "used", "handles", "depth"):
        getattr(library, f"stand_in_{name}").restype = ctypes.c_long
    for name in ("log", "message"):
        getattr(library, f"stand_in_{name}").restype = ctypes.c_char_p
    return library


class StandInDriver:
    """A driver with GPUs whose kernels run on the emulator. There is one in a process; a new one replaces it.

    memory   bytes of a GPU
    version  version of CUDA that the driver supports, as 12090
    """

    def __init__(
        self, *, devices: int = 1, capability: tuple[int, int] = (9, 0), memory: int = 1 << 30, version: int = 12090
    ) -> None:
        self.library = _library()
        self.library.stand_in_reset(devices, *capability, memory, version)

    def runtime(self, *, graphs: bool = True, compiler: Compiler = lambda text, _: text.encode()) -> CudaRuntime:
        """Return a runtime. By default, its kernels are not compiled by NVRTC: the stand-in gets their text."""
        return StandInRuntime(self, graphs, compiler)

    def register(self, kernel: DeviceKernel) -> None:
        """Let the emulator run a kernel under its name."""
        written = kernel.group_kernel
        run = ctypes.cast(EmulatedKernel(kernel).library.run, ctypes.c_void_p)
        counts = len(written.pointers), len(written.sizes), written.device.threads
        self.library.stand_in_register(written.name.encode(), run, *counts)

    def fail(self, function: str, number: int, after: int = 0) -> None:
        """Let a function of the driver fail with an error, after a number of calls."""
        self.library.stand_in_fail(function.encode(), number, after)

    def count(self, function: str) -> int:
        """Return the number of calls of a function of the driver."""
        return int(self.library.stand_in_count(function.encode()))

    @property
    def used(self) -> int:
        """Bytes of the GPU that are allocated."""
        return int(self.library.stand_in_used())

    @property
    def handles(self) -> int:
        """Number of streams, modules, graphs and pinned arrays that exist."""
        return int(self.library.stand_in_handles())

    @property
    def depth(self) -> int:
        """Number of contexts that are current in this thread, one above the other."""
        return int(self.library.stand_in_depth())

    @property
    def log(self) -> list[str]:
        """The operations of all streams, in order: copies, launches, graphs and waits."""
        return str(self.library.stand_in_log().decode()).splitlines()


class StandInRuntime(CudaRuntime):
    """A runtime of the stand-in, which registers the kernels that it loads."""

    def __init__(self, driver: StandInDriver, graphs: bool, compiler: Compiler) -> None:
        super().__init__(CudaDriver(driver.library), graphs=graphs, compiler=compiler)
        self._stand_in = driver

    def load(self, kernels):  # type: ignore[no-untyped-def]
        for kernel in kernels.values():
            self._stand_in.register(kernel)
        return super().load(kernels)
