"""Files that are written whole or not at all: to a temporary name beside the target, synced, renamed."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_STAGED = re.compile(r"\..*-[0-9a-f]{12}", re.DOTALL)
_OLDEST = 24 * 3600.0  # seconds; nothing takes so long to write


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the target's place when the block ends, and goes without a trace where it fails.

    Whoever opens the target at any time finds the old bytes or the new ones. Raises OSError where the folder cannot be
    written.
    """
    staged = target.with_name(f".{target.name[:64]}-{secrets.token_hex(6)}")
    try:
        with staged.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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


def sweep(folder: Path) -> None:
    """Delete what writers that were killed left in a folder, a day ago or earlier."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                if _STAGED.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _OLDEST:
                    os.unlink(entry.path)
