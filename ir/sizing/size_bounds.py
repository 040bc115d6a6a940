"""Bounds of sizes, and arithmetic on bounds, which may be infinite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.ir.sizing.sizes import Atom


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values that a symbol may take: lower <= symbol <= upper; if `upper` is None, there is no limit."""

    lower: int = 1
    upper: int | None = None

    def __contains__(self, value: int) -> bool:
        return value >= self.lower and (self.upper is None or value <= self.upper)

    def intersect(self, other: Bounds) -> Bounds:
        """Return the bounds that contain the values allowed by both."""
        uppers = [b for b in (self.upper, other.upper) if b is not None]
        return Bounds(max(self.lower, other.lower), min(uppers) if uppers else None)

    def around(self, name: str) -> str:
        """Return the bounds of a symbol as text, such as `S`, `S <= 1024` or `2 <= S <= 1024`. A lower bound of 1 is
        omitted.
        """
        low = f"{self.lower} <= " if self.lower != 1 else ""
        return f"{low}{name}" + (f" <= {self.upper}" if self.upper is not None else "")


INFINITY = float("inf")
_ANY = Bounds()


def times(x: float, y: float) -> float:
    """Return x * y, where 0 times infinity is 0."""
    return 0 if x == 0 or y == 0 else x * y


def _over(x: float, y: float) -> float:
    """Return x // y, where y >= 1 and x or y may be infinite."""
    if abs(x) == INFINITY:
        return x
    if y == INFINITY:
        return -1 if x < 0 else 0
    return x // y


def atom_bounds(atom: Atom, symbols: Mapping[str, Bounds]) -> tuple[float, float]:
    """Return the least and the greatest value of a symbol or a quotient."""
    if isinstance(atom, str):
        b = symbols.get(atom, _ANY)
        return b.lower, INFINITY if b.upper is None else b.upper
    return quotient_interval(atom.numerator.interval(symbols), atom.denominator.interval(symbols))


def quotient_interval(numerator: tuple[float, float], denominator: tuple[float, float]) -> tuple[float, float]:
    """Return the least and the greatest value of `numerator // denominator`, from the bounds of numerator and
    denominator.
    """
    (low, high), (small, large) = numerator, denominator
    if small < 1:
        return -INFINITY, INFINITY
    return _over(low, small if low < 0 else large), _over(high, large if high < 0 else small)
