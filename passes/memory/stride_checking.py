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

from treadle.ir.graph import Function, Node, Value
from treadle.ir.operation import Op
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.storage.views import StorageKind, View
from treadle.passes.memory.storage_plan import FunctionPlan, How, ValuePlace
from treadle.passes.memory.write_checking import lost_writes
from treadle.passes.memory.wrong_plans import wrong_plan

Array = np.ndarray[Any, Any]

_FIRST_TAG = 2**23 + 2**21  # of elements: numbers that no margin is filled with, and that float32 holds


MOST_PLACES = 1 << 10
"""Elements of a view whose places are compared: of more, so many, the first and the last among them.

Views are affine: where a stride is wrong, half of the elements at least are not where they should be.
"""
_FEW_PLACES = 250  # of very many elements: as many as a byte tells apart


@lru_cache(maxsize=256)
def _some(count: int, most: int = MOST_PLACES) -> Array:
    """The numbers below a count, or so many of them, always the same ones: where multiples of the golden ratio fall,
    which is everywhere alike and in step with no stride."""
    if count <= most:
        return np.arange(count)
    fractions = np.arange(most - 2) * ((5**0.5 - 1) / 2) % 1.0  # importing numpy.random takes as long as a check
    return np.concatenate([[0, count - 1], (fractions * count).astype(np.int64)])


def _tags(count: int, margins: bool = False) -> tuple[Array, Array]:
    """Some of so many elements, by their numbers, and a tag for each: 2, 3, 4, ..., of few bytes.

    margins  there are other numbers as well: tags are then such as no margin is filled with
    """
    few = count > MOST_PLACES and not margins
    some = _some(count, _FEW_PLACES if few else MOST_PLACES)
    dtype, first = ("f4", _FIRST_TAG) if margins else ("u1" if few else "u2", 2)
    return some, np.arange(first, first + max(1, len(some)), dtype=dtype)


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
            return lost_writes(self)
        return []

    def number(self, size: Size) -> int:
        found = size.constant
        if found is None:
            found = self._known.get(size)
        if found is None:
            found = self._known[size] = int(size.evaluate(self.sizes))
        return found

    # -- one place -------------------------------------------------------------------------------------------

    def _fits(self, value: Value, place: ValuePlace, view: View) -> None:
        wanted, layout = value.type.held, value.layout
        if view.shape != wanted.shape or view.storage is not place.storage or view.dtype is not wanted.dtype:
            raise wrong_plan("a view has another shape, dtype or storage than its value", self.plan, value, str(view))
        if layout != view.storage.layout:
            lies, wanted_so = (f"in {each}" if each else "row-major" for each in (view.storage.layout, layout))
            raise wrong_plan(f"it lies {lies}, not {wanted_so}", self.plan, value)
        if value.node is None and view.offset == ZERO and (layout is not None or view.is_contiguous):
            taken = wanted.elements if layout is None else layout.elements(wanted.shape)
            if view.storage.elements == taken:
                return  # it fills its storage at all sizes
        held = self.number(view.storage.elements)
        if layout is not None:
            needed, last = self.number(layout.elements(view.shape)), self.number(view.offset)
            if needed > held or last:
                raise wrong_plan("a destination is too small", self.plan, value, f"{needed} elements of {held}")
            return
        shape, strides, first = self.lies(view)
        if 0 in shape:
            return
        last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if first < 0 or min(strides, default=0) < 0 or last >= held:
            told = f"elements {first} to {last} of {held} at {self.sizes}"
            raise wrong_plan("a destination is too small", self.plan, value, told)
        if place.written and not self._apart(value, shape, strides):
            raise wrong_plan("two elements are written to one place", self.plan, value, str(strides))

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
            if storage.kind is not StorageKind.RESULT or self.number(storage.elements) < self._elements(value):
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
            return self.number(value.layout.elements(shape))
        return int(np.prod([self.number(n) for n in shape], dtype=object))

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

        Mostly the reference gives a view of the array that stands for the operand, whose strides tell. Where it gives a
        copy, some elements are tags.
        """
        shape = tuple(self._numbers(node.inputs[0].type.held.shape))
        key = node.op, shape
        if key not in self._moved:  # of one op on one shape it is the same
            op, size = node.op.at(self.sizes), math.prod(shape)
            some, tags = _tags(size)
            tagged = np.zeros(size, tags.dtype)  # pages that nobody reads take no time
            tagged[some] = tags
            made = np.asarray(op.reference(tagged.reshape(shape)))
            at = _some(made.size)
            if np.may_share_memory(made, tagged):
                begin = made.__array_interface__["data"][0] - tagged.__array_interface__["data"][0]
                strides = [stride // tagged.itemsize for stride in made.strides]
                came = _places(at, made.shape, strides, begin // tagged.itemsize)
            elif made.size == size:
                made = made.reshape(-1)
                at = np.flatnonzero(made != 0)
                came = some[made[at].astype(np.int64) - int(tags[0])]
            else:
                came = np.asarray(op.reference(np.arange(size).reshape(shape))).reshape(-1)[at]
            self._moved[key] = at, came
        return self._moved[key]

    def _numbered(self, node: Node, position: int) -> tuple[Array, Array, int]:
        """The same of one operand of several, or with margins, and how many elements of the result are that one's.

        Some of its elements are tags, the others one number, and those of other operands zero.
        """
        shapes = [None if v is None else self._numbers(v.type.held.shape) for v in node.operands]
        sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
        margins = sum(sizes) != self._elements(node.result)  # which may hold any number
        some, tags = _tags(sizes[position], margins)
        tagged = np.full(sizes[position], tags[0] - 1, tags.dtype)
        tagged[some] = tags
        given = [None if shape is None else np.broadcast_to(tags.dtype.type(0), shape) for shape in shapes]
        given[position] = tagged.reshape(shapes[position] or ())
        made = np.asarray(node.op.at(self.sizes).reference(*given)).reshape(-1)
        at = np.flatnonzero(made >= tags[0])
        at = at[made[at] <= tags[-1]]  # margins may hold an infinity
        count = np.count_nonzero(made == tags[0] - 1) + len(at)
        return at, some[made[at].astype(np.int64) - int(tags[0])], int(count)

    def _agrees(self, result: View, operand: View, at: Array, came: Array) -> bool:
        """Whether elements of a result lie where the operand has those that they are: all, or some of very many."""
        return np.array_equal(self._address(result, at), self._address(operand, came))

    def _address(self, view: View, numbers: Array) -> Array:
        """Where elements of a view, by their row-major numbers, lie in its storage."""
        return _places(numbers, *self.lies(view))

    def lie_alike(self, one: View, other: View) -> bool:
        """Whether each element of one has its place where the other has the same."""
        (shape, mine, begin), (others, theirs, at) = self.lies(one), self.lies(other)
        return (shape, begin) == (others, at) and all(
            n == 1 or s == o for n, s, o in zip(shape, mine, theirs, strict=True)
        )

    def _numbers(self, sizes: Sequence[Size]) -> list[int]:
        return [self.number(size) for size in sizes]

    def lies(self, view: View) -> tuple[list[int], list[int], int]:
        """The shape, strides and offset of a view of the plan, as numbers."""
        found = self._told.get(id(view))
        if found is None:
            found = self._numbers(view.shape), self._numbers(view.strides), self.number(view.offset)
            self._told[id(view)] = found
        return found
