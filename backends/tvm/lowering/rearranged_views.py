"""A rearrange as a change of strides, where they can say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.backends.tvm.lowering.program import (
    View,
)
from treadle.ir.graph import Node
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type


@dataclass(frozen=True)
class Rearranged:
    """A rearrange of an operand of known type, as dimensions to split, permute and merge.

    operand  for each dimension of the operand its factors; a dimension of 1 has none
    result   likewise
    sizes    of the factors
    """

    operand: tuple[tuple[str, ...], ...]
    result: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, Size]

    @staticmethod
    def of(node: Node, type: Type) -> Rearranged:
        application = node.op.apply([type])
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
        """The operand with a dimension a factor, in the result's order."""
        return self.split(view, self.operand).permuted([self.before.index(f) for f in self.after])

    def split(self, view: View, dimensions: Sequence[tuple[str, ...]]) -> View:
        """A view of these dimensions with one a factor; it may be one whose elements lie apart."""
        axis = 0
        for factors in dimensions:
            if factors:
                view = view.split(axis, [self.sizes[f] for f in factors])
                axis += len(factors)
            else:
                view = replace(
                    view,
                    shape=(*view.shape[:axis], *view.shape[axis + 1 :]),
                    strides=(*view.strides[:axis], *view.strides[axis + 1 :]),
                )
        return view

    def view(self, view: View) -> View | None:
        """The result as a view of the operand, or None."""
        if view.panels is not None:
            return None
        found: View | None = self.factored(view)
        for axis, factors in enumerate(self.result):
            found = found.merged(axis, len(factors)) if found is not None else None
        return found
