"""The arena of an emitted module: the destinations of values in the storage plan, for each set of sizes.

    memory.x_1    the array into which a line writes x_1; None if the line allocates it, since the caller returns it
    memory.h_1    the memory of the call that returns h_1
    memory.x_1_work   the workspace of the call that returns x_1: `memory.x_1_work.scores`

Results that a library allocates are not in the arena. They are allocated when the line runs (foreign memory).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, Protocol

from treadle.backends.python.emission import EmittedProgram
from treadle.backends.python.workspace import Workspace
from treadle.ir.errors import BackendError
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.ir.types import DType
from treadle.passes.memory.frame_placement import PlacedFrame, place_frames
from treadle.passes.memory.frames import frames_of, parts_of
from treadle.passes.memory.storage_plan import How, StoragePlan

PLANS = 32  # number of cached sets of sizes


class ArenaArrays(Protocol):
    """The operations of a backend's arrays that an arena needs."""

    def allocated(self, count: int) -> Any:
        """Return a new array of `count` bytes, aligned to 64 bytes. Raises BackendError if memory is exhausted."""
        ...

    def laid(self, arena: Any, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        """Return a row-major array in the memory of `arena`, at a byte offset."""
        ...


class PythonArena:
    """The memory of all entries of a module: one array as large as the largest run so far, and its views for each set
    of sizes.

    array   the memory; None before the first run
    nbytes  size of the largest plan so far, in bytes
    poison  fills an array with NaN; it is applied to all memory before a run; None: not applied
    """

    def __init__(
        self,
        plan: StoragePlan,
        program: EmittedProgram,
        arrays: ArenaArrays,
        poison: Callable[[Any], None] | None = None,
    ) -> None:
        self.plan, self.program, self.arrays, self.poison = plan, program, arrays, poison
        self.frames, _ = parts_of(frames_of(plan))
        self.array: Any = None
        self.nbytes = 0
        self._lock = threading.Lock()
        self._memories: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], SimpleNamespace] = OrderedDict()

    def exclusive(self, entry: str) -> AbstractContextManager[object]:
        """Return the lock under which an entry uses `memory` and runs.

        The caller must enter the lock in its own frame, not in a generator. A generator would hold the lock as long as
        the traceback of a KeyboardInterrupt exists, as in an interactive session, and the next run would wait forever.
        """
        return self._lock if self.program.has_memory(entry) else nullcontext()

    def memory(self, entry: str, sizes: Mapping[str, int]) -> tuple[SimpleNamespace, ...]:
        """Return the argument `memory` of an entry's function at these sizes, in a tuple, which is empty if the
        function has no such argument. The argument is valid until the lock is released.

        Raises BackendError if there is not enough memory.
        """
        if not self.program.has_memory(entry):
            return ()
        try:
            memory = self._memory(entry, sizes)
        except OverflowError as error:  # the offsets exceed 64 bits
            received = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError("these sizes need more memory than is addressable", received=received) from error
        if self.poison is not None:
            self.poison(self.array)
        return (memory,)

    def _memory(self, entry: str, sizes: Mapping[str, int]) -> SimpleNamespace:
        key = entry, tuple(sorted(sizes.items()))
        if key in self._memories:
            self._memories.move_to_end(key)
            return self._memories[key]
        needed = self._called_by(entry)
        placed = place_frames({name: frame for name, frame in self.frames.items() if name in needed}, sizes)
        if self.array is None or placed[entry].size > self.nbytes:
            self._memories.clear()  # they are views of the old array
            self.array, self.nbytes = None, 0
            self.array, self.nbytes = self.arrays.allocated(placed[entry].size), placed[entry].size
        made = _Laying(self, placed, sizes).memory(entry, 0, ())
        self._memories[key] = made
        if len(self._memories) > PLANS:
            self._memories.popitem(last=False)
        return made

    def _called_by(self, entry: str) -> set[str]:
        """Return the functions that an entry runs, including itself. Functions of other entries may have sizes that are
        unknown in this entry.
        """
        found, waiting = {entry}, [entry]
        while waiting:
            new = {call.callee for call in self.frames[waiting.pop()].calls.values()} - found
            found |= new
            waiting += new
        return found


class _Laying:
    """A builder of the arrays of one set of sizes. Calls with equal offsets of frames and results share arrays."""

    def __init__(self, arena: PythonArena, placed: Mapping[str, PlacedFrame], sizes: Mapping[str, int]) -> None:
        self.arena, self.placed, self.sizes = arena, placed, sizes
        self._known: dict[tuple[str, int, tuple[int | None, ...]], SimpleNamespace] = {}

    def memory(self, name: str, base: int, given: Sequence[int | None]) -> SimpleNamespace:
        """Return the memory of a function whose frame begins at `base`. `given` are the caller's offsets of its
        outputs.
        """
        key = name, base, tuple(given)
        if key not in self._known:
            plan, program = self.arena.plan.functions[name], self.arena.program
            offsets = {storage: base + offset for storage, offset in self.placed[name].offsets.items()}
            for output, at in zip(plan.function.outputs.values(), given, strict=False):
                storage = plan.places[output].storage
                if storage is not None and at is not None:
                    offsets.setdefault(storage, at)
            made = SimpleNamespace()
            for attribute, value in program.destinations[name].items():
                storage = plan.places[value].storage
                assert storage is not None
                shape = tuple(size.evaluate(self.sizes) for size in value.type.storage_type.shape)
                setattr(made, attribute, self._laid(storage, offsets.get(storage), shape))
            for attribute, at in program.frames[name].items():
                setattr(made, attribute, self._called(name, at, base, offsets))
            for attribute, at in program.workspaces[name].items():
                views = plan.workspaces[at].items()
                setattr(made, attribute, Workspace(**{n: self._beside(v, offsets) for n, v in views}))
            self._known[key] = made
        return self._known[key]

    def _laid(self, storage: Storage, offset: int | None, shape: tuple[int, ...]) -> Any:
        if offset is None:
            return None
        assert storage.nbytes.evaluate(self.sizes) + offset <= self.arena.nbytes
        return self.arena.arrays.laid(self.arena.array, offset, shape, storage.dtype)

    def _beside(self, view: View, offsets: Mapping[Storage, int]) -> Any:
        shape = tuple(size.evaluate(self.sizes) for size in view.shape)
        return self._laid(view.storage, offsets[view.storage], shape)

    def _called(self, name: str, at: int, base: int, offsets: Mapping[Storage, int]) -> SimpleNamespace:
        """Return the memory of the function that a step calls."""
        plan = self.arena.plan.functions[name]
        node = plan.steps[at].root
        given: list[int | None] = []
        for result in node.results:
            place = plan.places[result]
            is_local = place.how is How.OWN and place.storage is not None and place.storage.kind is StorageKind.LOCAL
            given.append(offsets.get(place.storage) if is_local and place.storage is not None else None)
        return self.memory(str(node.op.callee), base + self.placed[name].callees[at], given)
