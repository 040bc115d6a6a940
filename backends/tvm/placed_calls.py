"""Placed calls: an entry of a kernel program at one set of sizes, as a flat list of kernel calls.

Sizes and strides become numbers, local values get offsets in one arena, and calls of routines are expanded. The
pointers of a call are locations in memory spaces (`treadle.backends.tvm.spaces`), without addresses. The list is the
same for all memories of one form. `treadle.backends.tvm.planning` encodes it for the host, and
`treadle.backends.tvm.runtimes.device_plans` for a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from treadle.backends.outside_axis import error_of
from treadle.backends.tvm.lowering.program import STATUS, KernelProgram, KernelStep, ProgramEntry, Routine, RoutineStep
from treadle.backends.tvm.spaces import (
    HOST,
    Arena,
    Constant,
    Fixed,
    Held,
    Input,
    MemoryForm,
    Output,
    Pointer,
    Space,
    State,
    Status,
)
from treadle.ir.errors import BackendError
from treadle.ir.storage.views import Storage, StorageKind
from treadle.ir.types import DType
from treadle.passes.memory.frame_placement import PlacedFrame, place_frames

Array = np.ndarray[Any, Any]

STATUS_WORDS = 4  # in i64; see `program.STATUS`


class PlacedCall(NamedTuple):
    """A kernel call: its step, a location for each pointer, and a number for each size."""

    step: KernelStep
    pointers: list[Pointer]
    sizes: list[int]


class Freed(NamedTuple):
    """After `calls` calls, the `nbytes` bytes at `pointer` are unused."""

    calls: int
    pointer: Pointer
    nbytes: int


@dataclass(frozen=True)
class PlacedCalls:
    """The kernel calls of an entry at one set of sizes.

    calls    the calls, in order
    shapes   shapes of the outputs by name
    arena    bytes of the arena for local values
    least    lower bound on the arena for any placement of the local values
    freed    memory that becomes unused, in the order of the calls
    host     the output whose memory holds local values that die before the output is written, or None
    """

    calls: list[PlacedCall]
    shapes: Mapping[str, tuple[int, ...]]
    arena: int
    least: int
    freed: list[Freed]
    host: str | None


def reported_error(words: Array, tellers: Sequence[KernelStep]) -> BackendError:
    """Return the error of the first kernel that reported one in its status words.

    words    the status words, four for each of `tellers`
    tellers  the steps that report errors
    """
    rows = words[: STATUS_WORDS * len(tellers)].reshape(-1, STATUS_WORDS)
    first = int(np.flatnonzero(rows[:, 0])[0])
    return error_of(rows[first].tolist()).located(tellers[first].node, tellers[first].kernel.title)


class FixedSpaces:
    """The spaces of a program's weights and constants. Equal constants have one space.

    constants  dtype and bytes of each constant, by number
    """

    def __init__(self, program: KernelProgram) -> None:
        self._constants: dict[Storage, Constant] = {}
        numbers: dict[tuple[DType, bytes], int] = {}
        for routine in program.routines:
            for step in routine.steps:
                for storage in [view.storage for view in step.views if view.storage.kind is StorageKind.CONSTANT]:
                    assert storage.literal is not None
                    number = numbers.setdefault((storage.dtype, storage.literal.data), len(numbers))
                    self._constants[storage] = Constant(number)
        self.constants = list(numbers)

    def of(self, entry: ProgramEntry) -> dict[Storage, Fixed]:
        """Return the space of each weight of an entry and of each constant."""
        return {**self._constants, **{storage: Held(name) for name, storage in entry.weights.items()}}


def place_calls(
    entry: ProgramEntry,
    sizes: Mapping[str, int],
    fixed: Mapping[Storage, Fixed],
    form: MemoryForm = HOST,
) -> PlacedCalls:
    """Return the kernel calls of an entry.

    fixed  the spaces of weights and constants
    form   the form of values in memory

    Raises OverflowError if the bytes do not fit into 64 bits.
    """
    return _Placing(entry, sizes, fixed, form).placed()


class _Location(NamedTuple):
    """A pointer of a routine's step: byte `offset` of a storage.

    begin  for a local storage, its offset in the routine's frame, or in the host; for any other, None
    """

    storage: Storage
    offset: int
    begin: int | None = None
    in_host: bool = False


class _Numbers(NamedTuple):
    """A routine's step with numbers in place of sizes. They are computed once for all calls of the routine.

    callee  for a call of a routine, the offset of its frame, in this routine's frame or in the host
    dying   the storages that no later step accesses, and their bytes
    """

    step: KernelStep | RoutineStep
    locations: list[_Location]
    sizes: list[int]
    callee: int
    callee_in_host: bool
    dying: list[tuple[_Location, int]]


class _Placing:
    def __init__(
        self,
        entry: ProgramEntry,
        sizes: Mapping[str, int],
        fixed: Mapping[Storage, Fixed],
        form: MemoryForm,
    ) -> None:
        self.entry, self.sizes, self.form = entry, sizes, form
        self.fixed = {storage: Pointer(space, 0, storage) for storage, space in fixed.items()}
        self.fixed[STATUS] = Pointer(Status(), 0, STATUS)
        self.calls: list[PlacedCall] = []
        self.freed: list[Freed] = []
        self.frames = place_frames(
            {routine.name: routine.frame for routine in entry.routines}, sizes, form.alignment, form.nbytes
        )
        self._routines: dict[str, list[_Numbers]] = {}

    def placed(self) -> PlacedCalls:
        entry = self.entry
        places = {storage: Pointer(Input(name), 0, storage) for name, storage in entry.inputs.items()}
        places |= {storage: Pointer(State(name), 0, storage) for name, storage in entry.states.items()}
        places |= {view.storage: Pointer(Output(name), 0, view.storage) for name, view in entry.outputs.items()}
        self._expand(entry.routine, places, Arena(), 0)
        frame = self.frames[entry.routine.name]
        return PlacedCalls(
            self.calls,
            {name: tuple(s.evaluate(self.sizes) for s in view.shape) for name, view in entry.outputs.items()},
            frame.size,
            frame.bound,
            self.freed,
            next((name for name, view in entry.outputs.items() if view.storage is frame.host), None),
        )

    def _expand(self, routine: Routine, places: Mapping[Storage, Pointer], space: Space, begin: int) -> None:
        """Add the calls of a routine whose arguments and results are at these places. Its frame starts at byte `begin`
        of a space.
        """
        host = self.frames[routine.name].host
        hosted = None if host is None else places[host]
        fixed = self.fixed

        def pointer(location: _Location) -> Pointer:
            storage, offset, own, in_host = location
            if own is None:
                place = places.get(storage) or fixed[storage]
                return Pointer(place[0], place[1], place[2], place[3] + offset) if place[3] or offset else place
            if in_host:
                assert hosted is not None
                return Pointer(hosted.space, hosted.at + own, storage, offset)
            return Pointer(space, begin + own, storage, offset)

        for step, locations, sizes, callee, callee_in_host, dying in self._numbers(routine):
            pointers = [pointer(location) for location in locations]
            if isinstance(step, RoutineStep):
                storages = [*step.routine.arguments, *step.routine.results]
                inner = dict(zip(storages, pointers, strict=True))
                if callee_in_host:
                    assert hosted is not None
                    self._expand(step.routine, inner, hosted.space, hosted.at + callee)
                else:
                    self._expand(step.routine, inner, space, begin + callee)
            else:
                self.calls.append(PlacedCall(step, pointers, sizes))
            for location, count in dying:
                self.freed.append(Freed(len(self.calls), pointer(location), count))

    def _numbers(self, routine: Routine) -> list[_Numbers]:
        if routine.name not in self._routines:
            frame, nbytes = self.frames[routine.name], self.form.nbytes
            dying: dict[int, list[tuple[_Location, int]]] = {}
            for life in routine.lives:
                count = nbytes(life.storage).evaluate(self.sizes)
                dying.setdefault(life.last, []).append((self._location(life.storage, 0, frame), count))
            self._routines[routine.name] = [
                _Numbers(
                    step,
                    [
                        self._location(v.storage, v.offset.evaluate(self.sizes) * self.form.element(v.dtype), frame)
                        for v in step.views
                    ],
                    [] if isinstance(step, RoutineStep) else [s.evaluate(self.sizes) for s in step.sizes],
                    frame.callees.get(number, 0),
                    number in frame.hosted,
                    dying.get(number, []),
                )
                for number, step in enumerate(routine.steps)
            ]
        return self._routines[routine.name]

    def _location(self, storage: Storage, offset: int, frame: PlacedFrame) -> _Location:
        begin = frame.offsets[storage] if storage.kind.is_own else None
        return _Location(storage, offset, begin, storage in frame.hosted)
