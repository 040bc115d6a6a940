"""Stop strings: a growing text ends at the first stop string, and a possible beginning of one is held back.

watch = StopStrings(["\\n\\n", "User:"])
watch.split("Hello. Us")       # ("Hello. ", False): " Us" may be the beginning of a stop string
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treadle.ir.errors import UsageError


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a text and are not part of it. Raises UsageError for an empty string."""

    strings: tuple[str, ...] = ()

    def __init__(self, strings: Sequence[Any] = ()) -> None:
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise UsageError("stop strings are texts of a character or more, in a list", received=repr(strings))
        object.__setattr__(self, "strings", tuple(strings))

    def split(self, text: str) -> tuple[str, bool]:
        """Return the part of the text that is certain, and True if a stop string ends the text there.

        The first complete stop string decides, or the longest if several are complete at once, so that the result does
        not depend on the pieces in which a text arrives.
        """
        places = [(at + len(stop), at) for stop in self.strings if (at := text.find(stop)) >= 0]
        if places:
            return text[: min(places)[1]], True
        held = max((_begun(text, stop) for stop in self.strings), default=0)
        return text[: len(text) - held], False


def _begun(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of a stop string with which a text ends."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
