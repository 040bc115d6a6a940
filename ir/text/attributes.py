"""Attributes as text. Each kind of attribute is described here once, by the annotation that declares it.

    eps=1e-05   axis=-1   keep=true   pattern="b s d -> b d s"   to=f16   size=S+1   axes=[0, 1]   fill=none

Values are written according to their Python type, and read according to the annotation of the op's field, so that
`to=f16` is a dtype and `size=S` a size. Tuples are written in brackets, to any depth.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import Term
from treadle.ir.attention.term_text import parse_term
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import GraphError
from treadle.ir.layouts import Layout, parse_layout
from treadle.ir.operation import Op
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.sizing.sizes import Size
from treadle.ir.text.scanner import RESERVED, Scanner, quoted, type_text
from treadle.ir.types import DTYPES, DType, Type

_BOOL = re.compile(r"(true|false)(?!\w)")


@dataclasses.dataclass(frozen=True, slots=True)
class Attribute:
    """A field of an op: its name, its annotation as written, its default (`dataclasses.MISSING` if it has none)."""

    name: str
    annotation: str
    default: Any


_FIELDS: dict[type[Op], Mapping[str, Attribute]] = {}
_DEFAULTS: dict[type[Op], Mapping[str, str]] = {}


def attribute_fields(cls: type[Op]) -> Mapping[str, Attribute]:
    """Return the attributes that an op class declares, in order."""
    found = _FIELDS.get(cls)
    if found is None:
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        found = _FIELDS[cls] = {f.name: Attribute(f.name, str(f.type), f.default) for f in fields}
    return found


# -- kinds ---------------------------------------------------------------------------------------------------------

_WRITERS: dict[type, Callable[[Any], str]] = {}
_READERS: dict[str, Callable[[Scanner], Any]] = {}


def attribute_kind(annotation: str, kind: type, write: Callable[[Any], str], read: Callable[[Scanner], Any]) -> None:
    """Register a kind of attribute. `write` writes values of type `kind`, and `read` reads fields with that
    annotation.
    """
    _WRITERS[kind] = write
    _READERS[annotation] = read


def _write_size(size: Size) -> str:
    text = str(size)
    return f"({text})" if text in RESERVED else text


def _read_bool(s: Scanner) -> bool:
    match = s.match(_BOOL)
    if match is None:
        raise s.error(f"expected true or false, found {s.found()}")
    return match[1] == "true"


def _read_int(s: Scanner) -> int:
    start = s.skip()
    number = s.integer("an integer")
    if not -(2**63) <= number < 2**63:
        raise s.error(f"{number} does not fit into 64 bits", start)
    return number


def _read_float(s: Scanner) -> float:
    number = s.accept_number()
    if number is None:
        raise s.error(f"expected a number, found {s.found()}")
    return float(number)


def _read_dtype(s: Scanner) -> DType:
    s.skip()
    start = s.at
    name = s.name("a dtype")
    if name not in DTYPES:
        raise s.error(f"unknown dtype {name!r}", start, hint="one of " + ", ".join(DTYPES))
    return DTYPES[name]


attribute_kind("bool", bool, lambda value: "true" if value else "false", _read_bool)
attribute_kind("int", int, int.__repr__, _read_int)
attribute_kind("float", float, float.__repr__, _read_float)
attribute_kind("str", str, quoted, lambda s: s.string())
attribute_kind("DType", DType, str, _read_dtype)
attribute_kind("Size", Size, _write_size, lambda s: parse_size(s.expression()))
attribute_kind("Type", Type, type_text, lambda s: s.type())
attribute_kind("Term", Term, lambda term: term.text, lambda s: parse_term(s.expression()))
attribute_kind("Layout", Layout, str, lambda s: parse_layout(s.expression()))
attribute_kind("Encoding", Encoding, str, lambda s: parse_encoding(s.expression()))


# -- writing -------------------------------------------------------------------------------------------------------


def attribute_text(value: Any) -> str:
    """Return one attribute's value as text. Raises GraphError for a value of unknown kind."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(attribute_text, value))}]"
    for kind in type(value).__mro__:
        if kind in _WRITERS:
            return _WRITERS[kind](value)
    if isinstance(value, np.generic):
        return attribute_text(value.item())
    raise GraphError(f"an attribute of type {type(value).__name__} has no text form", received=repr(value)[:80])


def default_texts(cls: type[Op]) -> Mapping[str, str]:
    """Return the default value of each attribute that has one, as text. The printer omits attributes with these
    values.
    """
    found = _DEFAULTS.get(cls)
    if found is None:
        fields = attribute_fields(cls).values()
        with_default = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        found = _DEFAULTS[cls] = {name: attribute_text(default) for name, default in with_default.items()}
    return found


@lru_cache(maxsize=8192)
def attribute_symbols(op: Op) -> frozenset[str]:
    """Return the symbols in an op's attributes. They are cached in the op, which is immutable, since the attributes of
    a call contain many types.
    """
    known: frozenset[str] | None = op.__dict__.get("_attribute_symbols")
    if known is not None:
        return known
    found: set[str] = set()
    waiting = list(op.attributes.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple | list):
            waiting.extend(value)
        elif isinstance(value, Size | Type):
            found |= value.symbols
    known = op.__dict__["_attribute_symbols"] = frozenset(found)
    return known


# -- reading -------------------------------------------------------------------------------------------------------


def read_attribute(s: Scanner, annotation: str) -> Any:
    """Read one attribute's value by its annotation. Raises ParseError."""
    return _read(s, annotation.replace(" ", ""), 0)


def _read(s: Scanner, annotation: str, depth: int) -> Any:
    s.skip()
    start = s.at
    kinds = _split(annotation, "|")
    if "None" in kinds and s.accept_word("none"):
        return None
    for kind in kinds:
        if kind.startswith("tuple[") and s.accept("["):
            return _read_tuple(s, _split(kind[len("tuple[") : -1], ","), depth)
    with s.located(start):
        for kind in kinds:
            if kind in _READERS:
                return _READERS[kind](s)
    raise s.error(f"expected a value of {annotation}, found {s.found()}", start)


def _read_tuple(s: Scanner, inner: tuple[str, ...], depth: int) -> tuple[Any, ...]:
    if depth >= s.limits.nesting:
        raise s.error("brackets nest too deeply", hint=f"at most {s.limits.nesting}")
    items: list[Any] = []
    while not s.accept("]"):
        if items:
            s.expect(",")
        if len(items) == s.limits.items:
            raise s.error("too many items", hint=f"at most {s.limits.items}")
        items.append(_read(s, inner[min(len(items), len(inner) - 1)] if inner[-1] != "..." else inner[0], depth + 1))
    return tuple(items)


@lru_cache(maxsize=256)
def _split(annotation: str, sign: str) -> tuple[str, ...]:
    """Split text at each occurrence of a sign outside brackets."""
    parts, depth = [""], 0
    for char in annotation:
        depth += (char == "[") - (char == "]")
        if char == sign and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return tuple(parts)
