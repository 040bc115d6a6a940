"""Files of a model's folder: only regular files inside the folder are opened.

Loading a model reads nothing outside its folder. Every path is made canonical (all links resolved) before it is
compared with the canonical folder, so that neither `..` nor a link leads out. A pipe or a device in place of a file is
refused before a read can block on it.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from treadle.files.errors import CheckpointError
from treadle.files.limits import limit_hint
from treadle.files.nearest_names import nearest_path_hint
from treadle.files.shown_names import shown_path

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class FileState:
    """The state of a file when it was opened.

    path    its absolute name; links are followed at each check, so that another target is another state
    label   its name in errors
    device, inode, size, modified   of `os.stat`: the size in bytes, the time of the last change in ns
    """

    path: str
    label: str
    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: PathLike, label: str, status: os.stat_result) -> FileState:
        """Return the state that a call of `os.stat` or `os.fstat` found."""
        return cls(os.path.abspath(path), label, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, *, exists: bool = False) -> None:
        """Raise CheckpointError if the path now names another file, or if the file was written since. With `exists`,
        also raise if the file no longer exists. (A memory-mapped file keeps its bytes when it is removed.)
        """
        try:
            now = FileState.of(self.path, self.label, os.stat(self.path))
        except OSError:
            now = None
        if now == self or (now is None and not exists):
            return
        if now is None:
            received = "no file of this name"
        elif now.size != self.size:
            received = f"{now.size} bytes, {self.size} when it was opened"
        else:
            received = "the file was " + ("written again" if now.inode == self.inode else "replaced by another one")
        raise CheckpointError(
            "the file has changed since it was opened",
            received=received,
            within=self.label,
            hint="open the model again, when its files are complete",
        )


class RegularFile(io.BufferedReader):
    """A regular file that is open for reading, with its state."""

    def __init__(self, descriptor: int, path: PathLike, label: str, status: os.stat_result) -> None:
        super().__init__(io.FileIO(descriptor, "rb"))
        self.state = FileState.of(path, label, status)


def open_regular(path: PathLike, shown: str | None = None, alias: PathLike | None = None) -> RegularFile:
    """Open a regular file for reading in binary mode.

    shown   the file's name in errors
    alias   the name of which `path` is the canonical form, for `FileState`; None: `path`

    Raises CheckpointError if the file does not exist, cannot be read, or is a folder, a pipe or a device.
    """
    shown = shown or shown_path(path)
    # O_NONBLOCK: opening a pipe without a writer would block forever.
    flags = os.O_RDONLY
    for optional in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, optional, 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise _unopened(shown, error, path) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise CheckpointError("not a regular file", received="a folder, a pipe or a device", within=shown)
    return RegularFile(descriptor, alias or path, shown, found)


def read_regular(path: PathLike, limit: int, shown: str | None = None, setting: str | None = None) -> bytes:
    """Return all bytes of a regular file of at most `limit` bytes; `setting` is the limit's name.

    Raises CheckpointError as `open_regular` does, and if the file is longer than the limit.
    """
    shown = shown or shown_path(path)
    with open_regular(path, shown) as file:
        return read_whole(file, limit, shown, setting)


def read_whole(file: BinaryIO, limit: int, label: str, setting: str | None = None) -> bytes:
    """Return all bytes of an open file. Raises CheckpointError as `read_regular` does."""
    try:
        data = file.read(limit + 1)
        size = max(len(data), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise _unopened(label, error) from None
    if size > limit:
        raise CheckpointError(
            "the file is longer than the limit",
            received=f"{size} bytes, limit {limit}",
            within=label,
            hint=limit_hint(setting, size) if setting else None,
        )
    return data


def canonical(path: PathLike, shown: str | None = None, *, suggests: bool = True) -> Path:
    """Return the path with every link resolved. Raises CheckpointError for a broken or circular link.

    suggests  True if the error for a missing file names a similar path: the user named it, not another file
    """
    try:
        return Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            raise CheckpointError(
                "the target of a link does not exist",
                within=shown or shown_path(path),
                hint="fetch the model again: its download is not complete",
            ) from None
        raise _unopened(shown or shown_path(path), error, path if suggests else None) from None


def contained(path: PathLike, root: Path, shown: str | None = None) -> Path:
    """Return the canonical form of `path`, which must be inside the canonical folder `root`.

    Raises CheckpointError if the path, or a link in it, leads out of the folder, or if there is no such file.
    """
    shown = shown or shown_path(path)
    real = canonical(path, shown, suggests=False)
    if not real.is_relative_to(root):
        raise CheckpointError(
            "the path leads out of the model's folder, and files outside it are not read",
            received=f"a path that ends at {shown_path(real)}",
            within=shown,
            hint=f"move the file itself into {shown_path(root)}",
        )
    return real


def _unopened(shown: str, error: OSError | ValueError, path: PathLike | None = None) -> CheckpointError:
    """Return the error for a file that cannot be opened. If the user named its path, the hint is a similar path."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        near = None if path is None else nearest_path_hint(path)
        return CheckpointError("the file does not exist", within=shown, hint=near or "check the path")
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    else:  # ValueError, whose text depends on the version of Python
        coded = isinstance(error, UnicodeEncodeError)
        reason = f"{'a character that the system cannot encode' if coded else 'a null character'} in the path"
    return CheckpointError("the file cannot be opened", received=reason, within=shown)
