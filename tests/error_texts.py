"""Golden texts of errors: the text of each Treadle error that a test provokes is in tests/golden/errors/.

`pytest.raises` compares the text with the file of the test's module. It does the same with the error that a command
printed before it ended with SystemExit. So any test that meets an error notices a lost `received`, location or hint;
the test itself only names the error that it expects. `make golden` writes the files. Quotes of another library, folders
of this machine and line numbers are replaced by placeholders.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from types import TracebackType
from typing import Any

import pytest
from hypothesis import currently_in_test_context

from tests.golden import FOLDER, Golden
from treadle.files.errors import TreadleError
from treadle.files.user_cache import cache_folder

raises_freely = pytest.raises
"""`pytest.raises` without a comparison, for texts that number in the thousands (by op, dtype and backend) or that
depend on the time.
"""

_ROOT = str(FOLDER.parents[1])
_HEADING = """\
{} that {} provokes, in the order of their texts. `make golden` writes this file.
"""
_BETWEEN = "\n\n"


_LINES = 16
"""Number of lines of a text that are compared; the rest of a long list is left out."""


def text_of(error: BaseException, folder: str, cache: str) -> str:
    """Return an error's text in a form that is the same everywhere: without folders, lines, numbers and foreign texts.

    Numbers stay, because the cases of a test differ by them.

    folder  the parent of the tests' own folders
    cache   the user's cache, which holds fetched models
    """
    text = str(error)
    other = error.__cause__ or error.__context__
    if other is not None and not type(other).__module__.startswith("treadle"):
        for line in filter(lambda line: len(line) > 7, map(str.strip, str(other).splitlines())):
            text = text.replace(line, f"({type(other).__name__})")
    text = text.replace(sys.executable, "PYTHON")  # may be below the root
    text = re.sub(rf"{re.escape(folder)}/[^/\s:,'\")]*", "TMP", text).replace(_ROOT, "ROOT").replace(cache, "CACHE")
    return shortened(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def shortened(text: str) -> str:
    """Return a text with # for its numbers and versions, and without the lines after the first `_LINES`."""
    text = re.sub(r"(\.py):\d+", r"\1", re.sub(r"\n\s*\n", "\n", text))
    text = re.sub(r"\b(?=\d*[a-f])[0-9a-f]{32,}\b", "...", re.sub(r"ERROR: .*", "(what pip says)", text))
    text = re.sub(r"(?<![\w.])(?:0x[0-9a-f]+|-?\d[\d.,]*\d(?:e[+-]?\d+)?|-?\d(?:e[+-]?\d+)?)(?!\w)", "#", text)
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    text = re.sub(r"#\+(?:cpu|cu\d+)\b", "#", text)  # the build in a version of PyTorch
    text = re.sub(r"for CUDA #: Found no NVIDIA driver.*", "without CUDA", text)  # a build with CUDA, without a GPU
    lines = [line.rstrip() for line in text.strip().split("\n")]
    return "\n".join([*lines[:_LINES], *["            ..."] * (len(lines) > _LINES)])


def _ours(caught: BaseException | None) -> TreadleError | None:
    """Return the error that was caught; for the exit of a command, the error that it reported."""
    while type(caught).__name__ == "Exit":
        caught = caught.__context__  # type: ignore[union-attr]
    return caught if isinstance(caught, TreadleError) else None


class KnownTexts:
    """The golden texts of all modules. Two processes cannot write the files, so an update must run in a single
    process.
    """

    def __init__(self, golden: Golden, kind: str) -> None:
        self.golden, self.kind = golden, kind
        self.known: dict[str, set[str]] = {}
        self.met: dict[str, set[str]] = {}

    def compare(self, module: str, text: str) -> None:
        """Raise the exception of `pytest.fail` if the text is not among the module's."""
        if self.golden.update:
            self.met.setdefault(module, set()).add(text)
        elif text not in (known := self._read(module)):
            near = "\n\n".join(get_close_matches(text, known, n=1, cutoff=0.0))
            raise pytest.fail.Exception(
                f"this is none of tests/golden/{self.kind}/{module}.txt:\n\n{text}\n\nthe nearest there:\n\n"
                f"{near}\n\npytest --update-golden {module}.py accepts it",
                pytrace=False,
            )

    def _read(self, module: str) -> set[str]:
        if module not in self.known:
            path = FOLDER / self.kind / f"{module}.txt"
            _, *texts = path.read_text(encoding="utf-8").split(_BETWEEN) if path.exists() else ("",)
            self.known[module] = {text.removesuffix("\n") for text in texts}
        return self.known[module]

    def write(self, whole: bool) -> None:
        """Write the texts of each module that was run: replace the file after a run of the whole module, else merge
        with the known texts.
        """
        for module, texts in self.met.items():
            kept = texts if whole else texts | self._read(module)
            heading = _HEADING.format(self.kind.capitalize(), module).strip()
            self.golden(f"{self.kind}/{module}.txt", _BETWEEN.join([heading, *sorted(kept)]))


class ErrorTexts(KnownTexts):
    """The texts of errors; `folder` is the parent of the tests' own folders."""

    def __init__(self, golden: Golden, folder: str) -> None:
        super().__init__(golden, "errors")
        self.folder, self.cache = folder, str(cache_folder())
        self.printed: list[TreadleError] = []

    def listening(self, telling: Callable[[TreadleError], Any]) -> Callable[[TreadleError], Any]:
        """Return a wrapper of the function that reports an error on the command line. The exit alone only has a
        code.
        """

        def listener(error: TreadleError) -> Any:
            self.printed.append(error)
            return telling(error)

        return listener

    def compare_error(self, module: str, error: BaseException) -> None:
        """Raise the exception of `pytest.fail` if the error's text is not among the module's."""
        self.compare(module, text_of(error, self.folder, self.cache))


def current_module() -> str:
    """Return the module of the running test; "" if no test runs."""
    found = re.match(r"tests/(\w+)\.py", os.environ.get("PYTEST_CURRENT_TEST", ""))
    return found[1] if found else ""


class _Compared:
    """The context of `pytest.raises`, which also compares the text of the error that it catches."""

    def __init__(self, raises: Any, texts: ErrorTexts) -> None:
        self.raises, self.texts = raises, texts

    def __enter__(self) -> Any:
        self.texts.printed.clear()
        return self.raises.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        caught: bool = self.raises.__exit__(kind, error, trace)
        module = current_module()
        if caught and module and not currently_in_test_context():
            for each in self.texts.printed if isinstance(error, SystemExit) else [_ours(error)]:
                if each is not None:
                    self.texts.compare_error(module, each)
        return caught


def comparing(raises: Callable[..., Any], texts: ErrorTexts) -> Callable[..., Any]:
    """Return a `pytest.raises` that compares."""

    def compared(*given: Any, **more: Any) -> Any:
        return _Compared(raises(*given, **more), texts)

    return compared
