"""Positions of the items of one box, in rows from top to bottom. Edges lead downwards, and no two items overlap.

    placed = place(5, [(0, 1), (1, 2), (0, 2), (3, 4)])
    placed.rows[2], placed.centers[2]        # the row of item 2, and its center in pixels
    placed.bends[(0, 2)]                     # where the edge crosses the rows between its ends

Items are numbered in program order. An edge that leads to an earlier item is ignored. Rows, orders and centers come
from fast-sugiyama (the extra `report`). Without it, rows are the topological generations of networkx, and items are
ordered by the mean position of their neighbors. Both are deterministic. The page stacks the rows itself, since an
opened box makes its row higher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType

WIDTH, HEIGHT = 172, 44
"""Size in pixels of an item: an op or a folded box."""
GAP_ACROSS, GAP_DOWN = 24, 30
"""Pixels between neighbors in a row, and between rows."""
SPACING = WIDTH + GAP_ACROSS
METRICS = {"width": WIDTH, "height": HEIGHT, "across": GAP_ACROSS, "down": GAP_DOWN}
"""The numbers that the page needs to stack rows."""

_SHELF = 6 * SPACING
"""Width in pixels up to which unconnected parts of a box are placed side by side."""
_SWEEPS = 8

Edge = tuple[int, int]


@dataclass(frozen=True)
class BoxPositions:
    """The positions of the items of one box.

    rows     the row of each item, from 0
    centers  the center of each item in pixels; the leftmost item starts at 0
    bends    for an edge over more than one row, the pixels at which it crosses each row between its ends
    """

    rows: tuple[int, ...]
    centers: tuple[float, ...]
    bends: Mapping[Edge, tuple[float, ...]]

    @property
    def width(self) -> float:
        """The width of all items in pixels."""
        return max(self.centers, default=0.0) + WIDTH / 2

    @property
    def height(self) -> float:
        """The height of all rows in pixels, if every item is folded."""
        rows = max(self.rows, default=-1) + 1
        return max(rows * (HEIGHT + GAP_DOWN) - GAP_DOWN, 0)


def place(count: int, edges: Sequence[Edge]) -> BoxPositions:
    """Return positions of `count` items that are connected by edges."""
    forward = list(dict.fromkeys(edge for edge in edges if edge[0] < edge[1]))
    shelf = _Shelf()
    for items in _components(count, forward):
        number = {item: at for at, item in enumerate(items)}
        inside = [(number[a], number[b]) for a, b in forward if a in number]
        shelf.add(items, _place_connected(len(items), tuple(inside)))
    return shelf.placed(count)


def _components(count: int, edges: Sequence[Edge]) -> list[list[int]]:
    """Return the connected components: lists of items in order. The component of the first item comes first."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    for a, b in edges:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    groups: dict[int, list[int]] = {}
    for item in range(count):
        groups.setdefault(root(item), []).append(item)
    return list(groups.values())


class _Shelf:
    """Places components side by side. A component that would exceed the width starts below the others."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.centers: dict[int, float] = {}
        self.bends: dict[Edge, tuple[float, ...]] = {}
        self.left, self.top, self.below = 0.0, 0, 0

    def add(self, items: Sequence[int], placed: BoxPositions) -> None:
        if self.left and self.left + placed.width > _SHELF:
            self.left, self.top = 0.0, self.below
        for item, row, center in zip(items, placed.rows, placed.centers, strict=True):
            self.rows[item], self.centers[item] = self.top + row, self.left + center
        for (a, b), xs in placed.bends.items():
            self.bends[items[a], items[b]] = tuple([self.left + x for x in xs])
        self.below = max(self.below, self.top + max(placed.rows) + 1)
        right = max([placed.width, *(x + GAP_ACROSS for xs in placed.bends.values() for x in xs)])
        self.left += right + GAP_ACROSS

    def placed(self, count: int) -> BoxPositions:
        return BoxPositions(
            tuple([self.rows[item] for item in range(count)]),
            tuple([round(self.centers[item], 1) for item in range(count)]),
            {edge: tuple([round(x, 1) for x in xs]) for edge, xs in self.bends.items()},
        )


@cache
def sugiyama() -> ModuleType | None:
    """Return the layout library fast-sugiyama, or None if it is not installed."""
    try:
        return import_module("fast_sugiyama")
    except ImportError:
        return None


def _place_connected(count: int, edges: tuple[Edge, ...]) -> BoxPositions:
    if not edges:
        return BoxPositions((0,), (WIDTH / 2,), {})
    library = sugiyama()
    found = _by_generations(count, edges) if library is None else _by_library(library, count, edges)
    if _is_mirrored(found):
        bends = {edge: tuple([-x for x in xs]) for edge, xs in found.bends.items()}
        found = BoxPositions(found.rows, tuple([-x for x in found.centers]), bends)
    left = min(found.centers) - WIDTH / 2
    left = min([left, *(x for xs in found.bends.values() for x in xs)])
    bends = {edge: tuple([x - left for x in xs]) for edge, xs in found.bends.items()}
    return BoxPositions(found.rows, tuple([x - left for x in found.centers]), bends)


def _is_mirrored(placed: BoxPositions) -> bool:
    """Return True if most neighbors in a row are in the reverse of their order in the program."""
    rows: dict[int, list[tuple[float, int]]] = {}
    for item, (row, center) in enumerate(zip(placed.rows, placed.centers, strict=True)):
        rows.setdefault(row, []).append((center, item))
    signs = [1 if a < b else -1 for row in rows.values() for (_, a), (_, b) in pairwise(sorted(row))]
    return sum(signs) < 0


def _by_library(library: ModuleType, count: int, edges: tuple[Edge, ...]) -> BoxPositions:
    """Place connected items with fast-sugiyama. Its rows are numbered from the bottom."""
    layouts = library.from_edges(
        edges, vertex_spacing=SPACING, dummy_vertices=True, dummy_size=0.15, ranking_type="minimize"
    )
    ((positions, _, _, drawn),) = layouts
    at = dict(positions)
    top = max(y for _, y in at.values())
    rows = tuple([round((top - at[item][1]) / SPACING) for item in range(count)])
    following = {a: b for a, b in drawn if a >= count}
    bends: dict[Edge, tuple[float, ...]] = {}
    for a, b in drawn:
        if a < count <= b:
            xs = []
            while b >= count:
                xs.append(at[b][0])
                b = following[b]
            bends[a, b] = tuple(xs)
    return BoxPositions(rows, tuple([at[item][0] for item in range(count)]), bends)


# -- without the library ---------------------------------------------------------------------------------------------


def _by_generations(count: int, edges: tuple[Edge, ...]) -> BoxPositions:
    """Place connected items in topological generations. An item without operands is moved down to its first reader."""
    rows = _generations(count, edges)
    chains: dict[Edge, list[int]] = {}
    levels: list[list[int]] = [[] for _ in range(max(rows) + 1)]
    for item in range(count):
        levels[rows[item]].append(item)
    steps: list[Edge] = []
    number = count
    for a, b in edges:
        chain = []
        for row in range(rows[a] + 1, rows[b]):
            levels[row].append(number)
            chain.append(number)
            number += 1
        chains[a, b] = chain
        steps += pairwise([a, *chain, b])
    above: list[list[int]] = [[] for _ in range(number)]
    below: list[list[int]] = [[] for _ in range(number)]
    for a, b in steps:
        above[b].append(a)
        below[a].append(b)
    _order(levels, above, below)
    centers = _centers(levels, above, below, count)
    bends = {edge: tuple([centers[each] for each in chain]) for edge, chain in chains.items() if chain}
    return BoxPositions(tuple(rows), tuple(centers[:count]), bends)


def _generations(count: int, edges: Sequence[Edge]) -> list[int]:
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(edges)
    rows = [0] * count
    for row, items in enumerate(networkx.topological_generations(graph)):
        for item in items:
            rows[item] = row
    for item in reversed(range(count)):
        readers = [rows[b] for b in graph.successors(item)]
        if readers and not graph.pred[item]:
            rows[item] = min(readers) - 1
    return rows


def _order(levels: list[list[int]], above: list[list[int]], below: list[list[int]]) -> None:
    """Order each row by the mean position of its items' neighbors, in sweeps down and up."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        for before, level in pairwise(levels if down else levels[::-1]):
            at = {item: place for place, item in enumerate(before)}
            own = {item: place for place, item in enumerate(level)}
            mean = {
                item: sum(at[each] for each in near[item]) / len(near[item]) if near[item] else own[item]
                for item in level
            }
            level.sort(key=lambda item: (mean[item], own[item]))


def _centers(levels: list[list[int]], above: list[list[int]], below: list[list[int]], count: int) -> list[float]:
    """Return centers near the neighbors' centers, with the order of each row unchanged and no overlap."""
    half = [SPACING / 2 if item < count else GAP_ACROSS / 2 for item in range(len(above))]
    centers = [0.0] * len(above)
    for level in levels:
        left = 0.0
        for item in level:
            centers[item] = left + half[item]
            left += 2 * half[item]
    for sweep in range(_SWEEPS):
        near = below if sweep % 2 else above
        for level in levels[::-1] if sweep % 2 else levels:
            wanted = [
                sum(centers[each] for each in near[item]) / len(near[item]) if near[item] else centers[item]
                for item in level
            ]
            _spread(level, wanted, half, centers)
    return centers


def _spread(level: Sequence[int], targets: Sequence[float], half: Sequence[float], centers: list[float]) -> None:
    """Set the centers of a row as near as possible to their targets. Items that would overlap are placed next to each
    other, around the mean of their targets.
    """
    groups: list[tuple[float, int, float]] = []  # touching items: start, number, total width
    for item, want in zip(level, targets, strict=True):
        start, number, wide = want - half[item], 1, 2 * half[item]
        while groups and groups[-1][0] + groups[-1][2] > start:
            before, count, width = groups.pop()
            start = (before * count + (start - width) * number) / (count + number)
            number, wide = count + number, width + wide
        groups.append((start, number, wide))
    items = iter(level)
    for start, number, _ in groups:
        for _ in range(number):
            item = next(items)
            centers[item] = start + half[item]
            start += 2 * half[item]
