"""The placements that an op needs and returns if some factors of its axis rule are split: one function for every op.

    mapped               the op works on parts, and each result is split in the same way
    whole, in blocks     the same for parts with whole blocks, if the op declares a block's size (`Op.multiples`)
    reduced              each rank has a partial result
    indexed              a lookup in a part of the table: rows of other parts count as zero, so results are partial sums
    all others           the op needs the axis whole (a composite's body may need less)

An op accepts partial sums in operands in which it is linear, if all operands of that group are partial. So if a summed
factor is split, an operand of the group that lacks the factor (a bias) must be partial, too: one rank holds all of it,
and the other ranks hold zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.operation import Composite, Op, names_operand
from treadle.ir.placement.mesh import SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement, Split, lies_between_blocks
from treadle.ir.sizing.sizes import ONE
from treadle.ir.types import Type
from treadle.passes.sharding.factors import Share, Shares, dim_split, locate


@dataclass(frozen=True)
class Requirement:
    """The placements that operands must have (None for an absent operand), and the placements of the results."""

    operands: tuple[MeshPlacement | None, ...]
    results: tuple[MeshPlacement, ...]


def may_split(op: Op, application: Application, name: str, types: Sequence[Type | None]) -> bool:
    """Return True if an op, without its body, can work on parts of a factor."""
    if op.resized({name: ONE}, types) is None:
        return False
    match application.factors[name].role:
        case Role.MAPPED:
            return name not in op.positional
        case Role.REDUCED:
            return True
        case Role.WHOLE:
            return name in op.multiples(types, application)
        case Role.INDEXED:
            return looked_up_by(op, application, name, types) is not None
        case _:
            return False


def looked_up_by(op: Op, application: Application, name: str, types: Sequence[Type | None]) -> int | None:
    """Return the position of the operand whose elements index a factor, if the op can work on a part of the table, else
    None.

    The op is a primitive that reads one table along the factor, is linear in the table, and has a single operand of
    integers. No result has the factor.
    """
    tables = [i for i, dims in enumerate(application.operands) if locate(dims, name)]
    names = op.operand_names(len(types))
    others = [i for i in range(len(types)) if i not in tables]
    if isinstance(op, Composite) or len(tables) != 1 or len(others) != 1 or len(application.results) != 1:
        return None
    indices = types[others[0]]
    linear = any(names_operand(group, names[tables[0]]) for group in op.linear)
    fits = linear and indices is not None and indices.dtype.is_int and not locate(application.results[0], name)
    return others[0] if fits else None


def requirement(
    op: Op,
    application: Application,
    types: Sequence[Type | None],
    shares: Shares,
    carried: SubAxes = (),
    through: frozenset[str] = frozenset(),
    ring: SubAxes = (),
) -> Requirement | None:
    """Return the placements that an op needs and returns if these factors are split, or None if this is not possible.

    carried  parts of mesh axes along which operands of the linear group `through` are partial sums

    ring     parts of mesh axes that split queries and keys in the same way, and around which keys pass
    """
    passed = op.keys_in_parts if ring and op.keys_in_parts is not None else ()
    if not all(_has_parts(application, name, share) for name, share in shares.items()):
        return None
    split = {name: share for name, share in shares.items() if name not in passed}
    if not all(_splits(op, application, types, name, share) for name, share in split.items()):
        return None
    factors = application.factors
    sums = {name: share for name, share in split.items() if factors[name].role not in (Role.MAPPED, Role.WHOLE)}
    partial = (*(axis for share in sums.values() for axis in share.over), *carried)
    monoids = {factors[name].monoid or "sum" for name in sums} | ({"sum"} if carried else set())
    if len(monoids) > 1:
        return None
    terms = _partial_operands(op, application, types, sums)
    if carried:
        for i in _group_positions(op, types, through):
            terms[i].append(carried)
    operands: list[MeshPlacement | None] = []
    for i, dims in enumerate(application.operands):
        if dims is None:
            operands.append(None)
            continue
        placed = _placed(application, dims, shares, tuple(dict.fromkeys(p for over in terms[i] for p in over)), "sum")
        if placed is None:
            return None
        operands.append(placed)
    monoid = next(iter(monoids), "sum")
    results = [_placed(application, dims, shares, partial, monoid) for dims in application.results]
    if any(r is None for r in results):
        return None
    return Requirement(tuple(operands), tuple(r for r in results if r is not None))


def _has_parts(application: Application, name: str, share: Share) -> bool:
    """Return True if each rank has a part of a factor."""
    units = application.dims[name].size.divide(share.grain)
    return units is not None and (units.constant is None or units.constant >= ways(share.over))


def _splits(op: Op, application: Application, types: Sequence[Type | None], name: str, share: Share) -> bool:
    """Return True if the op computes parts of a factor, and a factor that is whole is split between blocks."""
    if not may_split(op, application, name, types):
        return False
    if application.factors[name].role is not Role.WHOLE:
        return True
    split = Split(share.over, share.grain)
    return lies_between_blocks(application.dims[name].size, split, op.multiples(types, application)[name])


def _group_positions(op: Op, types: Sequence[Type | None], group: frozenset[str]) -> list[int]:
    """Return the positions of the present operands in a linear group."""
    names = op.operand_names(len(types))
    return [i for i, name in enumerate(names) if types[i] is not None and names_operand(group, name)]


def _partial_operands(
    op: Op, application: Application, types: Sequence[Type | None], sums: Shares
) -> dict[int, list[SubAxes]]:
    """Return for each operand the parts of mesh axes along which it must be partial sums: it lacks a summed factor that
    another operand of its linear group has, as a bias does.
    """
    terms: dict[int, list[SubAxes]] = {i: [] for i in range(len(types))}
    for name, share in sums.items():
        factor = application.factors[name]
        if (factor.monoid or "sum") != "sum" or factor.role is not Role.REDUCED:
            continue
        for group in op.linear:
            positions = _group_positions(op, types, group)
            without = [i for i in positions if not locate(application.operands[i], name)]
            if len(without) < len(positions):
                for i in without:
                    terms[i].append(share.over)
    return terms


def _placed(
    application: Application, dims: Sequence[AxisDim], shares: Shares, partial: SubAxes, monoid: str
) -> MeshPlacement | None:
    splits: list[Split | None] = []
    for dim in dims:
        split = dim_split(application, dim, shares)
        if isinstance(split, bool):
            return None
        splits.append(split)
    placed = MeshPlacement(tuple(splits), partial, monoid if partial else "sum")
    return placed if len(set(placed.used)) == len(placed.used) else None
