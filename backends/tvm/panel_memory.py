"""Where packed weights lie: all of them one after another, in memory or in a file that processes share.

A product of few rows takes as long as its weight takes to read, so where a weight lies counts. In memory, panels share
one array that begins with a large page: NumPy asks for large pages in arrays of megabytes, and each of many arrays
would have its ends in small ones, whose reading takes a fifth longer. All begin at a multiple of a cache line, or else
every vector would lie in two. In a file of the user's cache, named after what it holds, the pages are the system's, and
processes share them.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

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
_FORMAT = "treadle panels 3"
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
    start = LARGE_PAGE if panels.nbytes >= LARGE_PAGE else ALIGNMENT
    data = np.empty(panels.nbytes + start, np.uint8)
    return panels.filled(data[-data.ctypes.data % start :][: panels.nbytes], pool)


def through_file(
    panels: Panels, content: Callable[[], Sequence[str]], pool: ThreadPoolExecutor, folder: Path | None
) -> dict[str, Array]:
    """Panels mapped from the file that holds them, which is made where it is not there; few go to memory.

    content  what tells each one's elements and layout from others
    folder   where files of panels lie, by default in the user's cache
    """
    path = _path(content, folder) if panels.nbytes >= SMALLEST else None
    data = None if path is None else _mapped_file(path, panels.nbytes)
    if path is not None and data is None:
        data = _written(path, panels, pool)
    return in_memory(panels, pool) if data is None else panels.views(data)


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


def _mapped_file(path: Path, size: int) -> Array | None:
    """The file's bytes, if it is there and as long as it should be; it was written whole or not at all.

    Nobody else's: one who can write it can cut it, which kills whoever reads it then.
    """
    try:
        if path.stat().st_size != size or not is_private(path.parent):
            return None
        mapped = np.memmap(path, np.uint8, "r")
    except OSError:
        return None
    mark_used(path)
    return mapped


def _written(path: Path, panels: Panels, pool: ThreadPoolExecutor) -> Array | None:
    """Fill a new file and map it; None where the folder cannot be written.

    The panels can be used as soon as they are there. That they are on the disk, and the file gets its name, which takes
    as long again, is left to a thread.
    """
    filled: Future[Array] = Future()

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_private(path.parent):
                raise PermissionError(f"others can write {path.parent}")
            sweep(path.parent)
            forget_unused(path.parent, _FILES)
            with replacing(path) as file:
                _allocate(file, panels.nbytes)
                data = np.memmap(file.name, np.uint8, "r+")
                panels.filled(data, pool)
                read = data.view()
                read.flags.writeable = False
                filled.set_result(read)
        except Exception as error:
            if not filled.done():  # else the file alone is lost
                filled.set_exception(error)

    writer = threading.Thread(target=write, name=f"write {path.name}")
    writer.start()
    _writers.append(writer)
    try:
        return filled.result()
    except OSError:
        return None


def _allocate(file: IO[bytes], size: int) -> None:
    """Make a new file that long. Raises OSError on a full disk, where a write to its mapping would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


_writers: list[threading.Thread] = []


def finish_writing() -> None:
    """Wait until files that are being written have their names; the end of the process waits as well."""
    while _writers:
        _writers.pop().join()
