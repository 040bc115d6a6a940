"""Planning: a kernel program at one set of sizes, as a table of calls that only lacks a few addresses.

Sizes and strides become numbers, locals get offsets in one arena, every kernel call a record. A pointer lies in a space
(`treadle.backends.tvm.spaces`): what stays becomes an address now, what moves an offset that each call adds to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, assert_never

import numpy as np

from treadle.backends.states import States
from treadle.backends.tvm.kernels.cache import Entry
from treadle.backends.tvm.kernels.calling import INTEGER, POINTER, address
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.runner import RECORD
from treadle.backends.tvm.lowering.program import KernelStep, ProgramEntry, Routine, RoutineStep
from treadle.backends.tvm.spaces import Arena, Held, Input, Moving, Output, Pointer, State, Status
from treadle.ir.sizing.sizes import product
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.passes.memory.frame_placement import PlacedFrame, place_frames

Array = np.ndarray[Any, Any]

# What a core does, roughly, and what it takes to wake a pool of threads and wait for it.
_BYTES_A_SECOND, _FLOPS_A_SECOND, _WAKING = 20e9, 50e9, 10e-6
_STATUS_WORDS = 4  # of i64; see `program.STATUS`


@dataclass
class Relocation:
    """Words of a plan's arguments that hold addresses in one space, with the offsets in bytes."""

    at: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, at: int, offset: int) -> None:
        self.at.append(at)
        self.offsets.append(offset)

    def arrays(self) -> tuple[Array, Array]:
        return np.array(self.at, np.int64), np.array(self.offsets, np.int64)


@dataclass
class Plan:
    """The program at one set of sizes.

    table      a record a kernel call; see `treadle.backends.tvm.kernels.runner`
    words      all arguments, 16 bytes each: a type index and a value
    moves      for each space that another call has elsewhere, which words hold addresses in it, and their offsets
    arena      bytes that locals need
    least      no placement of the locals needs fewer
    shapes     of the outputs
    steps      for each record the step that it came from
    status     four words for each record that is given indices, in order; see `program.STATUS`
    tellers    the steps of these records
    freed      (records, where, bytes): after so many records nobody reads these bytes any longer
    host       the output in whose memory lies what dies before that is written; None: nothing does
    """

    table: Array
    words: Array
    moves: Mapping[Moving, tuple[Array, Array]]
    arena: int
    least: int
    shapes: Mapping[str, tuple[int, ...]]
    steps: Sequence[KernelStep]
    status: Array
    tellers: Sequence[KernelStep]
    freed: Sequence[tuple[int, Pointer, int]]
    host: str | None
    states: weakref.ref[States] | None = None
    """Those of the last call: their addresses are in place."""
    begins: dict[Moving, int] = field(default_factory=dict)
    """Where each space began in the last call."""

    def put(self, space: Moving, begin: int) -> None:
        """Write the addresses that lie in a space which begins there."""
        if self.begins.get(space) != begin and space in self.moves:
            at, offsets = self.moves[space]
            self.words[at, 1] = offsets + begin
            self.begins[space] = begin


class Planner:
    """Puts numbers in for the symbols: a plan of an entry for one set of sizes.

    entries  where the kernels' code is
    held     the array of a weight or a constant
    """

    def __init__(
        self,
        program: ProgramEntry,
        sizes: Mapping[str, int],
        threads: int,
        entries: Mapping[Kernel, Entry],
        held: Callable[[Storage], Array],
    ) -> None:
        self.program, self.sizes, self.threads = program, sizes, threads
        self.entries, self.held = entries, held
        self.records: list[tuple[Entry, int, int]] = []
        self.words: list[tuple[int, int]] = []
        self.moves: dict[Moving, Relocation] = {}
        self.told = Relocation()
        self.steps: list[KernelStep] = []
        self.tellers: list[KernelStep] = []
        self.freed: list[tuple[int, Pointer, int]] = []
        self.frames = place_frames({routine.name: routine.frame for routine in program.routines}, sizes)

    def plan(self) -> Plan:
        program = self.program
        places = {storage: Pointer(Input(name)) for name, storage in program.inputs.items()}
        places |= {storage: Pointer(State(name)) for name, storage in program.states.items()}
        places |= {view.storage: Pointer(Output(name)) for name, view in program.outputs.items()}
        self._expand(program.routine, places, Pointer(Arena()))
        table = np.zeros((len(self.records), RECORD), np.int64)
        words = np.array(self.words, np.int64).reshape(-1, 2)
        for i, ((function, handle), first, count) in enumerate(self.records):
            alone = self.threads == 1 or not self._worth_threads(self.steps[i])
            table[i] = (function, handle, address(words) + 16 * first, count, alone)
        placed = self.frames[program.routine.name]
        shapes = {n: tuple(s.evaluate(self.sizes) for s in v.shape) for n, v in program.outputs.items()}
        moves = {space: move.arrays() for space, move in self.moves.items()}
        status = np.zeros((len(self.tellers), _STATUS_WORDS), np.int64)
        at, offsets = self.told.arrays()
        words[at, 1] = offsets + address(status)
        return Plan(
            table,
            words,
            moves,
            placed.size,
            placed.bound,
            shapes,
            self.steps,
            status,
            self.tellers,
            self.freed,
            next((name for name, view in program.outputs.items() if view.storage is placed.host), None),
        )

    def _worth_threads(self, step: KernelStep) -> bool:
        """Whether a step takes longer than it takes to wake threads: by the bytes it touches and its operations."""
        if step not in self._known_worth:
            touched = sum(product(v.shape).evaluate(self.sizes) * v.dtype.bytes for v in step.views)
            flops = step.kernel.flops([s.evaluate(self.sizes) for s in step.sizes])
            self._known_worth[step] = max(touched / _BYTES_A_SECOND, flops / _FLOPS_A_SECOND) > _WAKING
        return self._known_worth[step]

    @cached_property
    def _known_worth(self) -> dict[KernelStep, bool]:
        return {}

    def _expand(self, routine: Routine, places: Mapping[Storage, Pointer], base: Pointer) -> None:
        """Add the calls of a routine whose frame begins at `base`, with arguments and results at these places."""
        frame, dying = self.frames[routine.name], self._dying(routine)
        for number, (step, views, sizes) in enumerate(self._numbers(routine)):
            pointers = [self._place(storage, at, places, frame, base) for storage, at in views]
            if isinstance(step, RoutineStep):
                storages = [*step.routine.arguments, *step.routine.results]
                begin = self._begin(number, places, frame, base).after(frame.callees[number])
                self._expand(step.routine, dict(zip(storages, pointers, strict=True)), begin)
            else:
                first = len(self.words)
                for pointer in pointers:
                    self.words.append((POINTER, self._value(pointer, step)))
                self.words += [(INTEGER, n) for n in sizes]
                self.records.append((self.entries[step.kernel], first, len(self.words) - first))
                self.steps.append(step)
            for storage, count in dying.get(number, ()):
                self.freed.append((len(self.records), self._place(storage, 0, places, frame, base), count))

    def _begin(
        self, of: Storage | int, places: Mapping[Storage, Pointer], frame: PlacedFrame, base: Pointer
    ) -> Pointer:
        """From where the offset counts of a storage of a routine, or of the callee of a step."""
        return places[frame.host] if frame.host is not None and of in frame.hosted else base

    def _dying(self, routine: Routine) -> Mapping[int, list[tuple[Storage, int]]]:
        """By step of a routine: the storages that no later step reads, and their bytes."""
        if routine.name not in self._known_dying:
            found: dict[int, list[tuple[Storage, int]]] = {}
            for life in routine.lives:
                count = life.storage.nbytes.evaluate(self.sizes)
                found.setdefault(life.last, []).append((life.storage, count))
            self._known_dying[routine.name] = found
        return self._known_dying[routine.name]

    @cached_property
    def _known_dying(self) -> dict[str, Mapping[int, list[tuple[Storage, int]]]]:
        return {}

    def _value(self, pointer: Pointer, step: KernelStep) -> int:
        """What the next word holds: an address, or, until that is known, the offset in its space."""
        space, offset = pointer
        match space:
            case Held():
                return space.address + offset
            case Status():
                self.told.add(len(self.words), offset + len(self.tellers) * 8 * _STATUS_WORDS)
                self.tellers.append(step)
            case Arena() | Input() | Output() | State():
                self.moves.setdefault(space, Relocation()).add(len(self.words), offset)
            case _:
                assert_never(space)
        return offset

    def _numbers(self, routine: Routine) -> list[tuple[KernelStep | RoutineStep, list[tuple[Storage, int]], list[int]]]:
        """A routine's steps with numbers for sizes, made once however often it is called."""
        if routine.name not in self._known:
            self._known[routine.name] = [
                (
                    step,
                    [(v.storage, self._bytes(v)) for v in step.views],
                    [] if isinstance(step, RoutineStep) else [s.evaluate(self.sizes) for s in step.sizes],
                )
                for step in routine.steps
            ]
        return self._known[routine.name]

    @cached_property
    def _known(self) -> dict[str, list[tuple[KernelStep | RoutineStep, list[tuple[Storage, int]], list[int]]]]:
        return {}

    def _bytes(self, view: View) -> int:
        return view.offset.evaluate(self.sizes) * view.dtype.bytes

    def _place(
        self, storage: Storage, at: int, places: Mapping[Storage, Pointer], frame: PlacedFrame, base: Pointer
    ) -> Pointer:
        """A storage's byte `at`."""
        match storage.kind:
            case StorageKind.LOCAL | StorageKind.FOREIGN:
                return self._begin(storage, places, frame, base).after(frame.offsets[storage] + at)
            case StorageKind.STATUS:
                return Pointer(Status(), at)
            case StorageKind.ARGUMENT | StorageKind.RESULT | StorageKind.STATE if storage in places:
                space, begin = places[storage]
                return Pointer(space, begin + at)
            case StorageKind.ARGUMENT | StorageKind.RESULT | StorageKind.STATE | StorageKind.CONSTANT:
                # of an entry's arguments, the weights
                return Pointer(Held(address(self.held(storage))), at)
            case _:
                assert_never(storage.kind)
