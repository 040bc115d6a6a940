"""Lines of code with comments that line up, as sources and listings show them."""

from __future__ import annotations

from collections.abc import Sequence

_COLUMN = 72  # comments line up, but no further right than this


def commented(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of code, each with its comment, if it has one."""
    column = max((len(code) for code, comment in lines if comment and len(code) <= _COLUMN), default=0)
    return [f"{code:<{column}}  # {comment}" if comment else code for code, comment in lines]
