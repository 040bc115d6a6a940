"""Analyses of a kernel for threads: the place of its registers, and its barriers.

Registers are private to a thread if all accesses are scalars, or all are vectors whose lane t is in thread t. Otherwise
they are shared memory.

A barrier is placed before a statement that reads what another thread may have written since the last barrier, or writes
what another thread may have read or written. Accesses of the same thread need none. Two vectors are accessed by the
same threads if their first elements differ by a multiple of the group's size (`remainder`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.statements import (
    GLOBAL,
    SCALARS,
    SHARED,
    VECTORS,
    Access,
    Barrier,
    Declare,
    Let,
    Loop,
    Memory,
    Statement,
    Store,
    When,
    expressions_of,
    walk,
)
from treadle.backends.tvm.kernels.devices.values import NOTHING, Remainder, ThreadNode, divided, loads_of, remainder


def place_registers(body: list[Statement], device: Device) -> list[Memory]:
    """Decide where registers are stored, and return those in shared memory."""
    accesses: dict[Memory, list[Access]] = {s.memory: [] for s in walk(body) if isinstance(s, Declare)}
    for statement in walk(body):
        for access, _ in _accesses(statement):
            if access.memory.place != GLOBAL:
                accesses[access.memory].append(access)
    shared = []
    for memory, found in accesses.items():
        memory.place = _place(memory, found, device.group)
        if memory.place == SHARED:
            shared.append(memory)
    return shared


def _place(memory: Memory, accesses: list[Access], group: int) -> str:
    lanes = {access.lanes for access in accesses}
    if any(access.offset is not None for access in accesses):
        return SCALARS if group == 1 else SHARED
    if lanes <= {1} or group == 1:
        return SCALARS
    step = group if all(n % group == 0 for n in lanes) else lanes.pop() if len(lanes) == 1 else 0
    if step > 1 and all(divided(access.base, step) is not None for access in accesses):
        memory.step = step
        return VECTORS
    return SHARED


@dataclass(frozen=True)
class _Use:
    """An access since the last barrier.

    by    the threads: `first` for the first thread, `own` if thread t accesses element t after a multiple of the
    group's
          size plus `rest`, `any` otherwise
    """

    memory: Memory
    writes: bool
    by: str
    rest: Remainder = NOTHING

    def conflicts(self, other: _Use) -> bool:
        """Return True if different threads may access the same element, and one of them writes to it."""
        if self.memory is not other.memory or not (self.writes or other.writes):
            return False
        return not (self.by == other.by != "any" and self.rest == other.rest)


def place_barriers(body: list[Statement], device: Device) -> list[Statement]:
    """Return the statements with barriers. Threads with tasks of their own need none."""
    if device.group == 1:
        return body
    return _Placing(device.group, _watched(body)).block(body, set())[0]


def _watched(body: list[Statement]) -> set[Memory]:
    """Return the memory through which threads may communicate: shared memory, and buffers that the kernel writes."""
    return {a.memory for s in walk(body) for a, _ in _accesses(s) if a.memory.place == SHARED or a.memory.is_written}


class _Placing:
    def __init__(self, group: int, watched: set[Memory]) -> None:
        self.group, self.watched = group, {m for m in watched if m.place in (SHARED, GLOBAL)}
        self.values = 0

    def block(self, statements: list[Statement], uses: set[_Use]) -> tuple[list[Statement], set[_Use]]:
        """Return the statements with barriers, and the uses since the last barrier at their end, from those at the
        beginning.
        """
        made: list[Statement] = []
        for statement in statements:
            reads, writes = self._uses(statement)
            if any(new.conflicts(old) for new in (*reads, *writes) for old in uses):
                made.append(Barrier())
                uses = set()
            uses = uses | reads | writes
            if isinstance(statement, When):
                inner, after = self.block(statement.body, uses)
                made.append(When(statement.condition, inner))
                uses = uses | after
            elif isinstance(statement, Loop):
                made_loop, uses = self._loop(statement, uses)
                made.append(made_loop)
            else:
                held = any(r.conflicts(w) for r in reads for w in writes)
                made += self._split(statement) if held else [statement]
        return made, uses

    def _loop(self, loop: Loop, before: set[_Use]) -> tuple[Loop, set[_Use]]:
        inside = {loop.variable.data} | {s.variable.data for s in walk(loop.body) if hasattr(s, "variable")}
        begin = set(before)
        while True:
            body, after = self.block(loop.body, begin)
            # tasks are independent: none reads or writes a buffer's element that another one writes
            again = {_again(use, inside) for use in after if not (loop.tasks and use.memory.place == GLOBAL)}
            if again <= begin:
                return Loop(loop.variable, loop.count, body, loop.unrolled, loop.tasks), begin | after
            begin |= again

    def _split(self, statement: Statement) -> list[Statement]:
        """Return a store before which all threads have computed its value."""
        assert isinstance(statement, Store)
        self.values += 1
        value = statement.value
        held = ThreadNode("variable", value.type, (), f"value_before_{self.values}")
        return [Let(held, value), Barrier(), replace(statement, value=held)]

    def _uses(self, statement: Statement) -> tuple[set[_Use], set[_Use]]:
        reads: set[_Use] = set()
        writes: set[_Use] = set()
        first = isinstance(statement, Store) and statement.first == 1
        for access, stored in _accesses(statement):
            if access.memory not in self.watched:
                continue
            by, rest = "any", NOTHING
            if first:
                by = "first"
            elif access.is_own:
                found = remainder(access.base, self.group)
                by, rest = ("any", rest) if found is None else ("own", found)
            (writes if stored else reads).add(_Use(access.memory, stored, by, rest))
        return reads, writes


def _again(use: _Use, inside: set[str]) -> _Use:
    """Return a use of an earlier iteration of a loop, in which variables had other values."""
    if use.rest.names & inside:
        return _Use(use.memory, use.writes, "any")
    return use


def _accesses(statement: Statement) -> Iterable[tuple[Access, bool]]:
    """Yield the loads and stores of a statement, without the statements inside it, each with True for a store."""
    for node in expressions_of(statement):
        for load in loads_of(node):
            yield load.data, False
    if isinstance(statement, Store):
        yield statement.access, True
