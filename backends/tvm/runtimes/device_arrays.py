"""Arrays in the memory of a device: states, and the form in which values are stored there.

A device without 64-bit integers stores them in 32 bits. A value that does not fit is refused when it is copied to the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.backends.states import Index
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceBuffer
from treadle.backends.tvm.runtimes.runtime import Runtime
from treadle.backends.tvm.spaces import MemoryForm
from treadle.ir.errors import BackendError

Array = np.ndarray[Any, Any]


def stored_dtype(dtype: np.dtype[Any], form: MemoryForm) -> np.dtype[Any]:
    """Return the dtype in which a device stores elements of a dtype."""
    return np.dtype(np.int32) if form.narrow and dtype == np.int64 else dtype


def to_stored(array: Array, form: MemoryForm, name: str) -> Array:
    """Return an array in the form in which a device stores it. Raises BackendError if a value does not fit; `name`
    describes the array.
    """
    kind = stored_dtype(array.dtype, form)
    if kind == array.dtype or not array.size:
        return array.astype(kind, copy=False)
    least, most = int(array.min()), int(array.max())
    if least < -(2**31) or most >= 2**31:
        raise BackendError(
            f"{name} has a value that does not fit into 32 bits, in which the device stores integers",
            received=f"{least if least < -(2**31) else most:,}",
            hint="values from -2,147,483,648 to 2,147,483,647, or another target",
        )
    return array.astype(kind)


def of_stored(data: Array, shape: tuple[int, ...], dtype: np.dtype[Any], form: MemoryForm) -> Array:
    """Return the array of a dtype from bytes of a device."""
    return data.view(stored_dtype(dtype, form)).reshape(shape).astype(dtype, copy=False)


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A state in the memory of a device. Only entries of an executable, and `States.read`, `write` and `copy`, access
    it.

    shape  the sizes
    dtype  NumPy dtype of the elements; the device may store them as smaller integers
    """

    runtime: Runtime
    buffer: DeviceBuffer
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    form: MemoryForm

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.buffer.nbytes

    def parts(self, index: Index) -> tuple[list[BufferPart], tuple[int, ...]]:
        """Return the consecutive bytes of a part in order, and the part's shape."""
        item = stored_dtype(self.dtype, self.form).itemsize
        full = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        spans = [
            slice(i, i + 1).indices(n)[:2] if isinstance(i, int) else i.indices(n)[:2]
            for i, n in zip(full, self.shape, strict=True)
        ]
        counts = [max(0, end - begin) for begin, end in spans]
        shape = tuple([count for i, count in zip(full, counts, strict=True) if not isinstance(i, int)])
        strides = [item * math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        split = max((axis for axis, n in enumerate(self.shape) if counts[axis] != n), default=0)
        run = math.prod(counts[split:]) * item
        if not math.prod(counts):
            return [], shape
        starts = np.zeros(1, np.int64) + sum(begin * stride for (begin, _), stride in zip(spans, strides, strict=True))
        for count, stride in zip(counts[:split], strides[:split], strict=True):
            starts = (starts[:, None] + stride * np.arange(count)).reshape(-1)
        return [BufferPart(self.buffer, run, int(at)) for at in starts], shape


class DeviceAccess:
    """Access to parts of states on a device. See `treadle.backends.states.StateAccess`."""

    def read(self, parts: Sequence[tuple[DeviceArray, Index]]) -> list[Array]:
        """Return copies of all parts, after one wait."""
        if not parts:
            return []
        runtime = parts[0][0].runtime
        found = [array.parts(index) for array, index in parts]
        with runtime.lock:
            data = iter(runtime.memory.read_parts([part for pieces, _ in found for part in pieces]))
        copies = []
        for (array, _), (pieces, shape) in zip(parts, found, strict=True):
            flat = np.concatenate([np.empty(0, np.uint8), *[next(data) for _ in pieces]])
            copies.append(of_stored(flat, shape, array.dtype, array.form))
        return copies

    def write(self, array: DeviceArray, index: Index, value: Array) -> None:
        pieces, shape = array.parts(index)
        data = to_stored(np.broadcast_to(value, shape), array.form, "a state")
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        with array.runtime.lock:
            for number, (buffer, nbytes, at) in enumerate(pieces):
                array.runtime.memory.write(buffer, flat[number * nbytes : (number + 1) * nbytes], at)

    def copy(self, array: DeviceArray, source: Index, to: Index) -> None:
        with array.runtime.lock:
            for part, (buffer, _, at) in zip(array.parts(source)[0], array.parts(to)[0], strict=True):
                array.runtime.memory.copy(part, buffer, at)
