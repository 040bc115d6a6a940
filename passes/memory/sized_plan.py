"""`SizedPlan`: the storage plan of a function at one set of sizes, with views as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.ir.graph import Function
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import View
from treadle.passes.memory.storage_plan import FunctionPlan


class SizedPlan:
    """A function's plan at one set of sizes.

    callees  plans that were checked before: their `reuses` are correct
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
        self._resolved: dict[int, tuple[list[int], list[int], int]] = {}

    def number(self, size: Size) -> int:
        """Return a size as an integer."""
        found = size.constant
        if found is None:
            found = self._known.get(size)
        if found is None:
            found = self._known[size] = int(size.evaluate(self.sizes))
        return found

    def _numbers(self, sizes: Sequence[Size]) -> list[int]:
        return [self.number(size) for size in sizes]

    def lies(self, view: View) -> tuple[list[int], list[int], int]:
        """Return the shape, strides and offset of a view of the plan, as integers."""
        found = self._resolved.get(id(view))
        if found is None:
            found = self._numbers(view.shape), self._numbers(view.strides), self.number(view.offset)
            self._resolved[id(view)] = found
        return found

    def lie_alike(self, one: View, other: View) -> bool:
        """Return True if two views have equal shapes, and each element has the same address in both views."""
        (shape, mine, begin), (others, theirs, at) = self.lies(one), self.lies(other)
        return (shape, begin) == (others, at) and all(
            n == 1 or s == o for n, s, o in zip(shape, mine, theirs, strict=True)
        )
