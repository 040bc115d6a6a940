"""Packages that only some models and commands need, each with the extra of Treadle that installs it."""

from __future__ import annotations

import importlib.util

from treadle.ir.errors import FrontendError

EXTRAS = {"tokenizers": "text", "gguf": "gguf", "jinja2": "chat"}


def need_packages(what: str, *packages: str) -> None:
    """Raise FrontendError, with one command that installs them, if some of these packages are missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        plural = "s" * (len(missing) > 1)
        extras = ",".join(EXTRAS[name] for name in missing)
        raise FrontendError(
            f"{what} needs the package{plural} {', '.join(missing)}", hint=f"pip install 'treadle[{extras}]'"
        )
