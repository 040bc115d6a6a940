"""Files that are written whole or not at all: to a temporary name beside the target, synced, renamed."""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

_TAG = re.compile(r"[0-9a-f]{12}")
_STAGED = re.compile(r"\..*-[0-9a-f]{12}", re.DOTALL)
_OLDEST = 24 * 3600.0  # seconds; nothing takes so long to write


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the target's place when the block ends, and goes without a trace where it fails.

    Whoever opens the target at any time finds the old bytes or the new ones. What writers of the target left who were
    killed goes first. Raises OSError where the folder cannot be written.
    """
    _sweep_dead(target)
    staged, file = _open_staged(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "posix":  # while it is locked; elsewhere a file that is open cannot be moved
                os.replace(staged, target)
        if os.name != "posix":
            os.replace(staged, target)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    if os.name == "posix":  # only there can a folder be synced, which makes the new name last
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(target: Path) -> None:
    """Raise OSError if `replacing` cannot write the target. Its temporary file is made, and deleted."""
    with suppress(FileNotFoundError):
        os.lstat(target)
    staged, file = _open_staged(target)
    file.close()
    staged.unlink()


def _open_staged(target: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside the target, locked as long as it is open: by that others know that its writer lives."""
    while True:
        staged = target.with_name(f".{target.name[:64]}-{secrets.token_hex(6)}")
        file = staged.open("xb")
        if _lock(file.fileno(), otherwise=True) and os.fstat(file.fileno()).st_nlink:
            return staged, file
        file.close()  # another writer took it for one that was left, before it was locked


def _sweep_dead(target: Path) -> None:
    """Delete the staged files of a target that belong to this user and that no living writer has locked."""
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
    """Lock a file if no one else has; `otherwise` where the file system locks nothing."""
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
    """Delete what writers that were killed left in a folder, a day ago or earlier."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                if _STAGED.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _OLDEST:
                    os.unlink(entry.path)
