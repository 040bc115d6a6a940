"""Check a storage plan for kernels that write by strides, at one set of sizes: places, views, what steps write over.

Views are held to the ops' references, which are run on numbers in place of elements; nothing here is shared with what
made the plan. `storage_checking.py` says what holds of a plan, and calls this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from treadle.ir.graph import Function, Node, Value
from treadle.ir.operation import Op
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.passes.memory.storage_plan import FunctionPlan, How, ValuePlace
from treadle.passes.memory.wrong_plans import wrong_plan

Array = np.ndarray[Any, Any]

MOST_CELLS = 1 << 26
"""Elements of a storage that are gone through one by one."""
_FIRST_TAG = float(2**50)  # of elements: a number that no margin is filled with


MOST_PLACES = 1 << 12
"""Elements of a view whose places are compared: of more, so many, the first and the last among them."""


@lru_cache(maxsize=256)
def _some(count: int) -> Array:
    """The numbers below a count, or so many of them that are drawn, always the same ones."""
    if count <= MOST_PLACES:
        return np.arange(count)
    drawn = np.random.default_rng(0).integers(0, count, MOST_PLACES)
    return np.concatenate([[0, count - 1], drawn])


class StridesCheck:
    """Places at one set of sizes.

    callees  plans that were checked before: what they say of reuse holds
    """

    def __init__(
        self,
        function: Function,
        plan: FunctionPlan,
        sizes: Mapping[str, int],
        callees: Mapping[str, FunctionPlan] | None = None,
    ) -> None:
        self.function, self.plan, self.sizes, self.callees = function, plan, sizes, callees or {}
        self._known: dict[Size, int] = {}
        self._moved: dict[tuple[Op, tuple[int, ...]], Array] = {}

    def check(self, small: bool) -> list[str]:
        """Lines on what is too large to be gone through; at small sizes elements are looked at one by one."""
        self._results()
        for value, place in self.plan.places.items():
            if value.node is None and not small:
                continue  # it lies as at all sizes
            if place.view is not None:
                self._fits(value, place, place.view)
            elif place.storage is not None:
                raise wrong_plan("nothing says how it lies in its storage", self.plan, value)
        if small:
            for value, place in self.plan.places.items():
                if value.node is not None and place.view is not None:
                    self._comes_from(value, value.node, place, place.view)
            return self._nothing_is_lost()
        return []

    def _number(self, size: Size) -> int:
        found = size.constant
        if found is None:
            found = self._known.get(size)
        if found is None:
            found = self._known[size] = int(size.evaluate(self.sizes))
        return found

    # -- one place -------------------------------------------------------------------------------------------

    def _fits(self, value: Value, place: ValuePlace, view: View) -> None:
        wanted = value.type.held
        if view.shape != wanted.shape or view.storage is not place.storage or view.dtype is not wanted.dtype:
            raise wrong_plan("a view has another shape, dtype or storage than its value", self.plan, value, str(view))
        if value.layout != view.storage.layout:
            raise wrong_plan(f"it lies in {view.storage.layout}, not in {value.layout}", self.plan, value)
        whole = view.offset == ZERO and (value.layout is not None or view.is_contiguous)
        if value.node is None and whole and view.storage.elements == self._taken(value):
            return  # it fills its storage at all sizes
        held = self._number(view.storage.elements)
        if value.layout is not None:
            needed, last = self._number(value.layout.elements(view.shape)), self._number(view.offset)
            if needed > held or last:
                raise wrong_plan("a destination is too small", self.plan, value, f"{needed} elements of {held}")
            return
        shape, strides = [self._number(n) for n in view.shape], [self._number(s) for s in view.strides]
        if 0 in shape:
            return
        first = self._number(view.offset)
        last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if first < 0 or min(strides, default=0) < 0 or last >= held:
            told = f"elements {first} to {last} of {held} at {self.sizes}"
            raise wrong_plan("a destination is too small", self.plan, value, told)
        if place.written and not self._apart(value, shape, strides):
            raise wrong_plan("two elements are written to one place", self.plan, value, str(strides))

    @staticmethod
    def _taken(value: Value) -> Size:
        held = value.type.held
        return held.elements if value.layout is None else value.layout.elements(held.shape)

    def _apart(self, value: Value, shape: Sequence[int], strides: Sequence[int]) -> bool:
        """Whether each element has a place of its own, but for axes along which all are alike."""
        node = value.node
        assert node is not None
        alike = node.op.repeats([None if v is None else v.type for v in node.operands])
        reach = 0
        moves = [(s, n) for axis, (s, n) in enumerate(zip(strides, shape, strict=True)) if n != 1 and axis not in alike]
        for stride, count in sorted(moves):
            if stride <= reach:
                return False
            reach += stride * (count - 1)
        return True

    def _results(self) -> None:
        outputs, results = self.function.outputs, self.plan.results
        if list(results) != list(outputs) or len({*results.values()}) != len(results):
            raise wrong_plan("each output needs a storage of the caller's", self.plan)
        for name, value in outputs.items():
            storage = results[name]
            if storage.kind is not StorageKind.RESULT or self._number(storage.elements) < self._elements(value):
                raise wrong_plan(f"a destination is too small for output {name}", self.plan, value)
            view = self.plan.places[value].view
            argument = self.plan.given_back.get(name)
            if argument is not None:
                if argument not in self.plan.donated:
                    raise wrong_plan(f"output {name} lies in what is not donated", self.plan, value)
                storage = view.storage if view is not None else storage
                if self.plan.places[argument].storage is not storage or storage.elements != value.type.held.elements:
                    raise wrong_plan(f"output {name} does not lie where {argument.name} does", self.plan, value)
            whole = view is not None and view.storage is storage and (view.is_contiguous or value.layout is not None)
            if name not in self.plan.copied and not (whole and view is not None and view.offset == 0):
                raise wrong_plan(f"nothing writes output {name}", self.plan, value)

    def _elements(self, value: Value) -> int:
        shape = value.type.held.shape
        if value.layout is not None:
            return self._number(value.layout.elements(shape))
        return int(np.prod([self._number(n) for n in shape], dtype=object))

    # -- where elements come from ----------------------------------------------------------------------------

    def _comes_from(self, value: Value, node: Node, place: ValuePlace, view: View) -> None:
        """A view lies where its operand has its elements; what is a part lies where the whole has it."""
        if value.state is not None:
            before = None if value.before is None else self.plan.places[value.before].view
            if place.how is not How.UPDATE or before != view:
                raise wrong_plan("the update of a state does not lie where the state does", self.plan, value, str(view))
        elif place.how is How.VIEW:
            x = node.inputs[0] if node.op.is_view else None
            lies = None if x is None else self.plan.places[x].view
            if x is None or lies is None or place.written or lies.storage is not view.storage:
                raise wrong_plan("it is no view of what it is told to be one of", self.plan, value)
            if view.storage.layout is None and not self._agrees(view, lies, self._views(node, value)):
                raise wrong_plan(f"it does not lie where {x.name} has its elements", self.plan, value, str(view))
        elif place.how is How.INTO and isinstance(place.of, Value):
            whole, reader = self.plan.places[place.of].view, place.of.node
            if whole is None or reader is None or value not in reader.inputs:
                raise wrong_plan(f"{place.of.name} is not made of it", self.plan, value)
            came = self._numbered(reader, reader.operands.index(value))
            here = np.flatnonzero(came >= 0)
            same = whole.storage is view.storage and len(here) == self._elements(value)
            if not same or not self._agrees(whole, view, came, here[_some(len(here))]):
                raise wrong_plan(f"it does not lie where {place.of.name} has it", self.plan, value, str(view))

    def _views(self, node: Node, value: Value) -> Array:
        """For each element of a view's result the number of the operand's element that it is."""
        key = node.op, tuple(self._numbers(node.inputs[0].type.held.shape))
        if key not in self._moved:  # of one op on one shape it is the same
            numbers = np.arange(math.prod(key[1]), dtype=np.int64).reshape(key[1])
            self._moved[key] = np.asarray(node.op.at(self.sizes).reference(numbers))
        return self._moved[key]

    def _numbered(self, node: Node, position: int) -> Array:
        """The same of one operand of several, or with margins; -1 where it is no element of that operand."""
        given: list[Array | None] = []
        for i, operand in enumerate(node.operands):
            shape = None if operand is None else [self._number(n) for n in operand.type.held.shape]
            array = None if shape is None else np.full(shape, -1.0)
            if array is not None and i == position:
                array = (np.arange(array.size) + _FIRST_TAG).reshape(array.shape)
            given.append(array)
        made = np.asarray(node.op.at(self.sizes).reference(*given))
        ours = (made >= _FIRST_TAG) & (made < 2 * _FIRST_TAG)  # margins may hold an infinity
        return np.where(ours, np.where(ours, made, _FIRST_TAG) - _FIRST_TAG, -1).astype(np.int64)

    def _agrees(self, result: View, operand: View, came: Array, at: Array | None = None) -> bool:
        """Whether elements of a result lie where the operand has those that they are: all, or some of very many."""
        if not came.size:
            return True
        at = _some(came.size) if at is None else at
        numbers = came[np.unravel_index(at, came.shape)] if came.ndim else came.reshape(1)
        return np.array_equal(self._address(result, at), self._address(operand, numbers))

    def _address(self, view: View, numbers: Array) -> Array:
        """Where elements of a view, by their row-major numbers, lie in its storage."""
        found = np.full(numbers.shape, self._number(view.offset), np.int64)
        for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
            numbers, along = np.divmod(numbers, self._number(size))
            found += along * self._number(stride)
        return found

    def _seen(self, cells: Array, view: View) -> Array:
        """What stands in the cells of a storage, as a view shows it: the same memory. `_fits` was called before."""
        shape, strides = self._numbers(view.shape), self._numbers(view.strides)
        begin = 0 if 0 in shape else self._number(view.offset)
        return as_strided(cells[begin:], shape, [s * cells.itemsize for s in strides])

    def _lie_alike(self, one: View, other: View) -> bool:
        """Whether each element of one has its place where the other has the same."""
        shape = self._numbers(one.shape)
        if shape != self._numbers(other.shape) or self._number(one.offset) != self._number(other.offset):
            return False
        strides = zip(shape, self._numbers(one.strides), self._numbers(other.strides), strict=True)
        return all(n == 1 or s == o for n, s, o in strides)

    def _numbers(self, sizes: Sequence[Size]) -> list[int]:
        return [self._number(size) for size in sizes]

    # -- what is written and read ----------------------------------------------------------------------------

    def _nothing_is_lost(self) -> list[str]:
        """Go through the steps with numbers for elements, in storages that more than one of them writes."""
        writers: dict[Storage, int] = {}
        for place in self.plan.places.values():
            if (place.written or place.how in (How.STATE, How.GIVEN)) and place.storage is not None:
                writers[place.storage] = writers.get(place.storage, 0) + 1
        shared = {s for s, n in writers.items() if n > 1}
        large = {s for s in shared if self._number(s.elements) > MOST_CELLS}
        if shared - large:
            _Run(self, shared - large).run()
        for reused in self.plan.reuses:
            argument, (result,) = self.plan.places[reused].storage, self.plan.results.values()
            if argument is None or argument.kind is not StorageKind.ARGUMENT or argument.elements != result.elements:
                raise wrong_plan("its result does not fit where an argument lies", self.plan, reused)
            if self._number(argument.elements) > MOST_CELLS:
                large.add(argument)
            else:
                _Run(self, shared - large, (argument, result)).run()
        return [f"{self.plan.function.name}: {s.name} is too large to be gone through" for s in shared if s in large]


class _Run:
    """The steps, with a number for each element that a step writes.

    cells   what each place of a storage holds
    holds   what the elements of a value are
    """

    def __init__(self, at: StridesCheck, shared: set[Storage], one: tuple[Storage, Storage] | None = None) -> None:
        """one: an argument and a result that lie in one place."""
        self.at, self.plan = at, at.plan
        self.cells = {s: np.full(at._number(s.elements), -1, np.int64) for s in {*shared, *(one or ())}}
        if one is not None:
            self.cells[one[1]] = self.cells[one[0]]
        self.holds: dict[Value, Array] = {}
        written = [v for v in filter(self._is_shared, self.plan.places) if self.plan.places[v].how is not How.VIEW]
        self.numbers = np.arange(sum(math.prod(at._numbers(v.type.held.shape)) for v in written), dtype=np.int64)
        self.count = 0

    def run(self) -> None:
        end = len(self.plan.steps)
        for value in filter(self._is_shared, self.at.function.arguments):
            self._write(value)
        for number, step in enumerate(self.plan.steps):
            reads = any(self.plan.places[v].written for v in step.root.results)  # a view does not
            for value in step.inputs if reads else ():
                self._read(value, f"step {number}, {step.root.op.name}, reads")
            for value in step.root.results:
                if not self._is_shared(value):
                    continue
                if self.plan.places[value].written:
                    for x in step.inputs:
                        if x is not value.before:
                            self._apart(value, x, step.nodes)
                    self._write(value)
                else:
                    x = step.root.inputs[0]
                    self.holds[value] = self.holds[x].reshape(-1)[self.at._views(step.root, value)]
        for name, value in self.at.function.outputs.items():
            self._read(value, f"output {name}, at step {end}, is")

    def _is_shared(self, value: Value) -> bool:
        return self.plan.places[value].storage in self.cells

    def _seen(self, value: Value) -> Array:
        """What stands in the cells where its elements are: the same memory."""
        view = self.plan.places[value].view
        assert view is not None
        return self.at._seen(self.cells[view.storage], view)

    def _read(self, value: Value, reader: str) -> None:
        if not self._is_shared(value):
            return
        if not np.array_equal(self._seen(value), self.holds[value]):
            raise wrong_plan(f"{reader} what another step has written over", self.plan, value)

    def _write(self, value: Value) -> None:
        seen = self._seen(value)
        made = self.numbers[self.count : self.count + seen.size].reshape(seen.shape)
        self.count += seen.size
        seen[...] = made
        self.holds[value] = made

    def _apart(self, value: Value, x: Value, nodes: Sequence[Node]) -> None:
        """A step that writes where it reads does so element by element, or finds a part where it belongs."""
        mine, read = self.plan.places[value], self.plan.places[x]
        view, to = read.view, mine.view
        if view is None or to is None or self.cells.get(view.storage) is not self.cells[self._storage(value)]:
            return
        if read.how is How.INTO and read.of is value:
            return
        is_written = np.zeros(len(self.cells[view.storage]), bool)
        self.at._seen(is_written, to)[...] = True
        if not self.at._seen(is_written, view).any():
            return
        alike = self.at._lie_alike(to, view)
        over = alike and mine.how is How.OVER and mine.of is x and self._by_element(x, nodes)
        if not over and not (alike and self._is_reused(x, nodes[-1])):
            raise wrong_plan(f"its step writes over {x.name}, which it reads", self.plan, value)

    def _storage(self, value: Value) -> Storage:
        storage = self.plan.places[value].storage
        assert storage is not None
        return storage

    def _is_reused(self, x: Value, node: Node) -> bool:
        """Whether a callee, as it was checked, may write its result over this operand, which it is passed once."""
        callee = node.op.called_in(self.at.callees)
        formals = (
            []
            if callee is None
            else [f for f, v in zip(callee.function.arguments, node.operands, strict=True) if v is x]
        )
        return callee is not None and len(node.results) == len(formals) == 1 and formals[0] in callee.reuses

    def _by_element(self, x: Value, nodes: Sequence[Node]) -> bool:
        """Whether the last of these nodes reads, by way of the others, each element of x for its own place alone."""
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
