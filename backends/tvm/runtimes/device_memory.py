"""Memory of a device: buffers that the host accesses by copies alone.

    buffer = memory.allocate(4096)
    memory.write(buffer, np.arange(1024, dtype=np.float32))
    memory.read(buffer, 4096).view(np.float32)

`HostMemory` keeps its buffers in the host's memory. The emulator uses it, and the other memories are tested against it.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import numpy as np

from treadle.backends.refusals import out_of_memory

Array = np.ndarray[Any, Any]


class DeviceBuffer:
    """Bytes of a device. They are released when the last reference to the buffer is gone.

    handle  the runtime's own object
    nbytes  number of bytes
    """

    def __init__(self, handle: Any, nbytes: int) -> None:
        self.handle, self.nbytes = handle, nbytes

    def __repr__(self) -> str:
        return f"<{self.nbytes:,} bytes of a device>"


class DeviceMemory(Protocol):
    """The memory of one device.

    used  bytes of all buffers that exist now
    peak  largest `used` so far
    """

    used: int
    peak: int

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Return a new buffer, whose content is undefined. Raises BackendError, with the bytes required and the bytes
        free, if there is not enough memory.
        """
        ...

    def write(self, buffer: DeviceBuffer, data: Array, at: int = 0) -> None:
        """Copy an array's bytes to the device, to byte `at` of the buffer. Launches that were enqueued before finish
        first. The array may be changed as soon as the call returns.
        """
        ...

    def read(self, buffer: DeviceBuffer, nbytes: int, at: int = 0) -> Array:
        """Wait for all launches, and return `nbytes` bytes of the buffer, from byte `at`, as a new array of uint8."""
        ...

    def fill(self, buffer: DeviceBuffer, byte: int, nbytes: int, at: int = 0) -> None:
        """Set `nbytes` bytes of the buffer, from byte `at`, to a value."""
        ...


class HostMemory:
    """A `DeviceMemory` whose buffers are arrays of the host."""

    def __init__(self) -> None:
        self.used = self.peak = 0

    def allocate(self, nbytes: int) -> DeviceBuffer:
        try:
            buffer = DeviceBuffer(np.empty(nbytes, np.uint8), nbytes)
        except (MemoryError, OverflowError, ValueError) as error:
            raise out_of_memory(nbytes, "a buffer of the device") from error
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        weakref.finalize(buffer, self._released, nbytes)
        return buffer

    def _released(self, nbytes: int) -> None:
        self.used -= nbytes

    def write(self, buffer: DeviceBuffer, data: Array, at: int = 0) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        buffer.handle[at : at + flat.size] = flat

    def read(self, buffer: DeviceBuffer, nbytes: int, at: int = 0) -> Array:
        return np.array(buffer.handle[at : at + nbytes])

    def fill(self, buffer: DeviceBuffer, byte: int, nbytes: int, at: int = 0) -> None:
        buffer.handle[at : at + nbytes] = byte
