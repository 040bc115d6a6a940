"""Proven bounds of a run's memory at any sizes within bounds, if storages that are dead before a result is written are
placed in the result.

    hostings(frames, "main")[0].most_apart(symbols, least, most)

A result may be large enough for these storages at some sizes and too small at others: logits for few positions after
many positions are read. `place_frames` never takes more memory than consecutive buffers, whose total is a polynomial of
the symbols. So if the total of the earlier storages is at most the result's size, they are placed in it. If that is not
proven, a run takes at most the total of all buffers.

Both totals are evaluated over boxes of sizes, by interval arithmetic. A box in which the storages may not fit is split
in two, in the middle of the symbol whose bounds have the largest ratio. The box that may need most memory is split
first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import gcd, isqrt

from treadle.ir.errors import SizeError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.passes.memory.frame_placement import share_places
from treadle.passes.memory.frames import Frame
from treadle.passes.memory.storage_plan import Life

Box = Mapping[str, Bounds]
MOST_BOXES = 256
"""Maximum number of boxes that are examined."""


@dataclass(frozen=True, eq=False)
class Hosting:
    """A result of an entry that may hold earlier storages.

    result  the life of the result, from the first step that touches it
    left    sizes; the least is the rest of the result after all earlier storages are placed in sequence; each
            is divided by the symbols that all of its terms have in common
    whole   sizes; the largest is the total of all storages that the entry needs, in sequence
    alignment  of the storages, in bytes
    """

    result: Life
    left: tuple[Size, ...]
    whole: tuple[Size, ...]
    alignment: int

    def most_apart(self, symbols: Box, least: int, most: int) -> int:
        """Return the most bytes that a run may take at sizes at which the earlier storages may not fit into the result.

        least, most  multiples of the alignment; the returned number is clipped to this range
        """
        if any(not self._fits(at) and self._needs(at) >= most for at in _corners(symbols)):
            return most
        names = sorted({name for size in (*self.left, *self.whole) for name in size.symbols})
        first = {name: symbols.get(name, Bounds()) for name in names}
        boxes, count = [(-self._needs(first), 0, first)], 0
        while count < MOST_BOXES and boxes and -boxes[0][0] > least:
            if self._fits(boxes[0][2]):
                heappop(boxes)
                continue
            cut = _cut(boxes[0][2])
            if cut is None:
                break
            heappop(boxes)
            for half in cut:
                count += 1
                heappush(boxes, (-self._needs(half), count, half))
        return int(min(max(-boxes[0][0] // self.alignment * self.alignment, least), most)) if boxes else least

    def _fits(self, box: Box) -> bool:
        return all(size.interval(box)[0] >= 0 for size in self.left)

    def _needs(self, box: Box) -> float:
        return max(size.interval(box)[1] for size in self.whole)


def hostings(frames: Mapping[str, Frame], entry: str) -> list[Hosting]:
    """Return a `Hosting` for each result that an entry returns in new memory. In `frames`, callees come first.

    Return an empty list if sizes have more terms than an expression can hold.
    """
    frame, stacked, found = frames[entry], dict[str, tuple[Size, ...]](), list[Hosting]()
    if not frame.handed_out:
        return []
    try:
        for name, each in frames.items():
            stacked[name] = _stacked(
                each.lives, [stacked[call.callee] for call in each.calls.values()], frame.alignment
            )
        for result in frame.handed_out:
            before = [life for life in frame.lives if life.last < result.first]
            calls = [stacked[call.callee] for at, call in frame.calls.items() if at < result.first]
            early = _stacked(before, calls, frame.alignment)
            left = tuple([_by_common_symbols(result.storage.nbytes - size) for size in early])
            found.append(Hosting(result, left, stacked[entry], frame.alignment))
    except SizeError:
        return []
    return found


def _stacked(lives: Sequence[Life], callees: Sequence[Sequence[Size]], alignment: int) -> tuple[Size, ...]:
    """Return sizes, the largest of which is the total of buffers in sequence. Buffers of one size share places."""
    alike: dict[Size, list[Life]] = {}
    for life in lives:
        alike.setdefault(life.storage.nbytes, []).append(life)
    own = ZERO
    for size, held in alike.items():
        places = share_places([(life.first, life.last + 1) for life in held])
        own = own + (size + _gap(size, alignment)) * (max(places) + 1)
    return tuple(dict.fromkeys(own + size for each in callees for size in each)) or (own,)


def _gap(size: Size, alignment: int) -> int:
    """Return the maximum padding in bytes after a buffer of this size, up to the next multiple of the alignment."""
    return alignment - gcd(alignment, *(coefficient for _, coefficient in size.terms))


def _by_common_symbols(size: Size) -> Size:
    """Return a size of the same sign for nonnegative symbols: the size divided by the symbols that all of its terms
    have in common.
    """
    for name in sorted(size.symbols):
        while size.terms and (quotient := size.divide(Size.symbol(name))) is not None:
            size = quotient
    return size


# -- boxes of sizes ------------------------------------------------------------------------------------------------


def _cut(box: Box) -> list[dict[str, Bounds]] | None:
    """Return a box split in two, or None for a single point or an unbounded box."""
    ratios: dict[str, float] = {}
    for name, bounds in box.items():
        if bounds.upper is None:
            return None
        if bounds.upper > bounds.lower:
            ratios[name] = bounds.upper / max(bounds.lower, 1)
    if not ratios:
        return None
    name = max(ratios, key=ratios.__getitem__)
    lower, upper = box[name].lower, box[name].upper
    assert upper is not None
    middle = min(max(isqrt(max(lower, 1) * upper), lower), upper - 1)
    return [{**box, name: Bounds(lower, middle)}, {**box, name: Bounds(middle + 1, upper)}]


def _corners(box: Box) -> Iterator[dict[str, Bounds]]:
    """Yield single points: all symbols at their maximum, all at their minimum, and one at its minimum with all others
    at their maximum.
    """
    for small in ([], list(box), *([name] for name in box)):
        yield {
            name: Bounds(b.lower, b.lower) if name in small or b.upper is None else Bounds(b.upper, b.upper)
            for name, b in box.items()
        }
