"""Limits on the resources that a file may request: setting them, and the hint if a limit is exceeded.

Each reader has a frozen dataclass of limits, whose fields are positive integers. The reader's argument `limits=` takes
an instance, or a mapping of the fields that differ from the defaults: `limits={"nodes": 400_000}`. `treadle.compile`
takes the same argument for any file that it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from treadle.files.errors import Hint, UsageError

L = TypeVar("L")

MORE = 4
"""If the required value of a limit is unknown, errors suggest raising the limit by this factor."""


def limits_of(kind: type[L], given: L | Mapping[str, int] | None) -> L:
    """Return all limits of a reader. Raises UsageError for an unknown name, and for a value that is not a positive
    integer.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        received = f"a {type(given).__name__}"
        raise UsageError(
            f"limits must be a {kind.__name__}, or numbers by name", received=received, hint=_one_of(known)
        )
    check_limits(given, known)
    return replace(kind(), **given)  # type: ignore[type-var]


def check_limits(given: Mapping[str, Any], known: list[str]) -> None:
    """Raise UsageError for a limit that this kind of file does not have, or that is not a positive integer."""
    for name, most in given.items():
        if name not in known:
            raise UsageError(f"this kind of file has no limit {name!r}", hint=_one_of(known))
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise UsageError(f"the limit {name} must be a positive integer", received=repr(most)[:80])


def _one_of(known: list[str]) -> str:
    return "one of " + ", ".join(known)


def limit_hint(name: str, most: int) -> Hint:
    """Return a hint that raises a limit far enough to read the file."""
    return Hint(f"limits={{{name!r}: {most}}}, if you trust the file", f"--limit {name}={most}, if you trust the file")
