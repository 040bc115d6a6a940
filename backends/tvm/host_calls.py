"""Host calls: the collectives in a table of kernel calls. The Python process executes them itself.

A record of the table holds the address of a function. For a collective, this is a Python function with a C signature.
It receives its arguments in the same form as kernels do, and works on the memory that they point to.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.host.cache import Entry
from treadle.backends.tvm.kernels.host.calling import PROTOTYPE
from treadle.backends.tvm.kernels.meeting import Meet
from treadle.ir.errors import BackendError, TreadleError
from treadle.ir.types import DType

Array = np.ndarray[Any, Any]


class HostCall:
    """A collective that is called like a kernel. One call runs at a time.

    entry  the address and the handle that the table stores for the call
    """

    def __init__(self, kernel: Meet) -> None:
        self.kernel = kernel
        self._failure: BaseException | None = None
        self._function = PROTOTYPE(self._called)

    @cached_property
    def entry(self) -> Entry:
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0, 0

    def _called(self, handle: int, arguments: int, count: int, result: int) -> int:
        """Run the collective. Return 0, or -1 if it failed, since exceptions cannot pass through the C caller."""
        try:
            self._meet([w for _, w in _words(arguments, count)])
        except BaseException as error:
            self._failure = error
            return -1
        return 0

    def _meet(self, words: list[int]) -> None:
        x, y, *sizes = words
        shapes = self.shapes(sizes)
        raw = [_bytes_at(at, shape, self.kernel.dtype) for at, shape in zip((x, y), shapes, strict=True)]
        self._compute(raw[0], raw[1], sizes)

    def shapes(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the shapes of the operand and of the result, from the sizes of a call."""
        rank = self.kernel.rank
        return list(sizes[:rank]), list(sizes[rank : 2 * rank])

    def run(self, x: Array, y: Array, sizes: Sequence[int], source: str | None) -> None:
        """Run the collective on bytes of the operand, and write the bytes of the result. Raises BackendError with the
        user's source line if it fails.
        """
        try:
            self._compute(x, y, sizes)
        except BaseException as error:
            self._failure = error
        self.raise_failure(source)

    def _compute(self, raw: Array, raw_result: Array, sizes: Sequence[int]) -> None:
        kernel, shapes = self.kernel, self.shapes(sizes)
        x, y = (_memory(each, shape, kernel.dtype) for each, shape in zip((raw, raw_result), shapes, strict=True))
        bindings = dict(zip(kernel.symbols, sizes[2 * kernel.rank :], strict=True))
        result = kernel.op.at(bindings).reference(x)
        if tuple(result.shape) != tuple(y.shape):
            raise BackendError(f"{kernel.op.name} returned shape {list(result.shape)}, expected {list(y.shape)}")
        y[...] = result

    def raise_failure(self, source: str | None) -> None:
        """Raise the error of the last failed call, with the user's source line."""
        error, self._failure = self._failure, None
        if isinstance(error, TreadleError) or (error is not None and not isinstance(error, Exception)):
            raise error
        if error is not None:
            what = f"{self.kernel.op.name}: failed while running"
            raise BackendError(what, received=f"{type(error).__name__}: {error}", source=source) from error


def _words(at: int, count: int) -> list[tuple[int, int]]:
    """Return the packed arguments as pairs of a type index and a value."""
    flat = (ctypes.c_int64 * (2 * count)).from_address(at)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _bytes_at(at: int, shape: Sequence[int], dtype: DType) -> Array:
    count = math.prod(shape) * dtype.bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(at)) if count else np.empty(0, np.uint8)


def _memory(raw: Array, shape: Sequence[int], dtype: DType) -> Any:
    """Return the bytes of a value as an array, or as a tensor for bf16, which NumPy lacks."""
    if dtype.numpy is not None:
        return raw.view(dtype.numpy).reshape(shape)
    import torch

    return torch.from_numpy(raw).view(torch.bfloat16).reshape(shape)
