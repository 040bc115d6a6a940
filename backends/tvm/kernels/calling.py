"""Calling one kernel on arrays, outside a program: for tests, for measuring, for looking."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.cache import Entry, KernelCache
from treadle.backends.tvm.kernels.isa import Isa, host_isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.errors import BackendError

Array = np.ndarray[Any, Any]

POINTER, INTEGER = 4, 1
"""Type indices of arguments in TVM's interface; each argument is such an index and eight bytes."""

PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)


def address(array: Array) -> int:
    """Where an array's first element lies."""
    return int(array.__array_interface__["data"][0])


def function_of(entry: Entry) -> Callable[[int, int, int], int]:
    """Compiled code as a function of where its arguments lie, how many they are, and where its result goes; 0: success.

    Only for arguments that are right: nothing is checked.
    """
    call, handle = PROTOTYPE(entry[0]), entry[1]
    return lambda arguments, count, result: call(handle, arguments, count, result)


def bind(
    kernel: Kernel,
    arrays: Sequence[Array],
    sizes: Sequence[int],
    isa: Isa | None = None,
    cache: KernelCache | None = None,
) -> Callable[[], None]:
    """A kernel on arrays, in the order in which it asks for pointers, then sizes: a function without arguments.

    The arrays must be as large as the sizes say: nothing is checked. They stay alive as long as the function does.
    """
    found = (cache or KernelCache(isa or host_isa())).entries([kernel])[kernel]
    words = np.zeros((len(arrays) + len(sizes), 2), np.int64)
    words[: len(arrays), 0], words[len(arrays) :, 0] = POINTER, INTEGER
    words[:, 1] = [*map(address, arrays), *sizes]
    result = np.zeros(2, np.int64)
    call, arguments, count, ret = function_of(found), address(words), len(words), address(result)
    held = (arrays, words, result)

    def run() -> None:
        if call(arguments, count, ret):
            raise BackendError(f"kernel {kernel.title} failed", received=f"{len(held[0])} arrays, {len(sizes)} sizes")

    return run
