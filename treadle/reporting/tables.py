"""Tables, and rows of items, as wide as the terminal or the pipe that they are printed to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_PIPED_WIDTH = 120


class _Plain(Console):
    """A console that passes BrokenPipeError on to its caller."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """Return a console for tables. It is as wide as the terminal, and uses colors only in a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return _Plain(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else _PIPED_WIDTH)


@dataclass(frozen=True)
class Items:
    """Strings in a row, separated by commas. Lines are broken only between two of them."""

    texts: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for text in self.texts:
            joined = f"{lines[-1]}, {text}" if lines[-1] else text
            if cell_len(joined) < options.max_width or not lines[-1]:
                lines[-1] = joined
            else:
                lines[-1] += ","
                lines.append(text)
        yield Text("\n".join(lines))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((cell_len(text) + 1 for text in self.texts), default=0)
        return Measurement(longest, max(longest, cell_len(", ".join(self.texts)) + 1))


def plain_table(*columns: str, numbers: set[str]) -> Table:
    """Return an empty table with these columns. Columns in `numbers` are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
