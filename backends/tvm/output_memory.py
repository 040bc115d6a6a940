"""Memory of outputs. If no array refers to the memory of an earlier call's output, a later call reuses it.

The operating system clears the memory that it provides, which takes about as long as a kernel takes to write it. For
GPT-2's logits over 512 tokens (103 MB), this is several hundredths of a run. A caller often holds a result until the
next result is available, so the memory of the last two calls' outputs is cached.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.backends.refusals import out_of_memory
from treadle.backends.tvm.kernels.host.calling import address
from treadle.ir.types import DType
from treadle.passes.memory.frames import ALIGNMENT

Array = np.ndarray[Any, Any]

LEAST = 1 << 20  # bytes of the smallest cached output; the allocator reuses smaller blocks itself
KEPT = 2  # number of calls whose output memory is cached


@dataclass(frozen=True)
class _Given:
    """Memory that was assigned to an output.

    held  the array that all views of the output refer to; it is freed with the last view
    """

    memory: Array
    held: weakref.ref[Array]

    def suits(self, count: int) -> bool:
        """Return True if no array refers to the memory and it has `count` bytes, or slightly more."""
        return self.held() is None and count <= self.memory.nbytes <= count + count // 8


class OutputMemory:
    """The allocator of the memory of outputs."""

    def __init__(self) -> None:
        self._given: dict[str, list[_Given]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, aligned: bool = False) -> Array:
        """Return an array for an output. If it is large, or if `aligned`, it starts at a cache line.

        Raises BackendError if there is not enough memory.
        """
        count = math.prod(shape) * dtype.itemsize
        if count < LEAST:
            self._given.pop(name, None)
            held = allocated(count + aligned * ALIGNMENT, shape)
            return placed(held, shape, dtype) if aligned else held.view(dtype).reshape(shape)
        given = self._given.pop(name, [])
        found = next((each for each in given if each.suits(count + ALIGNMENT)), None)
        memory = allocated(count + ALIGNMENT, shape) if found is None else found.memory
        held = np.frombuffer(
            memory.data, np.uint8
        )  # views of a view refer to this array, not to the memory that holds it
        self._given[name] = [_Given(memory, weakref.ref(held)), *(g for g in given if g is not found)][:KEPT]
        return placed(held, shape, dtype)


def stored(dtype: DType) -> np.dtype[Any]:
    """Return the NumPy dtype in which elements of a dtype are stored: uint16 for bf16."""
    return dtype.numpy or np.dtype(np.uint16)


def allocated(count: int, shape: tuple[int, ...]) -> Array:
    """Allocate `count` bytes for an array of this shape. Raises BackendError if there is not enough memory."""
    try:
        return np.empty(count, np.uint8)
    except (MemoryError, OverflowError, ValueError) as error:
        raise out_of_memory(count, str(list(shape))) from error


def placed(memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an array that starts at a cache line in memory that has one spare line."""
    begin = -address(memory) % ALIGNMENT
    return memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
