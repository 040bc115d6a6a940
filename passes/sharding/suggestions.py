"""Ways to split a node: each part of the mesh splits one of the factors suggested for it, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from treadle.ir.axes import Application, AxisDim
from treadle.ir.placement.mesh import Mesh, SubAxes, SubAxis
from treadle.ir.placement.placements import Split
from treadle.passes.sharding.factors import Share, factor_shares


@dataclass(frozen=True)
class Suggestion:
    """A suggestion to split a factor over these parts of the mesh."""

    factor: str
    share: Share


def suggested(
    application: Application, dims: Sequence[AxisDim] | None, splits: Sequence[tuple[int, Split]]
) -> Iterator[Suggestion]:
    """Yield suggestions of the factors that are split by splits of some dimensions of one operand or result."""
    for d, split in splits:
        shares = factor_shares(application, dims[d], split) if dims is not None else None
        for name, share in (shares or {}).items():
            yield Suggestion(name, share)


def choices(
    mesh: Mesh, suggestions: Sequence[Suggestion], carried: Sequence[tuple[SubAxes, frozenset[str]]]
) -> Iterator[tuple[dict[str, Share], SubAxes, frozenset[str]]]:
    """Yield every way to split a node: the split factors, the parts of the mesh along which partial sums pass through,
    and the operands that they pass through.

    carried  the parts along which operands are partial, with their group of operands, in which the op is linear

    Parts of the mesh that the same suggestions name are assigned together. The first way splits nothing.
    """
    sets = [s.share.over for s in suggestions] + [over for over, _ in carried]
    bundles: dict[tuple[bool, ...], list[SubAxis]] = {}
    for part in mesh.parts:
        named = tuple(part in over for over in sets)
        if any(named):
            bundles.setdefault(named, []).append(part)
    options: list[list[int | None]] = [[None, *[i for i, is_named in enumerate(n) if is_named]] for n in bundles]
    for choice in product(*options):
        taken: dict[int, set[SubAxis]] = {}
        for parts, index in zip(bundles.values(), choice, strict=True):
            if index is not None:
                taken.setdefault(index, set()).update(parts)
        passing = {i: own for i, own in taken.items() if i >= len(suggestions)}
        through = {carried[i - len(suggestions)][1] for i in passing}
        if len(through) <= 1:
            shares = _shares([(suggestions[i], own) for i, own in taken.items() if i < len(suggestions)])
            passed = tuple(p for i, own in passing.items() for p in sets[i] if p in own)
            yield shares, passed, next(iter(through), frozenset())


def _shares(taken: Sequence[tuple[Suggestion, set[SubAxis]]]) -> dict[str, Share]:
    """Return the split factors. If two suggestions split a factor, it is split by both, in the coarser units."""
    shares: dict[str, Share] = {}
    for suggestion, own in taken:
        over = tuple(p for p in suggestion.share.over if p in own)
        share = Share(over, suggestion.share.grain)
        known = shares.get(suggestion.factor)
        if known is not None:
            grain = max((known.grain, share.grain), key=lambda g: (g.constant or 0, str(g)))
            share = Share((*known.over, *over), grain)
        shares[suggestion.factor] = share
    return shares
