"""Locations of errors in a line of text: the column, and the line with a mark under it."""

from __future__ import annotations

import re

_AROUND = 60  # the number of characters shown on either side


def marked(text: str, at: int) -> str:
    """Return three lines: `column 5`, the text, and a ^ under the character at that position. A long text is
    shortened.
    """
    first = max(0, at - _AROUND) if len(text) > 2 * _AROUND else 0
    shown = re.sub(r"\s", " ", text[first : first + 2 * _AROUND])
    return f"column {at + 1}\n{shown}\n{' ' * (at - first)}^"


def marked_name(text: str, name: str, *, of: int = 0, after: int = 0) -> str:
    """Return what `marked` returns for an occurrence of a name: number `of` from `after` on, or the last."""
    found = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text) if m.start() >= after]
    return marked(text, found[min(of, len(found) - 1)] if found else 0)
