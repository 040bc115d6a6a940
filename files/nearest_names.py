"""The names that are most similar to a wrong name. The time is bounded, even for the names of a hostile file."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from treadle.files.errors import UsageError
from treadle.files.shown_names import printable

_LONGEST = 200  # characters; difflib takes quadratic time in them
_POOL = 300  # names compared for one query
_HOLDERS = 20 * _POOL  # maximum number of names with a common part that are considered
_PARTS = re.compile(r"[A-Za-z]+|[0-9]+")


class NearestNames:
    """An index of a set of names for finding similar names: parts of names select a small pool, which difflib ranks."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [name for name in names if len(name) <= _LONGEST]
        self._holders: dict[str, list[int]] = defaultdict(list)
        if len(self._names) > _POOL:
            for at, name in enumerate(self._names):
                for part in set(_PARTS.findall(name)):
                    self._holders[part].append(at)

    def of(self, wanted: str, count: int = 1, similarity: float = 0.6) -> list[str]:
        """Return at most `count` names whose difflib ratio to `wanted` is at least `similarity`, most similar first."""
        if len(wanted) > _LONGEST:
            return []
        return difflib.get_close_matches(wanted, self._pool(wanted), count, similarity)

    def _pool(self, wanted: str) -> list[str]:
        if not self._holders:
            return self._names
        # Rare parts are more informative than common ones: sharing `c_attn` and `7` counts more than sharing `weight`.
        parts = sorted((len(self._holders[p]), p) for p in set(_PARTS.findall(wanted)) if p in self._holders)
        score: dict[int, float] = defaultdict(float)
        for holders, part in parts:
            if score and holders > _HOLDERS:
                break
            for at in self._holders[part][:_HOLDERS]:
                score[at] += 1 / holders
        best = sorted(score, key=lambda at: (-score[at], at))[:_POOL]
        return [self._names[at] for at in best]


def check_suffix(path: str | PurePath, suffixes: Sequence[str], file: str, hint: str | None = None) -> None:
    """Raise UsageError unless a path ends in one of the suffixes.

    file  the file in the message: "an artifact"
    hint  the hint of the error; None: the path with a suffix
    """
    if PurePath(path).suffix not in suffixes:
        raise UsageError(
            f"the name of {file} must end in {' or '.join(suffixes)}",
            received=printable(str(path)),
            hint=hint or printable(with_nearest_suffix(str(path), suffixes)),
        )


def with_nearest_suffix(path: str, suffixes: Sequence[str]) -> str:
    """Return the path with one of the suffixes: in place of a misspelled one, or else the first one, added."""
    suffix = PurePath(path).suffix
    near = difflib.get_close_matches(suffix.lower(), suffixes, 1) if suffix else []
    return f"{path.removesuffix(suffix)}{near[0]}" if near else f"{path}{suffixes[0]}"
