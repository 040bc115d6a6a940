"""The nested boxes of a program: functions, scopes and ops, with edges and positions, for every stage.

    boxes = boxes_of(stages, records)

`box_scopes` decides which scopes are boxes, `box_contents` collects the items and edges of a box, and `box_positions`
places them. Stages with equal content of a box share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.report.box_contents import BoxContent, FunctionBoxes
from treadle.report.box_positions import drawn_content, held_positions
from treadle.report.box_scopes import BoxScopes, Key, path_text
from treadle.report.layout import METRICS
from treadle.report.stages import ProgramStage


def boxes_of(stages: Sequence[ProgramStage], records: Sequence[Mapping[int, int]]) -> dict[str, Any]:
    """Return the boxes of every stage as data for the page.

    records   for each stage, the index of each node's facts, by the node's number

    bodies    the distinct contents of boxes:
        items   ["op", number, record], ["box", path], ["call", number, record, function, numbers of all calls],
                ["in", value, name, type] or ["out", value, name, type]; a port that stands for several has a list of
                [value, name, type]
        edges   [from, to, value, ...] by position in `items`
        at      [row, center, ...] of each item;  held   the same, in the positions for all stages
        bends   [edge, [x, ...], ...] for an edge that crosses rows;  held_bends  the same, for all stages
        bundles [edge, [value, ...], ...] for an edge that stands for several
    slots     for each box, [kind, row, center, ...] of the held items and bends of all stages
    stages    for each stage, the boxes whose bodies changed: {path: index of a body, or null}
    """
    scopes = BoxScopes(stages)
    functions: dict[int, dict[Key, BoxContent]] = {}
    index: dict[tuple[Key, tuple[Any, ...]], int] = {}
    bodies: list[tuple[Key, BoxContent]] = []
    changes: list[dict[str, int | None]] = []
    before: dict[Key, int] = {}
    for stage, indices in zip(stages, records, strict=True):
        contents: dict[Key, BoxContent] = {}
        for name, function in stage.graph.functions.items():
            if id(function) not in functions:
                functions[id(function)] = FunctionBoxes(scopes, stage, name, function, indices).bodies
            contents |= functions[id(function)]
        contents[()] = _root(stage)
        now: dict[Key, int] = {}
        for key, body in contents.items():
            content = key, body.frozen()
            if content not in index:
                index[content] = len(bodies)
                bodies.append((key, body))
            now[key] = index[content]
        delta: dict[str, int | None] = {path_text(key): at for key, at in now.items() if before.get(key) != at}
        delta |= {path_text(key): None for key in before if key not in now}
        changes.append(delta)
        before = now
    held = held_positions(bodies)
    return {
        "metrics": METRICS,
        "bodies": [drawn_content(body, held[key]) for key, body in bodies],
        "slots": {path_text(key): each.slots() for key, each in held.items()},
        "stages": changes,
    }


def _root(stage: ProgramStage) -> BoxContent:
    """Return the outermost box, which contains the entries. If there is only one entry, the page opens it in
    place.
    """
    body = BoxContent()
    for name in stage.graph.entry_names:
        body.items[f"b:{name}"] = ["box", name]
    return body
