"""Errors as facts under the same labels as in their text, and as colored text."""

from __future__ import annotations

from rich.text import Text

from treadle.ir.errors import TreadleError
from treadle.reporting import Facts


def error_facts(error: TreadleError) -> Facts:
    """Return an error's parts under the same labels as in its text."""
    parts = {
        "what": error.what,
        "received": error.received,
        "in": error.within,
        "from": error.source,
        "try": error.hint,
    }
    return {"kind": type(error).__name__, **{label: text for label, text in parts.items() if text}}


def error_text(error: TreadleError) -> Text:
    text = Text(str(error))
    text.stylize("bold red", 0, len(error.what))
    return text
