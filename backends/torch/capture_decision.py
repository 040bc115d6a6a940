"""The decision which entries of a program for a GPU are captured as CUDA graphs, and the reasons if not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from treadle.files.shown_names import on_one_line
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph
from treadle.passes.memory.storage_plan import StoragePlan


class Obstacle(NamedTuple):
    """The reason why an entry cannot be captured.

    what   the reason, as text
    place  the user's line and the scope of the node; empty if it concerns no node
    """

    what: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.what}    ({self.place})" if self.place else self.what


def capture_obstacles(graph: Graph, entry: Function, plan: StoragePlan | None) -> tuple[Obstacle, ...]:
    """Return everything that prevents the capture of an entry of a program for a device; nothing if it can be captured.

    No code of the torch backend reads a value back from the device, which a test on the stand-in device checks for all
    ops. So the host takes part in a program only in collectives.
    """
    found: list[Obstacle] = []
    for function in graph.needed_by(entry):
        for node in function.nodes:
            if node.op.meets_ranks:
                place = describe_source(node.source, node.scope) or ""
                found.append(Obstacle(f"{node.op.name} communicates with other ranks through the host", place))
    planned = None if plan is None else plan.functions.get(entry.name)
    for value in planned.donated if planned is not None else ():
        found.append(Obstacle(f"input {value.name} is donated, and has another address in each call"))
    return tuple(dict.fromkeys(found))


def notes_on_capture(graph: Graph, plan: StoragePlan | None) -> Iterator[str]:
    """Yield a line for each entry: it can be captured, or the reasons why not."""
    for entry in graph.later_entries:
        obstacles = capture_obstacles(graph, entry, plan)
        if not obstacles:
            yield f"{entry.name}: captured as a CUDA graph at the second call with the same sizes"
        for each in obstacles:
            yield on_one_line(f"{entry.name}: not captured as a CUDA graph: {each}")
