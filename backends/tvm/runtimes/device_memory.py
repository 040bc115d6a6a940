"""Memory of a device: buffers that the host accesses by copies alone.

    buffer = memory.allocate(4096)
    memory.write(buffer, np.arange(1024, dtype=np.float32))
    memory.read(buffer, 4096).view(np.float32)

`HostMemory` keeps its buffers in the host's memory. The emulator uses it, and the other memories are tested against it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from treadle.ir.errors import BackendError

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


class BufferPart(NamedTuple):
    """`nbytes` bytes of a buffer, from byte `at`."""

    buffer: DeviceBuffer
    nbytes: int
    at: int = 0


class DeviceLostError(BackendError):
    """The error of a device that no longer answers: it was reset or unplugged, or a kernel ran too long. Its memory is
    lost, so executables and states on it cannot be used any more. The next call of `find_runtime` opens it again.
    """


def failed_allocation(nbytes: int, free: int | None) -> BackendError:
    """Return the error for a buffer that a device cannot allocate.

    free  bytes that are free on the device; None if it does not report them
    """
    left = "" if free is None else f", {free:,} bytes free"
    return BackendError(
        "there is not enough memory on the device",
        received=f"{nbytes:,} bytes required{left}",
        hint="smaller inputs, fewer rows or a smaller capacity of a session, or quantized weights",
    )


class DeviceMemory(Protocol):
    """The memory of one device. Every method may raise DeviceLostError.

    used  bytes of all buffers that exist now
    peak  largest `used` so far
    """

    used: int
    peak: int

    @property
    def free(self) -> int | None:
        """Bytes that can still be allocated; None if the device does not report them."""
        ...

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Return a new buffer, whose content is undefined. The number of bytes may be 0. Raises `failed_allocation` if
        there is not enough memory.
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

    def read_parts(self, parts: Sequence[BufferPart]) -> list[Array]:
        """Wait once for all launches, and return the bytes of each part as a new array of uint8."""
        ...

    def copy(self, source: BufferPart, to: DeviceBuffer, at: int = 0) -> None:
        """Copy bytes within the device, to byte `at` of a buffer, after the launches that were enqueued before. The
        source may be in the same buffer, where it does not overlap with the copy.
        """
        ...

    def fill(self, buffer: DeviceBuffer, byte: int, nbytes: int, at: int = 0) -> None:
        """Set `nbytes` bytes of the buffer, from byte `at`, to a value."""
        ...


class CountedMemory:
    """The base class of memories: it counts the bytes of buffers until they are released, which may happen in any
    thread, and also while this thread counts.
    """

    def __init__(self) -> None:
        self.used = self.peak = 0
        self._counting = threading.RLock()

    def _buffer(self, handle: Any, nbytes: int) -> DeviceBuffer:
        """Return a buffer of memory that was allocated."""
        buffer = DeviceBuffer(handle, nbytes)
        with self._counting:
            self.used += nbytes
            self.peak = max(self.peak, self.used)
        weakref.finalize(buffer, self._released, handle, nbytes).atexit = False
        return buffer

    def _released(self, handle: Any, nbytes: int) -> None:
        with self._counting:
            self.used -= nbytes


class HostMemory(CountedMemory):
    """A `DeviceMemory` whose buffers are arrays of the host.

    size  bytes of the memory; None: no limit
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size

    @property
    def free(self) -> int | None:
        return None if self.size is None else self.size - self.used

    def allocate(self, nbytes: int) -> DeviceBuffer:
        if self.free is not None and nbytes > self.free:
            raise failed_allocation(nbytes, self.free)
        try:
            return self._buffer(np.empty(nbytes, np.uint8), nbytes)
        except (MemoryError, OverflowError, ValueError) as error:
            raise failed_allocation(nbytes, self.free) from error

    def write(self, buffer: DeviceBuffer, data: Array, at: int = 0) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        buffer.handle[at : at + flat.size] = flat

    def read(self, buffer: DeviceBuffer, nbytes: int, at: int = 0) -> Array:
        return np.array(buffer.handle[at : at + nbytes])

    def read_parts(self, parts: Sequence[BufferPart]) -> list[Array]:
        return [self.read(*part) for part in parts]

    def copy(self, source: BufferPart, to: DeviceBuffer, at: int = 0) -> None:
        to.handle[at : at + source.nbytes] = self.read(*source)

    def fill(self, buffer: DeviceBuffer, byte: int, nbytes: int, at: int = 0) -> None:
        buffer.handle[at : at + nbytes] = byte
