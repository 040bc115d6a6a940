"""The user's cache folder, which stores fetched models, packed weights and compiled kernels."""

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
    """Return the user's cache folder for Treadle: `TREADLE_CACHE` if set, else the platform's default.

    Raises UsageError if neither is known.
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
            "the home folder is unknown, so there is no cache folder",
            received=str(error),
            hint="TREADLE_CACHE set to a folder",
        ) from error


def private_folder(*parts: str) -> Path | None:
    """Return a folder of the cache that this user can read and no other user can write; create it if it is missing.

    If `cache/parts` belongs to another user, or to root alone, the user's own folder is `cache/user-UID/parts`, or
    `cache-UID/parts` in the same place as the cache. None if there is none of these and none can be created.
    """
    try:
        base = cache_folder()
    except UsageError:
        return None
    bases = [base]
    if os.name == "posix":
        bases += [base / f"user-{os.geteuid()}", base.with_name(f"{base.name}-{os.geteuid()}")]
    return next((folder for folder in (each.joinpath(*parts) for each in bases) if make_private(folder)), None)


def make_private(folder: Path) -> bool:
    """Create a folder and its missing parents for this user alone. Return False if it exists or ends up otherwise.

    Nothing is created in a folder that another user can replace: root would leave folders in the user's own cache.
    """
    try:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        if missing and not _is_safe(folder, sticky=True):
            return False
        for each in reversed(missing):
            each.mkdir(mode=0o700, exist_ok=True)
            folder = each
    except (OSError, RuntimeError):
        return False
    return is_private(folder) and os.access(folder, os.R_OK | os.X_OK)


def is_private(folder: Path) -> bool:
    """Return True if no other user can write into a folder or replace it; False if it does not exist.

    The folder and its parents must belong to the user or to root, and must not be writable by anyone else. A group
    whose only member is the user is allowed. A sticky folder such as /tmp is allowed too, since users cannot replace
    each other's files in it. The contents of any other folder may come from anyone, and must not be executed.
    """
    return os.name != "posix" or _is_safe(folder, sticky=False)


def _is_safe(folder: Path, *, sticky: bool) -> bool:
    """Return True under the conditions of `is_private`; if `sticky` is True, the folder itself may be sticky, too."""
    if os.name != "posix":
        return True
    try:
        real = folder.resolve(strict=True)
        found = [(each, each.stat()) for each in (real, *real.parents)]
    except (OSError, RuntimeError):
        return False
    for each, about in found:
        by_group = about.st_mode & stat.S_IWGRP and not _is_own_group(about.st_gid)
        shared = by_group or about.st_mode & stat.S_IWOTH
        is_sticky = about.st_mode & stat.S_ISVTX and (sticky or each != real)
        if about.st_uid not in (0, os.geteuid()) or (shared and not is_sticky):
            return False
    return True


def _is_own_group(number: int) -> bool:
    """Return True for root's group, and for the group of the user's name, in which no one else is."""
    if number == 0 or sys.platform == "win32":
        return True
    import grp
    import pwd

    if number != os.getegid():
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(number)
    except KeyError:  # in a container, users may have no names
        return number == os.geteuid()
    return group.gr_name == user and set(group.gr_mem) <= {user}


UNUSED = 60 * 24 * 3600
"""Seconds after which unused files are deleted."""


def mark_used(path: Path) -> None:
    """Set the modification time of a cache file or folder to now, to record that it was used."""
    with suppress(OSError):
        os.utime(path)


def forget_unused(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files and folders in a folder whose names match and that were not used for UNUSED seconds."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                if names.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < time.time() - UNUSED:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
