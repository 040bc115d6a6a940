"""HTML for notebooks: what `_repr_html_` of graphs, logs and executables is made of. Every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_SCROLLED = "max-height: 32em; overflow: auto; text-align: left"


def html_title(text: str) -> str:
    """One line in fixed width."""
    return f"<div><code>{escape(text)}</code></div>"


def html_code(summary: str, text: str, *, open: bool = False) -> str:
    """Text in fixed width under a summary, by a click on which it is shown and hidden."""
    return (
        f"<details{' open' if open else ''}><summary>{escape(summary)}</summary>"
        f'<pre style="{_SCROLLED}">{escape(text)}</pre></details>'
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are text."""
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for cell in cells) + "</tr>"
