"""Reader of the arguments of ops and calls: operands by name, constants, attributes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from treadle.ir.graph import Function, Graph, Value
from treadle.ir.operation import Op
from treadle.ir.text.attributes import attribute_fields, read_attribute
from treadle.ir.text.constants import ConstantReader
from treadle.ir.text.scanner import RESERVED, Scanner, TextLimits

_ATTRIBUTE = re.compile(r"([A-Za-z_]\w*)\s*=")
_TENSOR = re.compile(r"[a-z]\w*\[")
_OPERAND = r"(?:[$%][A-Za-z_]\w*+(?:\.\w++)*+|[A-Za-z_]\w*+)"
_PLAIN_OPERANDS = re.compile(rf"{_OPERAND}(?:, {_OPERAND})*(?=\)|, )")

_ARGUMENT_WORK = 15


class OperandReader:
    """A reader of the operands in the function `current` of the graph `result`.

    values     the named values of the function, so far
    versions   the current version of each of the function's states, by name
    """

    def __init__(self, text: str, limits: TextLimits) -> None:
        self.s = Scanner(text, limits)
        self.limits = limits
        self.constants = ConstantReader(self.s, limits)
        self.result: Graph
        self.current: Function
        self.values: dict[str, Value] = {}
        self.versions: dict[str, Value] = {}
        self.arguments_left = limits.arguments

    def argument(self, at: int) -> None:
        """Count an input, an output, a weight or a state of a function. Raises ParseError if there are too many."""
        self.arguments_left -= 1
        if self.arguments_left < 0:
            most = f"at most {self.limits.arguments} inputs, outputs, weights and states of functions"
            raise self.s.error("too many arguments", at, hint=most)
        self.s.spend(_ARGUMENT_WORK, at)

    def arguments(self, cls: type[Op] | None) -> tuple[list[Value | None], dict[str, Any], str]:
        """Read operands and attributes in parentheses. Return the operands, the attributes, and the attributes' text. A
        call of a function (`cls` is None) has no attributes.
        """
        s = self.s
        s.expect("(")
        operands = self.plain_operands()
        attributes: dict[str, Any] = {}
        began = s.at
        while not s.accept(")"):
            if operands or attributes:
                s.expect(",")
            key = s.match(_ATTRIBUTE)
            if key is None:
                if attributes:
                    raise s.error("operands must come before attributes")
                operands.append(self.operand())
                began = s.at
                continue
            name = key[1]
            fields = attribute_fields(cls) if cls is not None else {}
            if name not in fields or name in attributes:
                why = "is given twice" if name in attributes else "is not an attribute here"
                known = ", ".join(fields)
                raise s.error(f"{name} {why}", key.start(), hint=f"attributes: {known}" if known else None)
            attributes[name] = read_attribute(s, fields[name].annotation)
        if len(operands) > s.limits.items and cls is not None:
            raise s.error("too many operands", hint=f"at most {s.limits.items}")
        return operands, attributes, s.text[began : s.at]

    def plain_operands(self) -> list[Value | None]:
        """Read operands that are bare names, all at once, and return them. If any operand is not a bare name, read
        none.
        """
        s = self.s
        match = s.match(_PLAIN_OPERANDS)
        found: list[Value | None] = []
        if match is None:
            return found
        for word in match[0].split(", "):
            if word[0] == "$":
                value = self.current.parameters.get(word[1:])
            elif word[0] == "%":
                value = self.versions.get(word[1:])
            else:
                value = None if word in RESERVED else self.values.get(word)
            if value is None:  # the reader of single operands reads the value or finds the error
                s.at = match.start()
                return []
            found.append(value)
        return found

    def operand(self) -> Value | None:
        s = self.s
        start = s.skip()
        if s.accept("$"):
            return self.weight_named(s.path("a parameter's name"), start)
        if s.accept("%"):
            return self.version_named(s.path("a state's name"), start)
        if s.accept_word("none"):
            return None
        if s.sees(_TENSOR):
            return self.constants.tensor()
        scalar = self.constants.accept_scalar()
        if scalar is not None:
            return scalar
        name = s.name("an operand")
        value = self.values.get(name)
        if value is None:
            raise s.error(f"unknown value {name!r}", start, hint=nearest_names(name, self.values))
        return value

    def weight_named(self, name: str, at: int) -> Value:
        value = self.current.parameters.get(name)
        made = self.result.derived_weights if self.current is self.result.bind else {}
        value = value or made.get(name)
        if value is None:
            hint = nearest_names(name, [*self.current.parameters, *made])
            raise self.s.error(f"unknown parameter ${name}", at, hint=hint)
        return value

    def version_named(self, name: str, at: int) -> Value:
        value = self.versions.get(name)
        if value is None:
            raise self.s.error(f"unknown state %{name}", at, hint=nearest_names(name, self.versions))
        return value


def nearest_names(name: str, known: Collection[str]) -> str | None:
    """Return a hint with the most similar names; None if the search would take long."""
    if len(name) > 60 or len(known) > 2000:
        return None
    near = difflib.get_close_matches(name, [n for n in known if len(n) <= 60], n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else None
