"""Names and paths from outside, as they may be shown on a terminal."""

from __future__ import annotations

import os


def printable(name: str, limit: int = 160) -> str:
    """A name from a file as it may be shown on a terminal: control characters escaped, long names cut."""
    cut = name[:limit]
    text = cut if cut.isprintable() and cut else repr(cut)
    return text if len(name) <= limit else f"{text}... ({len(name)} characters)"


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as errors show it."""
    return printable(os.fspath(path), 4096)
