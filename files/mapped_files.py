"""Arrays backed by files: detect them, move arrays there, and release their memory."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from treadle.files.user_cache import private_folder

Array = np.ndarray[Any, Any]

_SMALLEST = 1 << 20  # bytes of an array for which a file of its own pays off


def is_mapped(array: Array) -> bool:
    """Return True if an array is backed by a memory-mapped file, or by immutable bytes that were read from a file."""
    return any(isinstance(base, np.memmap | mmap.mmap | bytes) for base in _bases(array))


def give_back(array: Array) -> None:
    """Let the system release the memory of a memory-mapped file's pages. Pages that are needed again are read again.

    An array in other memory, or in a writable mapping, is unchanged.
    """
    mapping = next((base for base in _bases(array) if isinstance(base, mmap.mmap)), None)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    whole = np.frombuffer(mapping, np.uint8)
    if whole.flags.writeable:  # writes to a private mapping would be lost
        return
    first, last = np.lib.array_utils.byte_bounds(array)
    start = -(-(first - whole.ctypes.data) // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (last - whole.ctypes.data) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)


def in_file(array: Array) -> Array:
    """Return an equal, read-only array that is backed by a file without a name, in the user's cache, so that the system
    can release its memory. The array itself is returned if it is small, or if there is no room for the file.
    """
    folder = private_folder("blocks") if array.nbytes >= _SMALLEST else None
    if folder is None:
        return array
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(np.ascontiguousarray(array).data)
            file.flush()
            mapping = mmap.mmap(file.fileno(), array.nbytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return array
    return np.frombuffer(mapping, array.dtype).reshape(array.shape)


def _bases(array: Array) -> Iterator[Any]:
    base: Any = array
    while base is not None:
        yield base
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
