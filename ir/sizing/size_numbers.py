"""Sizes as Python and NumPy numbers: a constant size behaves as its integer, a symbolic size raises SizeError with a
hint.

x.shape[-1] ** -0.5       0.125, if the axis has size 64
range(x.shape[1])         SizeError: S differs from call to call
x.shape[1] > 0            True, since it holds for any S; so does x.shape[1] < 2**63
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from treadle.ir.errors import SizeError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.source_lines import user_call
from treadle.ir.wording.other_spellings import OTHER_WORDS
from treadle.ir.wording.typed_calls import typed_replacement

if TYPE_CHECKING:
    from treadle.ir.sizing.sizes import Size

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **{"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv},
    **{"floor_divide": operator.floordiv, "remainder": operator.mod, "power": operator.pow},
    **{"less": operator.lt, "less_equal": operator.le, "greater": operator.gt, "greater_equal": operator.ge},
    **{"equal": operator.eq, "not_equal": operator.ne},
}
"""The Python operators that NumPy's functions correspond to, for expressions with a NumPy number on the left."""


def _numbers(operands: Iterable[Any]) -> list[Any]:
    """Return operands of a call with the numbers of their sizes, also of those in a list or a tuple."""
    return [
        operator.index(x) if isinstance(x, SizeNumbers) else type(x)(_numbers(x)) if type(x) in (list, tuple) else x
        for x in operands
    ]


_LONGEST = 2**63 - 1
"""The longest possible axis of an array, and the largest integer in a tensor."""


class SizeNumbers:
    """Base of `Size`, for operations that are not arithmetic on sizes. They raise SizeError if the result differs from
    call to call.
    """

    __slots__ = ()
    constant: int | None

    def __index__(self) -> int:
        if self.constant is None:
            value = f't.size(value="{self}", dtype=t.f32) is a tensor of this value'
            loop = "to loop over the axis, give it a number as its size, or use t.cumsum (docs/dsl.md)"
            library, _, function = (ast.unparse(call.func) if (call := user_call()) else "").rpartition(
                "."
            )  # numpy.arange, torch.ones
            elsewhere = library in ("np", "numpy", "torch")
            tensor = typed_replacement(function) or OTHER_WORDS.get(function) if elsewhere else None
            raise SizeError(
                f"the size {self} is not a number while a model is traced, since it differs from call to call",
                hint=tensor or f"{value}; {loop}",
            )
        return self.constant

    __int__ = __index__

    def __float__(self) -> float:
        return float(operator.index(self))

    def beside(self, function: Callable[[Any, Any], Any], other: Any) -> Size:
        """Apply an operator to a size and another operand. If the operand is not a number, return NotImplemented, so
        that Python asks the other operand.

        The declared return type is the one for two sizes. With a float, the result is a number.
        """
        found: Any = NotImplemented
        if isinstance(other, Integral):
            found = function(self, int(other))
        elif isinstance(other, Real):
            found = function(operator.index(self), float(other))
        return cast("Size", found)

    def __truediv__(self, other: Size | float) -> float:
        return cast("float", self._of_numbers(operator.truediv, self, other))

    def __rtruediv__(self, other: float) -> float:
        return cast("float", self._of_numbers(operator.truediv, other, self))

    def __pow__(self, other: Any) -> Any:
        """Return a size for an integer exponent of at least 0, and a number for any other exponent. The return type is
        Any, as for `int.__pow__`.
        """
        if not isinstance(other, Integral) or other < 0:
            return self._of_numbers(operator.pow, self, other)
        if self.constant is not None:
            return self.constant ** int(other)
        product: Any = 1
        for _ in range(int(other)):
            product = product * self
        return product

    def __rpow__(self, other: float) -> Any:
        return self._of_numbers(operator.pow, other, self)

    def _of_numbers(self, function: Callable[[Any, Any], Any], *operands: object) -> Any:
        if not all(isinstance(x, SizeNumbers | Real) for x in operands):
            return NotImplemented
        return function(*[operator.index(x) if isinstance(x, SizeNumbers) else x for x in operands])

    def __lt__(self, other: Size | float) -> bool:
        return self._is("<", operator.lt, other)

    def __le__(self, other: Size | float) -> bool:
        return self._is("<=", operator.le, other)

    def __gt__(self, other: Size | float) -> bool:
        return self._is(">", operator.gt, other)

    def __ge__(self, other: Size | float) -> bool:
        return self._is(">=", operator.ge, other)

    def _is(self, sign: str, compare: Callable[[float, float], bool], other: Any) -> bool:
        """Return True if the comparison holds for all sizes that an axis can have, False if it holds for none.
        Otherwise raises SizeError.
        """
        if not isinstance(other, SizeNumbers | Real):
            return cast("bool", NotImplemented)
        size: Any = self
        beside: float = 0
        if isinstance(other, SizeNumbers):
            size = size - other
        else:
            beside = int(other) if isinstance(other, Integral) else float(other)
        low, high = size.interval(dict.fromkeys(size.symbols, Bounds(1, _LONGEST)))
        least, most = compare(low, beside), compare(high, beside)
        if least is not most:
            sides = [str(x) if isinstance(x, Real) else f't.size(value="{x}", dtype=t.f32)' for x in (self, other)]
            chosen = f", or t.where({f' {sign} '.join(sides)}, a, b)"
            raise SizeError(
                f"{self} {sign} {other} is unknown while a model is traced, since sizes differ from call to call",
                hint="declare the axis with a number" + (chosen if abs(beside) <= _LONGEST else ""),
            )
        return least

    def __format__(self, spec: str) -> str:
        return format(str(self) if self.constant is None else self.constant, spec)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, operands: Any = (), options: Any = None) -> Any:
        """Apply a PyTorch function to the numbers of sizes. Raises SizeError if a size is not a number."""
        return function(
            *_numbers(operands), **dict(zip(options or {}, _numbers((options or {}).values()), strict=True))
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Apply a NumPy function to the size's number. If the other operand is a NumPy number, apply the corresponding
        Python operator instead.
        """
        function = _OPERATORS.get(ufunc.__name__)
        if function is not None and method == "__call__" and all(isinstance(x, SizeNumbers | Real) for x in inputs):
            return function(*[x if isinstance(x, SizeNumbers) else getattr(x, "item", lambda x=x: x)() for x in inputs])
        numbers = [operator.index(x) if isinstance(x, SizeNumbers) else x for x in inputs]
        return getattr(ufunc, method)(*numbers, **options)
