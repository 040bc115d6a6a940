"""Stop strings: a text that grows ends where one of them appears, and what may be the beginning of one is held back.

watch = StopStrings(["\\n\\n", "User:"])
watch.split("Hello. Us")       # ("Hello. ", False): " Us" may go on as a stop string
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treadle.ir.errors import UsageError


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a text, and are no part of it. Raises UsageError for an empty one."""

    strings: tuple[str, ...] = ()

    def __init__(self, strings: Sequence[Any] = ()) -> None:
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise UsageError("stop strings are texts of a character or more, in a list", received=repr(strings))
        object.__setattr__(self, "strings", tuple(strings))

    def split(self, text: str) -> tuple[str, bool]:
        """The part of a whole text so far that is certain, and whether a stop string ends it there.

        The first that is complete decides, the longest of those that are complete at once, so that it does not matter
        in which pieces a text comes.
        """
        places = [(at + len(stop), at) for stop in self.strings if (at := text.find(stop)) >= 0]
        if places:
            return text[: min(places)[1]], True
        held = max((_begun(text, stop) for stop in self.strings), default=0)
        return text[: len(text) - held], False


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of a text with which a string begins, the whole string not among them."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
