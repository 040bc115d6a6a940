"""Planning for the host: placed calls (`treadle.backends.tvm.placed_calls`) become a table of kernel calls, which lacks
only a few addresses.

Every kernel call becomes a record. If the space of a pointer is fixed, the pointer becomes an address when the plan is
made. If the space moves between calls, the pointer becomes an offset, to which each call adds the start address of the
space.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, assert_never

import numpy as np

from treadle.backends.states import States
from treadle.backends.tvm.kernels.host.cache import Entry
from treadle.backends.tvm.kernels.host.calling import INTEGER, POINTER, address
from treadle.backends.tvm.kernels.host.runner import RECORD
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.program import KernelStep
from treadle.backends.tvm.placed_calls import STATUS_WORDS, Freed, PlacedCalls
from treadle.backends.tvm.spaces import Arena, Constant, Fixed, Held, Input, Moving, Output, Pointer, State, Status
from treadle.ir.sizing.sizes import product

Array = np.ndarray[Any, Any]

# rough throughput of a core, and the seconds for waking a thread pool and waiting for it
_BYTES_A_SECOND, _FLOPS_A_SECOND, _WAKING = 20e9, 50e9, 10e-6


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

    table      one record for each kernel call; see `treadle.backends.tvm.kernels.host.runner`
    words      all arguments, 16 bytes each: a type code and a value
    moves      for each space that moves between calls, the words that hold addresses in it, and their offsets
    arena      bytes of the arena for local values
    least      lower bound on the arena for any placement of the local values
    shapes     shapes of the outputs by name
    steps      the step of each record
    status     four words for each record with indices, in order; see `program.STATUS`
    tellers    the steps of these records
    freed      memory that becomes unused, in the order of the records
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
    freed: Sequence[Freed]
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


class HostEncoder:
    """An encoder of placed calls as a table of records.

    sizes      the sizes of the symbols
    threads    number of threads that kernels use
    entries    addresses of the compiled kernels
    addresses  returns the address of a weight or a constant
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        threads: int,
        entries: Mapping[Kernel, Entry],
        addresses: Callable[[Fixed], int],
    ) -> None:
        self.sizes, self.threads, self.entries, self._address = sizes, threads, entries, addresses
        self.records: list[tuple[Entry, int, int]] = []
        self.words: list[tuple[int, int]] = []
        self.moves: dict[Moving, Relocation] = {}
        self.status_words = Relocation()
        self.steps: list[KernelStep] = []
        self.tellers: list[KernelStep] = []

    def plan(self, placed: PlacedCalls) -> Plan:
        for step, pointers, numbers in placed.calls:
            first = len(self.words)
            for pointer in pointers:
                self.words.append((POINTER, self._value(pointer, step)))
            self.words += [(INTEGER, n) for n in numbers]
            self.records.append((self.entries[step.kernel], first, len(self.words) - first))
            self.steps.append(step)
        table = np.zeros((len(self.records), RECORD), np.int64)
        words = np.array(self.words, np.int64).reshape(-1, 2)
        for i, ((function, handle), first, count) in enumerate(self.records):
            alone = self.threads == 1 or not self._worth_threads(self.steps[i])
            table[i] = (function, handle, address(words) + 16 * first, count, alone)
        moves = {space: move.arrays() for space, move in self.moves.items()}
        status = np.zeros((len(self.tellers), STATUS_WORDS), np.int64)
        at, offsets = self.status_words.arrays()
        words[at, 1] = offsets + address(status)
        return Plan(
            table,
            words,
            moves,
            placed.arena,
            placed.least,
            placed.shapes,
            self.steps,
            status,
            self.tellers,
            placed.freed,
            placed.host,
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

    def _value(self, pointer: Pointer, step: KernelStep) -> int:
        """Return the value of the next argument word: an address, or an offset in a space whose address is not known
        yet.
        """
        space, begin, _, offset = pointer
        match space:
            case Arena() | Input() | Output() | State():
                self.moves.setdefault(space, Relocation()).add(len(self.words), begin + offset)
            case Held() | Constant():
                return self._address(space) + begin + offset
            case Status():
                self.status_words.add(len(self.words), offset + len(self.tellers) * 8 * STATUS_WORDS)
                self.tellers.append(step)
            case _:
                assert_never(space)
        return begin + offset
