"""Summaries of arrays: min, mean and max, in the fewest digits; similarities as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from treadle.reporting import Facts
from treadle.reporting.tables import plain_table

_SENTENCE, _ELLIPSIS = 48, 8  # the most and the fewest characters of a sentence in a table of similarities
_SHOWN_VALUES = 64  # an output of at most this many elements is printed in full


def array_facts(array: np.ndarray[Any, Any]) -> Facts:
    """Return a summary of an output: dtype, shape, and the min, mean and max of its finite elements. For a small
    output, all elements are included.
    """
    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    numbers = finite.astype(np.float64) if finite.size else None
    facts: Facts = {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "min": None if numbers is None else shortest(array.dtype.type(numbers.min())),
        "mean": None if numbers is None else shortest(_mean(numbers, array.dtype)),
        "max": None if numbers is None else shortest(array.dtype.type(numbers.max())),
        "not_finite": array.size - finite.size,
    }
    if array.size <= _SHOWN_VALUES:
        facts["values"] = _plain(shortest(array))
    return facts


def _mean(numbers: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> Any:
    mean = numbers.mean()
    return dtype.type(mean) if dtype.kind == "f" else mean


def shortest(numbers: Any) -> Any:
    """Convert NumPy numbers and lists to Python's. Floats get the fewest digits that identify them in their own dtype:
    0.1 for float32's 0.1, which is 0.10000000149011612 in Python's float64.
    """
    if getattr(numbers, "ndim", 0):
        return [shortest(each) for each in numbers]
    return float(str(numbers)) if np.asarray(numbers).dtype.kind == "f" else numbers.item()


def array_table(outputs: Mapping[str, Facts]) -> Table:
    numbers = ("min", "mean", "max", "not finite")
    table = plain_table("output", "dtype", "shape", *numbers, numbers=set(numbers))
    for name, facts in outputs.items():
        statistics = ["" if facts[key] is None else f"{facts[key]:.6g}" for key in ("min", "mean", "max")]
        shape = " x ".join(map(str, facts["shape"])) or "scalar"
        table.add_row(name, facts["dtype"], shape, *statistics, str(facts["not_finite"] or ""))
    return table


def _plain(value: Any) -> Any:
    """Convert numbers and lists to JSON values. NaN and infinity become null."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def similarity_tables(
    sentences: Sequence[str], similarity: np.ndarray[Any, Any], width: int | None = None
) -> Iterator[Table]:
    """Yield tables of cosine similarities in which high values are highlighted. Each has a row for each sentence, and
    as many of the columns as fit into `width` characters; None: one table with all columns.
    """
    cells = [[f"{x:.2f}" for x in row] for row in similarity]
    wide = max(len(cell) for cell in [*chain(*cells), str(len(sentences))])
    most = _SENTENCE if width is None else max(_ELLIPSIS, min(_SENTENCE, width - wide - len(f"{len(sentences)}") - 5))
    labels = [f"{i + 1}  {each if len(each) <= most else each[: most - 3] + '...'}" for i, each in enumerate(sentences)]
    fitting = len(sentences) if width is None else max(1, (width - max(map(len, labels))) // (wide + 3))
    for start in range(0, len(sentences), fitting):
        shown = range(start, min(start + fitting, len(sentences)))
        table = plain_table("", *(str(j + 1) for j in shown), numbers={str(j + 1) for j in shown})
        for column in table.columns[1:]:
            column.min_width = wide
        for i, label in enumerate(labels):
            styles = ["bold green" if similarity[i, j] > 0.5 and i != j else "" for j in shown]
            numbers = [Text(cells[i][j], style=style) for j, style in zip(shown, styles, strict=True)]
            table.add_row(Text(label, no_wrap=True, overflow="ellipsis"), *numbers)
        yield table
