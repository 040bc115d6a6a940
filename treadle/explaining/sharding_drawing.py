"""A drawing of a sharded run as SVG: the mesh, the memory of a device, and a timetable of work and collectives.

    Path("gpt2.svg").write_text(draw_sharding(explain_sharding("gpt2", mesh="tp=2,dp=2", recipe="megatron")))

The timetable has a lane for work and a lane for each kind of link. Below the whole step, the block that takes the
longest is drawn enlarged. For a pipeline, lanes above these show the micro-batches in each stage. Tooltips show ops,
reasons, times and the user's lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice, product
from math import prod

from treadle.explaining.sharding import ShardingReport
from treadle.ir.ops.collectives import PassOn
from treadle.passes.sharding.conversions import COLLECTIVES
from treadle.passes.sharding.timetable import LIMITS, Busy, PipelineTimes
from treadle.reporting.counts import human
from treadle.sharding.needs import milliseconds

WIDTH = 1200
_LEFT, _RIGHT = 96, 24
_WORK = {LIMITS[0]: "#2f5d8c", LIMITS[1]: "#7fa8d1"}
_OPS = (*[op.name for op in COLLECTIVES.values()], PassOn.name)
_MEETING = dict(zip(_OPS, ("#e07b39", "#59a14f", "#b07aa1", "#c94f5d", "#76b7b2"), strict=False))
_OTHER = "#8a7f72"
_LIMIT_COLOURS = (*_WORK.values(), "#e07b39", "#edc948")
_HELD = ("#2f5d8c", "#4e79a7", "#7fa8d1", "#a9c4de", "#59a14f", "#edc948")
_NODES = ("#dbe6f1", "#fbe8d6", "#e2efdd", "#efe3ee")
_GREY, _DARK, _RED = "#555555", "#222222", "#c0392b"
_LANE, _GAP = 30, 8
_COLUMNS, _ROWS = 40, 16
"""Maximum number of ranks of the mesh that are drawn, along each side."""


def draw_sharding(report: ShardingReport) -> str:
    """Return the drawing as the text of an SVG file."""
    lanes = ["", *dict.fromkeys(each.over for each in report.needs.times.busy if each.over)]
    top = 326
    staged = list(_stages(report.needs.stages, top)) if report.needs.stages is not None else []
    if report.needs.stages is not None:
        top += 52 + len(report.needs.stages.stages) * (_LANE + _GAP)
    whole = list(_whole(report, lanes, top))
    at = top + 52 + len(lanes) * (_LANE + _GAP)
    zoomed = list(_block(report, lanes, at))
    at += 52 + len(lanes) * (_LANE + _GAP) if zoomed else 0
    height = at + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        _rect(0, 0, WIDTH, height, "#ffffff"),
        _text(24, 28, report.title, size=17, weight=600),
        _text(24, 48, " ".join(report.needs.run_line().split()) + "; " + report.needs.limit_line(), fill=_GREY),
        *_mesh(report, 24, 74),
        *_sides(report, 516, 74),
        *staged,
        *whole,
        *zoomed,
        *_legend(report, height - 22),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


# -- pieces ----------------------------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, *, fill: str = _DARK, size: int = 12, weight: int = 400, at: str = "") -> str:
    anchor = f' text-anchor="{at}"' if at else ""
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    sized = f' font-size="{size}"' if size != 12 else ""
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" fill="{fill}"{sized}{bold}{anchor} pointer-events="none">{escape(text)}</text>'
    )


def _rect(x: float, y: float, wide: float, high: float, fill: str, title: str = "", more: str = "") -> str:
    head = f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" fill="{fill}"{more}'
    return f"{head}><title>{escape(title)}</title></rect>" if title else f"{head}/>"


def _upright(x: float, top: float, bottom: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{top:.2f}" y2="{bottom:.2f}" stroke="{colour}"{more}/>'


def _fits(text: str, wide: float) -> bool:
    return wide > 6.4 * len(text) + 8


def _stack(x: float, y: float, wide: float, total: float, parts: Iterable[tuple[str, float, str]]) -> Iterator[str]:
    """Yield a stacked bar for parts: names, amounts, colors."""
    for name, amount, colour in parts:
        part = wide * amount / max(total, 1e-30)
        if part <= 0:
            continue
        yield _rect(x, y, part, 24, colour, name, ' stroke="#ffffff" stroke-width="0.5"')
        if _fits(name, part):
            yield _text(x + part / 2, y + 16, name, fill="#ffffff", size=11, at="middle")
        x += part


# -- the mesh, and a device's memory ---------------------------------------------------------------------------------


def _mesh(report: ShardingReport, left: float, top: float) -> Iterator[str]:
    """Draw ranks in a grid: the first mesh axis along one side, all others along the other. Ranks of a node share a
    color.
    """
    mesh, machine = report.plan.devices, report.plan.machine
    first, *others = mesh.axes
    rest = prod(size for _, size in others)
    flat = first[1] >= rest  # the longer side is horizontal
    columns, rows = (first[1], rest) if flat else (rest, first[1])
    shown = min(columns, _COLUMNS), min(rows, _ROWS)
    cell = min(36.0, 440 / shown[0], 152 / shown[1])
    sides = [", ".join(f"{name}={size}" for name, size in side) for side in ([first], others[::-1])]
    right, down = sides if flat else sides[::-1]
    yield _text(left, top + 4, f"the mesh: {right} to the right" + (f", {down} downwards" if down else ""))
    y = top + 14
    for row, column in product(range(shown[1]), range(shown[0])):
        rank = row * columns + column if flat else column * rows + row
        node = rank // machine.node
        x, at = left + column * cell, y + row * cell
        fill = _NODES[node % len(_NODES)]
        edge = ' stroke="#9aa5b1" stroke-width="0.6"'
        yield _rect(x, at, cell - 2, cell - 2, fill, f"rank {rank}, node {node}", edge)
        if cell >= 6 * len(str(rank)) + 4:
            yield _text(x + cell / 2 - 1, at + cell / 2 + 3, str(rank), size=9, fill=_GREY, at="middle")
    y += shown[1] * cell + 14
    if shown != (columns, rows):
        yield _text(left, y, f"{shown[0]} x {shown[1]} of {mesh.ranks} ranks are drawn", fill=_GREY, size=11)
        y += 16
    for over, causes in _by_lane(report).items():
        link = machine.link(mesh.reach(mesh.parts_of(over)))
        kind = "within a node" if link == machine.fast and machine.node > 1 else "between nodes"
        sent, took = sum(c.sent for c in causes), sum(c.seconds for c in causes)
        words = f"over {over}: {human(sent, 'B')} sent in {milliseconds(took)}, {human(link, 'B/s')} {kind}"
        yield _text(left, y, words, size=11)
        y += 16


def _by_lane(report: ShardingReport) -> dict[str, list[Busy]]:
    found: dict[str, list[Busy]] = {}
    for each in report.needs.times.busy:
        if each.over:
            found.setdefault(each.over, []).append(each)
    return found


def _sides(report: ShardingReport, left: float, top: float) -> Iterator[str]:
    """Draw the times by limit, the contents of the memory, and the savings of single changes."""
    needs, wide = report.needs, WIDTH - _RIGHT - left
    limits = needs.times.by_limit()
    yield _text(left, top + 4, "times by limit")
    named = [
        (f"{name} {milliseconds(took)}", took, c)
        for (name, took), c in zip(limits.items(), _LIMIT_COLOURS, strict=True)
    ]
    yield from _stack(left, top + 14, wide, sum(limits.values()), named)
    room = needs.memory
    words = f"a device holds {human(needs.held, 'B')} of {human(room, 'B')}"
    yield _text(left, top + 62, words + ("" if needs.fits else ": it does NOT fit"), fill=_DARK if needs.fits else _RED)
    held: list[tuple[str, float]] = [
        (f"{human(count, 'B')} weights over {over}" if over else f"{human(count, 'B')} whole weights", count)
        for over, count in sorted(report.weights.items(), key=lambda each: -each[1])
    ]
    held += [(f"{human(needs.values, 'B')} values", needs.values), (f"{human(needs.ports, 'B')} in, out", needs.ports)]
    most = max(room, needs.held)
    yield _rect(left, top + 72, wide * room / most, 24, "#f4f4f4", "free", ' stroke="#cccccc"')
    yield from _stack(
        left,
        top + 72,
        wide * needs.held / most,
        needs.held,
        [(n, c, _HELD[i % len(_HELD)]) for i, (n, c) in enumerate(held)],
    )
    if not needs.fits:
        x = left + wide * room / most
        yield _upright(x, top + 66, top + 102, _RED, ' stroke-width="2"')
    y = top + 120
    best = report.best
    yield _text(left, y, "one change" + ("" if best is None else f"; the best: {best.description}"))
    for change in report.changes[:4]:
        y += 17
        fits = "" if change.fits else ", does not fit"
        part = wide * 0.45 * min(change.seconds / max(needs.times.seconds, 1e-30), 2) / 2
        yield _text(left, y, change.description, size=11)
        yield _rect(left + 150, y - 9, part, 10, "#59a14f" if change is best else "#c9ced6")
        words = f"{milliseconds(change.seconds)}, {human(change.held, 'B')}{fits}"
        yield _text(left + 160 + wide * 0.45, y, words, size=11, fill=_GREY)
    mark = left + 150 + wide * 0.45 / 2
    if report.changes:
        yield _upright(mark, top + 126, y + 4, _DARK, ' stroke-dasharray="3 3"')
        yield _text(mark, y + 16, f"now {milliseconds(needs.times.seconds)}", size=10, fill=_GREY, at="middle")


# -- the timetable ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """A section of the drawing for a part of the step, from y coordinate `top` on. It maps times to x coordinates."""

    begin: float
    end: float
    top: float

    def x(self, time: float) -> float:
        across = (WIDTH - _LEFT - _RIGHT) / max(self.end - self.begin, 1e-30)
        return _LEFT + (min(max(time, self.begin), self.end) - self.begin) * across

    def y(self, lane: int) -> float:
        return self.top + 32 + lane * (_LANE + _GAP)

    def frame(self, title: str, lanes: Sequence[str]) -> Iterator[str]:
        """Draw the section's title, its lanes with their labels, and ticks of time."""
        yield _text(24, self.top + 8, title, weight=600)
        bottom = self.y(len(lanes)) - _GAP
        for part in range(9):
            time = self.begin + (self.end - self.begin) * part / 8
            x = self.x(time)
            yield _upright(x, self.top + 26, bottom, "#e6e6e6")
            at = "end" if part == 8 else "middle" if part else ""
            yield _text(x, self.top + 22, milliseconds(time), size=10, fill=_GREY, at=at)
        for i, lane in enumerate(lanes):
            yield _rect(_LEFT, self.y(i), WIDTH - _LEFT - _RIGHT, _LANE, "#f7f7f8")
            yield _text(_LEFT - 8, self.y(i) + 19, lane, at="end")


def _lane_names(lanes: Sequence[str]) -> list[str]:
    return [f"over {lane}" if lane else "work" for lane in lanes]


def _stages(times: PipelineTimes, top: float) -> Iterator[str]:
    """Draw the time of each micro-batch in each stage. Neighbors differ in shade."""
    window = _Window(0.0, times.seconds, top)
    names = [f"stage {number}" for number in range(len(times.stages))]
    yield from window.frame(str(times), names)
    for each in times.turns:
        left, right = window.x(each.start), window.x(each.end)
        title = f"micro-batch {each.turn} in stage {each.stage}, {milliseconds(each.end - each.start)}"
        yield _rect(left, window.y(each.stage), max(right - left, 0.3), _LANE, _HELD[each.turn % 3], title)
        if _fits(str(each.turn), right - left):
            middle = (left + right) / 2
            yield _text(middle, window.y(each.stage) + 19, str(each.turn), fill="#ffffff", size=11, at="middle")


def _colour(each: Busy) -> str:
    return _MEETING.get(each.op, _OTHER) if each.over else _WORK.get(each.limit, _OTHER)


def _words(each: Busy) -> str:
    place = ", ".join(part for part in (each.line, each.scope) if part)
    why = f": {each.because}" if each.because else ""
    sent = f", {human(each.sent, 'B')} sent" if each.over else ""
    return f"{each.op}{why}, {milliseconds(each.seconds)}{sent}, limited by {each.limit}  {place}".rstrip()


def _whole(report: ShardingReport, lanes: Sequence[str], top: float) -> Iterator[str]:
    """Draw the whole step. Neighboring ops that are too narrow to be seen are joined in one bar, with the color of
    most of it.
    """
    times = report.needs.times
    window = _Window(0.0, times.seconds, top)
    yield from window.frame(f"the step of the last rank, {milliseconds(times.seconds)}", _lane_names(lanes))
    for lane, over in enumerate(lanes):
        gathered: list[Busy] = []
        for each in times.busy:
            if each.over != over:
                continue
            if gathered and window.x(each.start) - window.x(gathered[-1].end) > 0.5:
                yield _bar(window, lane, gathered)
                gathered = []
            gathered.append(each)
            if window.x(each.end) - window.x(gathered[0].start) > 1.2:
                yield _bar(window, lane, gathered)
                gathered = []
        if gathered:
            yield _bar(window, lane, gathered)


def _bar(window: _Window, lane: int, gathered: Sequence[Busy], more: str = "") -> str:
    amounts: dict[str, float] = {}
    for each in gathered:
        amounts[_colour(each)] = amounts.get(_colour(each), 0.0) + each.seconds
    begin, end = window.x(gathered[0].start), window.x(gathered[-1].end)
    title = _words(gathered[0]) if len(gathered) == 1 else f"{len(gathered)} ops, the first: {_words(gathered[0])}"
    colour = max(amounts, key=lambda c: amounts[c])
    return _rect(begin, window.y(lane), max(end - begin, 0.3), _LANE, colour, title, more)


def _block(report: ShardingReport, lanes: Sequence[str], top: float) -> Iterator[str]:
    """Draw one block enlarged: the middle call of the function whose calls take the longest together. Ops of other
    calls that overlap with it are drawn paler.
    """
    times = report.needs.times
    if not times.calls:
        return
    names = [scope.rpartition(".")[0] or scope for scope in times.calls]
    totals: dict[str, float] = {}
    for each in times.busy:
        if each.call >= 0:
            totals[names[each.call]] = totals.get(names[each.call], 0.0) + each.seconds
    longest = max(totals, key=lambda name: totals[name])
    calls = [i for i, name in enumerate(names) if name == longest]
    call = calls[len(calls) // 2]
    work = [each for each in times.busy if each.call == call and not each.over] or [
        each for each in times.busy if each.call == call
    ]
    ends = [each.end for each in times.busy if each.call == call]
    window = _Window(work[0].start, max(ends), top)
    head = f"{times.calls[call]}, {milliseconds(window.end - window.begin)}, one of {len(calls)} calls of its kind"
    yield from window.frame(head, _lane_names(lanes))
    for each in times.busy:
        if each.end <= window.begin or each.start >= window.end:
            continue
        lane, own = lanes.index(each.over), each.call == call
        edge = ' stroke="#ffffff" stroke-width="0.6"'
        yield _bar(window, lane, [each], edge if own else ' fill-opacity="0.35"' + edge)
        wide = window.x(each.end) - window.x(each.start)
        label = next((t for t in (f"{each.op}: {each.because}", each.op) if _fits(t, wide)), "") if own else ""
        if label:
            middle = (window.x(each.start) + window.x(each.end)) / 2
            yield _text(middle, window.y(lane) + 19, label.removesuffix(": "), fill="#ffffff", size=11, at="middle")


def _legend(report: ShardingReport, y: float) -> Iterator[str]:
    met = {each.op for each in report.needs.times.busy if each.over}
    named = [(f"work limited by {limit}", colour) for limit, colour in _WORK.items()]
    named += [(op, colour) for op, colour in _MEETING.items() if op in met]
    if met - _MEETING.keys():
        named.append((", ".join(sorted(met - _MEETING.keys())), _OTHER))
    at = float(_LEFT)
    for name, colour in islice(named, 8):
        yield _rect(at, y - 10, 12, 12, colour)
        yield _text(at + 17, y, name, fill="#333333")
        at += 17 + 7.0 * len(name) + 18
