"""Fit text to a terminal's width without wrapping in the middle of a line.

If a line is too long, the comment at its end is shortened first: its columns (scope, source line, types) are dropped,
starting from the right. If the line is still too long, it is broken between two arguments and continues in an indented
line. A graph's text still parses, and Python is still valid. If the output is not a terminal, text is unchanged.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator

from treadle.reporting.tables import console

_HANG = 4
_CODE_DEPTHS = range(1, 1000)  # maximum bracket depth at which a line may be broken
_GRAPH_DEPTHS = range(3)  # deeper text is an attention term, which the parser reads as one token
_NOTE = "   # "
_OPENING, _CLOSING = "([{", ")]}"


def fitted(text: str, fit: Callable[[str, int], str]) -> str:
    """Return text for standard output: fitted to the width on a terminal, otherwise unchanged."""
    return fit(text, console().width) if sys.stdout.isatty() else text


def fit_prose(text: str, width: int) -> str:
    """Return lines of words with long lines broken between words. Continuation lines keep the line's indentation."""
    return "\n".join(each for line in text.split("\n") for each in _words_wrapped(line, width))


def fit_graph(text: str, width: int) -> str:
    """Return a graph's text, fitted to the width. Lists that span several lines are joined and broken again."""
    return _fit_lines(re.sub(r",\n +", ", ", text), width, depths=_GRAPH_DEPTHS)


def fit_code(text: str, width: int) -> str:
    """Return lines of Python, or similar code with comments after `#`, broken only inside brackets."""
    return _fit_lines(text, width, depths=_CODE_DEPTHS)


def _fit_lines(text: str, width: int, *, depths: range) -> str:
    lines: list[str] = []
    noted: list[tuple[str, list[str]]] = []  # consecutive lines: code and the columns of its comment
    for line in text.split("\n"):
        code, note = _split_note(line)
        if note and code.strip():
            noted.append((code.rstrip(), re.split(r" {2,}", note)))
            continue
        lines += [*_fit_noted(noted, width, depths), *_folded(line, width, depths)]
        noted = []
    return "\n".join([*lines, *_fit_noted(noted, width, depths)])


def _fit_noted(lines: list[tuple[str, list[str]]], width: int, depths: range) -> Iterator[str]:
    """Yield lines with the largest number of comment columns for which all lines fit. A line that does not fit with one
    column gets no comment.
    """
    most = max((len(columns) for _, columns in lines), default=0)
    for kept in range(most, 0, -1):
        rows = [(code, columns[:kept]) for code, columns in lines]
        widths = [max((len(c[i]) for _, c in rows if i < len(c)), default=0) for i in range(kept)]
        room = width - len(_NOTE) - sum(widths) - 2 * (kept - 1)
        if kept == 1 or all(len(code) <= room for code, _ in rows):
            at = max((len(code) for code, _ in rows if len(code) <= room), default=0)
            for code, columns in rows:
                padded = [f"{c:<{w}}" for c, w in zip(columns, widths, strict=False)]
                whole = f"{code:<{at}}{_NOTE}{'  '.join(padded)}".rstrip()
                yield from [whole] if len(whole) <= width else _folded(code, width, depths)
            return


def _split_note(line: str) -> tuple[str, str]:
    """Return a line's code, and its comment without the `#`. A `#` inside quotes does not start a comment."""
    for at, sign, _ in _outside_quotes(line):
        if sign == "#":
            return line[:at], line[at + 1 :].strip()
    return line, ""


def _folded(line: str, width: int, depths: range) -> Iterator[str]:
    """Yield a line of code broken after commas, or else at spaces. A piece without either may stay too long."""
    if line.lstrip().startswith("#"):
        yield from _words_wrapped(line, width)
        return
    lead = len(line) - len(line.lstrip())
    hang = lead + (len("weights ") if line.lstrip().startswith("weights ") else _HANG)
    places = [(at, depth) for at, sign, depth in _outside_quotes(line) if sign == " " and at > hang and depth in depths]
    begin, indent = 0, 0
    while indent + len(line) - begin > width:
        at = _break(line, [p for p in places if begin < p[0] <= begin + width - indent], begin + width // 2)
        if at is None:
            break
        yield " " * indent + line[begin:at].rstrip()
        begin, indent = at + 1, hang
    yield " " * indent + line[begin:]


def _break(line: str, places: list[tuple[int, int]], late: int) -> int | None:
    """Return the position at which to break a line, or None. `places` are (position, bracket depth) pairs.

    Prefer positions after a comma beyond `late`, then any comma, then spaces inside brackets; among these, the smallest
    depth, then the last position.
    """
    commas = [(at, depth) for at, depth in places if line[at - 1] == ","]
    inside = [(at, depth) for at, depth in places if depth]
    for found in ([p for p in commas if p[0] > late], commas, inside):
        if found:
            least = min(depth for _, depth in found)
            return max(at for at, depth in found if depth == least)
    return None


def _outside_quotes(line: str) -> Iterator[tuple[int, str, int]]:
    """Yield the characters of a line outside of quotes, types and indices, each with its bracket depth."""
    quote, escaped = "", False
    opened: list[bool] = []  # True for each bracket that belongs to the word before it, as in f32[B, S]
    for at, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote and not escaped else quote
            escaped = sign == "\\" and not escaped
        elif sign in "\"'":
            quote = sign
        elif sign in _OPENING:
            opened.append(sign == "[" and at > 0 and (line[at - 1].isalnum() or line[at - 1] == "_"))
        elif sign in _CLOSING and opened:
            opened.pop()
        elif not any(opened):
            yield at, sign, len(opened)


def _words_wrapped(line: str, width: int) -> Iterable[str]:
    if len(line) <= width:
        return [line]
    match = re.match(r" *(?:# )?", line)
    lead = match[0] if match is not None else ""
    return textwrap.wrap(
        line[len(lead) :],
        width,
        initial_indent=lead,
        subsequent_indent=f"{lead}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
