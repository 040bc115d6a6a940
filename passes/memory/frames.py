"""Frames: what a function needs in memory of its own, from which step to which; and the most bytes that live at once.

    frames = frames_of(plan)                       one for each function of a storage plan
    peaks = peaks_of(frames, graph.symbols)        the polynomials of which the largest is the peak, at any sizes
    live_at(frames, "main", {"B": 8, "S": 512})    the bytes that live at each step, callees' included

A frame is the same whether it comes from a plan or from what a backend made of it, with memory that only single kernels
need. While a call runs, the frame of its callee lives beside what lives in the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.ir.graph import Node
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.storage.views import Storage, StorageKind
from treadle.passes.memory.storage_plan import FunctionPlan, Life, StoragePlan


@dataclass(frozen=True)
class FrameCall:
    """A step that runs another function.

    made  storages of the caller that are the callee's own while it runs, since it makes what lies in them
    """

    callee: str
    made: tuple[Storage, ...] = ()


@dataclass(frozen=True, eq=False)
class Frame:
    """What a function holds of its own.

    steps       what each step is of, in the order in which they run; None for a copy of what is handed out
    lives       each storage, from the first step that needs it to the last; of what is handed out, to the number of
                steps
    calls       by step
    handed_out  of an entry: new memory that its caller gets, from the first step that touches it on. What dies before
                may lie there
    """

    name: str
    steps: tuple[Node | None, ...]
    lives: tuple[Life, ...]
    calls: Mapping[int, FrameCall]
    handed_out: tuple[Life, ...] = ()

    def alive(self, at: int) -> list[Life]:
        """What lives at a step, without what a callee makes then."""
        made = self.calls[at].made if at in self.calls else ()
        return [x for x in self.lives if x.first <= at <= x.last and x.storage not in made]

    def made_at(self, at: int) -> list[Storage]:
        """What lives at a step and a callee makes then."""
        made = self.calls[at].made if at in self.calls else ()
        return [x.storage for x in self.lives if x.first <= at <= x.last and x.storage in made] if made else []


def frames_of(plan: StoragePlan) -> dict[str, Frame]:
    """The frames of a plan, callees first."""
    return {name: frame_of(each, plan.functions, plan.strided) for name, each in plan.functions.items()}


def frame_of(plan: FunctionPlan, callees: Mapping[str, FunctionPlan], strided: bool) -> Frame:
    """The frame of one function. What it hands out lies in its caller's, unless a library allocates it."""
    own = [life for life in plan.lives if life.storage.kind.is_own]
    lives = tuple([life for life in own if strided or life.last < plan.end or life.storage.kind is StorageKind.FOREIGN])
    calls = {}
    for at, step in enumerate(plan.steps):
        if step.root.op.callee is not None:
            made = () if strided else _made(step.root, plan, callees[step.root.op.callee])
            calls[at] = FrameCall(step.root.op.callee, made)
    return Frame(plan.function.name, tuple([step.root for step in plan.steps]), lives, calls)


def _made(node: Node, plan: FunctionPlan, callee: FunctionPlan) -> tuple[Storage, ...]:
    """The storages of results that a callee allocates itself: a library's."""
    found = []
    for output, result in zip(callee.function.outputs.values(), node.results, strict=False):
        theirs, ours = callee.places[output].storage, plan.places[result].storage
        if theirs is not None and ours is not None and theirs.kind is StorageKind.FOREIGN:
            found.append(ours)
    return tuple(dict.fromkeys(found))


def parts_of(frames: Mapping[str, Frame]) -> tuple[dict[str, Frame], dict[str, Frame]]:
    """Frames of what lies in an arena, and of what a library allocates beside it."""

    def part(frame: Frame, foreign: bool) -> Frame:
        lives = [life for life in frame.lives if (life.storage.kind is StorageKind.FOREIGN) is foreign]
        calls = frame.calls if foreign else {at: FrameCall(call.callee) for at, call in frame.calls.items()}
        return replace(frame, lives=tuple(lives), calls=calls)

    inside, beside = ({name: part(frame, foreign) for name, frame in frames.items()} for foreign in (False, True))
    return inside, beside


# -- at all sizes --------------------------------------------------------------------------------------------------


def peaks_of(frames: Mapping[str, Frame], symbols: Mapping[str, Bounds]) -> dict[str, tuple[Size, ...]]:
    """By function the sizes of which the largest is its peak, callees' frames included; none that another covers."""
    found: dict[str, tuple[Size, ...]] = {}
    for name, frame in frames.items():
        found[name] = peak_of(frame, found, symbols)
    return found


def peak_of(frame: Frame, callees: Mapping[str, Sequence[Size]], symbols: Mapping[str, Bounds]) -> tuple[Size, ...]:
    """The sizes of which the largest is the peak of one function."""
    sizes: dict[Size, None] = {}
    live, begins, ends = ZERO, _by_step(frame, first=True), _by_step(frame, first=False)
    for at in range(len(frame.steps) + 1):
        live = sum((storage.nbytes for storage in begins.get(at, ())), live)
        here, inner = live, callees[frame.calls[at].callee] if at in frame.calls else (ZERO,)
        for storage in frame.made_at(at):
            here = here - storage.nbytes
        sizes |= dict.fromkeys(here + each for each in inner)
        live = sum((-storage.nbytes for storage in ends.get(at, ())), live)
    return largest(sizes, symbols)


def _by_step(frame: Frame, first: bool) -> dict[int, list[Storage]]:
    """The storages that begin to live at each step, or that live at it for the last time."""
    found: dict[int, list[Storage]] = {}
    for life in frame.lives:
        found.setdefault(max(life.first, 0) if first else life.last, []).append(life.storage)
    return found


def largest(sizes: Sequence[Size] | Mapping[Size, None], symbols: Mapping[str, Bounds]) -> tuple[Size, ...]:
    """Those of some sizes that no other one is at least as large as, whatever the symbols are."""
    kept: list[Size] = []
    for size in sizes:
        if any(covers(other, size, symbols) for other in kept):
            continue
        kept = [other for other in kept if not covers(size, other, symbols)] + [size]
    return tuple(kept)


def covers(large: Size, small: Size, symbols: Mapping[str, Bounds]) -> bool:
    """Whether a size is proven to be at least as large as another one, whatever the symbols are."""
    return (large - small).interval(symbols)[0] >= 0


# -- at given sizes ------------------------------------------------------------------------------------------------


def live_at(
    frames: Mapping[str, Frame],
    entry: str,
    sizes: Mapping[str, int],
    alignment: int = 1,
    without: Storage | None = None,
) -> list[tuple[tuple[tuple[str, int], ...], int]]:
    """The bytes that live at each step of a run, each storage a multiple of `alignment`; one may be left out.

    A step is told by the functions and steps that lead to it: ((main, 3), (h, 5)).
    """
    known: dict[str, list[tuple[tuple[tuple[str, int], ...], int]]] = {}

    def flat(name: str) -> list[tuple[tuple[tuple[str, int], ...], int]]:
        if name in known:
            return known[name]
        frame, found, count = frames[name], [], 0
        begins, ends = _by_step(frame, first=True), _by_step(frame, first=False)
        taken = {x.storage: aligned(x.storage.nbytes.evaluate(sizes), alignment) for x in frame.lives}
        if without is not None:
            taken[without] = 0
        for at in range(len(frame.steps) + 1):
            count += sum(taken[storage] for storage in begins.get(at, ()))
            live = count - sum(taken[storage] for storage in frame.made_at(at))
            if at in frame.calls:
                found += [(((name, at), *path), live + inner) for path, inner in flat(frame.calls[at].callee)]
            elif at < len(frame.steps) or live:
                found.append((((name, at),), live))
            count -= sum(taken[storage] for storage in ends.get(at, ()))
        known[name] = found
        return found

    return flat(entry)


def aligned(size: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // alignment) * alignment
