"""Planning: a kernel program at one set of sizes becomes a table of kernel calls, which lacks only a few addresses.

Sizes and strides become numbers, local values get offsets in one arena, and every kernel call becomes a record. A
pointer is in a memory space (`treadle.backends.tvm.spaces`). If the space is fixed, the pointer becomes an address when
the plan is made. If the space moves between calls, the pointer becomes an offset, to which each call adds the start
address of the space.
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

# rough throughput of a core, and the seconds for waking a thread pool and waiting for it
_BYTES_A_SECOND, _FLOPS_A_SECOND, _WAKING = 20e9, 50e9, 10e-6
_STATUS_WORDS = 4  # in i64; see `program.STATUS`


@dataclass
class Relocation:
    """The argument words of a plan that hold addresses in one memory space, and the byte offset of each address."""

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

    table      one record for each kernel call; see `treadle.backends.tvm.kernels.runner`
    words      all arguments, 16 bytes each: a type code and a value
    moves      for each space that moves between calls, the words that hold addresses in it, and their offsets
    arena      bytes of the arena for local values
    least      lower bound on the arena for any placement of the local values
    shapes     shapes of the outputs by name
    steps      the step of each record
    status     four words for each record with indices, in order; see `program.STATUS`
    tellers    the steps of these records
    freed      (records, where, bytes): after this number of records, these bytes are unused
    host       the output whose memory holds local values that die before the output is written, or None
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
    """The states of the last call, whose addresses are in the table."""
    begins: dict[Moving, int] = field(default_factory=dict)
    """The start address of each moving space in the last call."""

    def addresses(self, number: int) -> tuple[int, ...]:
        """Return the addresses in a record's arguments, in the order of the pointers, as of the last call."""
        first = (int(self.table[number, 2]) - address(self.words)) // 16
        words = self.words[first : first + int(self.table[number, 3])]
        return tuple(words[words[:, 0] == POINTER, 1].tolist())

    def put(self, space: Moving, begin: int) -> None:
        """Write the addresses of all words in this space, which starts at `begin`."""
        if self.begins.get(space) != begin and space in self.moves:
            at, offsets = self.moves[space]
            self.words[at, 1] = offsets + begin
            self.begins[space] = begin


class Planner:
    """A builder of the plan of an entry for one set of sizes.

    entries  addresses of the compiled kernels
    held     a function that returns the array of a weight or a constant
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
        self.status_words = Relocation()
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
        at, offsets = self.status_words.arrays()
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
        """Return True if a step takes longer on one thread than waking threads, estimated from its bytes and
        operations.
        """
        if step not in self._known_worth:
            touched = sum(product(v.shape).evaluate(self.sizes) * v.dtype.bytes for v in step.views)
            flops = step.kernel.flops([s.evaluate(self.sizes) for s in step.sizes])
            self._known_worth[step] = max(touched / _BYTES_A_SECOND, flops / _FLOPS_A_SECOND) > _WAKING
        return self._known_worth[step]

    @cached_property
    def _known_worth(self) -> dict[KernelStep, bool]:
        return {}

    def _expand(self, routine: Routine, places: Mapping[Storage, Pointer], base: Pointer) -> None:
        """Add the calls of a routine whose arguments and results are at these places. Its frame starts at `base`."""
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
        """Return the pointer from which the offset of a routine's storage, or of a step's callee, is counted."""
        return places[frame.host] if frame.host is not None and of in frame.hosted else base

    def _dying(self, routine: Routine) -> Mapping[int, list[tuple[Storage, int]]]:
        """Return, for each step of a routine, the storages that no later step reads and their bytes."""
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
        """Return the value of the next argument word: an address, or an offset in a space whose address is not known
        yet.
        """
        space, offset = pointer
        match space:
            case Held():
                return space.address + offset
            case Status():
                self.status_words.add(len(self.words), offset + len(self.tellers) * 8 * _STATUS_WORDS)
                self.tellers.append(step)
            case Arena() | Input() | Output() | State():
                self.moves.setdefault(space, Relocation()).add(len(self.words), offset)
            case _:
                assert_never(space)
        return offset

    def _numbers(self, routine: Routine) -> list[tuple[KernelStep | RoutineStep, list[tuple[Storage, int]], list[int]]]:
        """Return a routine's steps with numbers in place of sizes. They are computed once for all calls of the
        routine.
        """
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
        """Return a pointer to byte `at` of a storage."""
        match storage.kind:
            case StorageKind.LOCAL | StorageKind.FOREIGN:
                return self._begin(storage, places, frame, base).after(frame.offsets[storage] + at)
            case StorageKind.STATUS:
                return Pointer(Status(), at)
            case StorageKind.ARGUMENT | StorageKind.RESULT | StorageKind.STATE if storage in places:
                space, begin = places[storage]
                return Pointer(space, begin + at)
            case StorageKind.ARGUMENT | StorageKind.RESULT | StorageKind.STATE | StorageKind.CONSTANT:
                # an argument of an entry that has no place is a weight
                return Pointer(Held(address(self.held(storage))), at)
            case _:
                assert_never(storage.kind)
