"""Stop strings: a text ends at the first stop string. While a text grows, an end that may be the beginning of a stop
string is held back.

watch = StopStrings(["\\n\\n", "User:"])
watch.split("Hello. Us")       # ("Hello. ", False): "Us" may be the beginning of a stop string
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treadle.ir.errors import UsageError


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a text and are removed from it. Raises UsageError for an empty string."""

    strings: tuple[str, ...] = ()

    def __init__(self, strings: Sequence[Any] = ()) -> None:
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise UsageError("stop strings are texts of a character or more, in a list", received=repr(strings))
        object.__setattr__(self, "strings", tuple(strings))

    def split(self, text: str) -> tuple[str, bool]:
        """Return the part of the text that can no longer become a stop string, and True if a stop string follows this
        part.

        The text ends at the stop string that is complete first, or at the longest one if several are complete at once.
        So the result does not depend on the pieces in which a text arrives.
        """
        places = [(at + len(stop), at) for stop in self.strings if (at := text.find(stop)) >= 0]
        if places:
            return text[: min(places)[1]], True
        held = max((_begun(text, stop) for stop in self.strings), default=0)
        return text[: len(text) - held], False


def _begun(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of a stop string with which a text ends."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
