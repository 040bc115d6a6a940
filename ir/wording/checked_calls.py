"""Typed errors for calls of public functions, methods and constructors with arguments that they do not take."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from inspect import Parameter, Signature
from types import MappingProxyType
from typing import Any, TypeVar

from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.wording.argument_kinds import kind_of
from treadle.ir.wording.call_spelling import spelled_call

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

_SIMILAR = 0.7
"""The least similarity of a name in a hint: `logprobs` and `prompts` have 0.53, `thread` and `threads` 0.92."""
_NONE: Mapping[str, str] = MappingProxyType({})
_PLACES = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_CHECKED = "_is_checked"
"""The attribute of a function that is checked already."""


def with_checked_call(
    elsewhere: Mapping[str, str] = _NONE, examples: Mapping[str, str] = _NONE, *, instead: str | None = None
) -> Callable[[Function], Function]:
    """Decorate a function, or a method with `self`. A call that does not fit its signature raises UsageError, with the
    nearest option or the signature as the hint; so does an argument of another kind than its annotation
    (`treadle.ir.wording.argument_kinds`).

    elsewhere  hints for options that other libraries, or other functions, have, by name
    examples   hints for arguments of another kind, by name
    instead    the hint for arguments that have no place; None: the signature
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = next(iter(signature.parameters), "") == "self"
        places = [each for each in signature.parameters.values() if each.kind in _PLACES][own:]
        required = sum(each.default is Parameter.empty for each in places)
        most = len(places)
        is_plain = not any(
            each.kind is Parameter.KEYWORD_ONLY and each.default is Parameter.empty
            for each in signature.parameters.values()
        )
        check_kinds = _kind_check(signature, places, examples)

        @functools.wraps(function)
        def checked(*ordered: Any, **options: Any) -> Any:
            arguments = ordered[own:]
            if options or not is_plain or not required <= len(arguments) <= most:
                check_call(function.__name__, signature, arguments, options, elsewhere, instead=instead)
            check_kinds(arguments, options)
            return function(*ordered, **options)

        setattr(checked, _CHECKED, True)
        return _as_original(checked, signature)  # type: ignore[return-value]

    return decorate


def with_checked_methods(
    elsewhere: Mapping[str, str] = _NONE, examples: Mapping[str, str] = _NONE
) -> Callable[[Class], Class]:
    """Decorate a class: its own public methods are checked as by `with_checked_call`, except those that are checked
    already.
    """

    def decorate(cls: Class) -> Class:
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and not name.startswith("_") and not hasattr(method, _CHECKED):
                setattr(cls, name, with_checked_call(elsewhere, examples)(method))
        return cls

    return decorate


def _kind_check(
    signature: Signature, places: Sequence[Parameter], examples: Mapping[str, str]
) -> Callable[[Sequence[Any], Mapping[str, Any]], None]:
    """Return a function that raises UsageError if an argument of a call is of another kind than its annotation.

    places  the parameters that arguments without a name fill
    """
    place_of = {each.name: place for place, each in enumerate(places)}
    kinds = [
        (place_of.get(name, len(places)), name, kind)
        for name, each in signature.parameters.items()
        if (kind := kind_of(each)) is not None
    ]

    def check(ordered: Sequence[Any], options: Mapping[str, Any]) -> None:
        for place, name, kind in kinds:
            if place >= len(ordered) and name not in options:
                continue
            value = ordered[place] if place < len(ordered) else options[name]
            if not kind.fits(value):
                received = f"{name}={value!r}"[:80]
                number = number_of(value)
                hint = f"{name}=[{value!r}]" if kind.fits([value]) else examples.get(name, kind.example)
                hint = f"{name}={number!r}" if number is not None and kind.fits(number) else hint
                raise UsageError(f"{name} must be {kind.words}", received=received, hint=hint)

    return check


def with_checked_constructor(elsewhere: Mapping[str, str] = _NONE) -> Callable[[Class], Class]:
    """Decorate a class in the same way: its constructor is checked. The constructor's own errors come before errors for
    arguments of another kind, since they know the range of a value.
    """

    def decorate(cls: Class) -> Class:
        create = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(create)
        check_kinds = _kind_check(signature, [p for p in signature.parameters.values() if p.kind in _PLACES][1:], _NONE)

        @functools.wraps(create)
        def checked(self: Any, /, *ordered: Any, **options: Any) -> None:
            if type(self) is not cls:
                create(self, *ordered, **options)
                return
            check_call(cls.__name__, signature, ordered, options, elsewhere)
            failure: Exception | None = None
            try:
                create(self, *ordered, **options)
            except TreadleError:
                raise
            except Exception as error:
                failure = error
            check_kinds(ordered, options)
            if failure is not None:
                raise failure

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


def number_of(text: object) -> int | float | None:
    """Return the number that a text writes, such as 1e-3; None for other values."""
    if isinstance(text, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
    return None


def check_call(
    name: str,
    signature: Signature,
    ordered: Collection[Any],
    options: Mapping[str, Any],
    elsewhere: Mapping[str, str] = _NONE,
    *,
    instead: str | None = None,
) -> None:
    """Raise UsageError if arguments do not fit a signature, whose first parameter `self` has no argument.

    ordered    the arguments without a name
    options    the arguments by name
    elsewhere  hints for options that other libraries, or other functions, have, by name
    instead    the hint for arguments that have no place; None: the signature
    """
    parameters = [each for each in signature.parameters.values() if each.name != "self"]
    with suppress(TypeError):
        signature.bind(*[None] * (len(signature.parameters) - len(parameters)), *ordered, **options)
        return
    call = spelled_call(name, signature.replace(parameters=parameters))
    places = [each for each in parameters if each.kind in _PLACES]
    by_name = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    filled = [each.name for each in places[: len(ordered)]]
    if not any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
        for option, value in options.items():
            if option not in by_name:
                raise UsageError(
                    f"{name} has no option {option!r}",
                    received=f"{option}={value!r}"[:80],
                    hint=_nearest(option, by_name.difference(filled, options), _as_typed(elsewhere, option, options))
                    or instead
                    or call,
                )
    if len(ordered) > len(places) and not any(each.kind is Parameter.VAR_POSITIONAL for each in parameters):
        takes = f"at most {len(places)} argument{'s' * (len(places) != 1)} without a name" if places else "no argument"
        takes += "" if places else " without a name"
        raise UsageError(f"{name} takes {takes}", received=str(len(ordered)), hint=instead or call)
    if twice := [option for option in filled if option in options and option in by_name]:
        received = f"{twice[0]}={options[twice[0]]!r}"[:80]
        raise UsageError(f"{name} received {twice[0]} twice", received=received, hint=call)
    for each in parameters:
        needed = each.default is Parameter.empty and each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if needed and each.name not in filled and each.name not in options:
            raise UsageError(f"{name} needs the argument {each.name}", hint=call)


_WHOLE = re.compile(r"(?<=[=(])\d+(?![\w.])")


def _as_typed(hints: Mapping[str, str], option: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return hints with the numbers of a call in place of an example's: `most=5` for `most=64`, and only the options
    that the call has for `Sampling(temperature=0.7, top_k=50)`.
    """
    values, parts = options.get(option), hints.get(option, "").split(", ")
    if isinstance(values, tuple | list) and len(values) == len(parts) and all(re.match(r"\w+=", x) for x in parts):
        pairs = zip(parts, values, strict=True)  # betas=(0.9, 0.99): beta1=0.9, beta2=0.99
        hints = {**hints, option: ", ".join(f"{part.partition('=')[0]}={value!r}" for part, value in pairs)[:80]}
    if option in hints and isinstance(options.get(option), Mapping):  # dynamic_axes={"x": {0: "B"}}: the same value
        hints = {**hints, option: f"{hints[option].partition('=')[0]}={options[option]!r}"}
    typed = {name: repr(value) for name, value in options.items() if type(value) in (int, float)}
    found = {}
    for other, hint in hints.items():
        if option in typed and len(_WHOLE.findall(hint)) == 1:
            hint = _WHOLE.sub(typed[option], hint)
        inside = re.findall(r"[(, ](\w+)=(?!t\.)", hint)
        given = [f"{name}={value}" for name, value in typed.items() if name in inside]
        found[other] = re.sub(r"\(\w+=[^()]*\)", f"({', '.join(given)})", hint) if given else hint
    return found


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
