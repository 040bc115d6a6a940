"""The memory that this process can still allocate, and memory that is allocated before its first use."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np

_MEMINFO = Path("/proc/meminfo")
_GROUPS = (  # version 2 and version 1 of control groups
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""The folder of a control group, its files with the limit and the use, and the entry of `memory.stat` with the file
cache that the kernel can drop.
"""

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE in <linux/mman.h>, since Linux 5.14."""


def free_memory() -> int | None:
    """Return the bytes that the machine has available, and the process's control group allows. None if the operating
    system does not report it, as on macOS and Windows.
    """
    found = [available for available in (_machine(), *(_group(*group) for group in _GROUPS)) if available is not None]
    return min(found) if found else None


def prefault(array: np.ndarray[Any, Any]) -> bool:
    """Let the operating system allocate the memory of a contiguous array now. Otherwise, it allocates each page at the
    first write to it. The elements do not change, and other threads may read and write them meanwhile (madvise(2)).

    Returns False if the system cannot: it is not Linux, older than 5.14, or has no memory left. The first writes then
    allocate the pages.
    """
    if not sys.platform.startswith("linux") or not array.nbytes:
        return False
    size = mmap.PAGESIZE
    begin = array.ctypes.data // size * size
    end = -(-(array.ctypes.data + array.nbytes) // size) * size
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _POPULATE_WRITE) == 0)


def _machine() -> int | None:
    try:
        lines = _MEMINFO.read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _group(folder: Path, limit: str, use: str, cache: str) -> int | None:
    """Return the bytes that a control group still allows, or None if it has no limit."""
    try:
        most, used, facts = [(folder / name).read_text("ascii").strip() for name in (limit, use, "memory.stat")]
    except (OSError, UnicodeDecodeError):
        return None
    if not (most.isdecimal() and used.isdecimal()):
        return None
    droppable = next((int(line.split()[1]) for line in facts.splitlines() if line.split()[:1] == [cache]), 0)
    return max(0, int(most) - int(used) + droppable)
