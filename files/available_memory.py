"""The memory that this process can still allocate."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUPS = (  # version 2 and version 1 of control groups
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""The folder of a control group, its files with the limit and the use, and the entry of `memory.stat` with the file
cache that the kernel can drop.
"""


def free_memory() -> int | None:
    """Return the bytes that the machine has available, and the process's control group allows. None if the operating
    system does not report it, as on macOS and Windows.
    """
    found = [available for available in (_machine(), *(_group(*group) for group in _GROUPS)) if available is not None]
    return min(found) if found else None


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
