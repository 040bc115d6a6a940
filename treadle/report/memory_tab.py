"""The memory tab: the arena over time, and the formulas from which the page computes other sizes.

A size is sent as a sum of terms [coefficient, atom, ...]. An atom is the name of a symbol, or a quotient {"of": size,
"by": size}, rounded down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.explaining.memory import MemoryReport
from treadle.explaining.memory_timeline import timeline_of
from treadle.ir.graph import Graph, Node
from treadle.ir.sizing.sizes import Quotient, Size
from treadle.passes.memory.frames import peaks_of
from treadle.passes.memory.storage_plan import StoragePlan

MOST_BOXES = 12_000
"""Limit on the lifetimes that are drawn; above it, the tab has only the table."""
LARGEST_AXIS = 8192
"""Upper end of the slider for an axis without a bound."""


def memory_facts(report: MemoryReport, graph: Graph, plan: StoragePlan, numbers: Mapping[Node, int]) -> dict[str, Any]:
    """Return the memory report as data, with the timeline of the arena and the formulas of sizes.

    A storage that is alive at the peak has the number of the op that made it; a kernel's workspace that of its op.
    """
    alive = []
    nodes = {
        (name, place.storage.name): numbers.get(value.node)
        for name, each in plan.functions.items()
        for value, place in reversed(list(each.rows()))
        if place.storage is not None and value.node is not None and place.is_written
    }
    for each in report.alive:
        node, facts = nodes.get((each.function, each.name)), each.as_dict()
        if (each.function, each.name) not in nodes:
            facts["workspace"] = True
            frame = report.frames[each.function]
            life = next((life for life in frame.lives if life.storage.name == each.name), None)
            user = None if life is None or life.first >= len(frame.steps) else frame.steps[life.first]
            node = None if user is None else numbers.get(user)
        alive.append({**facts, "node": node})
    found = {**report.as_dict(), "alive": alive, "unit": report.unit}
    peaks = peaks_of(report.frames, graph.symbols)[report.at[0][0]]
    found["formulas"] = [size_terms(size) for size in peaks]
    found["axes"] = {
        name: {
            "low": bounds.lower,
            "high": bounds.upper if bounds.upper is not None else max(LARGEST_AXIS, report.sizes[name]),
            "bounded": bounds.upper is not None,
        }
        for name, bounds in graph.symbols.items()
    }
    step = report.frames[report.at[-1][0]].steps
    at = report.at[-1][1]
    running = step[at] if at < len(step) else None
    found["step_node"] = None if running is None else numbers.get(running)
    found["timeline"] = _timeline(report, numbers)
    return found


def _timeline(report: MemoryReport, numbers: Mapping[Node, int]) -> dict[str, Any] | None:
    """Return the lifetimes as a table. Equal sizes are stored once, and so are equal producers. None if there are no
    lifetimes, or too many.
    """
    line = timeline_of(report)
    if not line.boxes or len(line.boxes) > MOST_BOXES:
        return None
    sizes: dict[Size, int] = {}
    makers: dict[tuple[Any, ...], int] = {}
    rows: list[int] = []
    for box in line.boxes:
        maker = box.name, box.function, box.op, box.line, None if box.node is None else numbers.get(box.node)
        size = sizes.setdefault(box.storage.nbytes, len(sizes))
        rows += [box.first, box.end, box.low, box.bytes, size, makers.setdefault(maker, len(makers))]
    return {
        "steps": line.steps,
        "arena": report.arena,
        "boxes": rows,
        "sizes": [size_terms(size) for size in sizes],
        "makers": [list(maker) for maker in makers],
        "bands": [[band.first, band.end, band.depth, band.name] for band in line.bands if band.end > band.first],
        "live": list(line.live),
    }


def size_terms(size: Size) -> list[list[Any]]:
    """Return a size as data: a sum of terms."""
    return [[coefficient, *map(_atom, atoms)] for atoms, coefficient in size.terms]


def _atom(atom: str | Quotient) -> Any:
    if isinstance(atom, str):
        return atom
    return {"of": size_terms(atom.numerator), "by": size_terms(atom.denominator)}
