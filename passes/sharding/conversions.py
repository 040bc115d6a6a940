"""Conversions between placements: the steps, and the bytes that each step sends.

For parts of mesh axes, one after the other:

    every rank holds all    -> a dimension is split     take a part; nothing is sent
    partial values          -> every rank holds all     all_reduce
    partial sums            -> a dimension is split     reduce_scatter
    a dimension is split    -> every rank holds all     all_gather
    a dimension is split    -> another is               all_to_all
    every rank holds all    -> partial sums             the first rank keeps it, others hold zeros; nothing is sent

The last row is used to add a bias exactly once. If several parts split a dimension, it is gathered and split at the
innermost part. If an outer part is removed, the parts inside it are removed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from treadle.ir.errors import PassError
from treadle.ir.hardware import Hardware
from treadle.ir.ops.collectives import AllGather, AllReduce, AllToAll, Collective, ReduceScatter
from treadle.ir.placement.mesh import Mesh, SubAxes, SubAxis, ways
from treadle.ir.placement.placements import IDEMPOTENT, MeshPlacement, Split
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type


class StepKind(Enum):
    """The kind of a step: local to each rank, or a collective op (`COLLECTIVES`)."""

    TAKE = "take a part"
    KEEP_FIRST = "keep on the first rank"
    ALL_REDUCE = "combine partial values"
    ALL_GATHER = "gather parts"
    REDUCE_SCATTER = "combine partial sums, and split"
    ALL_TO_ALL = "split along another dimension"

    @property
    def word(self) -> str:
        """The name of the collective op, or a description of the local step."""
        return COLLECTIVES[self].name if self in COLLECTIVES else self.value


COLLECTIVES: Mapping[StepKind, type[Collective]] = {
    StepKind.ALL_REDUCE: AllReduce,
    StepKind.ALL_GATHER: AllGather,
    StepKind.REDUCE_SCATTER: ReduceScatter,
    StepKind.ALL_TO_ALL: AllToAll,
}
"""The collective op for each kind of step that communicates."""


@dataclass(frozen=True)
class PlacementStep:
    """One step from a placement to another.

    over  the parts of mesh axes along which ranks communicate
    dim   the dimension that is split, gathered or scattered; for an all-to-all, the gathered one
    onto  the dimension that an all-to-all splits
    """

    kind: StepKind
    over: SubAxes
    before: MeshPlacement
    after: MeshPlacement
    dim: int | None = None
    onto: int | None = None

    @property
    def sends(self) -> bool:
        """True if the step is a collective."""
        return self.kind in COLLECTIVES


def conversion(shape: Sequence[Size], source: MeshPlacement, target: MeshPlacement) -> tuple[PlacementStep, ...]:
    """Return the steps that convert a value of this shape from one placement to another.

    A whole value becomes partial maxima only by leaving it whole on every rank. A value that is partial by one
    reduction is combined before it becomes partial by another. Raises PassError for a target that no steps lead to,
    because its splits are not in normal form (`Split.normal`).
    """
    return tuple(_steps(shape, source, target))


def _steps(shape: Sequence[Size], now: MeshPlacement, target: MeshPlacement) -> Iterator[PlacementStep]:
    while True:
        made = _next_step(shape, now, target)
        if made is None:
            return
        if made.after == now:
            raise PassError("no step leads to a placement whose grain could be smaller", received=str(target))
        yield made
        now = made.after


def _next_step(shape: Sequence[Size], now: MeshPlacement, target: MeshPlacement) -> PlacementStep | None:
    if now == target:
        return None
    shared = [_common(n, a, b) for n, a, b in zip(shape, now.dims, target.dims, strict=True)]
    wanted = [_over(split)[k:] for split, k in zip(target.dims, shared, strict=True)]
    left = [_over(split)[k:] for split, k in zip(now.dims, shared, strict=True)]
    stays = target.partial if now.monoid == target.monoid or not now.partial else ()
    reduced = tuple(p for p in now.partial if p not in stays)
    ready = [d for d, more in enumerate(wanted) if more and not left[d]]
    for d in ready:
        over = _leading(wanted[d], lambda p: p not in now.used)
        if over:
            return PlacementStep(StepKind.TAKE, over, now, _extended(now, shape, d, target, over), d)
    for d in ready:
        over = _leading(wanted[d], lambda p: p in reduced)
        if over and now.monoid == "sum":
            after = _extended(_without_terms(now, over), shape, d, target, over)
            return PlacementStep(StepKind.REDUCE_SCATTER, over, now, after, d)
    for d in ready:
        for e, rest in enumerate(left):
            length = max((n for n in range(len(rest) + 1) if n and rest[-n:] == wanted[d][:n]), default=0)
            if length:
                over = rest[-length:]
                shorter = _shortened(now, shape, e, len(over))
                return PlacementStep(StepKind.ALL_TO_ALL, over, now, _extended(shorter, shape, d, target, over), e, d)
    split_later = {part for more in wanted for part in more}
    over = tuple(p for p in reduced if p not in split_later)
    if over:
        return PlacementStep(StepKind.ALL_REDUCE, over, now, _without_terms(now, over))
    for d, rest in enumerate(left):
        if rest:
            return PlacementStep(StepKind.ALL_GATHER, rest, now, _shortened(now, shape, d, len(rest)), d)
    if reduced:
        return PlacementStep(StepKind.ALL_REDUCE, reduced, now, _without_terms(now, reduced))
    after = MeshPlacement(now.dims, target.partial, target.monoid)
    return PlacementStep(StepKind.KEEP_FIRST, tuple(p for p in target.partial if p not in now.partial), now, after)


def _over(split: Split | None) -> SubAxes:
    return () if split is None else split.over


def _leading(parts: SubAxes, fits: Callable[[SubAxis], bool]) -> SubAxes:
    """Return the leading parts that satisfy the condition."""
    count = next((i for i, part in enumerate(parts) if not fits(part)), len(parts))
    return parts[:count]


def _common(size: Size, a: Split | None, b: Split | None) -> int:
    """Return the number of outermost parts that both splits have in common, with the same effect on a dimension of this
    size.
    """
    if a is None or b is None:
        return 0
    alike = [
        k
        for k in range(1, min(len(a.over), len(b.over)) + 1)
        if Split(a.over[:k], a.grain).normal(size) == Split(b.over[:k], b.grain).normal(size)
    ]
    return alike[-1] if alike else 0


def _extended(now: MeshPlacement, shape: Sequence[Size], d: int, target: MeshPlacement, over: SubAxes) -> MeshPlacement:
    goal = target.dims[d]
    assert goal is not None
    return _with_dim(now, d, Split((*_over(now.dims[d]), *over), goal.grain).normal(shape[d]))


def _shortened(now: MeshPlacement, shape: Sequence[Size], d: int, count: int) -> MeshPlacement:
    split = now.dims[d]
    assert split is not None
    rest = split.over[: len(split.over) - count]
    return _with_dim(now, d, Split(rest, split.grain).normal(shape[d]) if rest else None)


def _with_dim(now: MeshPlacement, d: int, split: Split | None) -> MeshPlacement:
    return MeshPlacement((*now.dims[:d], split, *now.dims[d + 1 :]), now.partial, now.monoid)


def _without_terms(now: MeshPlacement, over: SubAxes) -> MeshPlacement:
    kept = tuple(p for p in now.partial if p not in over)
    return MeshPlacement(now.dims, kept, now.monoid if kept else "sum")


def is_possible(type: Type, steps: Sequence[PlacementStep]) -> bool:
    """Return True if steps are valid for a type. A whole value may become partial only for sums and idempotent
    reductions (x max x is x), and blocks must stay whole along their axis.
    """
    blocked = None if type.encoding is None else type.encoding.axis % type.rank
    if blocked is not None and any(blocked in (s.dim, s.onto) for s in steps):
        return False
    return all(s.kind is not StepKind.KEEP_FIRST or s.after.monoid in ("sum", *IDEMPOTENT) for s in steps)


# -- costs -----------------------------------------------------------------------------------------------------------


def bytes_of(type: Type, placement: MeshPlacement, sizes: Mapping[str, int]) -> float:
    """Return the average number of bytes of one rank's part."""
    split = [p for d in placement.dims if d is not None for p in d.over]
    return type.bytes_at(sizes) / ways(split)


def payload_of(type: Type, step: PlacementStep, sizes: Mapping[str, int]) -> float:
    """Return the number of bytes of a rank's part before or after a step, whichever is larger."""
    return max(bytes_of(type, p, sizes) for p in (step.before, step.after)) if step.sends else 0.0


def sent_by(type: Type, step: PlacementStep, sizes: Mapping[str, int]) -> float:
    """Return the number of bytes that a rank sends in a step, in a ring."""
    k = ways(step.over)
    rounds = 2 if step.kind is StepKind.ALL_REDUCE else 1
    return rounds * (k - 1) / k * payload_of(type, step, sizes)


def seconds_of(type: Type, step: PlacementStep, sizes: Mapping[str, int], mesh: Mesh, machine: Hardware) -> float:
    """Return the minimum time of a step in seconds. For a local step, this is the time to write the changed bytes."""
    if not step.sends:
        written = bytes_of(type, step.after, sizes) if step.kind is StepKind.KEEP_FIRST else 0.0
        return written / machine.bandwidth
    rounds = (2 if step.kind is StepKind.ALL_REDUCE else 1) * (ways(step.over) - 1)
    return sent_by(type, step, sizes) / machine.link(mesh.reach(step.over)) + rounds * machine.latency


def seconds_to_pass(
    type: Type, placed: MeshPlacement, sizes: Mapping[str, int], over: SubAxes, mesh: Mesh, machine: Hardware
) -> float:
    """Return the time in seconds to send a part to the next rank."""
    return bytes_of(type, placed, sizes) / machine.link(mesh.reach(over)) + machine.latency
