"""Chains of masks and biases applied to zeros instead of the scores: one bias with the same effect, in the same
order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from treadle.ir.builder import Builder, Expr
from treadle.ir.types import DType
from treadle.passes.fusion.attention.roles import PlacedOperand, Roles


@dataclass(frozen=True)
class Put:
    """One step of a chain: an addend, or a condition with a number that is filled in where the condition is false.

    unit     the factor from this step to the softmax
    number   the number that is filled in; None for an addend
    """

    operand: PlacedOperand
    unit: float
    number: float | None = None


@dataclass(frozen=True)
class OnZeros(PlacedOperand):
    """where(c2, where(c1, 0, n1) + a, n2), for the steps c1, n1; a; c2, n2

    Scales stay at their positions, so that overflows happen as in the graph. Equal numbers in a row are filled in at
    once.
    """

    puts: tuple[Put, ...] = ()

    @property
    def dtypes(self) -> tuple[DType, ...]:
        return tuple(dtype for put in self.puts if put.number is None for dtype in put.operand.dtypes)

    def fits(self, dtype: DType) -> bool:
        return all(dtype.holds(put.number or 0.0) and put.operand.fits(dtype) for put in self.puts)

    def build(self, b: Builder, roles: Roles, dtype: DType) -> Expr:
        made: Expr | None = None
        unit = self.puts[0].unit
        for puts in _runs(self.puts):
            first = puts[0]
            if made is not None and first.unit != unit:
                made = made * (unit / first.unit)
            unit = first.unit
            given = [self._spread(b, roles, put.operand, dtype) for put in puts]
            if first.number is None:
                made = given[0] if made is None else made + given[0]
                continue
            keep = given[0]
            for more in given[1:]:
                keep = keep & more
            made = b.where(keep, b.constant(0, dtype) if made is None else made, b.constant(first.number, dtype))
        assert made is not None
        return made if unit == 1.0 else made * unit

    def _spread(self, b: Builder, roles: Roles, operand: PlacedOperand, dtype: DType) -> Expr:
        """Return an operand with all axes of this bias, with size 1 for each axis that the operand lacks."""
        held = operand.axes.split()
        x = operand.build(b, roles, dtype)
        layout = tuple(roles.groups[name] for name in held)
        return roles.axes.place(b, x, layout, [roles.groups[n] if n in held else () for n in self.axes.split()])


def _runs(puts: Sequence[Put]) -> Iterator[list[Put]]:
    """Yield the steps in groups: consecutive steps that fill in the same number are one group."""
    run: list[Put] = []
    for put in puts:
        if run and (put.number is None or (put.number, put.unit) != (run[-1].number, run[-1].unit)):
            yield run
            run = []
        run.append(put)
    yield run
