"""The user's cache folder, where fetched models, packed weights and compiled kernels lie."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from treadle.files.errors import UsageError


def cache_folder() -> Path:
    """Return the user's cache folder for Treadle: `TREADLE_CACHE` if set, else the platform's custom.

    Raises UsageError when neither is known.
    """
    try:
        if chosen := os.environ.get("TREADLE_CACHE"):
            return Path(chosen).expanduser().absolute()
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA")
            return (Path(local) if local else Path.home() / "AppData" / "Local") / "treadle" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "treadle"
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path.home() / ".cache") / "treadle"
    except RuntimeError as error:  # pathlib found no home folder
        raise UsageError(
            "the home folder is unknown, and with it the cache folder",
            received=str(error),
            hint="TREADLE_CACHE set to a folder",
        ) from error


def is_private(folder: Path) -> bool:
    """Whether nobody else can write into a folder, or put another in its place; False where it is not there.

    It and those above it must belong to the user or to root, and be writable by no one else; a group of the user's own
    is none else, and in a sticky folder, such as /tmp, nobody replaces what is another's. What lies in another folder
    may be anyone's, and must not be run.
    """
    if os.name != "posix":
        return True
    try:
        real = folder.resolve(strict=True)
        found = [(each, each.stat()) for each in (real, *real.parents)]
    except (OSError, RuntimeError):
        return False
    for each, about in found:
        by_group = about.st_mode & stat.S_IWGRP and about.st_gid not in (0, os.getegid())
        shared = by_group or about.st_mode & stat.S_IWOTH
        sticky = about.st_mode & stat.S_ISVTX and each != real
        if about.st_uid not in (0, os.geteuid()) or (shared and not sticky):
            return False
    return True


UNUSED = 60 * 24 * 3600
"""Seconds after which what was not used goes."""


def mark_used(path: Path) -> None:
    """Note that a file or folder of the cache was used now: its time of modification says so."""
    with suppress(OSError):
        os.utime(path)


def forget_unused(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files and folders of these names that were not used for UNUSED seconds."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                if names.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < time.time() - UNUSED:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
