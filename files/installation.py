"""The pip command that adds an extra of Treadle to this installation."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "treadle"
_PACKAGE = Path(__file__).resolve().parent.parent


def pip_install(*extras: str, options: str = "") -> str:
    """Return the command that installs extras from where Treadle itself came: in a clone `pip install '.[text]'`,
    otherwise the wheel, the folder or the address that pip recorded; for a package of an index, its name.

    options  options of pip
    """
    suffix = f"[{','.join(extras)}]"
    if (_PACKAGE / "pyproject.toml").is_file():
        place = "." if Path.cwd() == _PACKAGE else str(_PACKAGE)
        requirement = f"{place}{suffix}"
    else:
        requirement = _requirement(_recorded_address(), suffix)
    return " ".join(filter(None, ["pip install", options, shlex.quote(requirement)]))


def _recorded_address() -> dict[str, Any]:
    """Return pip's record of the address that Treadle was installed from (PEP 610); empty for a package of an index."""
    with suppress(PackageNotFoundError, OSError, ValueError):
        found = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
        if isinstance(found, dict) and isinstance(found.get("url"), str):
            return found
    return {}


def _requirement(address: dict[str, Any], suffix: str) -> str:
    url = address.get("url", "")
    if url.startswith("file:"):
        path = url2pathname(urlsplit(url).path)
        return f"{path if os.path.exists(path) else os.path.basename(path)}{suffix}"
    if (control := address.get("vcs_info")) and isinstance(control, dict):
        url = f"{control.get('vcs', 'git')}+{url}"
    return f"{NAME}{suffix} @ {url}" if url else f"{NAME}{suffix}"
