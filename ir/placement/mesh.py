"""Meshes: devices in a grid with named axes, `tp=8,dp=2`, and the parts of an axis that a dimension may be split over.

Ranks are numbered with the first axis fastest: neighbours along the first axis have consecutive numbers. So the axis
with the most traffic should be the first.

An axis of 8 consists of three parts of 2, outermost first; a dimension may be split over only some of them. `tp:(1)4`
is the outermost part of tp, with 4 positions, and `tp:(4)2` is the next part inwards. (The notation is Shardy's.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from treadle.ir.errors import UsageError

MOST_RANKS = 1 << 17
"""The largest number of ranks in a mesh: the cost of checking a plan grows with the longest axis."""


@dataclass(frozen=True, slots=True)
class SubAxis:
    """A part of a mesh axis: `size` positions, inside parts with `outer` positions in total."""

    axis: str
    outer: int
    size: int


SubAxes = tuple[SubAxis, ...]
"""Parts of axes over which something is split, one after the other, outermost first."""


def ways(parts: Iterable[SubAxis]) -> int:
    """Return the number of pieces into which these parts split something."""
    return prod(part.size for part in parts)


@dataclass(frozen=True)
class Mesh:
    """The axes of a mesh by name with their sizes, the fastest first. Use `Mesh.of` to build a mesh."""

    axes: tuple[tuple[str, int], ...]

    @staticmethod
    def of(text: str) -> Mesh:
        """Parse `tp=2,dp=2`. Raises UsageError for malformed text, a duplicate name, a size below 1, or too many
        ranks.
        """
        axes: list[tuple[str, int]] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(\d{1,7})\s*", part)
            if match is None:
                raise UsageError(f"not a mesh: {part.strip()!r}", received=text[:80], hint="tp=2,dp=2")
            axes.append((match[1], int(match[2])))
        mesh = Mesh(tuple(axes))
        twice = next((name for name, _ in axes if [n for n, _ in axes].count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"the mesh has two axes {twice}", received=text[:80], hint="tp=2,dp=2")
        if any(size < 1 for _, size in axes) or mesh.ranks > MOST_RANKS:
            raise UsageError(
                f"a mesh must have 1 to {MOST_RANKS:,} ranks, and axes of 1 or more",
                received=text[:80],
                hint="tp=2,dp=2",
            )
        return mesh

    @property
    def ranks(self) -> int:
        """The number of devices."""
        return prod(size for _, size in self.axes)

    @cached_property
    def parts(self) -> SubAxes:
        """The prime parts of every axis, the smallest outermost. An axis of size 1 has no parts."""
        found: list[SubAxis] = []
        for name, size in self.axes:
            outer = 1
            for prime in _primes(size):
                found.append(SubAxis(name, outer, prime))
                outer *= prime
        return tuple(found)

    def parts_of(self, text: str) -> SubAxes:
        """Parse axes and parts of axes: `dp tp:(1)4`. Raises UsageError for an axis or a part that does not exist."""
        found: list[SubAxis] = []
        for word in text.split():
            match = re.fullmatch(r"(\w+)(?::\((\d{1,7})\)(\d{1,7}))?", word)
            size = dict(self.axes).get(match[1]) if match is not None else None
            if match is None or size is None:
                raise UsageError(f"the mesh {self} has no axis {word!r}", hint=", ".join(n for n, _ in self.axes))
            outer, wanted = (1, size) if match[2] is None else (int(match[2]), int(match[3]))
            held = [p for p in self.parts if p.axis == match[1] and outer <= p.outer < outer * wanted]
            if ways(held) != wanted or (held and held[0].outer != outer) or (match[2] and not held):
                raise UsageError(
                    f"axis {match[1]} of {self} has no part {word}",
                    hint=f"{match[1]}:(1)2, if the axis has an even size",
                )
            found += held
        return tuple(found)

    def text_of(self, parts: Sequence[SubAxis]) -> str:
        """Return parts as text, which `parts_of` parses. Adjacent parts of an axis are joined."""
        sizes = dict(self.axes)
        joined: list[SubAxis] = []
        for part in parts:
            last = joined[-1] if joined else None
            if last is not None and last.axis == part.axis and last.outer * last.size == part.outer:
                joined[-1] = SubAxis(last.axis, last.outer, last.size * part.size)
            else:
                joined.append(part)
        return " ".join(p.axis if p.size == sizes[p.axis] else f"{p.axis}:({p.outer}){p.size}" for p in joined)

    @cached_property
    def strides(self) -> Mapping[SubAxis, int]:
        """The difference between the numbers of neighbouring ranks along each part of an axis."""
        found, stride = {}, 1
        for name, size in self.axes:
            own = [part for part in self.parts if part.axis == name]
            found.update({part: stride * (size // (part.outer * part.size)) for part in own})
            stride *= size
        return found

    def reach(self, over: SubAxes) -> int:
        """Return the number of consecutive ranks that a group along these parts extends over."""
        reach, stride = 1, 1
        for name, size in self.axes:
            for part in over:
                if part.axis == name:
                    reach = max(reach, stride * (size // part.outer))
            stride *= size
        return reach

    def coordinate(self, rank: int, part: SubAxis) -> int:
        """Return the coordinate of a rank along a part of an axis, from 0."""
        return rank // self.strides[part] % part.size

    def index(self, rank: int, parts: Sequence[SubAxis]) -> int:
        """Return the index of the rank's piece among `ways(parts)` pieces: the rank's coordinate along the parts,
        outermost first.
        """
        found = 0
        for part in parts:
            found = found * part.size + self.coordinate(rank, part)
        return found

    def group(self, rank: int, parts: Sequence[SubAxis]) -> tuple[int, ...]:
        """Return the ranks that differ from a rank only along these parts, including the rank, in the order of
        `index`.
        """
        found = [rank - sum(self.coordinate(rank, part) * self.strides[part] for part in parts)]
        for part in parts:
            found = [first + at * self.strides[part] for first in found for at in range(part.size)]
        return tuple(found)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


def _primes(size: int) -> list[int]:
    """Return the prime factors of a size, the smallest first."""
    found, divisor = [], 2
    while size > 1:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1 if divisor * divisor <= size else max(size - divisor, 1)
    return found
