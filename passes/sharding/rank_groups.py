"""Groups of ranks in a mesh, and coverage of a whole by parts. The checker uses this module, which shares no code with
the planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

from treadle.ir.axes import AxisDim
from treadle.ir.placement.mesh import Mesh, SubAxis

Interval = tuple[int, int]
"""A half-open range of positions."""


def covers(parts: Sequence[Interval], whole: Interval) -> bool:
    """Return True if parts are consecutive, in this order, from the start of the whole to its end."""
    at = whole[0]
    for first, last in parts:
        if first != at:
            return False
        at = last
    return at == whole[1]


def holds_factor(dims: Sequence[AxisDim] | None, name: str) -> bool:
    return any(name in dim.factors for dim in dims or ())


@lru_cache(maxsize=256)
def _strides(mesh: Mesh) -> dict[SubAxis, int]:
    """Return the distance in ranks between neighbours along each part of an axis. Ranks are numbered with the first
    axis fastest.
    """
    found, below = {}, 1
    for name, size in mesh.axes:
        for part in mesh.parts:
            if part.axis == name:
                found[part] = below * (size // part.outer // part.size)
        below *= size
    return found


@lru_cache(maxsize=4096)
def ranks_along(mesh: Mesh, along: frozenset[SubAxis]) -> tuple[int, ...]:
    """Return the ranks at every position along these parts, and at position 0 along all other parts, where ranks hold
    the same.
    """
    return group_of(mesh, 0, tuple(part for part in mesh.parts if part in along))


@lru_cache(maxsize=65536)
def index_of(mesh: Mesh, rank: int, over: tuple[SubAxis, ...]) -> int:
    """Return the index of a rank's part of a dimension that is split over these parts, in this order."""
    found = 0
    for part in over:
        found = found * part.size + rank // _strides(mesh)[part] % part.size
    return found


@lru_cache(maxsize=65536)
def group_of(mesh: Mesh, rank: int, over: tuple[SubAxis, ...]) -> tuple[int, ...]:
    """Return the ranks that differ from a rank only along these parts, with the last part fastest."""
    strides = _strides(mesh)
    first = rank - sum(rank // strides[p] % p.size * strides[p] for p in over)
    places = product(*[range(part.size) for part in over])
    return tuple(first + sum(at * strides[p] for at, p in zip(place, over, strict=True)) for place in places)
