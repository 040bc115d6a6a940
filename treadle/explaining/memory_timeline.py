"""The arena of a run over time: the lifetime of each storage, with calls one after the other.

    line = timeline_of(explain_memory("gpt2", backend="tvm"))
    line.boxes, line.live

Steps are numbered over the whole run: a call takes as many steps as the function that it calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from treadle.explaining.memory import MemoryReport
from treadle.ir.builder import describe_source
from treadle.ir.graph import Node
from treadle.ir.storage.views import Storage
from treadle.passes.memory.frames import Frame, live_at, parts_of


@dataclass(frozen=True)
class TimelineBox:
    """The lifetime of a storage, from step `first` until before step `end`, at offset `low` of the arena.

    function  the function that it belongs to
    node      the node at the storage's first step; None for the copy of an output
    """

    first: int
    end: int
    low: int
    bytes: int
    storage: Storage
    function: str
    node: Node | None

    @property
    def name(self) -> str:
        """The name of the storage."""
        return self.storage.name

    @property
    def op(self) -> str:
        """The op at the storage's first step."""
        if self.node is None:
            return "workspace"
        return "a call" if self.node.op.callee is not None else self.node.op.name

    @property
    def line(self) -> str:
        """The user's line and the scope of `op`."""
        return "" if self.node is None else describe_source(self.node.source, self.node.scope) or ""


@dataclass(frozen=True)
class Band:
    """The steps during which a function runs, and `depth`, the number of calls that lead to it."""

    first: int
    end: int
    depth: int
    name: str


@dataclass(frozen=True)
class Timeline:
    """The lifetimes of all storages of the arena, the functions that run, and the bytes alive at each step."""

    boxes: tuple[TimelineBox, ...]
    bands: tuple[Band, ...]
    live: tuple[int, ...]

    @property
    def steps(self) -> int:
        """The number of steps of the run."""
        return self.bands[0].end


def timeline_of(report: MemoryReport) -> Timeline:
    """Return the timeline of a run's arena, without values that share the memory of an output."""
    report, entry = replace(report, frames=parts_of(report.frames)[0]), report.at[0][0]
    live = live_at(report.frames, entry, report.sizes, report.unit)
    boxes = () if report.placed is None else tuple(_boxes(report, entry, 0, 0))
    return Timeline(boxes, tuple(_bands(report, entry, 0, 0)), tuple([count for _, count in live]))


def _lengths(report: MemoryReport, name: str) -> list[int]:
    """Return for each step of a function the number of steps of the whole run that it takes."""
    frame = report.frames[name]
    return [sum(_lengths(report, frame.calls[at].callee)) if at in frame.calls else 1 for at in range(len(frame.steps))]


def _starts(report: MemoryReport, name: str, begin: int) -> list[int]:
    """Return the first step in the whole run of each step of a function that begins at `begin`, and the end of the last
    one.
    """
    starts = [begin]
    for length in _lengths(report, name):
        starts.append(starts[-1] + length)
    return starts


def _boxes(report: MemoryReport, name: str, begin: int, base: int) -> Iterator[TimelineBox]:
    assert report.placed is not None
    frame, placed, starts = report.frames[name], report.placed[name], _starts(report, name, begin)
    for life in frame.lives:
        count = life.storage.nbytes.evaluate(report.sizes)
        if count and life.storage not in placed.hosted:
            end = starts[min(life.last + 1, len(frame.steps))]
            low = base + placed.offsets[life.storage]
            yield TimelineBox(starts[life.first], end, low, count, life.storage, name, _maker(frame, life.first))
    for at, call in frame.calls.items():
        if at not in placed.hosted:
            yield from _boxes(report, call.callee, starts[at], base + placed.callees[at])


def _maker(frame: Frame, at: int) -> Node | None:
    return frame.steps[at] if at < len(frame.steps) else None


def _bands(report: MemoryReport, name: str, begin: int, depth: int) -> Iterator[Band]:
    starts = _starts(report, name, begin)
    yield Band(begin, starts[-1], depth, name)
    for at, call in report.frames[name].calls.items():
        yield from _bands(report, call.callee, starts[at], depth + 1)
