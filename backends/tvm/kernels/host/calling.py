"""Calls of a single kernel on arrays, outside a program: for tests, benchmarks and inspection."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.host.cache import Entry, KernelCache
from treadle.backends.tvm.kernels.isa import Isa, host_isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.errors import BackendError

Array = np.ndarray[Any, Any]

POINTER, INTEGER = 4, 1
"""Type codes of arguments in TVM's calling convention; each argument is a type code and eight bytes."""

PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)


def address(array: Array) -> int:
    """Return the address of an array's first element."""
    return int(array.__array_interface__["data"][0])


def function_of(entry: Entry) -> Callable[[int, int, int], int]:
    """Return compiled code as a function of the arguments' address, their number, and the result's address. It returns
    0 on success.

    Arguments are not checked.
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
    """Bind a kernel to arrays, in the order of its pointers, and to sizes. Return a function without arguments that
    runs it.

    The arrays must be as large as the sizes imply; this is not checked. The function keeps them alive.
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
