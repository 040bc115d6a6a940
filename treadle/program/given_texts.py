"""Texts given on the command line, as arguments or in a file, which is read once.

A text file is one document, or one sentence per line. Each row of a table (`treadle.program.text_files`) is one
document or sentence.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath

from treadle.files.nearest_names import nearest_path_hint
from treadle.files.shown_names import printable
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.program.text_files import read_column, read_text, shown_source

_LONGEST_NAME = 200
"""Maximum number of characters of a text that may be the name of a file."""


def read_sentences(
    given: Sequence[str],
    file: str | None,
    column: str | None = None,
    *,
    command: Sequence[str] = ("embed", "minilm"),
    example: str = "A sentence.",
) -> list[str]:
    """Return sentences from the command line, or nonblank lines of a file or of standard input, or rows of a table.

    column   the column of a table, as in `read_column`
    command  the words of the command before the sentences, and an example of a sentence, for the hint of an error

    Raises UsageError if there is no sentence, if one is the name of a file that exists, or if the text is too long or
    not UTF-8, CheckpointError for a file that
    does not exist, and the errors of `read_column`.
    """
    if column is not None and file is None:
        raise UsageError("a column is a column of a file", received=f"--column {column}", hint="--file FILE as well")
    if given and file is not None:
        raise UsageError(
            "sentences were given both as arguments and in a file",
            received=f"{len(given)} and --file {file}",
            hint="use one of them",
        )
    if given:
        for text in given:
            whole = Hint(f"--file {text}", f"--file {text}", replaces=text, words=("--file", text))
            refuse_file_name(text, whole if len(given) == 1 else f"--file {shlex.quote(text)}, without other texts")
        return list(given)
    if file is None and sys.stdin.isatty():
        raise UsageError("there is no sentence", hint=_with_sentence(command, example))
    if file is not None and not _exists(file):
        argument = f"{shlex.quote(printable(file))} without --file, as an argument" if _is_text(file) else None
        raise _no_file(file, argument or "the path of a file with a text on each line")
    rows = None if file is None else read_column(file, column)
    lines = read_text(file or "-").splitlines() if rows is None else rows
    found = [line for line in map(str.strip, lines) if line]
    if not found:
        raise UsageError(
            "there is no sentence",
            received="no line of text",
            within=shown_source(file),
            hint=_with_sentence(command, example) if file in (None, "-") else "a file with a text in it",
        )
    return found


def _with_sentence(command: Sequence[str], example: str) -> Hint:
    """Return the hint to give a sentence as an argument."""
    text = f'{shlex.join(["treadle", *command])} "{example}"'
    return Hint(text, text, replaces=command[-1], words=(command[-1], example))


def read_documents(files: Sequence[str], column: str | None = None) -> list[str]:
    """Return the documents of all files, in order: a text file is one document, and so is a row of a table. `-` is
    standard input. Blank documents are left out.

    column  the column of tables, as in `read_column`

    Raises UsageError if there is no document, CheckpointError for a file that does not exist, and the errors of
    `read_text` and `read_column`.
    """
    found: list[str] = []
    for file in files:
        if not _exists(file):
            piped = f"echo {shlex.quote(printable(file))} | "
            of_text = Hint(
                "the path of a file with the text", f"{piped}treadle ... -", replaces=file, words=("-",), before=piped
            )
            raise _no_file(
                file, of_text if _is_text(file) else "the path of a text file, or -, which is standard input"
            )
        rows = read_column(file, column)
        found += [read_text(file)] if rows is None else rows
    found = [text for text in found if text.strip()]
    if not found:
        raise UsageError("there is no text", received=", ".join(map(printable, files)), hint="a file with a text in it")
    return found


def refuse_file_name(text: str, hint: str) -> None:
    """Raise UsageError for a text that is the name of a file, with the hint."""
    if PurePath(text).suffix and len(text) < _LONGEST_NAME and os.path.isfile(text):
        raise UsageError("the text is the name of a file", received=printable(text), hint=hint)


def _exists(file: str) -> bool:
    return file == "-" or os.path.lexists(file)


def _is_text(file: str) -> bool:
    """Return True for a name that is a text rather than the path of a file."""
    return " " in file or not PurePath(file).suffix


def _no_file(file: str, hint: str) -> CheckpointError:
    shown = printable(file, 80)
    return CheckpointError("the file does not exist", within=shown, hint=nearest_path_hint(file) or hint)
