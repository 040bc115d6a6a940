"""Check a storage plan for kernels that write by strides, at one set of sizes: places, views, overwritten operands.

Views are compared with the ops' references, which are run on numbers in place of elements; no code is shared with the
planner. `storage_checking.py` lists the conditions and calls this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from treadle.ir.graph import Node, Value
from treadle.ir.operation import Op
from treadle.ir.sizing.sizes import ZERO
from treadle.ir.storage.views import StorageKind, View
from treadle.passes.memory.sized_plan import SizedPlan
from treadle.passes.memory.storage_plan import How, ValuePlace
from treadle.passes.memory.write_checking import lost_writes
from treadle.passes.memory.wrong_plans import wrong_plan

Array = np.ndarray[Any, Any]

_FIRST_TAG = 2**23 + 2**21  # tags: numbers that are never used as margins, and that float32 represents exactly


MOST_PLACES = 1 << 10
"""Maximum number of elements of a view whose addresses are compared: a sample that includes the first and the last.

Views are affine: if a stride is wrong, at least half of the elements are at wrong addresses.
"""
_FEW_PLACES = 250  # for very many elements: the number of different tags in a byte


@lru_cache(maxsize=256)
def _some(count: int, most: int = MOST_PLACES) -> Array:
    """Return the numbers below `count`, or a fixed sample of `most` of them: multiples of the golden ratio, which are
    distributed evenly and do not align with any stride.
    """
    if count <= most:
        return np.arange(count)
    fractions = np.arange(most - 2) * ((5**0.5 - 1) / 2) % 1.0  # importing numpy.random would take as long as a check
    return np.concatenate([[0, count - 1], (fractions * count).astype(np.int64)])


def _tags(count: int, margins: bool = False) -> tuple[Array, Array]:
    """Return the indices of some of `count` elements, and a small tag for each: 2, 3, 4, ...

    margins  True if the storage also contains margin values: tags are then large float32 numbers that are never used
             as margins
    """
    few = count > MOST_PLACES and not margins
    some = _some(count, _FEW_PLACES if few else MOST_PLACES)
    dtype, first = ("f4", _FIRST_TAG) if margins else ("u1" if few else "u2", 2)
    return some, np.arange(first, first + max(1, len(some)), dtype=dtype)


def _places(numbers: Array, shape: Sequence[int], strides: Sequence[int], begin: int) -> Array:
    """Return the addresses of an array's elements, given their row-major indices and its strides."""
    found = np.full(numbers.shape, begin, np.int64)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        numbers, along = np.divmod(numbers, size)
        found += along * stride
    return found


class StridesCheck(SizedPlan):
    """The check of places at one set of sizes."""

    @cached_property
    def _moved(self) -> dict[tuple[Op, tuple[int, ...]], tuple[Array, Array]]:
        return {}

    def check(self, small: bool) -> list[str]:
        """Check the plan. Return lines on storages that are too large to replay. At small sizes, elements are checked
        one by one.
        """
        self._results()
        for value, place in self.plan.places.items():
            if value.node is None and not small:
                continue  # the place is the same at all sizes
            if place.view is not None:
                self._fits(value, place, place.view)
            elif place.storage is not None:
                raise wrong_plan("it has a storage but no view", self.plan, value)
        if small:
            for value, place in self.plan.places.items():
                if value.node is not None and place.view is not None:
                    self._comes_from(value, value.node, place, place.view)
            return lost_writes(self)
        return []

    # -- one place -------------------------------------------------------------------------------------------

    def _fits(self, value: Value, place: ValuePlace, view: View) -> None:
        wanted, layout = value.type.storage_type, value.layout
        if view.shape != wanted.shape or view.storage is not place.storage or view.dtype is not wanted.dtype:
            raise wrong_plan("a view has another shape, dtype or storage than its value", self.plan, value, str(view))
        if layout != view.storage.layout:
            lies, wanted_so = (f"in {each}" if each else "row-major" for each in (view.storage.layout, layout))
            raise wrong_plan(f"it is stored {lies}, not {wanted_so}", self.plan, value)
        if value.node is None and view.offset == ZERO and (layout is not None or view.is_contiguous):
            taken = wanted.elements if layout is None else layout.elements(wanted.shape)
            if view.storage.elements == taken:
                return  # the value fills its storage at all sizes
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
            received = f"elements {first} to {last} of {held} at {self.sizes}"
            raise wrong_plan("a destination is too small", self.plan, value, received)
        if place.is_written and not self._apart(value, shape, strides):
            raise wrong_plan("two elements are written to one address", self.plan, value, str(strides))

    def _apart(self, value: Value, shape: Sequence[int], strides: Sequence[int]) -> bool:
        """Return True if all elements have different addresses, except along axes where all elements are equal."""
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
            raise wrong_plan("each output must have a storage from the caller", self.plan)
        for name, value in outputs.items():
            storage = results[name]
            if storage.kind is not StorageKind.RESULT or self.number(storage.elements) < self._elements(value):
                raise wrong_plan(f"a destination is too small for output {name}", self.plan, value)
            view = self.plan.places[value].view
            argument = self.plan.given_back.get(name)
            if argument is not None:
                if argument not in self.plan.donated:
                    raise wrong_plan(f"output {name} is stored in an input that is not donated", self.plan, value)
                storage = view.storage if view is not None else storage
                if (
                    self.plan.places[argument].storage is not storage
                    or storage.elements != value.type.storage_type.elements
                ):
                    raise wrong_plan(f"output {name} is not in the storage of {argument.name}", self.plan, value)
            whole = view is not None and view.storage is storage and (view.is_contiguous or value.layout is not None)
            if name not in self.plan.copied and not (whole and view is not None and view.offset == 0):
                raise wrong_plan(f"no step writes output {name}", self.plan, value)

    def _elements(self, value: Value) -> int:
        shape = value.type.storage_type.shape
        if value.layout is not None:
            return self.number(value.layout.elements(shape))
        return int(np.prod([self.number(n) for n in shape], dtype=object))

    # -- origins of elements ---------------------------------------------------------------------------------

    def _comes_from(self, value: Value, node: Node, place: ValuePlace, view: View) -> None:
        """Check that a view refers to its operand's elements, and that a part is stored at its position in the
        whole.
        """
        if value.state is not None:
            before = None if value.before is None else self.plan.places[value.before].view
            if place.how is not How.UPDATE or before != view:
                raise wrong_plan("the update of a state is not in the state's storage", self.plan, value, str(view))
        elif place.how is How.VIEW:
            x = node.inputs[0] if node.op.is_view else None
            lies = None if x is None else self.plan.places[x].view
            if x is None or lies is None or place.is_written or lies.storage is not view.storage:
                raise wrong_plan("it is not a view of its operand", self.plan, value)
            if view.storage.layout is None and not self._agrees(view, lies, *self._views(node)):
                raise wrong_plan(f"it does not refer to the elements of {x.name}", self.plan, value, str(view))
        elif place.how is How.INTO and isinstance(place.of, Value):
            whole, reader = self.plan.places[place.of].view, place.of.node
            if whole is None or reader is None or value not in reader.inputs:
                raise wrong_plan(f"{place.of.name} does not read it", self.plan, value)
            here, came, count = self._numbered(reader, reader.operands.index(value))
            same = whole.storage is view.storage and count == self._elements(value)
            if not same or not self._agrees(whole, view, here, came):
                raise wrong_plan(f"it is not stored at its position in {place.of.name}", self.plan, value, str(view))

    def _views(self, node: Node) -> tuple[Array, Array]:
        """Return indices of elements of a view's result, and for each the index of the operand's element that it
        equals.

        Usually the reference returns a view of the array that represents the operand, and the strides of that view
        determine the result. If the reference returns a copy, some elements of the array are tags.
        """
        shape = tuple(self._numbers(node.inputs[0].type.storage_type.shape))
        key = node.op, shape
        if key not in self._moved:  # the result is the same for one op on one shape
            op, size = node.op.at(self.sizes), math.prod(shape)
            some, tags = _tags(size)
            tagged = np.zeros(size, tags.dtype)  # untouched pages take no time
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
        """Return the same as `_views` for one of several operands, or for an op with margins. Also return the number of
        the operand's elements in the result.

        Some elements of the operand are tags, its other elements are all one number, and elements of other operands are
        zero.
        """
        shapes = [None if v is None else self._numbers(v.type.storage_type.shape) for v in node.operands]
        sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
        margins = sum(sizes) != self._elements(node.result)  # margins may have any value
        some, tags = _tags(sizes[position], margins)
        tagged = np.full(sizes[position], tags[0] - 1, tags.dtype)
        tagged[some] = tags
        given = [None if shape is None else np.broadcast_to(tags.dtype.type(0), shape) for shape in shapes]
        given[position] = tagged.reshape(shapes[position] or ())
        made = np.asarray(node.op.at(self.sizes).reference(*given)).reshape(-1)
        at = np.flatnonzero(made >= tags[0])
        at = at[made[at] <= tags[-1]]  # margins may be infinite
        count = np.count_nonzero(made == tags[0] - 1) + len(at)
        return at, some[made[at].astype(np.int64) - int(tags[0])], int(count)

    def _agrees(self, result: View, operand: View, at: Array, came: Array) -> bool:
        """Return True if elements of a result have the addresses of the operand's elements that they equal. Large views
        are sampled.
        """
        return np.array_equal(self._address(result, at), self._address(operand, came))

    def _address(self, view: View, numbers: Array) -> Array:
        """Return the addresses of a view's elements in its storage, given their row-major indices."""
        return _places(numbers, *self.lies(view))
