"""Read the documents in files. A text file is one document. A .jsonl file has one document per line: `{"text": "Once
upon a time"}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from treadle.files.shown_names import printable, shown_path
from treadle.ir.errors import UsageError
from treadle.program.given_texts import read_text

LINES = ".jsonl"
BYTE_ORDER_MARK = "\ufeff"
"""The byte order mark with which some editors begin a UTF-8 file."""


def read_documents(files: Sequence[str]) -> list[str]:
    """Return the documents of all files, in order. `-` is standard input. Blank documents are dropped, and so is a byte
    order mark at the start of a file.

    Raises UsageError if there is no document, if a file is too long or not UTF-8, or if a line of a .jsonl file is not
    an object with a text; CheckpointError if a file cannot be read.
    """
    found: list[str] = []
    for file in files:
        text = read_text(file).removeprefix(BYTE_ORDER_MARK)
        found += _lines(text, file) if file.lower().endswith(LINES) else [text]
    found = [text for text in found if text.strip()]
    if not found:
        raise UsageError("there is no text", received=", ".join(map(printable, files)), hint="a file with a text in it")
    return found


def _lines(text: str, file: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
        except (ValueError, RecursionError):
            held = None
        document = held.get("text") if isinstance(held, dict) else None
        if not isinstance(document, str):
            raise UsageError(
                f"a line of a {LINES} file must be an object with a text",
                received=printable(line, 80),
                within=f"{shown_path(file)}, line {number}",
                hint='{"text": "Once upon a time"}',
            )
        yield document
