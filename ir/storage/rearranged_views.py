"""A rearrange as a change of strides, if strides can express it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.ir.operation import Op
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import View
from treadle.ir.types import Type


@dataclass(frozen=True)
class Rearranged:
    """A rearrange of an operand of known type, as dimensions to split, permute and merge.

    operand  the factors of each dimension of the operand; a dimension of size 1 has none
    result   the factors of each dimension of the result
    sizes    the sizes of the factors
    """

    operand: tuple[tuple[str, ...], ...]
    result: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, Size]

    @staticmethod
    def of(op: Op, type: Type) -> Rearranged:
        application = op.apply([type])
        operand = application.operands[0]
        assert operand is not None
        sizes = {name: dim.size for name, dim in application.dims.items()}
        return Rearranged(tuple(d.factors for d in operand), tuple(d.factors for d in application.results[0]), sizes)

    @property
    def before(self) -> list[str]:
        return [f for factors in self.operand for f in factors]

    @property
    def after(self) -> list[str]:
        return [f for factors in self.result for f in factors]

    def factored(self, view: View) -> View:
        """Return the operand with one dimension per factor, in the result's order."""
        return self.split(view, self.operand).permuted([self.before.index(f) for f in self.after])

    def split(self, view: View, dimensions: Sequence[tuple[str, ...]]) -> View:
        """Split a view with these dimensions so that each factor has a dimension. The elements of the view need not be
        contiguous.
        """
        axis = 0
        for factors in dimensions:
            view = view.split(axis, [self.sizes[f] for f in factors])
            axis += len(factors)
        return view

    def view(self, view: View) -> View | None:
        """Return the result as a view of the operand, or None if strides cannot express it."""
        if view.panels is not None:
            return None
        found: View | None = self.factored(view)
        for axis, factors in enumerate(self.result):
            found = found.merged(axis, len(factors)) if found is not None else None
        return found

    def before_it(self, view: View) -> View | None:
        """Return the view in which the operand must be stored so that the result is stored in `view`. Return None if
        strides cannot express it.
        """
        found: View | None = self.split(view, self.result).permuted([self.after.index(f) for f in self.before])
        for axis, factors in enumerate(self.operand):
            found = found.merged(axis, len(factors)) if found is not None else None
        return found
