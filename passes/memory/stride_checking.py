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
_FIRST_TAG = 2**23 + 2**21  # of elements: numbers that no margin is filled with, and that float32 holds


MOST_PLACES = 1 << 12
"""Elements of a view whose places are compared: of more, so many, the first and the last among them."""


@lru_cache(maxsize=256)
def _some(count: int) -> Array:
    """The numbers below a count, or so many of them, always the same ones: where multiples of the golden ratio fall,
    which is everywhere alike and in step with no stride."""
    if count <= MOST_PLACES:
        return np.arange(count)
    fractions = np.arange(MOST_PLACES) * ((5**0.5 - 1) / 2) % 1.0  # importing numpy.random takes as long as a check
    return np.concatenate([[0, count - 1], (fractions * count).astype(np.int64)])


def _places(numbers: Array, shape: Sequence[int], strides: Sequence[int], begin: int) -> Array:
    """Where elements of an array, by their row-major numbers, lie by its strides."""
    found = np.full(numbers.shape, begin, np.int64)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        numbers, along = np.divmod(numbers, size)
        found += along * stride
    return found


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
        self._told: dict[int, tuple[list[int], list[int], int]] = {}
        self._moved: dict[tuple[Op, tuple[int, ...]], tuple[Array, Array]] = {}

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
        shape, strides, first = self._lies(view)
        if 0 in shape:
            return
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
            if view.storage.layout is None and not self._agrees(view, lies, *self._views(node)):
                raise wrong_plan(f"it does not lie where {x.name} has its elements", self.plan, value, str(view))
        elif place.how is How.INTO and isinstance(place.of, Value):
            whole, reader = self.plan.places[place.of].view, place.of.node
            if whole is None or reader is None or value not in reader.inputs:
                raise wrong_plan(f"{place.of.name} is not made of it", self.plan, value)
            here, came, count = self._numbered(reader, reader.operands.index(value))
            same = whole.storage is view.storage and count == self._elements(value)
            if not same or not self._agrees(whole, view, here, came):
                raise wrong_plan(f"it does not lie where {place.of.name} has it", self.plan, value, str(view))

    def _views(self, node: Node) -> tuple[Array, Array]:
        """Elements of a view's result, by their numbers, and for each the number of the operand's element that it is.

        Memory that nobody touches stands for the operand: mostly the reference gives a view of it, and strides tell.
        """
        shape = tuple(self._numbers(node.inputs[0].type.held.shape))
        key = node.op, shape
        if key not in self._moved:  # of one op on one shape it is the same
            untouched = np.empty(shape, np.uint8)
            made = np.asarray(node.op.at(self.sizes).reference(untouched))
            at = _some(made.size)
            if np.may_share_memory(made, untouched):
                begin = made.__array_interface__["data"][0] - untouched.__array_interface__["data"][0]
                self._moved[key] = at, _places(at, made.shape, made.strides, begin)
            else:
                numbers = np.arange(untouched.size, dtype=np.int32).reshape(shape)
                self._moved[key] = at, np.asarray(node.op.at(self.sizes).reference(numbers)).reshape(-1)[at]
        return self._moved[key]

    def _numbered(self, node: Node, position: int) -> tuple[Array, Array, int]:
        """The same of one operand of several, or with margins, and how many elements of the result are that one's.

        Some of its elements are tags, the others one number, and those of other operands zero.
        """
        shapes = [None if v is None else self._numbers(v.type.held.shape) for v in node.operands]
        sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
        full = sum(sizes) == self._elements(node.result)  # so there are no margins
        first, dtype = (2, np.dtype(np.uint16)) if full else (_FIRST_TAG, np.dtype(np.float32))
        some = _some(sizes[position])
        tagged = np.full(sizes[position], first - 1, dtype)
        tagged[some] = first + np.arange(len(some))
        given = [None if shape is None else np.broadcast_to(dtype.type(0), shape) for shape in shapes]
        given[position] = tagged.reshape(shapes[position] or ())
        made = np.asarray(node.op.at(self.sizes).reference(*given)).reshape(-1)
        at = np.flatnonzero(made >= first)
        at = at[made[at] < first + len(some)]  # margins may hold an infinity
        came = some[(made[at] - first).astype(np.int64)]
        return at, came, int(np.count_nonzero(made == first - 1)) + len(at)

    def _agrees(self, result: View, operand: View, at: Array, came: Array) -> bool:
        """Whether elements of a result lie where the operand has those that they are: all, or some of very many."""
        return np.array_equal(self._address(result, at), self._address(operand, came))

    def _address(self, view: View, numbers: Array) -> Array:
        """Where elements of a view, by their row-major numbers, lie in its storage."""
        return _places(numbers, *self._lies(view))

    def _seen(self, cells: Array, view: View, block: int) -> Array:
        """What stands in the cells of a storage, as a view shows it: the same memory. `_fits` was called before.

        block  so many elements are one cell: see `_blocks`
        """
        shape, strides, begin = self._lies(view)
        begin = 0 if 0 in shape else begin
        shape = [n // block if s == 1 and n > 1 else n for n, s in zip(shape, strides, strict=True)]
        strides = [s if s == 1 else s // block for s in strides]
        return as_strided(cells[begin // block :], shape, [s * cells.itemsize for s in strides])

    def _blocks(self, storages: set[Storage | None]) -> dict[Storage, int]:
        """Of some storages how many elements at once every view that lies there has or has not, all in one order."""
        found: dict[Storage, int] = {}
        for place in self.plan.places.values():
            view = place.view
            if view is None or view.storage not in storages:
                continue
            shape, strides, begin = self._lies(view)
            moves = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and s]
            inner = [n for n, s in moves if s == 1] or [1]
            outer = [s for _, s in moves if s != 1]
            known = found.get(view.storage, self._number(view.storage.elements))
            found[view.storage] = math.gcd(known, begin, *inner, *outer)
        return found

    def _lie_alike(self, one: View, other: View) -> bool:
        """Whether each element of one has its place where the other has the same."""
        (shape, mine, begin), (others, theirs, at) = self._lies(one), self._lies(other)
        return (shape, begin) == (others, at) and all(
            n == 1 or s == o for n, s, o in zip(shape, mine, theirs, strict=True)
        )

    def _numbers(self, sizes: Sequence[Size]) -> list[int]:
        return [self._number(size) for size in sizes]

    def _lies(self, view: View) -> tuple[list[int], list[int], int]:
        """The shape, strides and offset of a view of the plan, as numbers."""
        found = self._told.get(id(view))
        if found is None:
            found = self._numbers(view.shape), self._numbers(view.strides), self._number(view.offset)
            self._told[id(view)] = found
        return found

    # -- what is written and read ----------------------------------------------------------------------------

    def _nothing_is_lost(self) -> list[str]:
        """Go through the steps with numbers for elements, in storages that more than one of them writes."""
        writers: dict[Storage, int] = {}
        for place in self.plan.places.values():
            if (place.written or place.how in (How.STATE, How.GIVEN)) and place.storage is not None:
                writers[place.storage] = writers.get(place.storage, 0) + 1
        shared = {s for s, n in writers.items() if n > 1}
        reused = [self.plan.places[v].storage for v in self.plan.reuses]
        blocks = self._blocks({*shared, *reused, *(self.plan.results.values() if reused else ())})
        large = {s for s in shared if self._number(s.elements) > MOST_CELLS * blocks[s]}
        if shared - large:
            _Run(self, {s: blocks[s] for s in shared - large}).run()
        for reused in self.plan.reuses:
            argument, (result,) = self.plan.places[reused].storage, self.plan.results.values()
            if argument is None or argument.kind is not StorageKind.ARGUMENT or argument.elements != result.elements:
                raise wrong_plan("its result does not fit where an argument lies", self.plan, reused)
            block = math.gcd(blocks[argument], blocks.get(result, blocks[argument]))
            if self._number(argument.elements) > MOST_CELLS * block:
                large.add(argument)
            else:
                cells = {s: blocks[s] for s in shared - large} | {argument: block, result: block}
                _Run(self, cells, (argument, result)).run()
        return [f"{self.plan.function.name}: {s.name} is too large to be gone through" for s in shared if s in large]


class _Run:
    """The steps, with the number of a write in each cell that it writes.

    Where the elements of a value lie among themselves, `StridesCheck` compares with the references. So a value is there
    as long as all its cells hold the number of its write.

    blocks  of each storage how many elements are one cell
    cells   what each of them holds
    holds   the number of the write that made a value, or what it is a view of
    """

    def __init__(
        self, at: StridesCheck, blocks: Mapping[Storage, int], one: tuple[Storage, Storage] | None = None
    ) -> None:
        """one: an argument and a result that lie in one place."""
        self.at, self.plan, self.blocks = at, at.plan, blocks
        self.cells = {s: np.zeros(at._number(s.elements) // block, np.int32) for s, block in blocks.items()}
        if one is not None:
            self.cells[one[1]] = self.cells[one[0]]
        self.holds: dict[Value, int] = {}
        self.writes = 0

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
                    self.holds[value] = self.holds[step.root.inputs[0]]
        for name, value in self.at.function.outputs.items():
            self._read(value, f"output {name}, at step {end}, is")

    def _is_shared(self, value: Value) -> bool:
        return self.plan.places[value].storage in self.cells

    def _seen(self, value: Value) -> Array:
        """What stands in the cells where its elements are: the same memory."""
        view = self.plan.places[value].view
        assert view is not None
        return self.at._seen(self.cells[view.storage], view, self.blocks[view.storage])

    def _read(self, value: Value, reader: str) -> None:
        if not self._is_shared(value):
            return
        if (self._seen(value) != self.holds[value]).any():
            raise wrong_plan(f"{reader} what another step has written over", self.plan, value)

    def _write(self, value: Value) -> None:
        self.writes += 1
        self._seen(value)[...] = self.writes
        self.holds[value] = self.writes

    def _apart(self, value: Value, x: Value, nodes: Sequence[Node]) -> None:
        """A step that writes where it reads does so element by element, or finds a part where it belongs."""
        mine, read = self.plan.places[value], self.plan.places[x]
        view, to = read.view, mine.view
        if view is None or to is None or self.cells.get(view.storage) is not self.cells[self._storage(value)]:
            return
        if read.how is How.INTO and read.of is value:
            return
        is_written, block = np.zeros(len(self.cells[view.storage]), bool), self.blocks[view.storage]
        self.at._seen(is_written, to, block)[...] = True
        if not self.at._seen(is_written, view, block).any():
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
