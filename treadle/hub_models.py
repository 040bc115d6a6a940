"""Models of the Hugging Face hub, by name: found in the user's cache without the network, and downloaded to it.

    cached_hub_model("HuggingFaceTB/SmolLM2-135M")     # its folder in the cache
    fetch_hub_model("HuggingFaceTB/SmolLM2-135M")      # the same, after a download

The library huggingface_hub decides where the cache is (HF_HOME), which server is asked (HF_ENDPOINT) and which token is
sent, so a user's settings apply. Only `fetch_hub_model` uses the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treadle.extras import need_packages
from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.safetensors_file import PICKLE_SUFFIXES
from treadle.ir.errors import FrontendError, Hint, TreadleError, UsageError

PREFIX = "hf:"
"""Marks a name of the hub. It may be left out of `organization/name`."""

IGNORED = tuple(f"*{suffix}" for suffix in sorted({*PICKLE_SUFFIXES, ".py", ".h5", ".msgpack", ".ot"}))
"""Files that are not downloaded: code, pickles, which can run code when they are loaded, and other tools' weights."""

_FORM = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(name: str) -> bool:
    """Return True if a MODEL that is not an existing path is a name of the hub: `hf:NAME`, or `organization/name`."""
    return name.startswith(PREFIX) or ("/" in name and _FORM.fullmatch(name) is not None)


def hub_name_in(name: str) -> str | None:
    """Return the name of the hub that a MODEL of another form may mean: `hf:gpt2-medium` for `gpt2-medium`, and
    `hf:organization/name` for an address on the hub's site; else None.
    """
    address = re.fullmatch(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+(?:/[^/?#]+)?)(?:[/?#].*)?", name)
    repository = name if address is None else address[1]
    return f"{PREFIX}{repository}" if _is_repository(repository) else None


def cached_hub_model(name: str) -> Path:
    """Return the folder of a model in the user's Hugging Face cache: the snapshot of its main revision.

    Raises UsageError for a malformed name and for a model that is not in the cache, FrontendError without the package
    huggingface_hub, and CheckpointError if the cache's files lead out of the model's own folder.
    """
    repository = _repository(name)
    with _errors(name):
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        try:
            _snapshot(repository, local_files_only=True, allow_patterns=["config.json"])
        except (LocalEntryNotFoundError, IncompleteSnapshotError) as error:
            raise UsageError(
                f"there is no folder {printable(name)}, and no model of that name in the Hugging Face cache",
                received=_cache(),
                hint=Hint(
                    f't.fetch_model("{PREFIX}{repository}"), which needs the network',
                    f"treadle fetch {PREFIX}{repository}, which needs the network",
                ),
            ) from error
        return _folder(repository)


def fetch_hub_model(name: str, *, bars: bool = False) -> Path:
    """Download a model to the user's Hugging Face cache, without code and pickles. Return its folder.

    bars  show the library's progress bars on standard error

    Files that are in the cache already are not downloaded again. Raises UsageError for a malformed name, FrontendError
    without the package huggingface_hub or if the download fails, and CheckpointError as `cached_hub_model` does.
    """
    repository = _repository(name)
    with _errors(name), _bars(bars):
        _snapshot(repository, ignore_patterns=list(IGNORED))
        return _folder(repository)


def _is_repository(name: str) -> bool:
    return _FORM.fullmatch(name) is not None and ".." not in name and "--" not in name and len(name) <= 96


def _repository(name: str) -> str:
    """Return a name without its prefix. Raises UsageError for a malformed one."""
    repository = name.removeprefix(PREFIX)
    if not _is_repository(repository):
        raise UsageError(
            "not a name of the Hugging Face hub",
            received=printable(name),
            hint=f"{PREFIX}organization/name, of letters, digits, '-', '_' and '.', without '..' and '--'",
        )
    need_packages(f"{printable(name)}, a name of the Hugging Face hub,", "huggingface_hub")
    return repository


def _snapshot(repository: str, **options: Any) -> str:
    from huggingface_hub import snapshot_download

    found: str = snapshot_download(repository, **options)
    return found


def _cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def _folder(repository: str) -> Path:
    """Return the folder of the cached snapshot. `ModelFolder` refuses references and links that lead out of it."""
    return ModelFolder.find(os.path.join(_cache(), f"models--{repository.replace('/', '--')}")).path


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Raise the library's errors as FrontendError."""
    try:
        yield
    except TreadleError:
        raise
    except Exception as error:  # of the library, of its HTTP client, or of the disk
        received = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        raise FrontendError(
            f"{printable(name)} cannot be fetched from the Hugging Face hub",
            received=printable(received, 300),
            hint="the name, the network, and for a gated model `hf auth login`",
        ) from error


@contextmanager
def _bars(bars: bool) -> Iterator[None]:
    """Hide the library's progress bars in the block, unless they are to be shown."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if bars or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
