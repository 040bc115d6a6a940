"""Names and paths from outside, made safe to print on a terminal or in a program's comments."""

from __future__ import annotations

import os


def printable(name: str, limit: int = 160) -> str:
    """Return a name from a file in printable form: control characters are escaped, and long names are truncated."""
    cut = name[:limit]
    text = cut if cut.isprintable() and cut else repr(cut)
    return text if len(name) <= limit else f"{text}... ({len(name)} characters)"


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return a path in printable form, for errors."""
    return printable(os.fspath(path), 4096)


def on_one_line(comment: str) -> str:
    """Return a comment on one line, so that text from a file that it quotes cannot become code."""
    return comment if comment.isprintable() else comment.encode("unicode_escape").decode("ascii")
