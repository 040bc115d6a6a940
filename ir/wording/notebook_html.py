"""HTML for notebooks, used by `_repr_html_` of graphs, logs and executables. Every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_SCROLLED = "max-height: 32em; overflow: auto; text-align: left"


def html_title(text: str) -> str:
    """Return one line in a fixed-width font."""
    return f"<div><code>{escape(text)}</code></div>"


def html_code(summary: str, text: str, *, open: bool = False) -> str:
    """Return text in a fixed-width font under a summary. A click on the summary shows and hides the text."""
    return (
        f"<details{' open' if open else ''}><summary>{escape(summary)}</summary>"
        f'<pre style="{_SCROLLED}">{escape(text)}</pre></details>'
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose cells contain plain text."""
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for cell in cells) + "</tr>"
