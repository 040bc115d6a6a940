"""Typed errors for calls of public functions, methods and constructors with arguments that they do not take."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from inspect import Parameter, Signature
from types import MappingProxyType
from typing import Any, TypeVar

from treadle.ir.errors import UsageError
from treadle.ir.wording.call_spelling import spelled_call

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

_SIMILAR = 0.7
"""The least similarity of a name in a hint: `logprobs` and `prompts` have 0.53, `thread` and `threads` 0.92."""
_NONE: Mapping[str, str] = MappingProxyType({})


def with_checked_call(elsewhere: Mapping[str, str] = _NONE) -> Callable[[Function], Function]:
    """Decorate a function, or a method with `self`. A call that does not fit its signature raises UsageError, with the
    nearest option or the signature as the hint.

    elsewhere  hints for options that other libraries, or other functions, have, by name
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = next(iter(signature.parameters), "") == "self"

        @functools.wraps(function)
        def checked(*ordered: Any, **options: Any) -> Any:
            check_call(function.__name__, signature, ordered[own:], options, elsewhere)
            return function(*ordered, **options)

        return _as_original(checked, signature)  # type: ignore[return-value]

    return decorate


def with_checked_constructor(elsewhere: Mapping[str, str] = _NONE) -> Callable[[Class], Class]:
    """Decorate a class in the same way: its constructor is checked."""

    def decorate(cls: Class) -> Class:
        create = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(create)

        @functools.wraps(create)
        def checked(self: Any, /, *ordered: Any, **options: Any) -> None:
            if type(self) is cls:
                check_call(cls.__name__, signature, ordered, options, elsewhere)
            create(self, *ordered, **options)

        setattr(cls, "__init__", _as_original(checked, signature))  # noqa: B010  mypy refuses the assignment
        return cls

    return decorate


def _as_original(checked: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """Return a wrapper with the signature of its function. Tools that look for the function inside, and for its
    docstring, find the wrapper, whose docstring may be completed later.
    """
    del checked.__wrapped__  # type: ignore[attr-defined]
    checked.__signature__ = signature  # type: ignore[attr-defined]
    return checked


def check_call(
    name: str,
    signature: Signature,
    ordered: Collection[Any],
    options: Mapping[str, Any],
    elsewhere: Mapping[str, str] = _NONE,
) -> None:
    """Raise UsageError if arguments do not fit a signature, whose first parameter `self` has no argument.

    ordered    the arguments without a name
    options    the arguments by name
    elsewhere  hints for options that other libraries, or other functions, have, by name
    """
    parameters = [each for each in signature.parameters.values() if each.name != "self"]
    with suppress(TypeError):
        signature.bind(*[None] * (len(signature.parameters) - len(parameters)), *ordered, **options)
        return
    call = spelled_call(name, signature.replace(parameters=parameters))
    places = [each for each in parameters if each.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    filled = [each.name for each in places[: len(ordered)]]
    if not any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
        for option, value in options.items():
            if option not in by_name:
                raise UsageError(
                    f"{name} has no option {option!r}",
                    received=f"{option}={value!r}"[:80],
                    hint=_nearest(option, by_name.difference(filled, options), elsewhere) or call,
                )
    if len(ordered) > len(places) and not any(each.kind is Parameter.VAR_POSITIONAL for each in parameters):
        takes = f"at most {len(places)} argument{'s' * (len(places) != 1)} without a name" if places else "no argument"
        takes += "" if places else " without a name"
        raise UsageError(f"{name} takes {takes}", received=str(len(ordered)), hint=call)
    if twice := [option for option in filled if option in options and option in by_name]:
        received = f"{twice[0]}={options[twice[0]]!r}"[:80]
        raise UsageError(f"{name} received {twice[0]} twice", received=received, hint=call)
    for each in parameters:
        needed = each.default is Parameter.empty and each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if needed and each.name not in filled and each.name not in options:
            raise UsageError(f"{name} needs the argument {each.name}", hint=call)


def _nearest(option: str, free: Collection[str], elsewhere: Mapping[str, str]) -> str | None:
    """Return the hint for an unknown option, or None if no name is similar.

    free  the options that the call does not have yet: a hint names no other one
    """
    for other in difflib.get_close_matches(option, elsewhere, n=1, cutoff=0.8):
        hint = elsewhere[other]
        if hint.partition("=")[0] in free or not hint.partition("=")[0].isidentifier():
            return hint
    near = difflib.get_close_matches(option, sorted(free), n=1, cutoff=_SIMILAR)
    return f"{near[0]}=..." if near else None
