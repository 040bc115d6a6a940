"""A record of the files that Python opens while a block of code runs.

Python's audit events would show them too, but an audit hook stays for the rest of the process: it would be called for
millions of events of other tests.
"""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened_in(folder: Path) -> Iterator[Counter[str]]:
    """Count how often each file in this folder is opened; `folder` may also be a file. Keys are paths relative to it;
    links are followed.
    """
    below, counts = Path(os.path.realpath(folder)), Counter[str]()

    def counting(open: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, *rest: Any, **options: Any) -> Any:
            if isinstance(file, str | os.PathLike):
                path = Path(os.path.realpath(os.fspath(file)))
                if path.is_relative_to(below):
                    counts[path.relative_to(below).as_posix()] += 1
            return open(file, *rest, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io, os):
            patch.setattr(module, "open", counting(module.open))
        yield counts
