"""Texts given on the command line, as arguments or in a file, which is read once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from treadle.files.contained_files import read_regular
from treadle.ir.errors import UsageError

_TEXT_BYTES = 256 << 20  # limit on the bytes of a text


def read_sentences(given: Sequence[str], file: str | None, command: str = "embed minilm") -> list[str]:
    """Return sentences from the command line, or nonblank lines of a file or of standard input.

    command  the command that reads them, for the hint of an error

    Raises UsageError if there is no sentence, or if the text is too long or not UTF-8.
    """
    if given and file is not None:
        raise UsageError(
            "sentences were given both as arguments and in a file",
            received=f"{len(given)} and --file {file}",
            hint="use one of them",
        )
    if given:
        return list(given)
    if file is None and sys.stdin.isatty():
        raise UsageError("there is no sentence", hint=f'treadle {command} "A sentence."')
    text, shown = _read(file)
    found = [line for line in map(str.strip, text.splitlines()) if line]
    if not found:
        raise UsageError("there is no sentence", received="no line of text", within=shown)
    return found


def read_text(file: str) -> str:
    """Return the text of a file; `-` is standard input. Raises UsageError if it is too long or not UTF-8."""
    return _read(file)[0]


def _read(file: str | None) -> tuple[str, str]:
    """Return the text of a file, or of standard input for None and `-`, and its name for errors."""
    piped = file in (None, "-")
    shown = "standard input" if piped else str(file)
    data = sys.stdin.buffer.read(_TEXT_BYTES + 1) if piped else read_regular(str(file), _TEXT_BYTES)
    if len(data) > _TEXT_BYTES:
        raise UsageError("the text is longer than the limit", received=f"limit {_TEXT_BYTES} bytes", within=shown)
    try:
        return data.decode("utf-8"), shown
    except UnicodeDecodeError as error:
        raise UsageError("the text is not UTF-8", received=f"byte {error.start}", within=shown) from None
