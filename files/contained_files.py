"""Files of a model's folder: opened only if they are regular, read only if they lie inside the folder.

Loading a model reads nothing outside its folder. Every path is made canonical (links followed to the end)
before it is compared with the canonical folder, so that neither `..` nor a link leads out. A pipe or a
device in a file's place is refused before a read could block on it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from treadle.files.errors import CheckpointError
from treadle.files.limits import limit_hint
from treadle.files.shown_names import shown_path

PathLike = str | os.PathLike[str]


def open_regular(path: PathLike, shown: str | None = None) -> BinaryIO:
    """Open a regular file to read its bytes.

    Raises CheckpointError where there is no file, where it may not be read, and where it is a folder, a
    pipe or a device. `shown` is the file's name in errors.
    """
    shown = shown or shown_path(path)
    # O_NONBLOCK: opening a pipe that nobody writes to would wait forever.
    flags = os.O_RDONLY
    for optional in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, optional, 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise _unopened(shown, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("not a regular file", received="a folder, a pipe or a device", within=shown)
    return os.fdopen(descriptor, "rb")


def read_regular(path: PathLike, limit: int, shown: str | None = None, setting: str | None = None) -> bytes:
    """All bytes of a regular file of at most `limit` bytes; `setting` is the limit's name.

    Raises CheckpointError as `open_regular` does, and where the file is longer than the limit.
    """
    shown = shown or shown_path(path)
    with open_regular(path, shown) as file:
        try:
            data = file.read(limit + 1)
            size = max(len(data), os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise _unopened(shown, error) from None
    if size > limit:
        raise CheckpointError(
            "the file is longer than the limit",
            received=f"{size} bytes, limit {limit}",
            within=shown,
            hint=limit_hint(setting, size) if setting else None,
        )
    return data


def canonical(path: PathLike, shown: str | None = None) -> Path:
    """The path with every link followed. Raises CheckpointError if it leads nowhere or in a circle."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            raise CheckpointError(
                "a link leads to a file that is not there",
                within=shown or shown_path(path),
                hint="fetch the model again: its download is not complete",
            ) from None
        raise _unopened(shown or shown_path(path), error) from None


def contained(path: PathLike, root: Path, shown: str | None = None) -> Path:
    """The canonical form of `path`, which must lie inside the canonical folder `root`.

    Raises CheckpointError where the path, or a link on its way, leads out of the folder, or where there is
    no file.
    """
    shown = shown or shown_path(path)
    real = canonical(path, shown)
    if not real.is_relative_to(root):
        raise CheckpointError(
            "the path leads out of the model's folder, and nothing outside it is read",
            received=f"a path that ends at {shown_path(real)}",
            within=shown,
            hint=f"put the file itself into {shown_path(root)}",
        )
    return real


def _unopened(shown: str, error: OSError | ValueError) -> CheckpointError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError("there is no such file", within=shown, hint="check the path")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError("the file cannot be opened", received=reason, within=shown)
