"""Tables, and rows of items, as wide as the terminal or the pipe that they are printed to."""

from __future__ import annotations

import re
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


def print_whole(table: Table) -> None:
    """Print a table. In a pipe, no cell is broken, and the lines are as long as they need to be."""
    out = console()
    if not out.is_terminal:
        out.width = max(out.width, Measurement.get(out, out.options.update(max_width=sys.maxsize), table).maximum)
    out.print(table)


@dataclass(frozen=True)
class Items:
    """Strings in a row, separated by commas. Lines are broken only between two of them.

    separator  the text between two of them; its spaces are left out at the end of a line
    """

    texts: Sequence[str]
    separator: str = ", "

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines, end = [""], self.separator.rstrip()
        for text in self.texts:
            joined = f"{lines[-1]}{self.separator}{text}" if lines[-1] else text
            if cell_len(joined + end) <= options.max_width or not lines[-1]:
                lines[-1] = joined
            else:
                lines[-1] += end
                lines.append(text)
        yield Text("\n".join(lines))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        end = len(self.separator.rstrip())
        longest = max((cell_len(text) + end for text in self.texts), default=0)
        return Measurement(longest, max(longest, cell_len(self.separator.join(self.texts)) + end))


def phrases(text: str) -> Items:
    """Return a text whose lines are broken between words, but not inside brackets: `hidden states [B, S, dim]`."""
    return Items(re.findall(r"(?:\[[^\]]*\]|\S)+", text), " ")


def plain_table(*columns: str, numbers: set[str]) -> Table:
    """Return an empty table with these columns. Columns in `numbers` are aligned to the right.

    On a narrow terminal, columns are closer together, so that fewer cells are broken.
    """
    is_narrow = console().width < _PIPED_WIDTH
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", collapse_padding=is_narrow)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
