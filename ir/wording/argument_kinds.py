"""Kinds of arguments that an annotation's text names, and the values that fit them: `str | list[str]`, `int | None`.

An annotation with a part that is not listed here has no kind, and its arguments are not checked.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ArgumentKind:
    """The values that an argument may have.

    words    the kind in an error: "an integer"
    fits     True for a value of this kind
    example  the hint for another value, or None
    """

    words: str
    fits: Callable[[object], bool]
    example: str | None = None


def kind_of(parameter: Parameter) -> ArgumentKind | None:
    """Return the kind of a parameter whose annotation is a text; None if it is unknown, and for *args and **kwargs."""
    annotation, default = parameter.annotation, parameter.default
    if not isinstance(annotation, str) or parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        return None
    parts = annotation.split(" | ")
    kinds = [_KINDS.get(part) or _KINDS.get("Mapping" if part.startswith("Mapping[") else part) for part in parts]
    if None in kinds:
        return None
    tests = [kind[1] for kind in kinds if kind is not None]
    words = [kind[0] for kind in kinds if kind is not None and kind[0]]
    example = None if default in (Parameter.empty, None, ()) else f"{parameter.name}={default!r}"
    return ArgumentKind(" or ".join(words), lambda value: any(test(value) for test in tests), example)


def _is_integer(value: object) -> bool:
    if type(value) is int:
        return True
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _each(kind: type | tuple[type, ...], test: Callable[[object], bool]) -> Callable[[object], bool]:
    """Return a test for containers of this type whose items all pass a test."""
    return lambda value: isinstance(value, kind) and all(test(each) for each in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _has_texts(value: Iterable[object]) -> bool:
    """Return False for a container with an item that is not a string. A generator is not read."""
    return not isinstance(value, Sequence | frozenset | set) or all(map(_is_text, value))


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_text, value))


def _is_text_or_pair(value: object) -> bool:
    return _is_text(value) or _is_pair(value)


def _options(name: str) -> tuple[str, Callable[[Any], bool]]:
    """Return the kind of a class of options of the public API, which this module cannot import."""
    return f"t.{name}(...)", lambda value: type(value).__name__ == name


_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "None": ("", lambda value: value is None),
    "int": ("an integer", _is_integer),
    "float": ("a number", _is_number),
    "bool": ("True or False", lambda value: isinstance(value, bool | np.bool_)),
    "str": ("a string", _is_text),
    "PathLike": ("a path", _is_path),
    "bytes": ("bytes", lambda value: isinstance(value, bytes)),
    "Mapping": ("a mapping", lambda value: isinstance(value, Mapping)),
    "Mapping[str, str]": (
        "a mapping from strings to strings",
        lambda value: isinstance(value, Mapping) and all(map(_is_text, [*value, *value.values()])),
    ),
    "list[str]": ("a list of strings", _each(list, _is_text)),
    "list[PathLike]": ("a list of paths", _each(list, _is_path)),
    "list[tuple[str, str]]": ("a list of pairs of strings", _each(list, _is_pair)),
    "Text": ("a string or a pair of strings", _is_text_or_pair),
    "list[Text]": ("a list of them", _each(list, _is_text_or_pair)),
    "Sequence[str]": ("a list of strings", lambda value: not _is_text(value) and _each(Sequence, _is_text)(value)),
    "Sequence[PathLike]": ("a list of paths", _each(Sequence, _is_path)),
    "Iterable[str]": ("a list of strings", lambda value: isinstance(value, Iterable) and _has_texts(value)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
    "Sampling": _options("Sampling"),
    "TokenRules": _options("TokenRules"),
    "Beams": _options("Beams"),
}
"""For each part of an annotation, the kind in words, and a test of a value."""
