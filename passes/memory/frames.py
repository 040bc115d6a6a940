"""Frames: the storages of a function with their first and last steps; and the most bytes that are live at once.

    frames = frames_of(plan)                       one for each function of a storage plan
    peaks = peaks_of(frames, graph.symbols)        polynomials; the largest is the peak, at any sizes
    live_at(frames, "main", {"B": 8, "S": 512})    the bytes that are live at each step, callees' included

A plan and a backend's version of the plan, which adds workspaces of single kernels, have frames of the same form. While
a call runs, the frame of its callee is live in addition to the live storages of the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.ir.graph import Node
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.storage.views import Storage, StorageKind
from treadle.passes.memory.storage_plan import FunctionPlan, Life, StoragePlan

ALIGNMENT = 64
"""The alignment of storages on the host in bytes: a cache line, and the widest vector."""


@dataclass(frozen=True)
class FrameCall:
    """A step that runs another function.

    storages  storages of the caller that count as the callee's while it runs, since the callee computes their values
    """

    callee: str
    storages: tuple[Storage, ...] = ()


@dataclass(frozen=True, eq=False)
class Frame:
    """The storages of a function.

    steps       the node of each step, in the order in which they run; None for the copy of an output
    lives       each storage, from the first step that needs it to the last; for an output, to the number of steps
    calls       calls by step
    handed_out  for an entry: new memory for its caller, from the first step that touches it. Storages that are dead
                before that step may be placed in this memory
    alignment   every storage begins at a multiple of this number of bytes
    """

    name: str
    steps: tuple[Node | None, ...]
    lives: tuple[Life, ...]
    calls: Mapping[int, FrameCall]
    handed_out: tuple[Life, ...] = ()
    alignment: int = ALIGNMENT

    def alive(self, at: int) -> list[Life]:
        """Return the storages that are live at a step, without those that a callee allocates in this step."""
        made = self.calls[at].storages if at in self.calls else ()
        return [x for x in self.lives if x.first <= at <= x.last and x.storage not in made]

    def made_at(self, at: int) -> list[Storage]:
        """Return the storages that are live at a step and that a callee allocates in it."""
        made = self.calls[at].storages if at in self.calls else ()
        return [x.storage for x in self.lives if x.first <= at <= x.last and x.storage in made] if made else []


def frames_of(plan: StoragePlan) -> dict[str, Frame]:
    """Return the frames of a plan, callees first."""
    return {name: frame_of(each, plan.functions, plan.strided) for name, each in plan.functions.items()}


def frame_of(plan: FunctionPlan, callees: Mapping[str, FunctionPlan], strided: bool) -> Frame:
    """Return the frame of one function. Its outputs are in the caller's memory, unless a library allocates them."""
    own = [life for life in plan.lives if life.storage.kind.is_own]
    lives = tuple([life for life in own if strided or life.last < plan.end or life.storage.kind is StorageKind.FOREIGN])
    calls = {}
    for at, step in enumerate(plan.steps):
        if step.root.op.callee is not None:
            made = () if strided else _made(step.root, plan, callees[step.root.op.callee])
            calls[at] = FrameCall(step.root.op.callee, made)
    return Frame(plan.function.name, tuple([step.root for step in plan.steps]), lives, calls)


def _made(node: Node, plan: FunctionPlan, callee: FunctionPlan) -> tuple[Storage, ...]:
    """Return the storages of a call's results that the callee allocates itself, in a library."""
    found = []
    for output, result in zip(callee.function.outputs.values(), node.results, strict=False):
        theirs, ours = callee.places[output].storage, plan.places[result].storage
        if theirs is not None and ours is not None and theirs.kind is StorageKind.FOREIGN:
            found.append(ours)
    return tuple(dict.fromkeys(found))


def parts_of(frames: Mapping[str, Frame]) -> tuple[dict[str, Frame], dict[str, Frame]]:
    """Return two dicts: the frames with the storages in an arena, and the frames with the storages that a library
    allocates.
    """

    def part(frame: Frame, foreign: bool) -> Frame:
        lives = [life for life in frame.lives if (life.storage.kind is StorageKind.FOREIGN) is foreign]
        calls = frame.calls if foreign else {at: FrameCall(call.callee) for at, call in frame.calls.items()}
        return replace(frame, lives=tuple(lives), calls=calls)

    inside, beside = ({name: part(frame, foreign) for name, frame in frames.items()} for foreign in (False, True))
    return inside, beside


# -- at all sizes --------------------------------------------------------------------------------------------------


def peaks_of(frames: Mapping[str, Frame], symbols: Mapping[str, Bounds]) -> dict[str, tuple[Size, ...]]:
    """Return sizes for each function. The largest of them is the function's peak, including callees' frames. No size is
    proven to be at least as large as another.
    """
    found: dict[str, tuple[Size, ...]] = {}
    for name, frame in frames.items():
        found[name] = peak_of(frame, found, symbols)
    return found


def peak_of(frame: Frame, callees: Mapping[str, Sequence[Size]], symbols: Mapping[str, Bounds]) -> tuple[Size, ...]:
    """Return sizes, the largest of which is the peak of one function."""
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
    """Return the storages whose life begins at each step, if `first`, else the storages whose life ends there."""
    found: dict[int, list[Storage]] = {}
    for life in frame.lives:
        found.setdefault(max(life.first, 0) if first else life.last, []).append(life.storage)
    return found


def largest(sizes: Sequence[Size] | Mapping[Size, None], symbols: Mapping[str, Bounds]) -> tuple[Size, ...]:
    """Return the sizes for which no other size is proven to be at least as large, whatever the symbols are."""
    kept: list[Size] = []
    for size in sizes:
        if any(covers(other, size, symbols) for other in kept):
            continue
        kept = [other for other in kept if not covers(size, other, symbols)] + [size]
    return tuple(kept)


def covers(large: Size, small: Size, symbols: Mapping[str, Bounds]) -> bool:
    """Return True if a size is proven to be at least as large as another, whatever the symbols are."""
    return (large - small).interval(symbols)[0] >= 0


# -- at given sizes ------------------------------------------------------------------------------------------------


def live_at(
    frames: Mapping[str, Frame],
    entry: str,
    sizes: Mapping[str, int],
    alignment: int = 1,
    without: Storage | None = None,
) -> list[tuple[tuple[tuple[str, int], ...], int]]:
    """Return the number of bytes that are live at each step of a run. Each storage is rounded up to `alignment`;
    `without` is left out.

    A step is identified by the functions and steps that lead to it: ((main, 3), (h, 5)).
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
    """Return a size rounded up to a multiple of the alignment."""
    return -(-size // alignment) * alignment
