"""The paths of boxes: the scopes of a program that are boxes, and the box that contains each node.

A function is a box. Inside, a scope with two ops or more is a box. If a box would have more than 400 ops or boxes,
these are put into inner boxes of 250.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from treadle.ir.graph import Function, Node
from treadle.report.stages import ProgramStage

MOST_ITEMS, CHUNK = 400, 250
"""A box with more than MOST_ITEMS items is divided into boxes of CHUNK consecutive ops."""

Key = tuple[str, ...]
"""The path of a box: the function's name, then scopes."""

_NUMBERED = re.compile(r"\d+")


class BoxScopes:
    """The boxes of all stages of a program, by the scopes of their nodes."""

    def __init__(self, stages: Sequence[ProgramStage]) -> None:
        self._stages = stages
        self._boxed = self._boxed_scopes()
        self._groups = self._grouped()
        self._chunks: dict[tuple[Key, int], int] = {}
        self._chunked = self._chunked_boxes()

    def _distinct(self) -> Iterator[tuple[ProgramStage, str, Function]]:
        """Yield each distinct function of all stages once."""
        seen: set[int] = set()
        for stage in self._stages:
            for name, function in stage.graph.functions.items():
                if id(function) not in seen:
                    seen.add(id(function))
                    yield stage, name, function

    def _boxed_scopes(self) -> set[Key]:
        boxed: set[Key] = set()
        for _, name, function in self._distinct():
            counts: dict[Key, int] = {}
            for node in function.nodes:
                path = _path(name, node)
                for depth in range(2, len(path) + 1):
                    counts[path[:depth]] = counts.get(path[:depth], 0) + 1
            boxed |= {key for key, count in counts.items() if count > 1}
        return boxed

    def box_of(self, name: str, node: Node) -> Key:
        """Return the path of the innermost box that contains a node. Scopes that are not boxes are left out."""
        path = _path(name, node)
        while len(path) > 1 and path not in self._boxed:
            path = path[:-1]
        return path

    def _grouped(self) -> dict[Key, str]:
        """Name groups of boxes in a box that would have too many: `layer.0 to layer.249`. Return the group of each of
        them.
        """
        inside: dict[Key, dict[Key, None]] = {}
        for _, name, function in self._distinct():
            for node in function.nodes:
                key = self.box_of(name, node)
                for depth in range(2, len(key) + 1):
                    inside.setdefault(key[: depth - 1], {})[key[:depth]] = None
        names: dict[Key, str] = {}
        for boxes in inside.values():
            order = list(boxes)
            for first in range(0, len(order) if len(order) > MOST_ITEMS else 0, CHUNK):
                part = order[first : first + CHUNK]
                names |= dict.fromkeys(part, f"{part[0][-1]} to {part[-1][-1]}")
        return names

    def _chunked_boxes(self) -> set[Key]:
        """Return the boxes with too many ops. Assign each of their ops to a part, in `self._chunks`."""
        large: set[Key] = set()
        for _, name, function in self._distinct():
            counts: dict[Key, int] = {}
            for node in function.nodes:
                key = self.box_of(name, node)
                counts[key] = counts.get(key, 0) + 1
            large |= {key for key, count in counts.items() if count > MOST_ITEMS}
        last: dict[Key, int] = {}
        for stage, name, function in self._distinct() if large else ():
            at: dict[Key, int] = {}
            part: dict[Key, int] = {}
            for node, number in zip(function.nodes, stage.numbers[name], strict=True):
                key = self.box_of(name, node)
                if key not in large:
                    continue
                at[key] = at.get(key, 0) + 1
                known = self._chunks.get((key, number))
                if known is None:
                    known = part.get(key, 0) if key in last else (at[key] - 1) // CHUNK
                    self._chunks[key, number] = known
                part[key] = known
            last |= part
        return large

    def part_of(self, name: str, node: Node, number: int) -> Key:
        """Return the path of the box that contains a node, with the group and the part of the box."""
        key = self.box_of(name, node)
        path = key
        if self._groups:
            path = key[:1]
            for depth in range(2, len(key) + 1):
                group = self._groups.get(key[:depth])
                path = (*path, key[depth - 1]) if group is None else (*path, group, key[depth - 1])
        if key in self._chunked:
            first = self._chunks[key, number] * CHUNK
            return (*path, f"ops {first + 1} to {first + CHUNK}")
        return path


def path_text(key: Key) -> str:
    """Return the path of a box as a string that is unique among all boxes of a program."""
    return "\x1f".join(key)


def _path(name: str, node: Node) -> Key:
    """Return the function and the scopes of a node. A name and its number are one scope: `layer.0`. The last scope of a
    call is left out.
    """
    found = [name]
    for part in node.scope.split("."):
        if part and _NUMBERED.fullmatch(part) and len(found) > 1:
            found[-1] += f".{part}"
        elif part:
            found.append(part)
    if node.op.callee is not None and len(found) > 1:
        found.pop()
    return tuple(found)
