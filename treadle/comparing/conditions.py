"""Conditions on a comparison, for `treadle diff A B --fail-if "attention<12, peak>1.05x, flops>1.01x"`.

    conditions = condition {"," condition}
    condition  = quantity comparison number [unit]
    quantity   = a name of QUANTITIES, or an op's name: the number of such ops in a run of b, including those that are
                 part of larger fused ops
    comparison = "<" | "<=" | ">" | ">=" | "=" | "!="
    number     = digits ["." digits]
    unit       = "x" | "k" | "M" | "G" | "T" | "kB" | "MB" | "GB" | "KiB" | "MiB" | "GiB" | "B"

`x` multiplies the value in a: `peak>1.05x` holds if the peak of b is more than 1.05 times the peak of a. k, M, G and T
are powers of 1000. Units of bytes apply to peak, bytes and weights. Numbers are compared exactly.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

from treadle.comparing.differences import COUNTS, QUANTITIES, BuildComparison, Quantity
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import GraphError, Hint, UsageError
from treadle.ir.op_registry import OPS, find_op
from treadle.program.budgets import BYTE_UNITS

_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_POWERS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_OF_BYTES = ("peak", "bytes", "weights")

_LONGEST = 10_000
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBER = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,9})?")
_UNIT = re.compile(r"[A-Za-z]*")


@dataclass(frozen=True)
class DiffCondition:
    """A condition on a quantity of build b.

    text        the condition as written
    quantity    the name of a quantity or an op
    comparison  "<", "<=", ">", ">=", "=" or "!="
    number      the number, multiplied by its unit
    is_ratio    True for the unit `x`: the number multiplies the value in a
    """

    text: str
    quantity: str
    comparison: str
    number: Fraction
    is_ratio: bool

    def holds(self, quantity: Quantity, *stages: str) -> bool:
        """Return True if the condition holds.

        stages  the passes of builds that end before storage is planned

        Raises UsageError if a build ends too early, or if the backend does not determine the quantity.
        """
        if quantity.b is None or (self.is_ratio and quantity.a is None):
            needs = "tvm" if self.quantity in ("kernels", "generic") else "numpy"
            hint: str = Hint(f'backend="{needs}"', f"--backend {needs}")
            if stages:
                hint = f"leave out {' and '.join(f'@{each}' for each in stages)}: storage is planned later"
            raise UsageError(f"{self.quantity} is not known in both builds", received=self.text, hint=hint)
        limit = self.number * Fraction(quantity.a or 0) if self.is_ratio else self.number
        return _COMPARISONS[self.comparison](Fraction(quantity.b), limit)


@dataclass(frozen=True)
class ConditionOutcome:
    """A condition, the values of its quantity, and `holds`: True if the condition holds."""

    condition: DiffCondition
    quantity: Quantity
    holds: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON."""
        return {"condition": self.condition.text, "holds": self.holds, **self.quantity.as_dict()}

    def __str__(self) -> str:
        _, a, b, change = self.quantity.cells
        values = f"a {a}, b {b}" if a else f"b {b}"
        return f"{self.condition.text}: {'HOLDS' if self.holds else 'does not hold'}, {values} {change}".rstrip()


def check_conditions(
    conditions: tuple[DiffCondition, ...], comparison: BuildComparison
) -> tuple[ConditionOutcome, ...]:
    """Evaluate conditions on a comparison. Raises UsageError as `DiffCondition.holds` does."""
    quantities = [comparison.quantity(each.quantity) for each in conditions]
    early = [each.stage for each in (comparison.a, comparison.b) if each.is_unplanned]
    return tuple([ConditionOutcome(c, q, c.holds(q, *early)) for c, q in zip(conditions, quantities, strict=True)])


def parse_conditions(text: str) -> tuple[DiffCondition, ...]:
    """Parse conditions that are separated by commas. Raises UsageError with the position of a syntax error."""
    return _Parser(text).conditions()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        if len(text) > _LONGEST:
            raise UsageError("the conditions are too long", received=f"{len(text):,} characters")

    def conditions(self) -> tuple[DiffCondition, ...]:
        found = [self._condition()]
        while self._take(re.compile(",")):
            found.append(self._condition())
        if self.at < len(self.text):
            self._fail('expected "," or the end')
        return tuple(found)

    def _condition(self) -> DiffCondition:
        self._skip()
        start = self.at
        name = self._take(_WORD)
        if not name:
            self._fail("expected a quantity", hint="a quantity such as peak, or an op such as attention")
        self._check_quantity(name, start)
        comparison = next((sign for sign in _COMPARISONS if self._take(re.compile(re.escape(sign)))), "")
        if not comparison:
            self._fail("expected a comparison", hint=f'"{name}" and one of {", ".join(_COMPARISONS)}')
        self._skip()
        number = self._take(_NUMBER)
        if not number:
            self._fail("expected a number", hint=f"{name}{comparison}12 or {name}{comparison}1.05x")
        place = self.at
        unit = self._take(_UNIT, spaced=False)
        scale = self._scale(name, unit, place)
        end = self.at
        return DiffCondition(self.text[start:end], name, comparison, Fraction(number) * scale, unit == "x")

    def _check_quantity(self, name: str, start: int) -> None:
        if name in QUANTITIES:
            return
        try:
            find_op(name)
        except GraphError:
            self.at = start
            near = NearestNames([*QUANTITIES, *OPS]).of(name, 3, 0.7)
            known = f"one of {', '.join(QUANTITIES)}, or an op"
            hint = f"did you mean {' or '.join(near)}?" if near else known
            self._fail(f"unknown quantity {printable(name)}", hint)

    def _scale(self, name: str, unit: str, place: int) -> int:
        if unit == "x" and name in COUNTS:
            self.at = place
            self._fail(f"{name} counts differences between a and b, so it has no ratio", hint=f"{name}>0")
        if unit in ("", "x"):
            return 1
        units = _POWERS | (BYTE_UNITS if name in _OF_BYTES else {})
        if unit not in units:
            self.at = place
            self._fail(f"unknown unit {printable(unit)} of {name}", hint=f"x, {', '.join(units)}")
        return units[unit]

    def _take(self, pattern: re.Pattern[str], *, spaced: bool = True) -> str:
        if spaced:
            self._skip()
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[0]

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.at += 1

    def _fail(self, what: str, hint: str | None = None) -> NoReturn:
        """Raise UsageError with the text around the current position, and a mark below that position."""
        first = max(0, self.at - 50)
        shown = self.text[first : self.at + 30]
        plain = "".join(c if c.isprintable() else "?" for c in shown)
        mark = f"{plain or '(nothing)'}\n{' ' * (self.at - first)}^"
        raise UsageError(f"{what} at character {self.at + 1}", received=mark, hint=hint)
