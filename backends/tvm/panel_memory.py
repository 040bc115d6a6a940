"""Memory of packed weights: one array that holds all panels, and a cache file from which later processes read it.

A product of few rows takes as long as reading its weight takes, so the placement of weights matters. All panels share
one array that starts at a large page. NumPy requests large pages for arrays of megabytes, but if each weight had its
own array, both ends of each array would be in small pages, which take a fifth longer to read. Each panel starts at a
multiple of a cache line; otherwise every vector would span two lines. The file is in the user's cache and is named
after its weights. It is read into such an array instead of being mapped, because the system would map it mostly in
small pages.

A file starts with a header: the format, its own name, the number of bytes, and their hash. A file whose header does not
fit is packed again. With TREADLE_CHECK_PANELS=1 the bytes are compared with the hash too, which takes longer than
reading them.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
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

from treadle.files.user_cache import forget_unused, is_private, make_private, mark_used, private_folder
from treadle.files.whole_files import replacing, sweep
from treadle.passes.memory.frames import ALIGNMENT, aligned

Array = np.ndarray[Any, Any]
Kind = tuple[tuple[int, ...], np.dtype[Any]]

LARGE_PAGE = 2 << 20
SMALLEST = 1 << 20  # smallest size of panels in bytes that is cached in a file
CHECK = "TREADLE_CHECK_PANELS"
"""The environment variable that makes every load compare a file's bytes with the hash in its header."""

_FORMAT = "treadle panels 5"
_HEADER = struct.Struct("<16s 16s Q 32s")  # the format, the file's name as bytes, the number of bytes, their SHA-256
_PART = 64 << 20  # bytes that a thread reads in one task
_FILES = re.compile(r"[0-9a-f]{32}\.panels")


@dataclass(frozen=True)
class Panels:
    """Weights to pack: the shape and dtype of each in its layout, and the function that packs a weight."""

    kinds: Mapping[str, Kind]
    fill: Callable[[str, Array], None]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The offset of each weight in bytes."""
        found, end = {}, 0
        for name, kind in self.kinds.items():
            found[name] = end
            end = aligned(end + _nbytes(kind), ALIGNMENT)
        return found

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes of all weights."""
        return max((aligned(at + _nbytes(self.kinds[name]), ALIGNMENT) for name, at in self.offsets.items()), default=0)

    def views(self, data: Array) -> dict[str, Array]:
        """Return the view of each weight in an array of `nbytes` bytes."""
        return {
            name: data[at : at + _nbytes((shape, dtype))].view(dtype).reshape(shape)
            for (name, (shape, dtype)), at in zip(self.kinds.items(), self.offsets.values(), strict=True)
        }

    def filled(self, data: Array, pool: ThreadPoolExecutor) -> dict[str, Array]:
        """Pack each weight into its view of the array, in parallel; return the views."""
        views = self.views(data)
        list(pool.map(self.fill, views, views.values()))
        return views


def in_memory(panels: Panels, pool: ThreadPoolExecutor) -> dict[str, Array]:
    """Return panels packed now, in large pages if there is at least one page of them."""
    return panels.filled(_room(panels.nbytes), pool)


def through_file(
    panels: Panels, content: Callable[[], Sequence[str]], pool: ThreadPoolExecutor, folder: Path | None
) -> dict[str, Array]:
    """Return panels read from their cache file, or pack them and write the file. Small panels are never cached.

    content  returns lines that identify the elements and layout of each weight
    folder   where files of panels are stored, by default in the user's cache
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


_held: WeakValueDictionary[Path, Array] = WeakValueDictionary()  # arrays read from files, while they are used


def _room(size: int) -> Array:
    """Return an array of `size` bytes. It is aligned to a large page, or to a cache line if it is smaller."""
    owner = np.empty(size + (LARGE_PAGE if size >= LARGE_PAGE else ALIGNMENT), np.uint8)
    return owner[_start(owner) :][:size]


def _start(owner: Array) -> int:
    """Return the offset of the panels in the array that holds them."""
    return int(-owner.ctypes.data % (LARGE_PAGE if owner.nbytes >= 2 * LARGE_PAGE else ALIGNMENT))


def _nbytes(kind: Kind) -> int:
    shape, dtype = kind
    return int(np.prod(shape)) * dtype.itemsize


def _path(content: Callable[[], Sequence[str]], folder: Path | None) -> Path | None:
    """Return a path named after a hash of the content: the bytes, shape, dtype and layout of every matrix."""
    if folder is None and (folder := private_folder("panels")) is None:
        return None
    digest = hashlib.sha256(_FORMAT.encode())
    for each in content():
        digest.update(f"{each}\n".encode())
    return folder / f"{digest.hexdigest()[:32]}.panels"


def _header(path: Path, size: int, digest: bytes) -> bytes:
    return _HEADER.pack(_FORMAT.encode(), bytes.fromhex(path.stem), size, digest)


def _read(path: Path, size: int, pool: ThreadPoolExecutor) -> Array | None:
    """Return the panels of a file; None if it does not exist, or its header or its size does not fit.

    Files are written completely or not at all. Only a private folder is read: another user who can write the file could
    change the results.
    """
    try:
        if not is_private(path.parent):
            return None
        with path.open("rb", buffering=0) as file:
            header = file.read(_HEADER.size)
            digest = header[-hashlib.sha256().digest_size :]
            if header != _header(path, size, digest) or os.fstat(file.fileno()).st_size != _HEADER.size + size:
                return None
            data = _room(size)
            parts = [data[at : at + _PART] for at in range(0, size, _PART)]
            starts = range(_HEADER.size, _HEADER.size + size, _PART)
            if not all(pool.map(lambda at, part: _read_part(path, at, part), starts, parts)):
                return None
    except OSError:
        return None
    if os.environ.get(CHECK, "0") not in ("", "0") and hashlib.sha256(data.data).digest() != digest:
        return None
    mark_used(path)
    return data


def _read_part(path: Path, at: int, part: Array) -> bool:
    """Fill a part of the array from offset `at` of the file. Return False if the file has become shorter."""
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
    """Write panels to a file in a background thread, if the folder is writable."""

    def write() -> None:
        if not make_private(path.parent):
            return
        with suppress(OSError):  # on failure they are packed again by the next process
            sweep(path.parent)
            forget_unused(path.parent, _FILES)
            with replacing(path) as file:
                file.write(_header(path, data.nbytes, hashlib.sha256(data.data).digest()))
                file.write(data.data)

    writer = threading.Thread(target=write, name=f"write {path.name}")
    writer.start()
    _writers.append(writer)


_writers: list[threading.Thread] = []


def finish_writing() -> None:
    """Wait until all files are written and renamed. The end of the process waits as well."""
    while _writers:
        _writers.pop().join()
