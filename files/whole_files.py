"""Files that are written completely or not at all: written under a temporary name in the same folder, synced, and
renamed. Errors of writing, with the reason: a full disk, or another one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from treadle.files.errors import Hint, UsageError
from treadle.files.shown_names import shown_path

if sys.platform != "win32":
    import fcntl

_TAG = re.compile(r"[0-9a-f]{12}")
_STAGED = re.compile(r"\..*-[0-9a-f]{12}", re.DOTALL)
_OLDEST = 24 * 3600.0  # seconds; no write takes this long


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A context manager that opens a temporary file. If the block succeeds, the file replaces the target. If it fails,
    the file is deleted.

    Every reader of the target sees either the old bytes or the new ones. Temporary files of writers that were killed
    are deleted first. Raises OSError if the folder cannot be written, and for a path that cannot be a file's.
    """
    _refuse_name(target)
    _sweep_dead(target)
    staged, file = _open_staged(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "posix":  # while the file is locked; other systems cannot move an open file
                os.replace(staged, target)
        if os.name != "posix":
            os.replace(staged, target)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    if os.name == "posix":  # only there can a folder be synced, which makes the rename durable
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


FULL = {errno.ENOSPC: "the disk is full"}
"""Error numbers of a disk without space for a write, with descriptions."""
if sys.platform != "win32":
    FULL[errno.EDQUOT] = "the disk quota is used up"


@contextmanager
def reporting_failed_writes(
    what: str, path: str | os.PathLike[str], *, hint: str | None = None, elsewhere: str = "another disk"
) -> Iterator[None]:
    """A context that raises UsageError if its block fails to write.

    what       the subject of the error: "the weights"
    path       the file or folder that is written
    hint       what to do, unless the disk is full or the folder is missing
    elsewhere  another place, if it is
    """
    try:
        yield
    except OSError as error:
        full, reason = FULL.get(error.errno or 0), error.strerror or str(error)
        raise UsageError(
            f"{what} cannot be written" if full is None else f"{full}: {what} cannot be written",
            received=reason,
            within=shown_path(path),
            hint=missing_folder_hint(path) or hint if full is None else f"free space there, or {elsewhere}",
        ) from error


def missing_folder_hint(path: str | os.PathLike[str]) -> Hint | None:
    """Return the hint that creates the folder of a file; None if there is something under its name."""
    folder = os.path.dirname(path)
    if not folder or "\0" in folder or os.path.lexists(folder):
        return None
    return Hint(f"os.makedirs({folder!r})", f"mkdir -p {shlex.quote(folder)}")


def check_writable(target: Path) -> None:
    """Raise OSError if `replacing` cannot write the target. This is tested by creating and deleting a
    temporary file.
    """
    _refuse_name(target)
    with suppress(FileNotFoundError):
        os.lstat(target)
    staged, file = _open_staged(target)
    file.close()
    staged.unlink()


def _refuse_name(target: Path) -> None:
    """Raise OSError for paths for which Python raises ValueError."""
    if not target.name or "\0" in str(target):
        reason = "a null character in the path" if target.name else "the path has no file name"
        raise OSError(errno.EINVAL, reason, str(target))


def _open_staged(target: Path) -> tuple[Path, IO[bytes]]:
    """Open a new temporary file next to the target. The file is locked while it is open, so that other processes know
    that its writer is alive.
    """
    while True:
        staged = target.with_name(f".{target.name[:64]}-{secrets.token_hex(6)}")
        file = staged.open("xb")
        if _lock(file.fileno(), otherwise=True) and os.fstat(file.fileno()).st_nlink:
            return staged, file
        file.close()  # another process deleted the file as a leftover before it was locked


def _sweep_dead(target: Path) -> None:
    """Delete the temporary files of a target that belong to this user and that no running writer has locked."""
    if sys.platform == "win32":
        return
    lead = f".{target.name[:64]}-"
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if not entry.name.startswith(lead) or not _TAG.fullmatch(entry.name, len(lead)):
                continue
            with suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    about = os.fstat(descriptor)
                    is_ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid()
                    if is_ours and _lock(descriptor, otherwise=False):
                        os.unlink(entry.path)
                finally:
                    os.close(descriptor)


def _lock(descriptor: int, *, otherwise: bool) -> bool:
    """Lock a file. Return True if it was not locked before, or `otherwise` if the file system does not
    support locks.
    """
    if sys.platform == "win32":
        return otherwise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    return True


def sweep(folder: Path) -> None:
    """Delete temporary files that killed writers left in a folder at least a day ago."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                if _STAGED.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _OLDEST:
                    os.unlink(entry.path)
