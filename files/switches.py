"""Environment variables that switch something on or off, such as TREADLE_POISON."""

from __future__ import annotations

import os

from treadle.files.errors import UsageError
from treadle.files.shown_names import printable


def read_switch(name: str) -> bool:
    """Return True if a variable of the environment is 1; False if it is 0, empty or not set. Raises UsageError for
    another value.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise UsageError(f"{name} must be 0 or 1", received=printable(value, 80), hint=f"{name}=1")
    return value == "1"
