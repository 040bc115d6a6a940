"""Files of texts: text files, and tables, of which a row is a text: CSV, TSV and Parquet files, and .jsonl files of
objects.

    read_text("novel.txt")                  # "Once upon a time ..."
    read_column("reviews.csv", "body")      # ["Good.", "Not so good."]
    read_column("novel.txt", None)          # None: not a table

The first row of CSV and TSV files has the columns' names (RFC 4180). Parquet is read by the package pyarrow.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath

from treadle.files.contained_files import open_regular, read_regular
from treadle.files.shown_names import printable, shown_path
from treadle.ir.errors import CheckpointError, FrontendError, Hint, UsageError

TEXT_BYTES = 256 << 20
"""Limit on the bytes of a file of texts."""
BYTE_ORDER_MARK = "\ufeff"
"""The mark with which some editors begin a file in UTF-8."""
COLUMN = "text"
"""The default name of the column with the texts."""


def shown_source(file: str | None) -> str:
    """Return the name of a file, or of standard input for None and `-`, for errors."""
    return "standard input" if file in (None, "-") else str(file)


def read_text(file: str) -> str:
    """Return the text of a file without its byte order mark; `-` is standard input.

    Raises UsageError if it is too long or not UTF-8.
    """
    piped, shown = file == "-", shown_source(file)
    data = sys.stdin.buffer.read(TEXT_BYTES + 1) if piped else read_regular(file, TEXT_BYTES)
    if len(data) > TEXT_BYTES:
        raise UsageError("the text is longer than the limit", received=f"limit {TEXT_BYTES} bytes", within=shown)
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UsageError("the text is not UTF-8", received=f"byte {error.start}", within=shown) from None


def read_column(file: str, column: str | None) -> list[str] | None:
    """Return the texts in a column of a table, blank ones included; None if the file is not a table.

    column  None: the column `text`, or the only column

    Raises UsageError for an unknown column, or a row without a text in it, with its line, and if the file is too long
    or not UTF-8; CheckpointError if the file cannot be read or is damaged; FrontendError if pyarrow is missing.
    """
    suffix = PurePath(file).suffix.lower()
    if suffix not in _READERS:
        if column is not None:
            tables = f"a file of the kind {', '.join(_READERS)}"
            raise UsageError(
                "only tables have columns",
                received=f"column {printable(column)}",
                within=shown_path(file),
                hint=Hint(f"leave column= out, or {tables}", f"leave --column out, or {tables}"),
            )
        return None
    return list(_READERS[suffix](file, column))


def _json_lines(file: str, column: str | None) -> Iterator[str]:
    name = COLUMN if column is None else column
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
        except (ValueError, RecursionError):
            held = None
        text = held.get(name) if isinstance(held, dict) else None
        if not isinstance(text, str):
            subject = "a text" if column is None else f"a text {printable(column)}"
            raise UsageError(
                f"a line of a .jsonl file must be an object with {subject}",
                received=printable(line, 80),
                within=f"{shown_path(file)}, line {number}",
                hint=_text_column(held) or json.dumps({name: "Once upon a time"}, ensure_ascii=False),
            )
        yield text


def _text_column(row: object) -> Hint | None:
    """Return a hint that names the keys with texts of a row; None if there are none."""
    names = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
    if not names:
        return None
    first, *others = [printable(name) for name in names[:5]]
    further = f", or {', '.join(others)}" if others else ""
    return Hint(f"column={first!r}{further}", f"--column {shlex.quote(first)}{further}")


def _separated(separator: str) -> Callable[[str, str | None], Iterator[str]]:
    """Return a reader of files whose values are separated by this character."""

    def read(file: str, column: str | None) -> Iterator[str]:
        rows = csv.reader(io.StringIO(read_text(file), newline=""), delimiter=separator, strict=True)
        longest = csv.field_size_limit(TEXT_BYTES)  # by default 131,072 characters, shorter than many documents
        try:
            names = next(rows, [])
            at = _index(names, column, file)
            for row in rows:
                if not row:  # a blank line
                    continue
                if len(row) != len(names):
                    raise UsageError(
                        "a row has another number of values than the table has columns",
                        received=f"{len(row)} values, {len(names)} columns",
                        within=f"{shown_path(file)}, line {rows.line_num}",
                        hint="a value with a separator, a quote or a line break is written in double quotes",
                    )
                yield row[at]
        except csv.Error as error:
            where = f"{shown_path(file)}, line {rows.line_num}"
            raise CheckpointError("the table is damaged", received=str(error), within=where) from None
        finally:
            csv.field_size_limit(longest)

    return read


def _parquet(file: str, column: str | None) -> Iterator[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise FrontendError(
            "reading Parquet files needs the package pyarrow",
            within=shown_path(file),
            hint="pip install pyarrow, or the same texts as .csv or .jsonl",
        )
    import pyarrow
    from pyarrow import parquet

    size = 0
    with open_regular(file) as opened:
        try:
            table = parquet.ParquetFile(opened)
            schema = table.schema_arrow
            kind = schema.field(_index(schema.names, column, file))
            if not (pyarrow.types.is_string(kind.type) or pyarrow.types.is_large_string(kind.type)):
                raise UsageError(
                    f"the column {printable(kind.name)} has no texts",
                    received=printable(str(kind.type)),
                    within=shown_path(file),
                    hint=Hint(
                        "column= with the name of a column of texts", "--column with the name of a column of texts"
                    ),
                )
            for batch in table.iter_batches(batch_size=256, columns=[kind.name]):
                size += batch.nbytes
                if size > TEXT_BYTES:
                    raise UsageError(
                        "the text is longer than the limit",
                        received=f"limit {TEXT_BYTES} bytes",
                        within=shown_path(file),
                    )
                for text in batch.column(0).to_pylist():
                    yield "" if text is None else text
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = printable(str(error), 200)
            raise CheckpointError("the table is damaged", received=reason, within=shown_path(file)) from None


def _index(names: Sequence[str], column: str | None, file: str) -> int:
    """Return the position of a column. Raises UsageError if there is no such column, or more than one."""
    name = COLUMN if column is None else column
    if column is None and COLUMN not in names and len(names) == 1:
        return 0
    count = list(names).count(name)
    if count != 1:
        shown = ", ".join(map(printable, names[:20])) + (", ..." if len(names) > 20 else "")
        raise UsageError(
            f"the table has {'no column' if not count else 'several columns'} {printable(name)}",
            received=f"columns {shown}" if names else "no columns",
            within=shown_path(file),
            hint=Hint("column= with the name of the column of texts", "--column with the name of the column of texts")
            if names
            else "a file with a first row of names",
        )
    return list(names).index(name)


_READERS: dict[str, Callable[[str, str | None], Iterator[str]]] = {
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".jsonl": _json_lines,
}
