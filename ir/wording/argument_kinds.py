"""Kinds of arguments that an annotation's text names, and the values that fit them: `str | list[str]`, `int | None`.

An annotation with a part that is unknown here has no kind, and its arguments are not checked.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, NamedTuple

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


class _Kind(NamedTuple):
    """A part of an annotation.

    one      one value in words
    several  several values in words
    fits     True for a value of this kind
    numbers  True for numbers: arrays of them are lists, too, and items are not tested, since there may be many
    """

    one: str
    several: str
    fits: Callable[[Any], bool]
    numbers: bool = False


def kind_of(parameter: Parameter) -> ArgumentKind | None:
    """Return the kind of a parameter whose annotation is a text; None if it is unknown, and for *args and **kwargs."""
    annotation, default = parameter.annotation, parameter.default
    if not isinstance(annotation, str) or parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        return None
    kind = _kind(ast.parse(annotation, mode="eval").body)
    if kind is None or kind is _ANY:
        return None
    example = None if default in (Parameter.empty, None, ()) else f"{parameter.name}={default!r}"
    return ArgumentKind(kind.one, kind.fits, example)


def _kind(node: ast.expr) -> _Kind | None:
    """Return the kind of a part of an annotation; None if it is unknown."""
    if isinstance(node, ast.BinOp):
        return _either(_kind(node.left), _kind(node.right))
    if isinstance(node, ast.Constant) and node.value is None:
        return _NONE
    if isinstance(node, ast.Name):
        return _NAMED.get(node.id)
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return None
    name, inside = node.value.id, node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return _literal([ast.literal_eval(each) for each in inside])
    parts = [_kind(each) for each in inside if not (isinstance(each, ast.Constant) and each.value is ...)]
    kinds = [each for each in parts if each is not None]
    if len(kinds) < len(parts) or name not in _CONTAINERS:
        return None
    if name == "Mapping":
        return _mapping(*kinds)
    if name == "tuple" and kinds == [_ANY]:  # the function itself knows what its tuple holds
        return None
    if name == "tuple" and len(inside) == len(kinds):
        return _fixed(kinds)
    return _items(_CONTAINERS[name], kinds[0])


def _either(x: _Kind | None, y: _Kind | None) -> _Kind | None:
    """Return the kind of the values of two kinds. None needs no words."""
    if x is None or y is None or _ANY in (x, y):
        return None if x is None or y is None else _ANY
    one, several = (
        " or ".join(dict.fromkeys(filter(None, words))) for words in ((x.one, y.one), (x.several, y.several))
    )
    return _Kind(one, several, lambda value: x.fits(value) or y.fits(value))


def _items(container: type | tuple[type, ...], kind: _Kind) -> _Kind:
    """Return the kind of containers whose items have a kind. A generator is not read. A text is an iterable of texts,
    but no list of them.
    """

    def fits(value: Any) -> bool:
        if kind.numbers and hasattr(value, "__array__"):
            return True
        if isinstance(value, str | bytes) or not isinstance(value, container):
            return container is Iterable and kind.fits(value)
        return kind.numbers or not isinstance(value, Sequence | Set) or all(map(kind.fits, value))

    of = f" of {kind.several}" if kind.several else ""
    return _Kind(f"a list{of}", f"lists{of}", fits)


def _fixed(kinds: Sequence[_Kind]) -> _Kind:
    """Return the kind of tuples, or lists, of items of these kinds."""

    def fits(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(kinds)
            and all(kind.fits(each) for kind, each in zip(kinds, value, strict=True))
        )

    of = f" of {kinds[0].several}" if len({kind.several for kind in kinds}) == 1 else ""
    noun = "pair" if len(kinds) == 2 else "tuple"
    return _Kind(f"a {noun}{of}", f"{noun}s{of}", fits)


def _mapping(key: _Kind, item: _Kind) -> _Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, Mapping) and (key.numbers or item.numbers or all(map(_fits_item, value.items())))

    def _fits_item(pair: tuple[Any, Any]) -> bool:
        return key.fits(pair[0]) and item.fits(pair[1])

    of = f" from {key.several} to {item.several}" if item.several else ""
    return _Kind(f"a mapping{of}", f"mappings{of}", fits)


def _literal(values: Sequence[object]) -> _Kind:
    words = " or ".join(map(repr, values))
    return _Kind(words, words, lambda value: any(type(value) is type(each) and value == each for each in values))


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


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_image(value: object) -> bool:
    """Return True for an image file's path or bytes, an array, and an image of Pillow."""
    return isinstance(value, str | bytes | os.PathLike | np.ndarray) or hasattr(value, "convert")


def _are_texts(value: object) -> bool:
    """Return True for a text or a pair of texts, and for a list of them."""
    listed = value if isinstance(value, list) else [value]
    return all(_is_text(each) or _PAIR.fits(each) for each in listed)


def _of_class(name: str) -> _Kind:
    """Return the kind of a class of the public API, which this module cannot import."""
    return _Kind(f"t.{name}(...)", f"t.{name}(...)", lambda value: type(value).__name__ == name)


_NONE = _Kind("", "", lambda value: value is None)
_ANY = _Kind("", "", lambda value: True)
_PAIR = _fixed([_Kind("a string", "strings", _is_text)] * 2)
_NAMED: Mapping[str, _Kind] = {
    "Any": _ANY,
    "int": _Kind("an integer", "integers", _is_integer, numbers=True),
    "float": _Kind("a number", "numbers", _is_number, numbers=True),
    "bool": _Kind("True or False", "truth values", lambda value: isinstance(value, bool | np.bool_)),
    "str": _Kind("a string", "strings", _is_text),
    "bytes": _Kind("bytes", "bytes", lambda value: isinstance(value, bytes)),
    "PathLike": _Kind("a path", "paths", lambda value: isinstance(value, str | os.PathLike)),
    "Path": _Kind("a path", "paths", lambda value: isinstance(value, os.PathLike)),
    "Texts": _Kind("a text, a pair of texts, or a list of them", "", _are_texts),
    "Image": _Kind("an image", "images", _is_image),
    "RowPrompt": _Kind("a prompt", "prompts", lambda value: type(value).__name__ == "RowPrompt"),
    "Full": _literal(("error", "slide")),
    "Early": _literal((True, False, "never")),
    "Sampling": _of_class("Sampling"),
    "TokenRules": _of_class("TokenRules"),
    "Beams": _of_class("Beams"),
    "ShardingReport": _Kind("a report", "reports", lambda value: type(value).__name__ == "ShardingReport"),
}
"""The kinds of names in annotations, some of which are aliases of the project."""

_CONTAINERS: Mapping[str, type | tuple[type, ...]] = {
    "list": list,
    "tuple": (Sequence, Set),
    "Sequence": (Sequence, Set),
    "Iterable": Iterable,
    "Mapping": Mapping,
}
"""The containers in annotations, and the classes of their values: a list is taken for a tuple."""
