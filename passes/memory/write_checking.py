"""Check that no step of a storage plan overwrites a value that is read later, at one set of sizes.

The steps are replayed for every storage that more than one of them writes: each write stores its number in the cells
that it writes. `stride_checking.py` compares the order of a value's elements with the references. So a value is intact
as long as all its cells hold the number of its write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from treadle.ir.graph import Node, Value
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.passes.memory.sized_plan import SizedPlan
from treadle.passes.memory.storage_plan import How
from treadle.passes.memory.wrong_plans import wrong_plan

Array = np.ndarray[Any, Any]

MOST_CELLS = 1 << 26
"""Maximum number of cells of a storage that is replayed."""


def lost_writes(at: SizedPlan) -> list[str]:
    """Replay the steps. Return lines on storages that are too large to be replayed.

    Raises PassError if a step reads a value that was overwritten.
    """
    plan = at.plan
    writers: dict[Storage, int] = {}
    for place in plan.places.values():
        if (place.is_written or place.how in (How.STATE, How.GIVEN)) and place.storage is not None:
            writers[place.storage] = writers.get(place.storage, 0) + 1
    shared = {s for s, n in writers.items() if n > 1}
    reused = [plan.places[v].storage for v in plan.reuses]
    blocks = _blocks(at, {*shared, *reused, *(plan.results.values() if reused else ())})
    large = {s for s in shared if at.number(s.elements) > MOST_CELLS * blocks[s]}
    if shared - large:
        _Run(at, {s: blocks[s] for s in shared - large}).run()
    for value in plan.reuses:
        argument, (result,) = plan.places[value].storage, plan.results.values()
        if argument is None or argument.kind is not StorageKind.ARGUMENT or argument.elements != result.elements:
            raise wrong_plan("its result does not fit into the storage of an argument", plan, value)
        block = math.gcd(blocks[argument], blocks.get(result, blocks[argument]))
        if at.number(argument.elements) > MOST_CELLS * block:
            large.add(argument)
        else:
            cells = {s: blocks[s] for s in shared - large} | {argument: block, result: block}
            _Run(at, cells, (argument, result)).run()
    return [f"{plan.function.name}: {s.name} is too large to be replayed" for s in shared if s in large]


def _blocks(at: SizedPlan, storages: set[Storage | None]) -> dict[Storage, int]:
    """Return the number of elements in a cell of each storage. Every view contains either all elements of a cell, in
    order, or none.
    """
    found: dict[Storage, int] = {}
    for place in at.plan.places.values():
        view = place.view
        if view is None or view.storage not in storages:
            continue
        shape, strides, begin = at.lies(view)
        moves = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and s]
        inner = [n for n, s in moves if s == 1] or [1]
        outer = [s for _, s in moves if s != 1]
        known = found.get(view.storage, at.number(view.storage.elements))
        found[view.storage] = math.gcd(known, begin, *inner, *outer)
    return found


class _Run:
    """A replay of the steps.

    blocks  the number of elements in a cell of each storage
    cells   the contents of the cells of each storage
    holds   the number of the write that stored a value, or the value that it is a view of
    """

    def __init__(
        self, at: SizedPlan, blocks: Mapping[Storage, int], one: tuple[Storage, Storage] | None = None
    ) -> None:
        """Set up the cells.

        one  an argument and a result that share their memory
        """
        self.at, self.plan, self.blocks = at, at.plan, blocks
        self.cells = {s: np.zeros(at.number(s.elements) // block, np.int32) for s, block in blocks.items()}
        if one is not None:
            self.cells[one[1]] = self.cells[one[0]]
        self.holds: dict[Value, int] = {}
        self.writes = 0

    def run(self) -> None:
        end = len(self.plan.steps)
        for value in filter(self._is_shared, self.at.function.arguments):
            self._write(value)
        for number, step in enumerate(self.plan.steps):
            reads = any(self.plan.places[v].is_written for v in step.root.results)  # a view reads no elements
            for value in step.inputs if reads else ():
                self._read(value, f"step {number}, {step.root.op.name}, reads")
            for value in step.root.results:
                if not self._is_shared(value):
                    continue
                if self.plan.places[value].is_written:
                    for x in step.inputs:
                        if x is not value.before:
                            self._apart(value, x, step.nodes)
                    self._write(value)
                else:
                    self.holds[value] = self.holds[step.root.inputs[0]]
        for name, value in self.at.function.outputs.items():
            self._read(value, f"output {name}, at step {end}, is")

    def _is_shared(self, value: Value) -> bool:
        return self.plan.places[value].storage in self.cells

    def _seen(self, value: Value) -> Array:
        """Return the cells of a value's elements, as a view of the same memory."""
        view = self.plan.places[value].view
        assert view is not None
        return self._shown(self.cells[view.storage], view)

    def _shown(self, cells: Array, view: View) -> Array:
        """Return the cells of a view of a storage, sharing its memory. The view's bounds were checked before."""
        (shape, strides, begin), block = self.at.lies(view), self.blocks[view.storage]
        begin = 0 if 0 in shape else begin
        shape = [n // block if s == 1 and n > 1 else n for n, s in zip(shape, strides, strict=True)]
        strides = [s if s == 1 else s // block for s in strides]
        return as_strided(cells[begin // block :], shape, [s * cells.itemsize for s in strides])

    def _read(self, value: Value, reader: str) -> None:
        if not self._is_shared(value):
            return
        if (self._seen(value) != self.holds[value]).any():
            raise wrong_plan(f"{reader} a value that another step has overwritten", self.plan, value)

    def _write(self, value: Value) -> None:
        self.writes += 1
        self._seen(value)[...] = self.writes
        self.holds[value] = self.writes

    def _apart(self, value: Value, x: Value, nodes: Sequence[Node]) -> None:
        """Check that a step overwrites only memory that it reads element by element, or memory of a part that is
        already in its final place.
        """
        mine, read = self.plan.places[value], self.plan.places[x]
        view, to = read.view, mine.view
        if view is None or to is None or self.cells.get(view.storage) is not self.cells[self._storage(value)]:
            return
        if read.how is How.INTO and read.of is value:
            return
        is_written = np.zeros(len(self.cells[view.storage]), bool)
        self._shown(is_written, to)[...] = True
        if not self._shown(is_written, view).any():
            return
        alike = self.at.lie_alike(to, view)
        over = alike and mine.how is How.OVER and mine.of is x and self._by_element(x, nodes)
        if not over and not (alike and self._is_reused(x, nodes[-1])):
            raise wrong_plan(f"its step overwrites {x.name}, which it reads", self.plan, value)

    def _storage(self, value: Value) -> Storage:
        storage = self.plan.places[value].storage
        assert storage is not None
        return storage

    def _is_reused(self, x: Value, node: Node) -> bool:
        """Return True if a callee, whose plan was checked, may overwrite this operand with its result, and gets the
        operand only once.
        """
        callee = node.op.called_in(self.at.callees)
        formals = (
            []
            if callee is None
            else [f for f, v in zip(callee.function.arguments, node.operands, strict=True) if v is x]
        )
        return callee is not None and len(node.results) == len(formals) == 1 and formals[0] in callee.reuses

    def _by_element(self, x: Value, nodes: Sequence[Node]) -> bool:
        """Return True if the last of these nodes depends on x only element by element, directly or through the other
        nodes.
        """
        by = {x}
        for node in nodes:
            reading = [i for i, v in enumerate(node.operands) if v in by]
            if not reading:
                continue
            if node.op.callee is not None:
                return False
            types = [None if v is None else v.type for v in node.operands]
            alike = node.is_elementwise and node.result.type.shape == x.type.shape
            if not alike and not {*reading} <= {*node.op.in_place(types)}:
                return False
            by.update(node.results)
        return True
