"""Splits of dimensions as splits of the factors of an axis rule, and the reverse.

    heads split in `b s (h d) -> b h s d`      dimension 2, in multiples of d, and dimension 1 of the result

A dimension is split by its outermost factor. An inner factor is split only if each rank has a single step of the outer
factors. So 32 query heads that share 4 key heads, `(g r)`, are split over 8 ranks as g over 4 and r over 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.ir.axes import Application, AxisDim
from treadle.ir.placement.mesh import SubAxes, ways
from treadle.ir.placement.placements import Split
from treadle.ir.sizing.sizes import ONE, Size, product


@dataclass(frozen=True, slots=True)
class Share:
    """A factor split over parts of mesh axes, in multiples of `grain` steps."""

    over: SubAxes
    grain: Size = ONE


Shares = Mapping[str, Share]


def factor_shares(application: Application, dim: AxisDim, split: Split) -> dict[str, Share] | None:
    """Return the factors that a split of a dimension splits. Return None if a part would end inside a factor, or the
    dimension has no factors.
    """
    sizes = [application.dims[name].size for name in dim.factors]
    whole = product(sizes)
    equal = split.normal(whole).grain == ONE and _is_even(whole, ways(split.over))
    left = split.over
    found: dict[str, Share] = {}
    for i, (name, size) in enumerate(zip(dim.factors, sizes, strict=True)):
        if not left:
            break
        if size == ONE:
            continue
        inner = product(sizes[i + 1 :])
        taken = left if size.constant is None or size.constant >= ways(left) else _prefix(left, size.constant)
        if not taken:
            return None
        grain = ONE if equal and _is_even(size, ways(taken)) else split.grain.divide(inner)
        if grain is None:
            return None
        found[name] = Share(taken, grain)
        left = left[len(taken) :]
    return None if left else found


def dim_split(application: Application, dim: AxisDim, shares: Shares) -> Split | bool | None:
    """Return the split of a dimension that follows from splits of its factors, or None if it is not split. Return
    False if its parts would not be contiguous.
    """
    over: SubAxes = ()
    grain = ONE
    is_open = True
    sizes = [application.dims[name].size for name in dim.factors]
    for i, (name, size) in enumerate(zip(dim.factors, sizes, strict=True)):
        share = shares.get(name)
        if share is not None:
            if not is_open:
                return False
            over += share.over
            grain = share.grain * product(sizes[i + 1 :])
        is_open = is_open and size.constant == (1 if share is None else ways(share.over))
    return Split(over, grain).normal(product(sizes)) if over else None


def _is_even(size: Size, count: int) -> bool:
    return size.constant is not None and size.constant % count == 0


def _prefix(parts: SubAxes, count: int) -> SubAxes:
    """Return the leading parts whose sizes multiply to exactly `count`, or no parts."""
    return next((parts[:n] for n in range(1, len(parts) + 1) if ways(parts[:n]) == count), ())


def locate(dims: Sequence[AxisDim] | None, name: str) -> bool:
    """Return True if one of these dimensions has a factor."""
    return any(name in dim.factors for dim in dims or ())
