"""Attributes of ops: conversion of the caller's values to the types that the fields are annotated with.

axes: tuple[int, ...]      [0, -1]  -->  (0, -1)
size: Size                 "2*S"    -->  Size
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from treadle.ir.errors import GraphError
from treadle.ir.sizing.sizes import Size, SizeLike
from treadle.ir.types import DTYPES, DType
from treadle.ir.wording.other_spellings import dtype_word

_CODECS: dict[str, Callable[[Any], Any]] = {}
_ACCEPTED: dict[str, str] = {}


def attribute_codec(annotation: str, read: Callable[[Any], Any], accepts: str | None = None) -> None:
    """Register the conversion of a caller's value for attributes with this annotation, and for items of tuples of them.

    accepts  the annotation of the argument of `read`, if it accepts more than the attribute's own type
    """
    _CODECS[annotation] = read
    _ACCEPTED[annotation] = accepts or annotation


def accepted_annotation(annotation: str) -> str:
    """Return the annotation of the values that a caller may pass for an attribute: `SizeLike | None` for `Size |
    None`.
    """
    kinds = []
    for kind in annotation.split(" | ") if not annotation.startswith("tuple[") else [annotation]:
        inside = kind.removeprefix("tuple[").removesuffix(", ...]")
        kinds.append(f"Sequence[{accepted_annotation(inside)}]" if inside != kind else _ACCEPTED.get(kind, kind))
    return " | ".join(kinds)


def _read_size(value: SizeLike) -> Size:
    return Size.of(value)


def _read_dtype(value: Any) -> DType:
    if isinstance(value, DType):
        return value
    if not isinstance(value, str) or value not in DTYPES:
        hint = dtype_word(value) or "one of " + ", ".join(DTYPES)
        raise GraphError(f"unknown dtype {value!r:.80}", hint=hint)
    return DTYPES[value]


def _read_bool(value: Any) -> bool:
    if value not in (False, True):
        raise TypeError
    return bool(value)


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


attribute_codec("Size", _read_size, "SizeLike")
attribute_codec("DType", _read_dtype, "DType | str")
attribute_codec("float", float)
attribute_codec("int", operator.index)
attribute_codec("bool", _read_bool)
attribute_codec("str", _read_str)


def coerced(annotation: str, value: Any) -> Any:
    """Convert a value for an attribute with this annotation. Raises TypeError or ValueError for an invalid value."""
    if value is None and "None" in annotation:
        return None
    base = annotation.replace(" | None", "")
    if base.startswith("tuple["):
        if isinstance(value, str):  # a string is a sequence too: its characters would become items
            raise TypeError
        inner = base[6:-1].removesuffix(", ...")
        read = _CODECS.get(inner)
        return tuple([v if read is None or (v is None and "None" in annotation) else read(v) for v in value])
    read = _CODECS.get(base)
    return read(value) if read else value


def has_size(value: Any) -> bool:
    """Return True if an attribute's value is a symbolic size, or a tuple that contains one."""
    return isinstance(value, Size) or (isinstance(value, tuple) and any(isinstance(v, Size) for v in value))


def evaluated(value: Any, values: Mapping[str, int]) -> Any:
    """Return an attribute's value with its sizes evaluated. `values` maps symbols to integers."""
    if isinstance(value, Size):
        return Size.of(value.evaluate(values))
    return tuple(evaluated(v, values) for v in value) if isinstance(value, tuple) else value


def substituted(value: Any, values: Mapping[str, SizeLike]) -> Any:
    """Return an attribute's value with the symbols in its sizes replaced. `values` maps symbols to sizes."""
    if isinstance(value, Size):
        return value.substitute(values)
    return tuple(substituted(v, values) for v in value) if isinstance(value, tuple) else value


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "True or False",
    "str": "text",
    "Size": "a size, an integer or an expression of symbols",
    "DType": "a dtype",
}


def in_words(annotation: str) -> str:
    """Return an annotation in words: `a tuple of integers` for `tuple[int, ...]`."""
    base = annotation.removesuffix(" | None")
    inner = base.removeprefix("tuple[").removesuffix(", ...]")
    if inner != base:
        return f"a tuple of {'integers' if inner == 'int' else f'{inner}s'.lower()}"
    return _WORDS.get(base, base)


def as_tuple(name: str, annotation: str, value: Any, count: int = 0) -> str | None:
    """Return a hint if a single item was passed for a tuple of items, else None.

    count  the number of items that the tuple needs; 0: it is not known
    """
    read = _CODECS.get(annotation.removeprefix("tuple[").removesuffix(", ...]"))
    if not annotation.startswith("tuple[") or read is None or isinstance(value, str | list | tuple):
        return None
    try:
        item = read(value)
    except (TypeError, ValueError):
        return None
    if count > 1:
        return f"{name}=({', '.join([str(item)] * count)})"
    one = f"{name}=({item},)"
    return one if count or name == "axes" else f"{one} for one axis, {name}=({item}, {item}) for two"
