"""Linking of compiled kernels into shared libraries, by the platform's linkers.

A machine may have no linker, or one that fails. Then `link` returns False, and the caller loads the kernel from memory.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

from treadle.backends.tvm.kernels.host.platforms import this_platform

_failures: dict[tuple[str, ...], str] = {}  # commands that failed once in this process, and their messages


def link(compiled: Path, library: Path) -> bool:
    """Link an object file into a shared library. Return False if no linker of this machine can.

    A linker that fails is not tried again in this process.
    """
    for command in linkers():
        if command in _failures:
            continue
        try:
            done = subprocess.run(
                [*command, str(library), str(compiled)], stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        except (OSError, UnicodeDecodeError) as error:
            _failures[command] = str(error)
            continue
        if done.returncode == 0 and library.is_file():
            return True
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        _failures[command] = said[0][:200]
    return False


def why_not() -> str:
    """Return the reason why `link` returned False."""
    if _failures:
        command, message = next(iter(_failures.items()))
        return f"{Path(command[0]).name} fails: {message}"
    names = dict.fromkeys(name for name, *_ in this_platform().linkers)
    return f"there is no linker ({', '.join(names)})" if names else "this platform's libraries are not linked"


@cache
def linkers() -> tuple[tuple[str, ...], ...]:
    """The commands of linkers that are installed."""
    platform = this_platform()
    if platform.linker_check and not _succeeds(platform.linker_check):
        return ()
    found = [(shutil.which(name), options) for name, *options in platform.linkers]
    return tuple((path, *options) for path, options in found if path is not None)


def _succeeds(command: tuple[str, ...]) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
