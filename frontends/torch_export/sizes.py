"""Sizes of torch.export, which are SymPy expressions, as IR sizes.

s70                        S
2*s70 + 1                  2*S + 1
FloorDiv(s70 - 3, 2) + 1   (S - 3)//2 + 1
Mod(s70, 4)                S - 4*(S//4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any

from treadle.ir.errors import FrontendError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import ZERO, Size, product


class UnknownSize(FrontendError):
    """A size that is not an expression of the inputs' sizes."""


def depends_on_data(received: str | None = None) -> UnknownSize:
    """Return the error for a size that depends on the elements of a tensor, such as n.item()."""
    return UnknownSize(
        "a size or a number in the module's code depends on data, and a graph has no such sizes",
        received=received,
        hint="keep it a tensor, and mask with torch.arange(size) < n in place of a slice [:n]; or give the module a "
        "Python number, which becomes a part of the graph",
    )


_LARGEST_DIVISOR = 4096
"""For a factor such as 0.6, whose divisor is larger, rounding of a product with it depends on the size."""


@dataclass(frozen=True)
class Traced:
    """The number of guards, and the range of each symbol of PyTorch, after a module was traced."""

    guards: int
    ranges: Mapping[Any, Any]


class Symbols:
    """Names for the symbols of one export.

    names   our name for each of PyTorch's symbols
    env     PyTorch's own ShapeEnv of the symbols, or None if all sizes are numbers
    bounds  known bounds of each of our symbols, which decide minima and maxima
    expressions  sizes for PyTorch's symbols that are known here as expressions
    least   differences of sizes that must be nonnegative in every call, in addition to the bounds
    traced  what the module's own code demanded of sizes, without what came from decompositions later
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.env: Any = None
        self.bounds: dict[str, Bounds] = {}
        self.expressions: dict[str, Size] = {}
        self.least: set[Size] = set()
        self.traced: Traced | None = None

    def size(self, value: Any) -> Size:
        """Return an int, a torch.SymInt or a SymPy expression as a size. Raises UnknownSize."""
        if isinstance(value, int):
            return Size.of(value)
        node = getattr(value, "node", None)
        return self._of(value if node is None else node.expr)

    def _of(self, expr: Any) -> Size:
        kind = type(expr).__name__
        if expr.is_Integer:
            return Size.of(int(expr))
        if expr.is_Symbol:
            if expr.name in self.expressions:
                return self.expressions[expr.name]
            if expr.name not in self.names:
                raise depends_on_data(str(expr))
            return Size.symbol(self.names[expr.name])
        if kind in ("TruncToInt", "FloorToInt"):
            return self._scaled(expr)
        parts = [self._of(x) for x in expr.args]
        if kind == "Add":
            return reduce(lambda x, y: x + y, parts)
        if kind == "Mul":
            return product(parts)
        if kind == "Pow" and parts[1].constant is not None and 0 <= parts[1].constant <= 8:
            return product([parts[0]] * parts[1].constant)
        if kind in ("FloorDiv", "CleanDiv"):
            return parts[0] // parts[1]
        if kind in ("Mod", "PythonMod"):
            return parts[0] - parts[0] // parts[1] * parts[1]
        if kind in ("Min", "Max"):
            return self._extremum(parts, largest=kind == "Max")
        raise self._unknown(expr)

    def _scaled(self, expr: Any) -> Size:
        """int(0.5 * float(n)), as F.interpolate computes sizes from scale factors  -->  n // 2"""
        (scaled,) = expr.args
        ratio, parts = Fraction(1), []
        for factor in scaled.args if scaled.is_Mul else [scaled]:
            if factor.is_Number:
                ratio *= Fraction(float(factor))
            elif type(factor).__name__ == "ToFloat":
                parts.append(self._of(factor.args[0]))
            else:
                raise self._unknown(expr)
        if ratio < 0 or ratio.denominator > _LARGEST_DIVISOR:
            raise self._unknown(expr)
        return product(parts) * ratio.numerator // ratio.denominator

    def _unknown(self, expr: Any) -> UnknownSize:
        return UnknownSize(
            f"a size of {type(expr).__name__} is not supported",
            received=self.named(expr),
            hint="leave the dimension out of dynamic=, or compute the size with +, -, *, //, %, min and max",
        )

    def explain(self, value: Any, size: Size) -> None:
        """Record the size for a symbol that PyTorch could not express: for x[:, n - 3:], the length, since n - 3 may
        count from the end.
        """
        expr = getattr(getattr(value, "node", None), "expr", None)
        if expr is not None and expr.is_Symbol and expr.name not in self.names:
            self.expressions.setdefault(expr.name, size)

    def named(self, expr: Any) -> str:
        """Return the text of an expression of PyTorch's, with our names."""
        text = str(expr)
        for theirs, ours in sorted(self.names.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(theirs, ours)
        return text[:200]

    # -- minima and maxima -------------------------------------------------------------------------------------

    def is_at_least(self, x: Size, y: Size) -> bool:
        """Return True if x >= y for all sizes that a call may have."""
        return (x - y).bounds(self.bounds).lower >= 0 or x - y in self.least

    def _extremum(self, parts: Sequence[Size], largest: bool) -> Size:
        """Return the minimum or maximum of several sizes, if it is the same size in all calls, or else as in the
        example.
        """

        def conditions(one: Size) -> list[Size]:
            return [one - other if largest else other - one for other in parts]

        for one in parts:
            if all(self.is_at_least(difference, ZERO) for difference in conditions(one)):
                return one
        # Sizes that bound a symbol from below come first: if the example is at the bound, calls with larger sizes stay
        # valid.
        for one in sorted(parts, key=lambda one: any(_falls(difference) for difference in conditions(one))):
            if all(self._can_suppose(difference) for difference in conditions(one)):
                for difference in conditions(one):
                    self.suppose(difference, ZERO)
                return one
        text = ", ".join(map(str, parts))
        raise UnknownSize(
            f"the {'largest' if largest else 'smallest'} of several sizes differs between calls, and bounds "
            "of single dimensions cannot decide it",
            received=text,
            hint="leave all but one of these dimensions out of dynamic=, or give them one name if they are equal",
        )

    def suppose(self, x: Size, y: Size) -> bool:
        """Bound a symbol so that x >= y, as in the example. Return False if x < y in the example, or if bounds cannot
        express the condition.
        """
        if self.is_at_least(x, y):
            return True
        if not self._can_suppose(x - y):
            return False
        linear = (x - y).as_linear
        assert linear is not None
        name, factor, offset = linear
        held = Bounds(-(offset // factor)) if factor > 0 else Bounds(0, offset // -factor)
        self.bounds[name] = self.bounds.get(name, Bounds()).intersect(held)
        return True

    def _can_suppose(self, difference: Size) -> bool:
        return self.is_at_least(difference, ZERO) or (difference.as_linear is not None and self.hint(difference) >= 0)

    def demand(self, x: Size, y: Size) -> bool:
        """Assume x >= y, which an op of the graph requires. Return False if it does not hold in the example."""
        if self.hint(x) < self.hint(y):
            return False
        self.least.add(x - y)
        return True

    def hint(self, size: Size) -> int:
        """Return a size's value in the example."""
        return size.evaluate({ours: env_hint(self.env, theirs) for theirs, ours in self.names.items()})


def _falls(difference: Size) -> bool:
    """Return True if a difference decreases as its symbol grows."""
    return difference.as_linear is not None and difference.as_linear[1] < 0


def env_hint(env: Any, name: str) -> int:
    """Return the example's size for a symbol of PyTorch's."""
    known = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    return next(int(value) for symbol, value in known.items() if symbol.name == name)
