"""The names, or the paths of files, that are most similar to a wrong one. The time is bounded, even for the names of a
hostile file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path, PurePath

from treadle.files.errors import Hint, UsageError
from treadle.files.shown_names import printable

_LONGEST = 200  # characters; difflib takes quadratic time in them
_POOL = 300  # names compared for one query
_HOLDERS = 20 * _POOL  # maximum number of names with a common part that are considered
_FORMAT = len(".html")  # maximum length of a suffix that is taken for the name of a format
_ENTRIES = 10_000  # maximum number of files of a folder that are considered
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

    def of_parts(self, name: str) -> list[str]:
        """Return the most similar dotted name, if its differing parts are similar, too; else an empty list. `x.weight`
        and `wte.weight` are similar only because their ends are equal.
        """
        return [near for near in self.of(name, 5) if _differing_parts_are_similar(near, name)][:1]

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


def check_folder(path: Path | None, file: str) -> None:
    """Raise UsageError if a path, in which a folder is to be created, has the name of a file.

    file  the name of the file that is written there: "embeddings.npy"
    """
    if path is not None and path.suffix == PurePath(file).suffix and not path.is_dir():
        folder = path.with_suffix("")
        raise UsageError(
            f"{printable(path.name)} would be a folder, with the file {file} in it",
            received=printable(str(path)),
            hint=printable(f"--output {folder}, which writes {folder / file}"),
        )


def with_nearest_suffix(path: str, suffixes: Sequence[str]) -> str:
    """Return the path with one of the suffixes: in place of a misspelled one or of another format's, or else the first
    one, added.
    """
    suffix = PurePath(path).suffix
    near = difflib.get_close_matches(suffix.lower(), suffixes, 1) if suffix else []
    is_format = suffix[1:].isalpha() and len(suffix) <= _FORMAT
    return f"{path.removesuffix(suffix) if near or is_format else path}{(near or suffixes)[0]}"


def nearest_path(path: str | os.PathLike[str], fits: Callable[[str], bool] | None = None) -> str | None:
    """Return the path of an existing file or folder that a misspelled path may mean: every missing part is replaced by
    the most similar name in its folder. Return None if the path exists, or if a part has no similar name.

    fits  returns True for a path that may be meant; by default, for a path with the same suffix
    """
    parts, place = PurePath(path).parts, ""
    suffix = PurePath(path).suffix
    of_last = fits or (lambda there: PurePath(there).suffix == suffix)
    for at, part in enumerate(parts):
        there = os.path.join(place, part)
        if not os.path.exists(there):
            names = _entries(place, of_last if at == len(parts) - 1 else os.path.isdir)
            near = [name for name in NearestNames(names).of(part, 3) if _stems_are_similar(name, part)]
            if not near:
                return None
            there = os.path.join(place, near[0])
        place = there
    return place if PurePath(place) != PurePath(path) else None


def _differing_parts_are_similar(name: str, other: str) -> bool:
    """Return True if two dotted names are similar without their equal parts at both ends, and their numbers are equal;
    or if one of them has all parts of the other, at least two.
    """
    left, right = name.split("."), other.split(".")
    shared = 0
    for _ in range(2):  # from the end, then from the start
        left, right = left[::-1], right[::-1]
        while left and right and left[0] == right[0]:
            left, right, shared = left[1:], right[1:], shared + 1
    if not left or not right:
        return shared >= 2
    rest, other_rest = ".".join(left), ".".join(right)
    return re.findall("[0-9]+", rest) == re.findall("[0-9]+", other_rest) and bool(
        difflib.get_close_matches(rest, [other_rest], 1)
    )


def _stems_are_similar(name: str, other: str) -> bool:
    """Return True if two names of files are similar without their suffixes, which are often equal."""
    stems = PurePath(name).stem, PurePath(other).stem
    return bool(difflib.get_close_matches(stems[0], stems[1:], 1))


def _entries(folder: str, fits: Callable[[str], bool]) -> list[str]:
    """Return the names of files and folders in a folder that fit and can be printed."""
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in islice(entries, _ENTRIES)]
    except OSError:
        return []
    return sorted(name for name in names if name.isprintable() and fits(os.path.join(folder, name)))


def nearest_path_hint(
    path: str | os.PathLike[str], fits: Callable[[str], bool] | None = None, *, rest: str = ""
) -> Hint | None:
    """Return the hint for a path that does not exist: the nearest path, followed by `rest`. On the command line, it is
    the same command with this argument. Return None if there is no such path; see `nearest_path`.
    """
    near = nearest_path(path, fits)
    return None if near is None else argument_hint(f"{os.fspath(path)}{rest}", f"{near}{rest}")


def argument_hint(misspelled: str, meant: str) -> Hint:
    """Return the hint for a misspelled argument; on the command line, it is the same command with the other one."""
    return Hint(f"{meant}?", f"{meant}?", replaces=misspelled, words=(meant,))
