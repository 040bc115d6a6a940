"""Arrays backed by files: detect them, and release their memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


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


def _bases(array: Array) -> Iterator[Any]:
    base: Any = array
    while base is not None:
        yield base
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
