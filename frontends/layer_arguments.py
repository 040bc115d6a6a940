"""Checks of a layer's arguments against its annotations before it runs; an error names the wrong argument.

    t.self_attention(x, "6")        self_attention: heads must be an integer
                                      received  '6'
                                      try       heads=6

Options that a layer does not have are left to Python, whose error `call_errors` explains.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from treadle.frontends.call_errors import nearest_op
from treadle.frontends.dsl import trace
from treadle.ir.builder import Expr
from treadle.ir.errors import FrontendError
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Dim, DType
from treadle.ir.wording.call_spelling import spelled_call
from treadle.ir.wording.other_spellings import dtype_word

P = ParamSpec("P")
R = TypeVar("R")


class _Wrong(Exception):
    """An argument that does not match its annotation: the required kind, and the hint."""

    def __init__(self, wanted: str, hint: str | None = None) -> None:
        super().__init__(wanted)
        self.wanted, self.hint = wanted, hint


def layer(function: Callable[P, R]) -> Callable[P, R]:
    """Return the layer with a check that raises FrontendError for an argument that does not match its annotation."""
    parameters = inspect.signature(function).parameters
    checks = {name: _CHECKS[p.annotation] for name, p in parameters.items() if p.annotation in _CHECKS}
    names = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    fitting = {
        name: _FITTING.get(check, frozenset()) | ({type(None)} if parameters[name].default is None else set())
        for name, check in checks.items()
    }
    fit: set[tuple[type | str, ...]] = set()
    """Argument types, by position and then by name, that need no check: nearly all calls use a few combinations."""

    def fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if all arguments have types that need no check."""
        return all(
            fitting.get(name) is None or type(value) in fitting[name]
            for name, value in (*zip(names, args, strict=False), *kwargs.items())
        )

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        types: tuple[type | str, ...] = (*map(type, args), *list(kwargs), *map(type, kwargs.values()))
        if types in fit:
            return function(*args, **kwargs)
        if fits(args, kwargs):
            fit.add(types)
            return function(*args, **kwargs)
        tracing = trace()
        if len(args) > len(names) or not kwargs.keys() <= parameters.keys():
            return function(*args, **kwargs)  # Python reports the error
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, check in checks.items():
            if name not in given or (given[name] is None and parameters[name].default is None):
                continue
            try:
                given[name] = check(name, given[name])
            except _Wrong as wrong:
                raise FrontendError(
                    f"{function.__name__}: {name} must be {wrong.wanted}",
                    received=f"{given[name]!r}"[:80],
                    source=tracing.place(),
                    hint=wrong.hint or (_call(function) if check is _tensor else None),
                ) from None
        whole: Any = function
        result: R = whole(*[given.pop(name) for name in names[: len(args)]], **given)
        return result

    return checked


def _call(function: Callable[..., Any]) -> str:
    """Return the call of a layer, for a size or a text in place of a tensor, as in PyTorch's nn.Embedding(100, 16)."""
    return f"t.{spelled_call(function.__name__, inspect.signature(function))}"


def _tensor(name: str, value: Any) -> Expr:
    if isinstance(value, Expr):
        return value
    if value is None:
        raise _Wrong("a tensor", "an optional input that was left out is None: inputs=(...) of compile includes it")
    if isinstance(value, list | tuple) and any(isinstance(each, Expr) for each in value):
        raise _Wrong("one tensor", "t.concat(a, b, axis=1) joins tensors")
    arrays = isinstance(value, np.ndarray | np.generic | list | tuple) or hasattr(value, "__array__")
    raise _Wrong("a tensor", "t.constant(...) builds a tensor from numbers" if arrays else None)


def _integer(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # raises a clear error for a size that contains symbols
        except TypeError:
            pass
    if isinstance(value, Dim):
        raise _Wrong("an integer", value.label_hint)
    try:
        whole = int(value) if isinstance(value, str) or float(value).is_integer() else None
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is not None:
        raise _Wrong("an integer", f"{name}={whole}")
    raise _Wrong("an integer", "// divides integers, and int(...) truncates" if isinstance(value, float) else None)


def _size(name: str, value: Any) -> Any:
    if isinstance(value, str) and value.strip().isdecimal():
        raise _Wrong('a size: an integer, or an axis of the inputs, such as "S"', f"{name}={int(value)}")
    return value if isinstance(value, Size | Dim | str) else _integer(name, value)


def _integers(name: str, value: Any) -> tuple[int, ...]:
    wanted = "a tuple of integers, one for each axis"
    if isinstance(value, list | tuple | np.ndarray):
        try:
            return tuple(_integer(name, each) for each in value)
        except _Wrong:
            raise _Wrong(wanted) from None
    try:
        whole = _integer(name, value)
    except _Wrong:
        raise _Wrong(wanted) from None
    raise _Wrong(wanted, f"{name}=({whole},) for one axis, {name}=({whole}, {whole}) for two")


def _padding(name: str, value: Any) -> Any:
    if isinstance(value, str):
        if value in ("same", "valid"):
            return value
        ways = f'{name}="same" or "valid"'
        if value == "causal":
            ways = f'{name}="valid", for t.pad(x, axis=-1, before=2) in place of x, where 2 is (kernel - 1) * dilation'
        raise _Wrong("a tuple of integers, one for each axis", ways)
    return _integers(name, value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, str | bool | Expr):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    try:
        raise _Wrong("a number", f"{name}={float(value)}" if isinstance(value, str) else None)
    except ValueError:
        raise _Wrong("a number") from None


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise _Wrong("True or False")


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise _Wrong("text", f'{name}="{value}"' if isinstance(value, int) else None)


def _function(name: str, value: Any) -> Any:
    if callable(value) and not isinstance(value, Expr):
        return value
    op = nearest_op(value) if isinstance(value, str) else None
    raise _Wrong("a function of a tensor", f"{name}=t.{op}" if op else None)


def _dtype(name: str, value: Any) -> DType:
    if isinstance(value, DType):
        return value
    raise _Wrong("a dtype", f"{name}={dtype_word(value) or 't.f32, t.f16, t.bf16 or t.f64'}")


_FITTING: dict[Callable[[str, Any], Any], frozenset[type]] = {
    _tensor: frozenset({Expr}),
    _integer: frozenset({int}),
    _size: frozenset({int, Size, Dim}),
    _number: frozenset({float}),
    _truth: frozenset({bool}),
    _text: frozenset({str}),
    _function: frozenset({FunctionType}),
    _dtype: frozenset({DType}),
}
"""For each check, the types of arguments that it returns unchanged."""

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "Tensor": _tensor,
    "int": _integer,
    "SizeLike": _size,
    "SizeLike | Dim": _size,
    "Sequence[int]": _integers,
    "Sequence[int] | Literal['same', 'valid']": _padding,
    "float": _number,
    "bool": _truth,
    "str": _text,
    "Activation": _function,
    "Normalize": _function,
    "DType": _dtype,
}
_CHECKS |= {f"{annotation} | None": check for annotation, check in _CHECKS.items()}
