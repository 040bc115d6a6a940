"""The interface of the CUDA driver, by ctypes: its functions, their errors, and the library."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from treadle.backends.tvm.runtimes.device_memory import DeviceLostError
from treadle.ir.errors import BackendError

_POINTER, _SIZE, _INT, _UNSIGNED = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
_ADDRESS = ctypes.c_uint64  # CUdeviceptr

FUNCTIONS: Mapping[str, tuple[Any, ...]] = {
    "cuInit": (_UNSIGNED,),
    "cuDriverGetVersion": (_POINTER,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
    "cuDeviceGetCount": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (_POINTER, _INT, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemGetInfo_v2": (_POINTER, _POINTER),
    "cuMemAlloc_v2": (_POINTER, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemAllocHost_v2": (_POINTER, _SIZE),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, _SIZE, _POINTER),
    "cuStreamCreate": (_POINTER, _UNSIGNED),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamBeginCapture_v2": (_POINTER, _INT),
    "cuStreamEndCapture": (_POINTER, _POINTER),
    "cuGraphInstantiateWithFlags": (_POINTER, _POINTER, ctypes.c_ulonglong),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphExecDestroy": (_POINTER,),
    "cuModuleLoadData": (_POINTER, _POINTER),
    "cuModuleUnload": (_POINTER,),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuLaunchKernel": (_POINTER, *[_UNSIGNED] * 7, _POINTER, _POINTER, _POINTER),
}
"""The driver's functions that are called, with the types of their arguments. Each returns a CUresult."""

OUT_OF_MEMORY, NO_DEVICE, INVALID_DEVICE = 2, 100, 101
DRIVER_IS_OLDER = (209, 222)  # no binary for this GPU, an unsupported version of PTX
_LOSSES = frozenset({214, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 720})
"""Errors after which a context cannot be used: a kernel failed or ran too long, or the hardware failed."""

MAX_GRID, MAX_SHARED, WARP, MAJOR, MINOR = 5, 8, 10, 75, 76  # CUdevice_attribute
NON_BLOCKING, RELAXED = 1, 2  # a stream that does not wait for others; other threads may allocate during a capture


class CudaDriver:
    """The functions of the CUDA driver. They raise errors instead of returning numbers.

    version  version of CUDA that the driver supports, as 12.4
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        self._loss: str | None = None
        for name, types in FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise BackendError(
                    "NVIDIA's driver is too old", received=f"a driver without {name}", hint="a driver for CUDA 12"
                ) from None
            function.argtypes, function.restype = types, ctypes.c_int
            self._functions[name] = function
        self.call("cuInit", 0)
        self.version = "{}.{}".format(*divmod(self.integer("cuDriverGetVersion") // 10, 100))

    def result(self, name: str, *arguments: Any) -> int:
        """Call a function and return its result: 0, or the number of an error. Raises DeviceLostError if the context
        cannot be used any more.
        """
        if self._loss is not None:
            raise DeviceLostError("the GPU was lost", received=self._loss, hint=AFTER_LOSS)
        number = int(self._functions[name](*arguments))
        if number in _LOSSES:
            self._loss = f"{name}: {self.describe(number)}"
            raise DeviceLostError("the GPU was lost", received=self._loss, hint=AFTER_LOSS)
        return number

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises BackendError if it fails."""
        number = self.result(name, *arguments)
        if number in (NO_DEVICE, INVALID_DEVICE):
            raise BackendError("there is no NVIDIA GPU", received=f"{name}: {self.describe(number)}", hint=ELSEWHERE)
        if number:
            raise BackendError("NVIDIA's driver failed", received=f"{name}: {self.describe(number)}")

    def integer(self, name: str, *arguments: Any) -> int:
        """Return the integer that a function writes to its first argument."""
        made = ctypes.c_int()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value

    def handle(self, name: str, *arguments: Any) -> int:
        """Return the handle that a function writes to its first argument."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value or 0

    @contextmanager
    def within(self, context: int) -> Iterator[None]:
        """A context manager in which a context is current in this thread. The caller's is current again after it."""
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._functions["cuCtxPopCurrent_v2"](ctypes.byref(ctypes.c_void_p()))

    def release(self, name: str, handle: int, context: int) -> None:
        """Release a handle. A failure is ignored: the context may be lost, or the process may end."""
        with suppress(BackendError), self.within(context):
            self.call(name, handle)

    def describe(self, number: int) -> str:
        """Return the name and the description of an error."""
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if self._functions[name](number, ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode(errors="replace"))
        return ", ".join(texts) or f"error {number}"


ELSEWHERE = "another target: cpu, opencl, webgpu"
AFTER_LOSS = "a new process: a context with this error cannot be used any more"


def driver_library() -> ctypes.CDLL:
    """Return the driver's library. Raises BackendError if this machine has none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise BackendError(
            "there is no NVIDIA driver on this machine", received=str(error), hint=f"NVIDIA's driver, or {ELSEWHERE}"
        ) from error
