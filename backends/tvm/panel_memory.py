"""Where packed weights lie: all of them one after another in memory, and in a file that is read the next time.

A product of few rows takes as long as its weight takes to read, so where a weight lies counts. Panels share one array
that begins with a large page: NumPy asks for large pages in arrays of megabytes, and each of many arrays would have its
ends in small ones, whose reading takes a fifth longer. All begin at a multiple of a cache line, or else every vector
would lie in two. The file, in the user's cache and named after what it holds, is read into such an array: mapped, its
pages would be as large as the system made them, mostly small.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from treadle.files.user_cache import cache_folder, forget_unused, is_private, mark_used
from treadle.files.whole_files import replacing, sweep
from treadle.ir.errors import UsageError
from treadle.passes.memory.frame_placement import ALIGNMENT
from treadle.passes.memory.frames import aligned

Array = np.ndarray[Any, Any]
Kind = tuple[tuple[int, ...], np.dtype[Any]]

LARGE_PAGE = 2 << 20
SMALLEST = 1 << 20  # bytes of panels that are worth a file
_FORMAT = "treadle panels 4"
_PART = 64 << 20  # bytes that a thread reads at once
_FILES = re.compile(r"[0-9a-f]{32}\.panels")


@dataclass(frozen=True)
class Panels:
    """Weights to pack: each one's shape and dtype in its layout, and what writes it into such an array."""

    kinds: Mapping[str, Kind]
    fill: Callable[[str, Array], None]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each begins, in bytes."""
        found, end = {}, 0
        for name, kind in self.kinds.items():
            found[name] = end
            end = aligned(end + _nbytes(kind), ALIGNMENT)
        return found

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all."""
        return max((aligned(at + _nbytes(self.kinds[name]), ALIGNMENT) for name, at in self.offsets.items()), default=0)

    def views(self, data: Array) -> dict[str, Array]:
        """Each one's part of so many bytes."""
        return {
            name: data[at : at + _nbytes((shape, dtype))].view(dtype).reshape(shape)
            for (name, (shape, dtype)), at in zip(self.kinds.items(), self.offsets.values(), strict=True)
        }

    def filled(self, data: Array, pool: ThreadPoolExecutor) -> dict[str, Array]:
        """The parts, each packed by a thread."""
        views = self.views(data)
        list(pool.map(self.fill, views, views.values()))
        return views


def in_memory(panels: Panels, pool: ThreadPoolExecutor) -> dict[str, Array]:
    """Panels packed now, in large pages where there are enough of them."""
    return panels.filled(_room(panels.nbytes), pool)


def through_file(
    panels: Panels, content: Callable[[], Sequence[str]], pool: ThreadPoolExecutor, folder: Path | None
) -> dict[str, Array]:
    """Panels read from the file that holds them, or packed now and left in one for the next time; few have no file.

    content  what tells each one's elements and layout from others
    folder   where files of panels lie, by default in the user's cache
    """
    path = _path(content, folder) if panels.nbytes >= SMALLEST else None
    if path is None:
        return in_memory(panels, pool)
    held = _held.get(path)
    data = _read(path, panels.nbytes, pool) if held is None else held[_start(held) :][: panels.nbytes]
    if data is None:
        data = _room(panels.nbytes)
        panels.filled(data, pool)
        _write(path, data)
    data.flags.writeable = False
    assert data.base is not None
    _held[path] = data.base
    return panels.views(data)


_held: WeakValueDictionary[Path, Array] = WeakValueDictionary()  # arrays with the panels of files, while they are used


def _room(size: int) -> Array:
    """An array of so many bytes that begins with a large page, or with a cache line where it holds none."""
    owner = np.empty(size + (LARGE_PAGE if size >= LARGE_PAGE else ALIGNMENT), np.uint8)
    return owner[_start(owner) :][:size]


def _start(owner: Array) -> int:
    """Where panels begin in the array that holds them."""
    return int(-owner.ctypes.data % (LARGE_PAGE if owner.nbytes >= 2 * LARGE_PAGE else ALIGNMENT))


def _nbytes(kind: Kind) -> int:
    shape, dtype = kind
    return int(np.prod(shape)) * dtype.itemsize


def _path(content: Callable[[], Sequence[str]], folder: Path | None) -> Path | None:
    """Named by content: every matrix's bytes, shape and dtype, and its layout."""
    try:
        folder = cache_folder() / "panels" if folder is None else folder
    except UsageError:
        return None
    digest = hashlib.sha256(_FORMAT.encode())
    for each in content():
        digest.update(f"{each}\n".encode())
    return folder / f"{digest.hexdigest()[:32]}.panels"


def _read(path: Path, size: int, pool: ThreadPoolExecutor) -> Array | None:
    """The file's bytes, if it is there and as long as it should be; it was written whole or not at all.

    Nobody else's: one who can write it decides what others compute.
    """
    try:
        if not is_private(path.parent):
            return None
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size:
                return None
            data = _room(size)
            parts = [data[at : at + _PART] for at in range(0, size, _PART)]
            if not all(pool.map(lambda at, part: _read_part(path, at, part), range(0, size, _PART), parts)):
                return None
    except OSError:
        return None
    mark_used(path)
    return data


def _read_part(path: Path, at: int, part: Array) -> bool:
    """Fill a part of the array with what begins there; False where the file has become shorter."""
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        rest = part.data
        while rest.nbytes:
            count = file.readinto(rest)
            if not count:
                return False
            rest = rest[count:]
    return True


def _write(path: Path, data: Array) -> None:
    """Leave panels in a file, if the folder can be written: a thread does it, and nobody waits for the disk."""

    def write() -> None:
        with suppress(OSError):  # then they are packed again the next time
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_private(path.parent):
                return
            sweep(path.parent)
            forget_unused(path.parent, _FILES)
            with replacing(path) as file:
                file.write(data.data)

    writer = threading.Thread(target=write, name=f"write {path.name}")
    writer.start()
    _writers.append(writer)


_writers: list[threading.Thread] = []


def finish_writing() -> None:
    """Wait until files that are being written have their names; the end of the process waits as well."""
    while _writers:
        _writers.pop().join()
