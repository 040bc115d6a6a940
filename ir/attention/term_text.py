"""Parsing of attention's terms: `causal`, `window(128)`, `bias(h s t)`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.errors import ParseError

_TERMS: dict[str, type[Term]] = {
    cls.name: cls for cls in (Causal, Window, Padding, Segments, BooleanMask, TensorBias, T5Relative, Alibi)
}


def parse_term(text: str) -> Term:
    """Parse a term: `causal`, `window(128)`, `bias(h s t)`. Raises ParseError, GraphError."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None:
        raise ParseError(f"not a term of attention: {text!r}", hint="such as causal or window(128)")
    cls = _TERMS.get(match[1])
    if cls is None:
        raise ParseError(f"unknown term of attention {match[1]!r}", hint="one of " + ", ".join(_TERMS))
    words = [word.strip() for word in match[2].split(",")] if match[2] else []
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.type == "bool":
            values[field.name] = field.name in words
            words = [word for word in words if word != field.name]
        elif words:
            word = words.pop(0)
            if field.type == "int" and not re.fullmatch(r"-?\d{1,18}", word):
                raise ParseError(f"{cls.name}: {field.name} must be an integer, is {word!r}", received=text)
            values[field.name] = int(word) if field.type == "int" else word
        elif field.default is dataclasses.MISSING:
            raise ParseError(f"{cls.name}: {field.name} is missing", received=text)
    if words:
        raise ParseError(f"{cls.name}: cannot read {words[0]!r}", received=text)
    return cls(**values)


def read_term(value: Term | str) -> Term:
    """Return the term that an op's attribute holds, parsed if the attribute is text. Raises TypeError for any other
    type.
    """
    if not isinstance(value, Term | str):
        raise TypeError
    return parse_term(value) if isinstance(value, str) else value
