"""Lines of code with aligned comments, for generated source and listings."""

from __future__ import annotations

from collections.abc import Sequence

_COLUMN = 72  # rightmost column of aligned comments


def commented(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines of code, each followed by its comment, if it has one."""
    column = max((len(code) for code, comment in lines if comment and len(code) <= _COLUMN), default=0)
    return [f"{code:<{column}}  # {comment}" if comment else code for code, comment in lines]
