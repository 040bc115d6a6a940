"""Python and NumPy protocols that a graph's value cannot support. Each error names the replacement.

`float(x)`, `if x:`, `x[0] = 1`, `numpy.tanh(x)`, `torch.relu(x)`, ...: while a graph is built, values have no elements.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from treadle.files.nearest_names import NearestNames
from treadle.ir.errors import GraphError
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.source_lines import user_call
from treadle.ir.wording.call_spelling import spelled_call
from treadle.ir.wording.op_signatures import op_signature
from treadle.ir.wording.other_spellings import OTHER_FUNCTIONS, OTHER_METHODS, OTHER_WORDS, without_option
from treadle.ir.wording.typed_calls import fixed_method, typed_replacement

if TYPE_CHECKING:
    from treadle.ir.builder import Builder
    from treadle.ir.types import Type


class NoSuchMethod(GraphError, AttributeError):
    """A traced value lacks a method that arrays of other libraries have."""


def replacement(name: str, operands: int) -> str | None:
    """Return the call that replaces a function of another library, or None if there is none."""
    spelled = OTHER_WORDS.get(name) or OTHER_FUNCTIONS.get(name)
    return spelled or (_op_call(OPS[name], operands) if name in OPS and OPS[name].is_word else None)


def _op_call(op: type[Op], operands: int) -> str:
    """Return a call of an op with x, y and z as operands, or its signature if it needs more than that."""
    required, most = op.arity
    needs_more = any(field.default is dataclasses.MISSING for field in dataclasses.fields(op))  # type: ignore[arg-type]
    if needs_more or most is None or not len(required) <= operands <= most:
        return f"t.ops.{spelled_call(op.name, op_signature(op))}"  # t.attention is a layer, with another signature
    return f"t.{op.name}({', '.join('xyz'[:operands])})"


def _as_method(tensor: Any, name: str, operands: Any, options: dict[str, Any]) -> str | None:
    """Return a call of PyTorch's function as a call of the method of that name, or None if it cannot be one."""
    method = fixed_method(type(tensor), name)
    set_options = {option: value for option, value in options.items() if value is not None}
    numbers = [*_each((operands[1:], set_options))]
    if not operands or operands[0] is not tensor or not all(isinstance(x, int | float) for x in numbers):
        return None
    try:
        inspect.signature(method).bind(tensor, *operands[1:], **set_options)  # type: ignore[arg-type]
    except TypeError:
        return None
    arguments = [*map(repr, operands[1:]), *[f"{option}={value!r}" for option, value in set_options.items()]]
    return f"x.{name}({', '.join(arguments)})"


def _each(values: Any) -> Iterator[Any]:
    """Yield the arguments of a call, and the items of its lists, tuples and dictionaries."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, list | tuple | dict):
            yield from _each(value)
        else:
            yield value


_OPERATORS = {
    **{"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "floor_divide": "floor_divide"},
    **{"remainder": "mod", "power": "pow", "float_power": "pow", "matmul": "matmul"},
    **{"less": "less", "less_equal": "less_equal", "greater": "greater", "greater_equal": "greater_equal"},
    **{"equal": "equal", "not_equal": "not_equal", "bitwise_and": "logical_and", "bitwise_or": "logical_or"},
}
"""The op for each NumPy function that Python calls for an operator with an array or a NumPy number on the left."""

_PYTORCHS_OPERATORS = {
    **{"sub": "sub", "mul": "mul", "div": "div", "true_divide": "div", "__floordiv__": "floor_divide", "pow": "pow"},
    **{"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal"},
}
"""The op for each further function of PyTorch that Python calls for an operator with a PyTorch tensor on the left."""


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

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, operands: Any = (), options: Any = None) -> Any:
        """Handle PyTorch's functions: operators with a PyTorch tensor on the left become ops, others raise
        GraphError.
        """
        ours = [x for x in _each((operands, options or {})) if isinstance(x, PythonProtocols)]
        name = function.__name__
        op = _OPERATORS.get(name.strip("_")) or _PYTORCHS_OPERATORS.get(name)
        if op is not None and len(operands) == 2 and not options and not isinstance(operands[0], PythonProtocols):
            return ours[0].builder.apply(op, *operands, name="x")
        keywords = {option: value for option, value in (options or {}).items() if not option.startswith("_")}
        instead = typed_replacement(name, cls) or next(
            filter(None, (without_option(name, option, value) for option, value in keywords.items())), None
        )
        raise ours[0]._refusal(
            f"PyTorch's {name} takes PyTorch's tensors, not tensors of a model",
            instead
            or _as_method(ours[0], name, operands, keywords)
            or replacement(name, len(ours) if len(ours) == len(operands) else 1),
        )

    def _not_numpys(self, name: str, operands: int) -> GraphError:
        return self._refusal(
            f"NumPy's {name} takes arrays, not tensors of a model",
            typed_replacement(name, type(self)) or replacement(name, operands),
        )

    def _no_such_method(self, name: str) -> NoSuchMethod:
        """Return the error for a method that tensors lack, which names the replacement."""
        spelled = typed_replacement(name, type(self), of_tensor=True) or OTHER_METHODS.get(name) or replacement(name, 1)
        if name.endswith("_") and hasattr(self, name[:-1]):
            spelled = f"x = x.{name[:-1]}(...)  # values do not change"
        return NoSuchMethod(
            f"a tensor of a model has no .{name}: use an op instead",
            received=str(self.type),
            source=self.builder.place(),
            hint=spelled or self._nearest(name) or "dir(treadle) lists the ops",
        )

    def _nearest(self, name: str) -> str | None:
        """Return the method or the op whose name is most similar."""
        methods = [each for each in dir(type(self)) if not each.startswith("_") and callable(getattr(type(self), each))]
        near = next(iter(NearestNames([*methods, *OPS]).of(name, 1, 0.85)), None)
        return f"x.{near}(...)" if near in methods else near and replacement(near, 1)

    def _refusal(self, what: str, hint: str | None) -> GraphError:
        return GraphError(what, received=str(self.type), source=self.builder.place(), hint=hint)

    if not TYPE_CHECKING:  # only at run time, since type checkers report these operators themselves

        def __contains__(self, value: Any) -> NoReturn:
            raise self._refusal("`in` cannot look into a tensor", "x == value compares each element")

        def __array__(self, *_: Any, **__: Any) -> NoReturn:
            raise self._refusal(
                "a tensor of a model is not an array: it has elements only when the compiled model is called",
                "t.concat(a, b, axis=1) joins tensors; ops accept arrays and tensors together",
            )

        def __setitem__(self, index: Any, value: Any) -> NoReturn:
            raise self._refusal(
                "a tensor of a model cannot be changed: ops return new tensors",
                "t.where(condition, a, b) selects elementwise; t.concat(a, b, axis=1) joins parts",
            )

        def _no_number(self, *_: Any) -> NoReturn:
            call = user_call()
            called = ast.unparse(call.func) if call else ""
            raise self._refusal(
                "a tensor of a model is not a Python number: it has elements only when the compiled model is called",
                (replacement(called.rpartition(".")[2], 1) if not hasattr(builtins, called) else None)
                or "x.cast(t.f32) and x.cast(t.i64) for another dtype; x.shape[1] for a size",
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
