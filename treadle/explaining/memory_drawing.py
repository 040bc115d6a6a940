"""A drawing of a run's arena as SVG: time to the right, bytes upwards, a rectangle for the lifetime of each storage.

    Path("gpt2.svg").write_text(draw_memory(explain_memory("gpt2", backend="tvm")))

Calls are drawn one after the other, each at its offset in the caller's frame. A line shows the bytes alive at each
step, and the step of the peak is marked. Tooltips show names, bytes and the user's lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from treadle.explaining.memory import MemoryReport
from treadle.explaining.memory_timeline import Band, TimelineBox, timeline_of
from treadle.files.shown_names import shown_path
from treadle.files.whole_files import replacing
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
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        reason, hint = error.strerror or str(error), "a file in a folder that exists and is writable"
        raise UsageError(
            "the drawing cannot be written", received=reason, within=shown_path(path), hint=hint
        ) from error


def draw_memory(report: MemoryReport) -> str:
    """Return the drawing as the text of an SVG file. It shows only the arena, without values that share the memory of
    an output.

    Raises UsageError for a backend without an arena.
    """
    if report.placed is None or report.arena is None:
        raise UsageError(
            f"backend {report.backend} allocates arrays by itself, so there is no arena to draw",
            hint=Hint('backend="tvm"', "--backend tvm"),
        )
    line = timeline_of(report)
    return "\n".join(_drawn(report, line.boxes, line.bands, line.live, max(line.steps, 1))) + "\n"


def _drawn(
    report: MemoryReport, boxes: Sequence[TimelineBox], bands: Sequence[Band], live: Sequence[int], end: int
) -> Iterator[str]:
    assert report.arena is not None
    top = max(report.arena, 1)
    across, up = (WIDTH - _LEFT - _RIGHT) / end, (HEIGHT - _TOP - _BOTTOM) / top

    def x(step: float) -> float:
        return round(_LEFT + step * across, 2)

    def y(count: float) -> float:
        return round(HEIGHT - _BOTTOM - count * up, 2)

    totals: dict[str, int] = {}
    for box in boxes:
        totals[box.op] = totals.get(box.op, 0) + box.bytes * (box.end - box.first)
    ops = sorted(totals, key=lambda op: (-totals[op], op))
    colours = {op: _COLOURS[i] if i < _LEGEND else _BESIDE for i, op in enumerate(ops)}
    where = f" at {sizes_text(report.sizes)}" if report.sizes else ""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="system-ui, sans-serif" font-size="12">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    yield f'<text x="{_LEFT}" y="24" font-size="16" font-weight="600">{escape(report.model)}{escape(where)}</text>'
    yield (
        f'<text x="{_LEFT}" y="44" fill="#555555">arena {human(report.arena, "B")}; at most {human(report.peak, "B")}'
        f" live at once, in {escape(report.step)}</text>"
    )
    for part in range(5):
        count = top * part / 4
        yield f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(count)}" y2="{y(count)}" stroke="#e6e6e6"/>'
        yield f'<text x="{_LEFT - 8}" y="{y(count) + 4}" text-anchor="end" fill="#555555">{human(count, "B")}</text>'
    for box in boxes:
        wide, high = round((box.end - box.first) * across, 2), round(box.bytes * up, 2)
        yield (
            f'<rect x="{x(box.first)}" y="{y(box.low + box.bytes)}" width="{wide}" height="{high}"'
            f' fill="{colours[box.op]}" fill-opacity="0.85" stroke="#ffffff" stroke-width="0.5">'
            f"<title>{escape(_described(box))}</title></rect>"
        )
        if wide > 7 * len(box.op) + 8 and high > 15:
            middle = x(box.first) + wide / 2, y(box.low + box.bytes / 2) + 4
            yield (
                f'<text x="{middle[0]:.2f}" y="{middle[1]:.2f}" text-anchor="middle" fill="#ffffff" font-size="11"'
                f' pointer-events="none">{escape(box.op)}</text>'
            )
    points = " ".join(f"{x(i)},{y(count)} {x(i + 1)},{y(count)}" for i, count in enumerate(live[:end]))
    yield f'<polyline points="{points}" fill="none" stroke="#222222" stroke-width="1.2"/>'
    peak = live.index(max(live, default=0)) if live else 0
    yield (
        f'<line x1="{x(peak + 0.5)}" x2="{x(peak + 0.5)}" y1="{_TOP - 8}" y2="{HEIGHT - _BOTTOM}" stroke="#d62728"'
        ' stroke-dasharray="4 3"/>'
    )
    right = peak > end * 0.9
    yield (
        f'<text x="{x(peak + 0.5) + (-5 if right else 5)}" y="{_TOP - 6}" fill="#d62728"'
        f' text-anchor="{"end" if right else "start"}">peak</text>'
    )
    for number, band in enumerate(bands):
        low = HEIGHT - _BOTTOM + 6 + 16 * min(band.depth, 2)
        wide = round((band.end - band.first) * across, 2)
        fill = ("#d9dee6", "#eceff4")[number % 2]
        yield (
            f'<rect x="{x(band.first)}" y="{low}" width="{wide}" height="14" fill="{fill}" stroke="#ffffff">'
            f"<title>{escape(band.name)}</title></rect>"
        )
        if wide > 7 * len(band.name) + 6:
            yield (
                f'<text x="{x(band.first) + wide / 2:.2f}" y="{low + 11}" text-anchor="middle" fill="#333333"'
                f' font-size="11" pointer-events="none">{escape(band.name)}</text>'
            )
    at = float(_LEFT)
    for op in ops[:_LEGEND]:
        yield f'<rect x="{at}" y="{HEIGHT - 30}" width="12" height="12" fill="{colours[op]}"/>'
        yield f'<text x="{at + 17}" y="{HEIGHT - 20}" fill="#333333">{escape(op)}</text>'
        at += 17 + 7.2 * len(op) + 18
    yield "</svg>"


def _described(box: TimelineBox) -> str:
    """Return the tooltip of a lifetime."""
    count = f"{human(box.bytes, 'B')} ({box.bytes:,} bytes)"
    return f"{box.name} of {box.function}: {count}, for {box.op}  {box.line}".rstrip()
