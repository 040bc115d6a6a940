"""The positions of the items of a box, at one stage and held at all stages.

Each item has two positions: one for the content at one stage alone, and a held one. The held position is the same at
all stages: it follows from the items and edges of all stages together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from treadle.report.box_contents import BoxContent, item_rank
from treadle.report.box_scopes import Key
from treadle.report.layout import place


@dataclass(frozen=True)
class HeldPositions:
    """The row and the center of each item of a box, and the bends of edges between the items, for all stages."""

    at: Mapping[str, tuple[int, float]]
    bends: Mapping[tuple[str, str], tuple[float, ...]]

    def slots(self) -> list[float]:
        """Return [kind, row, center, ...] of every item and bend. A stage that lacks an item leaves its slot empty.

        Kinds are 0 for an item, 1 for a port and 2 for a bend.
        """
        found: list[float] = []
        for item, (row, center) in self.at.items():
            found += [int(item_rank(item) != 1), row, center]
        for (a, _), xs in self.bends.items():
            for step, x in enumerate(xs, 1):
                found += [2, self.at[a][0] + step, x]
        return found


def held_positions(bodies: Sequence[tuple[Key, BoxContent]]) -> dict[Key, HeldPositions]:
    """Return positions for all stages: a box is laid out once, with the items and edges of all its bodies."""
    items: dict[Key, list[str]] = {}
    edges: dict[Key, dict[tuple[str, str], None]] = {}
    for key, body in bodies:
        order = items.setdefault(key, [])
        known, after = set(order), -1
        for item in body.items:
            if item in known:
                after = order.index(item)
            else:
                after += 1
                order.insert(after, item)
        edges.setdefault(key, {}).update(dict.fromkeys((a, b) for a, b, _ in body.edges))
    found = {}
    for key, order in items.items():
        order = sorted(_downwards(order, edges[key]), key=item_rank)
        number = {item: at for at, item in enumerate(order)}
        placed = place(len(order), [(number[a], number[b]) for a, b in edges[key]])
        found[key] = HeldPositions(
            {item: (placed.rows[at], placed.centers[at]) for item, at in number.items()},
            {(order[a], order[b]): xs for (a, b), xs in placed.bends.items()},
        )
    return found


def _downwards(items: Sequence[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Return items in an order in which edges lead to later items; otherwise their order stays.

    The program's order is not enough: a box stands at its first op, which may be an early decoding of a weight. Edges
    of different stages, and edges of boxes, may form a cycle. Its first item then comes first.
    """
    place = {item: at for at, item in enumerate(items)}
    below: dict[str, list[str]] = {item: [] for item in items}
    above = dict.fromkeys(items, 0)
    for a, b in edges:
        below[a].append(b)
        above[b] += 1
    ready = [place[item] for item in items if not above[item]]
    rest = iter(items)
    found: dict[str, None] = {}
    while len(found) < len(items):
        item = items[heappop(ready)] if ready else next(each for each in rest if each not in found)
        if item in found:
            continue
        found[item] = None
        for each in below[item]:
            above[each] -= 1
            if not above[each] and each not in found:
                heappush(ready, place[each])
    return list(found)


def drawn_content(body: BoxContent, positions: HeldPositions) -> dict[str, Any]:
    """Return the items and edges of a box with their positions, as data for the page: see `boxes_of`."""
    order = sorted(_downwards(list(body.items), [(a, b) for a, b, _ in body.edges]), key=item_rank)
    number = {item: at for at, item in enumerate(order)}
    edges = [(number[a], number[b], value) for a, b, value in body.edges]
    placed = place(len(order), [(a, b) for a, b, _ in edges])
    found = {
        "items": [body.items[item] for item in order],
        "edges": [each for edge in edges for each in edge],
        "at": [each for pair in zip(placed.rows, placed.centers, strict=True) for each in pair],
        "held": [each for item in order for each in positions.at[item]],
        "bends": _flat(placed.bends.get((a, b)) for a, b, _ in edges),
        "held_bends": _flat(positions.bends.get((order[a], order[b])) for a, b, _ in edges),
        "bundles": _flat(body.bundles.get((order[a], order[b])) for a, b, _ in edges),
    }
    return {name: value for name, value in found.items() if value}


def _flat(facts: Iterable[tuple[Any, ...] | None]) -> list[Any]:
    """Return [number of the edge, list, ...] for all edges that have facts."""
    return [part for at, held in enumerate(facts) if held for part in (at, list(held))]
