"""A roofline plot as SVG: operations per byte to the right, operations per second upwards, a dot for each kernel.

    Path("bert.svg").write_text(draw_roofline(measure_roofline(exe, {"B": 1, "S": 128})))

Both axes are logarithmic. A dot's area is the kernel's share of the run. The slowest kernels are numbered and listed.
Tooltips show times and the user's line. The slanted line is the memory limit. A flat line is the rate of the unit that
multiplies a dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from treadle.benching.roofline import KernelRow, Roofline
from treadle.reporting.counts import human, rate_text, sizes_text

WIDTH, HEIGHT = 1000, 620
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 30, 64, 64
_COLOURS = {"f32": "#4e79a7", "bf16": "#f28e2b", "int8": "#59a14f"}
_LISTED = 8  # number of kernels that are numbered and listed: the slowest


def draw_roofline(found: Roofline) -> str:
    """Return the drawing as the text of an SVG file. Kernels that only move data are at the left edge."""
    return "\n".join(_Drawing(found).lines()) + "\n"


class _Drawing:
    def __init__(self, found: Roofline) -> None:
        self.found = found
        self.rows = [row for row in found.rows if row.flops]
        self.total = sum(row.total for row in found.rows)
        rates = [*found.rates.values(), *(row.flops / row.seconds for row in self.rows)]
        work = [row.flops / row.bytes for row in found.rows if row.flops and row.bytes]
        self.high = math.ceil(math.log10(max(rates)) + 0.1)
        self.low = min(math.floor(math.log10(min(rates))), self.high - 2)
        self.left = math.floor(math.log10(min([*work, 0.1])))
        self.right = math.ceil(math.log10(max([*work, max(rates) / found.read])))

    def x(self, intensity: float) -> float:
        part = (math.log10(intensity) - self.left) / (self.right - self.left) if intensity else 0.0
        return _LEFT + min(max(part, 0.0), 1.0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, rate: float) -> float:
        part = (math.log10(rate) - self.low) / (self.high - self.low) if rate else 0.0
        return HEIGHT - _BOTTOM - min(max(part, 0.0), 1.0) * (HEIGHT - _TOP - _BOTTOM)

    def lines(self) -> Iterator[str]:
        found = self.found
        yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
        yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        at = f" at {sizes_text(found.sizes)}" if found.sizes else ""
        title = f"{found.model}{at}, {found.target}, {found.threads} thread{'s' * (found.threads != 1)}"
        yield f'<text x="{_LEFT}" y="28" font-size="17" fill="#222">{escape(title)}</text>'
        yield from self._axes()
        yield from self._ceilings()
        for number, row in enumerate(self.rows, 1):
            yield from self._dot(row, str(number) if number <= _LISTED else "")
        listed = self.rows[:_LISTED]
        for number, row in enumerate(listed, 1):
            y = HEIGHT - _BOTTOM - 14 - 18 * (len(listed) - number)
            yield _text(WIDTH - _RIGHT - 8, y, f"{escape(row.kernel)}  {row.total / self.total:.1%}  ({number})", "end")
        yield "</svg>"

    def _axes(self) -> Iterator[str]:
        for power in range(self.left, self.right + 1):
            x = self.x(10.0**power)
            yield _line(x, _TOP, x, HEIGHT - _BOTTOM, "#eee")
            yield _text(x, HEIGHT - _BOTTOM + 18, f"{10.0**power:g}", "middle")
        for power in range(self.low, self.high + 1):
            y = self.y(10.0**power)
            yield _line(_LEFT, y, WIDTH - _RIGHT, y, "#eee")
            yield _text(_LEFT - 8, y + 4, human(10.0**power), "end")
        yield _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 22, "operations per byte", "middle")
        yield _text(_LEFT - 70, _TOP - 14, "operations per second", "start")

    def _ceilings(self) -> Iterator[str]:
        read = self.found.read
        for dtype, rate in self.found.rates.items():
            start, colour = max(rate / read, 10.0**self.left), _COLOURS[dtype]
            yield _line(self.x(start), self.y(rate), WIDTH - _RIGHT, self.y(rate), colour, 2)
            yield _text(WIDTH - _RIGHT, self.y(rate) - 6, rate_text(rate, dtype), "end", colour)
        first = max(10.0**self.left, 10.0**self.low / read)
        last = max(self.found.rates.values()) / read
        yield _line(self.x(first), self.y(first * read), self.x(last), self.y(last * read), "#666", 2)
        middle = math.sqrt(first * last)
        yield _text(self.x(middle) - 8, self.y(middle * read) - 8, f"memory: {human(read, 'B')}/s", "end", "#666")

    def _dot(self, row: KernelRow, number: str) -> Iterator[str]:
        radius = 4 + 26 * math.sqrt(row.total / self.total)
        x, y = self.x(row.flops / max(row.bytes, 1)), self.y(row.flops / row.seconds)
        title = (
            f"{row.kernel}: {row.what}\n"
            f"{row.calls} x {row.seconds * 1e6:.1f} us, {row.total / self.total:.1%} of the run\n"
            f"{row.least / row.seconds:.0%} of the machine's limit\n{row.source}"
        )
        colour = _COLOURS[row.dtype]
        fill = f'fill="{colour}" fill-opacity="0.45" stroke="{colour}"'
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {fill}>'
        yield f"<title>{escape(title)}</title></circle>"
        if number:
            yield _text(x, y + 4, number, "middle", "#222")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    at = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {at} stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}" fill="{colour}">{text}</text>'
