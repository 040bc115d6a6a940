"""Placements: the part of a value that each device of a mesh holds.

    [dp, -, tp]             dimension 0 is split over dp, dimension 2 over tp; every rank holds all of dimension 1
    [-, tp*64]              split over tp in multiples of 64: heads of 64 whose number tp does not divide
    [dp, -, -] sum(tp)      each rank of a row of tp holds a partial sum; the value is their sum

If an axis splits a value, each element is on one rank of that axis. Every element is on all ranks of the other axes. A
mesh axis, or a part of one, is used at most once in a placement.

A dimension of n units is split over k positions so that position i holds units i n // k to (i + 1) n // k. Parts differ
by one unit at most, and no part is empty if n >= k. Several axes that split one dimension count as one axis with the
product of their sizes, the first outermost. The bounds of a split over all axes but the last are also bounds of the
whole split, so gathering along the last axis results in the parts of the split over the other axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from treadle.ir.axes import MONOIDS
from treadle.ir.errors import ParseError
from treadle.ir.placement.mesh import Mesh, SubAxes, ways
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.types import Dim, Factor, Type

Array = np.ndarray[Any, Any]

IDEMPOTENT = ("max", "min", "and", "or")
"""Reductions for which a whole value may also serve as a partial value: x max x is x."""


@dataclass(frozen=True, slots=True)
class Split:
    """A dimension split over parts of mesh axes in turn, in multiples of `grain` elements."""

    over: SubAxes
    grain: Size = ONE

    def normal(self, size: Size) -> Split:
        """Return the same split with the smallest equivalent grain: 1 if all parts of a dimension of this size are
        equal.
        """
        units = size.divide(self.grain)
        even = units is not None and units.constant is not None and units.constant % ways(self.over) == 0
        return Split(self.over) if even else self

    def text(self, mesh: Mesh) -> str:
        """Return the split's text within a placement, such as `tp*64`."""
        return mesh.text_of(self.over) + _grain_text(self.grain)


@dataclass(frozen=True)
class MeshPlacement:
    """The placement of a value's parts on a mesh.

    dims     for each dimension its split, or None
    partial  the parts of mesh axes along which ranks hold partial values
    monoid   the combination of the partial values: "sum", "max", ...
    """

    dims: tuple[Split | None, ...]
    partial: SubAxes = ()
    monoid: str = "sum"

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.partial, key=lambda part: (part.axis, part.outer)))
        object.__setattr__(self, "partial", ordered)  # the dataclass is frozen

    @staticmethod
    def whole(rank: int) -> MeshPlacement:
        """Return the placement in which every device holds all of a value of this rank."""
        return MeshPlacement((None,) * rank)

    @property
    def used(self) -> SubAxes:
        """The parts of axes that the placement uses, in order."""
        return (*[part for split in self.dims if split is not None for part in split.over], *self.partial)

    def text(self, mesh: Mesh) -> str:
        """Return the text `[dp, -, tp*64] sum(ep)`, which `parse_placement` parses."""
        dims = ", ".join("-" if d is None else d.text(mesh) for d in self.dims)
        return f"[{dims}]" + (f" {self.monoid}({mesh.text_of(self.partial)})" if self.partial else "")


def _grain_text(grain: Size) -> str:
    text = str(grain)
    return "" if grain == ONE else f"*{text}" if text.isalnum() else f"*({text})"


def parse_placement(text: str, mesh: Mesh) -> MeshPlacement:
    """Parse the text of `MeshPlacement.text`.

    Raises ParseError, also for an unknown reduction; UsageError for an axis that the mesh lacks.
    """
    match = re.fullmatch(r"\s*\[(.*)\]\s*(?:(\w+)\(((?:[^()]|\(\d{1,7}\)\d)*)\))?\s*", text)
    if match is None:
        raise ParseError(f"not a placement: {text[:80]!r}", hint="[dp, -, tp] sum(ep)")
    if match[2] is not None and match[2] not in MONOIDS:
        raise ParseError(
            f"unknown reduction {match[2][:40]!r}", received=text[:80], hint="one of " + ", ".join(MONOIDS)
        )
    dims: list[Split | None] = []
    for part in match[1].split(",") if match[1].strip() else ():
        over, _, grain = part.partition("*")
        parts = mesh.parts_of(over) if over.strip() != "-" else ()
        if not over.strip():
            raise ParseError(f"a dimension is split over no axis: {text[:80]!r}", hint="- for a whole dimension")
        dims.append(Split(parts, parse_size(grain) if grain.strip() else ONE) if parts else None)
    return MeshPlacement(tuple(dims), mesh.parts_of(match[3] or ""), match[2] or "sum")


def lies_between_blocks(size: Size, split: Split, elements: int) -> bool:
    """Return True if all bounds of a split dimension are also bounds of its blocks of `elements`."""
    units, grain = size.divide(split.grain), split.grain.constant
    if units is None or units.constant is None or grain is None:
        return False
    count = ways(split.over)
    return all(at * units.constant // count * grain % elements == 0 for at in range(count))


def held_placement(type: Type, placement: MeshPlacement) -> MeshPlacement:
    """Return the placement of the array that holds an encoded value. Its blocked axis counts bytes, where `type` counts
    elements.
    """
    if type.encoding is None:
        return placement
    axis = type.encoding.axis % type.rank
    split, size = placement.dims[axis], type.shape[axis].constant
    if split is None or size is None or split.grain == ONE:
        return placement
    assert split.grain.constant is not None
    held = Split(split.over, Size.of(type.encoding.bytes(split.grain.constant)))
    dims = (*placement.dims[:axis], held, *placement.dims[axis + 1 :])
    return MeshPlacement(dims, placement.partial, placement.monoid)


def span(size: Size, split: Split | None, mesh: Mesh, rank: int) -> tuple[Size, Size]:
    """Return the start and the size of a rank's part in a dimension of this size."""
    if split is None:
        return ZERO, size
    return _piece(size, split.grain, mesh.index(rank, split.over), ways(split.over))


@lru_cache(maxsize=4096)
def _piece(size: Size, grain: Size, at: int, count: int) -> tuple[Size, Size]:
    """Return the start and the size of piece `at` of `count` pieces of a dimension, in multiples of a grain."""
    units = size.divide(grain)
    assert units is not None, f"{size} is not a multiple of {grain}"
    first, last = (units * at) // count, (units * (at + 1)) // count
    return first * grain, (last - first) * grain


def local_type(type: Type, placement: MeshPlacement, mesh: Mesh, rank: int) -> Type:
    """Return the type of the part that a rank holds, with the same labels."""
    dims = []
    for dim, split in zip(type.dims, placement.dims, strict=True):
        if split is None:
            dims.append(dim)
            continue
        _, size = span(dim.size, split, mesh, rank)
        outermost, *others = dim.factors
        inner = Dim(others).size if others else ONE
        left = size.divide(inner)
        if size == dim.size:
            dims.append(dim)
        elif left is not None and others:
            dims.append(Dim([Factor(left, outermost.label), *others]))
        else:
            dims.append(Dim([Factor(size, outermost.label if not others else None)]))
    return Type(type.dtype, tuple(dims), type.encoding)


def taken_part(
    array: Array, shape: Sequence[Size], placement: MeshPlacement, mesh: Mesh, rank: int, sizes: Mapping[str, int]
) -> Array:
    """Return a view of the part that a rank holds. `array` is a whole value of this shape.

    For a value in blocks, the array and the shape count bytes along the blocks' axis, and `placement` must be the
    `held_placement`.
    """
    where: list[Any] = []
    for size, split in zip(shape, placement.dims, strict=True):
        if split is None:
            where.append(slice(None))
            continue
        start, length = (n.evaluate(sizes) for n in span(size, split, mesh, rank))
        where.append(slice(start, start + length))
    part: Array = array[(*where, ...)]  # the dots make a view even of an array of rank 0, instead of its number
    return part
