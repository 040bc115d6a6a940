"""Passes and pipelines as text that parses back: `fold-constants{limit_bytes=4096}, fuse-gelu`.

    pipeline  := pass ("," pass)*
    pass      := name [ "{" fields "}" ]
    fields    := name "=" value ("," name "=" value)*
    value     := true | false | none | number | word | "text" | "[" [ value ("," value)* ] "]" | "{" [ fields ] "}"

A name is a pass's class in lower case with hyphens. Fields are the fields of the class. A field that has its default
value is not printed. A word is a dtype (`bf16`) if the field holds a dtype, a backend (`tvm`) if the field holds
capabilities, else a string.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import ParseError, TreadleError, UsageError
from treadle.ir.types import DTYPES, DType
from treadle.passes.capabilities import PRIMITIVES, Capabilities
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.option_text import WORDS
from treadle.passes.pipelines import Pipeline

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][\w.-]*)|(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|(\"(?:[^\"\\]|\\.)*\")|([{}\[\],=]))")
_LONGEST = 100_000
_DEEPEST = 8
_ENDS = {",": "a comma between passes, options and elements", "=": "NAME=VALUE, such as limit_bytes=4096"}
"""Hints for a missing token, by the token."""


Backends = Callable[[str], Capabilities]
"""A function that returns the capabilities of a backend by its name. It raises a TreadleError for an unknown name."""


def spell_pass(each: Pass) -> str:
    """Return a pass as text. Raises ValueError for a pass without a text form: it is not in `treadle.passes`, or its
    capabilities have no name.
    """
    unnamed = any(isinstance(v, Capabilities) and not v.name and v != PRIMITIVES for v in vars(each).values())
    if pass_classes().get(each.name) is not type(each) or unnamed:
        raise ValueError(f"a pass without a text form: {each!r}")
    return f"{each.name}{{{each.options}}}" if each.options else each.name


def pipeline_text(passes: Sequence[Pass]) -> str:
    """Return a pipeline as text. Raises ValueError as `spell_pass` does."""
    return ", ".join(map(spell_pass, passes))


def parse_pipeline(text: str, backends: Backends | None = None) -> Pipeline:
    """Parse a pipeline. The empty text is the empty pipeline.

    backends  the capabilities of each backend by name, for passes with the option `backend`; None: none is known

    Raises ParseError, with the position, for text that does not match the grammar, for an unknown pass, field or
    backend, with the nearest name, and for a value that the pass does not accept.
    """
    return Pipeline(_Parser(text, backends or _no_backend).pipeline())


def _no_backend(name: str) -> Capabilities:
    raise UsageError("a pass of a backend cannot be used here", hint="leave it out")


@cache
def pass_classes() -> Mapping[str, type[Pass]]:
    """Return the passes in `treadle.passes` by name."""
    import treadle.passes

    for module in pkgutil.walk_packages(treadle.passes.__path__, "treadle.passes."):
        importlib.import_module(module.name)
    kinds = [kind for kind in _subclasses(Pass) if kind.__module__.startswith("treadle.passes.")]
    return dict(sorted((kind.__new__(kind).name, kind) for kind in kinds if not kind.__subclasses__() and _runs(kind)))


def _subclasses(kind: type[Pass]) -> Iterator[type[Pass]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _runs(kind: type[Pass]) -> bool:
    """Return True if a class is more than a base class of passes."""
    return any(name in vars(base) for base in kind.__mro__[:-2] for name in ("run", "run_graph", "build"))


class _MismatchError(Exception):
    """The error for a value that does not have the type of its field."""


class _Parser:
    def __init__(self, text: str, backends: Backends) -> None:
        self.text, self.at, self.backends = text, 0, backends
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
            self.fail(f"expected {expected!r}", _ENDS.get(expected))
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
        kind = known[name]
        fields, values = dataclasses.fields(kind), dict[str, Any]()
        if self.peek() == "{":
            self.take()
            values = self.fields([f.name for f in fields], name, get_type_hints(kind))
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            self.fail(f"{name} needs {missing[0]}", f"{name}{{{missing[0]}=...}}")
        try:
            return kind(**values)
        except TreadleError as error:  # the pass does not accept a value
            self.at = started
            self.fail(error.what, str(error.hint) if error.hint else None)

    def fields(self, names: Sequence[str], name: str, types: Mapping[str, Any]) -> dict[str, Any]:
        """Parse the fields of a pass up to the closing brace."""
        values = dict[str, Any]()
        while self.peek() != "}":
            if values:
                self.take(",")
            place, field = self.at, self.take()
            if field in values:
                self.at = place
                self.fail(f"{name} has {field} twice", "one value for each option")
            if field not in names:
                self.at = place
                near = NearestNames(names).of(field)
                takes = "takes " + ", ".join(names) if names else "takes no options"
                self.fail(f"{name} has no option {printable(field)!r}", f"{near[0]}?" if near else takes)
            self.take("=")
            place = self.at
            value = self.value()
            try:
                values[field] = self.converted(value, types[field])
            except _MismatchError:
                self.at = place
                self.fail(f"{field} of {name} must be {type_text(types[field])}")
            except TreadleError as error:  # an unknown backend
                self.at = place
                self.fail(error.what, str(error.hint) if error.hint else None)
        self.take("}")
        return values

    def value(self, depth: int = 0) -> Any:
        """Parse a value: lists become tuples, and fields in braces a dict."""
        token = self.peek()
        if depth > _DEEPEST:
            self.fail("lists must not be nested that deep")
        if token == "[":
            self.take()
            found = list[Any]()
            while self.peek() != "]":
                if found:
                    self.take(",")
                found.append(self.value(depth + 1))
            self.take("]")
            return tuple(found)
        if token == "{":
            self.take()
            named = dict[str, Any]()
            while self.peek() != "}":
                if named:
                    self.take(",")
                name = self.value(_DEEPEST)
                self.take("=")
                named[str(name)] = self.value(depth + 1)
            self.take("}")
            return named
        if not token or token in "}],=":
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

    def converted(self, value: Any, type: Any) -> Any:
        """Return a parsed value as a value of a type. Raises _MismatchError if it is not one."""
        origin, args = get_origin(type), get_args(type)
        if origin in (Union, UnionType):
            if value is None and NoneType in args:
                return None
            return self.converted(value, next(each for each in args if each is not NoneType))
        if type is DType and value in DTYPES:
            return DTYPES[value]
        if type is Capabilities and isinstance(value, str):
            return self.backends(value)
        if origin is tuple and isinstance(value, tuple):
            return tuple([self.converted(each, args[0]) for each in value])
        if origin is Mapping and isinstance(value, dict):
            return {name: self.converted(each, args[1]) for name, each in value.items()}
        if dataclasses.is_dataclass(type) and isinstance(value, dict):
            types = get_type_hints(type)
            try:
                return type(**{name: self.converted(each, types[name]) for name, each in value.items()})  # type: ignore[operator]
            except (KeyError, TypeError):  # an unknown field, or one that is missing
                raise _MismatchError from None
        if type is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if type in (bool, int, str) and builtins.type(value) is type:
            return value
        raise _MismatchError


_TYPES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    DType: "a dtype",
    Capabilities: "the name of a backend",
}


def type_text(type: Any) -> str:
    """Return a type as an error prints it."""
    if get_origin(type) is tuple:
        return f"a list, each element {type_text(get_args(type)[0])}"
    return _TYPES.get(type) or f"{{...}} with the fields of {type.__name__}"
