"""Where in a line of text something is wrong: its column, and the line with a mark under it. For errors."""

from __future__ import annotations

import re

_AROUND = 60  # characters that are shown on either side


def marked(text: str, at: int) -> str:
    """`column 5`, the text and a ^ under the character at that position; of a long text, what stands around it."""
    first = max(0, at - _AROUND) if len(text) > 2 * _AROUND else 0
    shown = re.sub(r"\s", " ", text[first : first + 2 * _AROUND])
    return f"column {at + 1}\n{shown}\n{' ' * (at - first)}^"


def marked_name(text: str, name: str, *, of: int = 0, after: int = 0) -> str:
    """The same for a name: the one of that number among those that begin at `after` or later, or its last."""
    found = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text) if m.start() >= after]
    return marked(text, found[min(of, len(found) - 1)] if found else 0)
