"""Optional packages that some models and commands need, each with the extra of Treadle that installs the package."""

from __future__ import annotations

import importlib.util

from treadle.ir.errors import FrontendError

EXTRAS = {"tokenizers": "text", "gguf": "gguf", "jinja2": "chat"}


def need_packages(what: str, *packages: str) -> None:
    """Raise FrontendError if some of these packages are missing. The hint is one command that installs all of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        plural = "s" * (len(missing) > 1)
        extras = ",".join(EXTRAS[name] for name in missing)
        raise FrontendError(
            f"{what} needs the package{plural} {', '.join(missing)}", hint=f"pip install 'treadle[{extras}]'"
        )
