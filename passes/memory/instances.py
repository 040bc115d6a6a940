"""Instances of the placement problem: buffers with a size and a life, in the format of CSV files.

    id,lower,upper,size[,offset]

A buffer is live from step `lower` to before step `upper`. With the column `offset`, the file also holds a placement.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from treadle.ir.errors import PassError

COLUMNS = ("id", "lower", "upper", "size")
LARGEST = 1 << 60
"""Steps, sizes and their sums stay below this limit: placements are computed in 64 bits."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer: its name and its size in bytes. It is live from step `first` to before step `end`."""

    name: str
    first: int
    end: int
    size: int


@dataclass(frozen=True)
class Instance:
    """Buffers to place, and the offsets of a placement if the file has one. `str` returns CSV."""

    name: str
    buffers: tuple[Lifetime, ...]
    offsets: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(COLUMNS if self.offsets is None else (*COLUMNS, "offset"))
        for i, b in enumerate(self.buffers):
            lines.writerow((b.name, b.first, b.end, b.size) + (() if self.offsets is None else (self.offsets[i],)))
        return text.getvalue()


def read_instance(path: str | Path) -> Instance:
    """Read an instance from a CSV file. Raises PassError, with the line, if the file is not a valid instance."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise PassError(
            "the file cannot be read", received=str(path), within=error.strerror, hint="the path of a CSV file"
        ) from error
    except UnicodeDecodeError as error:
        raise PassError(
            "the file is not text", received=f"byte {error.start} is not UTF-8", within=str(path), hint="a CSV file"
        ) from error
    return parse_instance(text, path.stem)


def parse_instance(text: str, name: str = "instance") -> Instance:
    """Parse an instance from CSV text, and give it the name `name`. Raises PassError, with the line."""
    rows = csv.reader(io.StringIO(text), strict=True)
    buffers: list[Lifetime] = []
    offsets: list[int] = []
    names: dict[str, int] = {}
    try:
        columns = [x.strip() for x in next(rows, [])]
        _check_columns(columns, name)
        for row in rows:
            if not row:
                continue
            where = f"{name}, line {rows.line_num}"
            if len(row) != len(columns):
                raise PassError(
                    "a line must have as many fields as the first line",
                    received=f"{len(row)} fields, {len(columns)} columns",
                    within=where,
                    hint="one field for each of " + ",".join(columns),
                )
            fields = {c: x.strip() for c, x in zip(columns, row, strict=True)}
            numbers = {c: _whole(c, x, where) for c, x in fields.items() if c != "id"}
            if fields["id"] in names:
                raise PassError(
                    "two buffers have the same id",
                    received=f"id {fields['id']}, also in line {names[fields['id']]}",
                    within=where,
                    hint="a unique id for each buffer",
                )
            if numbers["upper"] <= numbers["lower"]:
                raise PassError(
                    "a buffer must end after it begins",
                    received=f"lower {numbers['lower']}, upper {numbers['upper']}",
                    within=where,
                    hint="upper is the first step at which the buffer is dead: at least lower + 1",
                )
            names[fields["id"]] = rows.line_num
            buffers.append(Lifetime(fields["id"], *(numbers[column] for column in COLUMNS[1:])))
            if "offset" in numbers:
                offsets.append(numbers["offset"])
    except csv.Error as error:
        raise PassError(
            "the file is not CSV", received=str(error), within=f"{name}, line {rows.line_num}", hint="plain fields"
        ) from error
    return Instance(name, tuple(buffers), tuple(offsets) if "offset" in columns else None)


def _check_columns(columns: list[str], name: str) -> None:
    """Raise PassError unless the columns are the four columns, and possibly `offset`, in any order."""
    if not set(COLUMNS) <= set(columns) or set(columns) - {*COLUMNS, "offset"} or len(set(columns)) != len(columns):
        raise PassError(
            "the first line must name the columns",
            received=",".join(columns)[:200] or "an empty line",
            within=f"{name}, line 1",
            hint="id,lower,upper,size and, if the file holds a placement, offset",
        )


def _whole(column: str, text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise PassError(
            f"{column} must be a non-negative integer of at most 18 digits",
            received=repr(text[:40]),
            within=where,
            hint=f"only digits in the column {column}",
        )
    return int(text)
