"""Python and NumPy protocols that a graph's value cannot support. Each error names the replacement.

`len(x)`, `float(x)`, `if x:`, `x[0]`, `x.mean()`, `numpy.tanh(x)`, ...: while a graph is built, values have no
elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from treadle.ir.errors import GraphError
from treadle.ir.op_registry import OPS
from treadle.ir.wording.other_spellings import OTHER_METHODS, OTHER_WORDS

if TYPE_CHECKING:
    from treadle.ir.builder import Builder
    from treadle.ir.types import Type


class NoSuchMethod(GraphError, AttributeError):
    """A traced value lacks a method that arrays of other libraries have."""


_OPERATORS = {
    **{"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "floor_divide": "floor_divide"},
    **{"remainder": "mod", "power": "pow", "float_power": "pow", "matmul": "matmul"},
    **{"less": "less", "less_equal": "less_equal", "greater": "greater", "greater_equal": "greater_equal"},
    **{"equal": "equal", "not_equal": "not_equal", "bitwise_and": "logical_and", "bitwise_or": "logical_or"},
}
"""The op for each NumPy function that Python calls for an operator with an array or a NumPy number on the left."""


class PythonProtocols:
    """Base of `Expr` with the unsupported operators. Each raises GraphError."""

    __slots__ = ()
    builder: Builder

    if TYPE_CHECKING:

        @property
        def type(self) -> Type: ...

    def __bool__(self) -> NoReturn:
        raise self._refusal(
            "a tensor of a model has no truth value: a graph has no data-dependent branches",
            "t.where(condition, a, b) selects elementwise; "
            "& | ~ stand for and, or, not; t.maximum, t.minimum for max, min",
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Handle NumPy's elementwise functions: operators with an array become ops, others raise GraphError."""
        op = _OPERATORS.get(ufunc.__name__)
        if op is not None and method == "__call__" and not options:
            return self.builder.apply(op, *inputs, name="x")
        if method != "__call__":
            ufunc, options = getattr(ufunc, method), {}
        raise self._not_numpys(ufunc.__name__, len(inputs))

    def __array_function__(self, function: Callable[..., Any], *_: Any) -> NoReturn:
        raise self._not_numpys(function.__name__, 1)

    def _not_numpys(self, name: str, operands: int) -> GraphError:
        return self._refusal(
            f"NumPy's {name} takes arrays, not tensors of a model",
            OTHER_WORDS.get(name) or (f"t.{name}({', '.join('xyz'[:operands])})" if name in OPS else None),
        )

    def _refusal(self, what: str, hint: str | None) -> GraphError:
        return GraphError(what, received=str(self.type), source=self.builder.place(), hint=hint)

    if not TYPE_CHECKING:  # only at run time, since type checkers report these operators themselves

        def __getitem__(self, index: Any) -> NoReturn:
            raise self._refusal(
                "a tensor of a model has no [ ]: use ops to slice and index its axes",
                "t.slice(x, axis=1, start=0, stop=4) for a part of an axis, t.gather(x, 0, axis=1) for one position",
            )

        def __getattr__(self, name: str) -> NoReturn:
            """Raise NoSuchMethod, which names the replacement."""
            if name.startswith("__"):
                raise AttributeError(name)
            spelled = OTHER_METHODS.get(name) or (f"t.{name}(x)" if name in OPS else None)
            raise NoSuchMethod(
                f"a tensor of a model has no .{name}: use an op instead",
                received=str(self.type),
                source=self.builder.place(),
                hint=spelled or "dir(treadle) lists the ops",
            )

        def __iter__(self) -> NoReturn:
            raise self._refusal(
                "a tensor of a model cannot be iterated over",
                "t.gather(x, i, axis=0) returns position i of an axis, for i in range(...) if its size is a number",
            )

        def __contains__(self, value: Any) -> NoReturn:
            raise self._refusal("`in` cannot look into a tensor", "x == value compares each element")

        def __len__(self) -> NoReturn:
            raise self._refusal(
                "a tensor of a model has no len()",
                "x.shape[0] is the size of its first axis, x.rank the number of axes",
            )

        def __array__(self, *_: Any, **__: Any) -> NoReturn:
            raise self._refusal(
                "a tensor of a model is not an array: it has elements only when the compiled model is called",
                "t.concat(a, b, axis=1) joins tensors; ops accept arrays and tensors together",
            )

        def _no_number(self, *_: Any) -> NoReturn:
            raise self._refusal(
                "a tensor of a model is not a Python number: it has elements only when the compiled model is called",
                "x.cast(t.f32) and x.cast(t.i64) for another dtype; x.shape[1] for a size",
            )

        __float__ = __int__ = __index__ = __complex__ = _no_number

        def __round__(self, *_: Any) -> NoReturn:
            raise self._refusal("a tensor of a model is not a Python number", "t.round(x)")

        def __floor__(self) -> NoReturn:
            raise self._refusal("a tensor of a model is not a Python number", "t.floor(x)")

        __trunc__ = __floor__

        def __ceil__(self) -> NoReturn:
            raise self._refusal("a tensor of a model is not a Python number", "-t.floor(-x)")

        def __divmod__(self, _: Any) -> NoReturn:
            raise self._refusal("a tensor of a model has no divmod()", "x // y and x % y")
