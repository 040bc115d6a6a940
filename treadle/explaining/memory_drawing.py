"""A drawing of a run's arena as SVG: time to the right, bytes upwards, a rectangle for the lifetime of each storage.

    Path("gpt2.svg").write_text(draw_memory(explain_memory("gpt2", backend="tvm")))

Calls are drawn one after the other, each at its offset in the caller's frame. Values that share the memory of an output
are drawn above the arena. A line shows the bytes alive at each step, and the step of the peak is marked. Tooltips show
names, bytes and the user's lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from treadle.explaining.memory import MemoryReport
from treadle.explaining.memory_timeline import Timeline, TimelineBox, timeline_of
from treadle.files.whole_files import replacing, reporting_failed_writes
from treadle.ir.errors import Hint, UsageError
from treadle.reporting.counts import human, sizes_text

WIDTH, HEIGHT = 1200, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 64, 96
_COLOURS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#e15759", "#d37295"),
    *("#a0cbe8", "#ffbe7d"),
)
_BESIDE = "#bab0ac"
_LEGEND = 10  # number of entries; further ops share the last color


def write_drawing(path: Path, text: str) -> None:
    """Write an SVG file atomically. Raises UsageError if that is not possible."""
    hint = "a file in a folder that exists and is writable"
    with reporting_failed_writes("the drawing", path, hint=hint), replacing(path) as file:
        file.write(text.encode())


def draw_memory(report: MemoryReport) -> str:
    """Return the drawing as the text of an SVG file. Above the arena, it shows the values that share the memory of an
    output.

    Raises UsageError for a backend without an arena.
    """
    if report.placed is None or report.arena is None:
        raise UsageError(
            f"backend {report.backend} allocates arrays by itself, so there is no arena to draw",
            hint=Hint('backend="tvm"', "--backend tvm"),
        )
    return "\n".join(_Drawing(report, report.arena, timeline_of(report)).lines()) + "\n"


class _Drawing:
    """The lines of an SVG file. Lengths in it are pixels; `across` and `up` are pixels per step and per byte."""

    def __init__(self, report: MemoryReport, arena: int, line: Timeline) -> None:
        self.report, self.arena, self.line = report, arena, line
        self.end, self.top = max(line.steps, 1), max(arena, line.top, 1)
        self.across, self.up = (WIDTH - _LEFT - _RIGHT) / self.end, (HEIGHT - _TOP - _BOTTOM) / self.top
        totals: dict[str, int] = {}
        for box in line.boxes:
            totals[box.op] = totals.get(box.op, 0) + box.bytes * (box.end - box.first)
        ops = sorted(totals, key=lambda op: (-totals[op], op))
        self.legend = _legend(ops)
        self.colours = dict.fromkeys(ops, _BESIDE) | dict(zip(self.legend, _COLOURS, strict=False))

    def x(self, step: float) -> float:
        return round(_LEFT + step * self.across, 2)

    def y(self, count: float) -> float:
        return round(HEIGHT - _BOTTOM - count * self.up, 2)

    def lines(self) -> Iterator[str]:
        yield from self._head()
        yield from self._scale()
        yield from self._boxes()
        yield from self._live_bytes()
        yield from self._bands()
        yield from self._legend_entries()
        yield "</svg>"

    def _head(self) -> Iterator[str]:
        report = self.report
        title = f"{report.model} at {sizes_text(report.sizes)}" if report.sizes else report.model
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            ' font-family="system-ui, sans-serif" font-size="12">'
        )
        yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
        yield f'<text x="{_LEFT}" y="24" font-size="16" font-weight="600">{escape(title)}</text>'
        yield (
            f'<text x="{_LEFT}" y="44" fill="#555555">arena {human(self.arena, "B")}; at most {human(report.peak, "B")}'
            f" live at once, in {escape(report.step)}</text>"
        )

    def _scale(self) -> Iterator[str]:
        """Draw lines at parts of the height, and at the end of the arena."""
        for part in range(5):
            count = self.top * part / 4
            y = self.y(count)
            yield _level(y, "#e6e6e6")
            yield f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#555555">{human(count, "B")}</text>'
        if self.line.top > self.arena and self.report.host is not None:
            yield _level(self.y(self.arena), "#222222")
            yield (
                f'<text x="{WIDTH - _RIGHT}" y="24" text-anchor="end" fill="#555555">above the line: values in the'
                f" memory of {escape(self.report.host)}, before it is written</text>"
            )

    def _boxes(self) -> Iterator[str]:
        """Draw the lifetime of each storage, with the name of its op if there is room."""
        for box in self.line.boxes:
            wide, high = round((box.end - box.first) * self.across, 2), round(box.bytes * self.up, 2)
            yield (
                f'<rect x="{self.x(box.first)}" y="{self.y(box.low + box.bytes)}" width="{wide}" height="{high}"'
                f' fill="{self.colours[box.op]}" fill-opacity="0.85" stroke="#ffffff" stroke-width="0.5">'
                f"<title>{escape(_described(box))}</title></rect>"
            )
            if wide > 7 * len(box.op) + 8 and high > 15:
                middle = self.x(box.first) + wide / 2, self.y(box.low + box.bytes / 2) + 4
                yield (
                    f'<text x="{middle[0]:.2f}" y="{middle[1]:.2f}" text-anchor="middle" fill="#ffffff" font-size="11"'
                    f' pointer-events="none">{escape(box.op)}</text>'
                )

    def _live_bytes(self) -> Iterator[str]:
        """Draw the bytes alive at each step, and the peak."""
        live = self.line.live
        steps = [(self.x(i), self.x(i + 1), self.y(count)) for i, count in enumerate(live[: self.end])]
        points = " ".join(f"{begin},{y} {end},{y}" for begin, end, y in steps)
        yield f'<polyline points="{points}" fill="none" stroke="#222222" stroke-width="1.2"/>'
        peak = live.index(max(live, default=0)) if live else 0
        at, right = self.x(peak + 0.5), peak > self.end * 0.9
        yield (
            f'<line x1="{at}" x2="{at}" y1="{_TOP - 8}" y2="{HEIGHT - _BOTTOM}" stroke="#d62728"'
            ' stroke-dasharray="4 3"/>'
        )
        yield (
            f'<text x="{at + (-5 if right else 5)}" y="{_TOP - 6}" fill="#d62728"'
            f' text-anchor="{"end" if right else "start"}">peak</text>'
        )

    def _bands(self) -> Iterator[str]:
        """Draw the functions that run, below the arena."""
        for number, band in enumerate(self.line.bands):
            low = HEIGHT - _BOTTOM + 6 + 16 * min(band.depth, 2)
            wide = round((band.end - band.first) * self.across, 2)
            fill = ("#d9dee6", "#eceff4")[number % 2]
            yield (
                f'<rect x="{self.x(band.first)}" y="{low}" width="{wide}" height="14" fill="{fill}" stroke="#ffffff">'
                f"<title>{escape(band.name)}</title></rect>"
            )
            if wide > 7 * len(band.name) + 6:
                yield (
                    f'<text x="{self.x(band.first) + wide / 2:.2f}" y="{low + 11}" text-anchor="middle" fill="#333333"'
                    f' font-size="11" pointer-events="none">{escape(band.name)}</text>'
                )

    def _legend_entries(self) -> Iterator[str]:
        for op, at in self.legend.items():
            yield f'<rect x="{at}" y="{HEIGHT - 30}" width="12" height="12" fill="{self.colours[op]}"/>'
            yield f'<text x="{at + 17}" y="{HEIGHT - 20}" fill="#333333">{escape(op)}</text>'


def _level(y: float, colour: str) -> str:
    """Return a line over the whole width."""
    return f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="{colour}"/>'


def _legend(ops: Sequence[str]) -> dict[str, float]:
    """Return the positions of the legend's entries: the first ops, as many as fit in one row."""
    found, at = {}, float(_LEFT)
    for op in ops[:_LEGEND]:
        wide = 17 + 7.2 * len(op)
        if at + wide > WIDTH - _RIGHT:
            break
        found[op], at = at, at + wide + 18
    return found


def _described(box: TimelineBox) -> str:
    """Return the tooltip of a lifetime."""
    count = f"{human(box.bytes, 'B')} ({box.bytes:,} bytes)"
    return f"{box.name} of {box.function}: {count}, for {box.op}  {box.line}".rstrip()
