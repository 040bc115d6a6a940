"""Passes and pipelines as text that parses back: `fold-constants{limit_bytes=4096}, fuse-gelu`.

    pipeline  := pass ("," pass)*
    pass      := name [ "{" field "=" value ("," field "=" value)* "}" ]
    value     := true | false | none | number | word | "text" | "[" value ("," value)* "]"

A name is a pass's class in lower case with hyphens. Fields are the fields of the class; those with their default are
not printed. A word is a dtype (`bf16`) if the field holds a dtype, else a string.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import ParseError
from treadle.ir.types import DTYPES
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.option_text import WORDS
from treadle.passes.pipelines import Pipeline

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][\w.-]*)|(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|(\"(?:[^\"\\]|\\.)*\")|([{}\[\],=]))")
_LONGEST = 100_000


def spell_pass(each: Pass) -> str:
    """Return a pass as text. Raises ValueError for a pass without a text form: an option is a function, or the pass is
    not in `treadle.passes`.
    """
    if pass_classes().get(each.name) is not type(each):
        raise ValueError(f"a pass without a text form: {each!r}")
    return f"{each.name}{{{each.options}}}" if each.options else each.name


def pipeline_text(passes: Sequence[Pass]) -> str:
    """Return a pipeline as text. Raises ValueError as `spell_pass` does."""
    return ", ".join(map(spell_pass, passes))


def parse_pipeline(text: str) -> Pipeline:
    """Parse a pipeline. The empty text is the empty pipeline.

    Raises ParseError, with the position, for text that does not match the grammar, for an unknown pass or field, with
    the nearest name, and for a value that the pass does not accept.
    """
    return Pipeline(_Parser(text).pipeline())


@cache
def pass_classes() -> Mapping[str, type[Pass]]:
    """Return the passes that have a text form, by name."""
    import treadle.passes

    for module in pkgutil.walk_packages(treadle.passes.__path__, "treadle.passes."):
        importlib.import_module(module.name)
    found = {}
    for kind in _subclasses(Pass):
        if kind.__module__.startswith("treadle.passes.") and _has_text(kind):
            found[kind.__new__(kind).name] = kind
    return dict(sorted(found.items()))


def _subclasses(kind: type[Pass]) -> Iterator[type[Pass]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _has_text(kind: type[Pass]) -> bool:
    """Return True if a class is a pass whose options are all plain values."""
    overrides = any(name in vars(base) for base in kind.__mro__[:-2] for name in ("run", "run_graph", "build"))
    plain = {"bool", "int", "float", "str", "DType", "tuple[str, ...]"}
    return overrides and not kind.__subclasses__() and all(str(f.type) in plain for f in dataclasses.fields(kind))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        if len(text) > _LONGEST:
            self.fail(f"a pipeline's text has at most {_LONGEST} characters")

    def fail(self, what: str, hint: str | None = None) -> NoReturn:
        shown = printable(self.text[max(0, self.at - 20) : self.at + 20])
        raise ParseError(what, received=f"{shown!r}, position {self.at}", hint=hint)

    def peek(self) -> str:
        """Return the next token without its spaces, or an empty string at the end."""
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            if self.text[self.at :].strip():
                self.fail("expected a token of a pipeline", 'such as "fuse-gelu, fuse-linear"')
            return ""
        return match[0].strip()

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if expected is not None and token != expected:
            self.fail(f"expected {expected!r}", None)
        match = _TOKEN.match(self.text, self.at)
        self.at = match.end() if match is not None else len(self.text)
        return token

    def pipeline(self) -> Iterator[Pass]:
        while self.peek():
            yield self.one()
            if self.peek():
                self.take(",")

    def one(self) -> Pass:
        self.at += len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
        started, name = self.at, self.take()
        known = pass_classes()
        if name not in known:
            self.at = started
            near = NearestNames(known).of(name)
            self.fail(f"unknown pass {printable(name)!r}", f"{near[0]}?" if near else "one of " + ", ".join(known))
        kind, values = known[name], dict[str, Any]()
        fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
        if self.peek() == "{":
            self.take()
            while self.peek() != "}":
                if values:
                    self.take(",")
                place, field = self.at, self.take()
                if field not in fields or field in values:
                    self.at = place
                    near = NearestNames(fields).of(field)
                    takes = "takes " + ", ".join(fields) if fields else "takes no options"
                    self.fail(f"{name} has no option {printable(field)!r}", f"{near[0]}?" if near else takes)
                self.take("=")
                place = self.at
                values[field] = self.value()
                self._check(name, field, fields[field], values, place)
            self.take("}")
        missing = [
            f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            self.fail(f"{name} needs {missing[0]}", f"{name}{{{missing[0]}=...}}")
        return kind(**values)

    def _check(self, name: str, field: str, type: str, values: dict[str, Any], place: int) -> None:
        value = values[field]
        if type == "DType" and value in DTYPES:
            values[field] = DTYPES[value]
            return
        kinds: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str, "tuple[str, ...]": tuple}
        right = type in kinds and isinstance(value, kinds[type]) and (type == "bool" or not isinstance(value, bool))
        if not right or (type == "tuple[str, ...]" and not all(isinstance(each, str) for each in value)):
            self.at = place
            self.fail(f"{field} of {name} must be {type}")

    def value(self) -> Any:
        token = self.peek()
        if token == "[":
            self.take()
            found = list[Any]()
            while self.peek() != "]":
                if found:
                    self.take(",")
                if self.peek() == "[":
                    self.fail("a list must not contain lists")
                found.append(self.value())
            self.take("]")
            return tuple(found)
        if not token or token in "{}],=":
            self.fail("expected a value")
        self.take()
        if token.startswith('"'):
            try:
                return json.loads(token)
            except ValueError:
                self.fail("malformed text in quotes")
        if token[0].isdigit() or token[0] == "-":
            return float(token) if re.search(r"[.eE]", token) else int(token)
        return WORDS.get(token, token)
