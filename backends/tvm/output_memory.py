"""Where outputs lie: in memory that those of earlier calls had, once nobody refers to these.

The system clears the memory that it gives, which takes about as long as a kernel takes to write it: of GPT-2's logits
over 512 tokens, 103 MB, some hundredths of a run. A caller often holds a result until it has the next one, so the
memory of the last two calls' outputs is remembered, and no other.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.backends.refusals import out_of_memory
from treadle.backends.tvm.kernels.calling import address
from treadle.passes.memory.frame_placement import ALIGNMENT

Array = np.ndarray[Any, Any]

LEAST = 1 << 20  # bytes from which memory is remembered: the process keeps less than that by itself
KEPT = 2  # calls whose outputs' memory is remembered


@dataclass(frozen=True)
class _Given:
    """Memory that was given to an output.

    held  the array that all views of the output refer to; it dies with the last of them
    """

    memory: Array
    held: weakref.ref[Array]

    def suits(self, count: int) -> bool:
        """Whether nobody refers to it, and it has so many bytes, or few more."""
        return self.held() is None and count <= self.memory.nbytes <= count + count // 8


class OutputMemory:
    """Gives memory to outputs, call by call."""

    def __init__(self) -> None:
        self._given: dict[str, list[_Given]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, aligned: bool = False) -> Array:
        """Memory for an output: a large one, or one that is to be aligned, begins where a cache line does.

        Raises BackendError where there is not enough.
        """
        count = math.prod(shape) * dtype.itemsize
        if count < LEAST:
            self._given.pop(name, None)
            held = allocated(count + aligned * ALIGNMENT, shape)
            return placed(held, shape, dtype) if aligned else held.view(dtype).reshape(shape)
        given = self._given.pop(name, [])
        found = next((each for each in given if each.suits(count + ALIGNMENT)), None)
        memory = allocated(count + ALIGNMENT, shape) if found is None else found.memory
        held = np.frombuffer(memory.data, np.uint8)  # views of views refer to it, and not to what it lies in
        self._given[name] = [_Given(memory, weakref.ref(held)), *(g for g in given if g is not found)][:KEPT]
        return placed(held, shape, dtype)


def allocated(count: int, shape: tuple[int, ...]) -> Array:
    """So many bytes of new memory, for an array of this shape. Raises BackendError where there is not enough."""
    try:
        return np.empty(count, np.uint8)
    except (MemoryError, OverflowError, ValueError) as error:
        raise out_of_memory(count, str(list(shape))) from error


def placed(memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array in memory that has a line more than it needs, from the start of a line on."""
    begin = -address(memory) % ALIGNMENT
    return memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
