"""Names and paths from outside, as they may be shown on a terminal or in the comment of a program."""

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


def on_one_line(comment: str) -> str:
    """A comment as it may be written: what it quotes may come from a file, and no part of it may become code."""
    return comment if comment.isprintable() else comment.encode("unicode_escape").decode("ascii")
