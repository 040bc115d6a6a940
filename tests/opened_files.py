"""A record of the files that are opened while a block of code runs, from Python's audit events."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RECORDS: list[tuple[Path, Counter[str]]] = []


def _record(event: str, given: tuple[object, ...]) -> None:
    if event == "open" and _RECORDS and isinstance(given[0], str | os.PathLike):
        path = Path(os.path.realpath(os.fspath(given[0])))
        for below, counts in _RECORDS:
            if path.is_relative_to(below):
                counts[path.relative_to(below).as_posix()] += 1


sys.addaudithook(_record)  # an audit hook cannot be removed


@contextmanager
def opened_in(folder: Path) -> Iterator[Counter[str]]:
    """Count how often each file in this folder is opened; `folder` may also be a file. Keys are paths relative to it;
    links are followed.
    """
    entry = (Path(os.path.realpath(folder)), Counter[str]())
    _RECORDS.append(entry)
    try:
        yield entry[1]
    finally:
        _RECORDS.remove(entry)
