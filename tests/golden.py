"""Golden files: the expected texts of tests are stored in files, so that a change in a text appears as a diff.

`make golden` (pytest --update-golden, or TREADLE_UPDATE_GOLDEN=1) writes the current texts; then read the diff.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """A function of a file name below tests/golden/ and the text that should be in the file."""

    def __init__(self, update: bool) -> None:
        self.update = update

    def __call__(self, name: str, text: str) -> None:
        path = FOLDER / name
        if not text.endswith("\n"):
            text += "\n"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        if not path.exists():
            pytest.fail(f"there is no tests/golden/{name}; pytest --update-golden writes it")
        wanted = path.read_text(encoding="utf-8")
        if text != wanted:
            lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="")
            pytest.fail("\n".join([*lines, "", "pytest --update-golden accepts the new text"]), pytrace=False)
