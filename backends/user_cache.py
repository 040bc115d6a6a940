"""The user's cache folder, where fetched models, packed weights and compiled kernels lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from treadle.ir.errors import UsageError


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
