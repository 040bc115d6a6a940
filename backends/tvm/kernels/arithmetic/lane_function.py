"""A function of lanes, written in Python and passed to LLVM as text, for vector code such as exp.

    f = LaneFunction(k, lanes)
    x = f.operand(value, "f32")
    return f.result((x * x + 1.0).sqrt())     # one call in the kernel, which LLVM inlines

TVM sees only one call. Its simplifier would take seconds for a long expression, and would apply rules to floats that
hold only for real numbers. A product that is added to a value is fused with the addition; any other product is rounded:
see `treadle.backends.tvm.kernels.fused_products`.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from treadle.backends.tvm.kernels.arithmetic.lanewise import call_lanewise, hexadecimal

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_TVM = {"i1": "bool", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64", "f32": "float32", "f64": "float64"}
_ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
_ORDER = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq"}

Number = float | int


class LaneValue:
    """A vector or a constant in a `LaneFunction`. `type` is i1, i32, i64, f32 or f64. Integers wrap around.

    Comparisons return i1. A comparison of floats is false if one of them is NaN.
    """

    def __init__(self, function: LaneFunction, text: str, type: str) -> None:
        self.function, self.text, self.type = function, text, type

    def __add__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.binary("+", self, other)

    def __sub__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.binary("-", self, other)

    def __rsub__(self, other: Number) -> LaneValue:
        return self.function.binary("-", self.function.number(other, self.type), self)

    def __mul__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.binary("*", self, other)

    def __truediv__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.binary("/", self, other)

    def __rtruediv__(self, other: Number) -> LaneValue:
        return self.function.binary("/", self.function.number(other, self.type), self)

    def __neg__(self) -> LaneValue:
        return self.function.line(self.type, f"fneg {{{self.type}}} {self.text}")

    def __lt__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.comparison("<", self, other)

    def __le__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.comparison("<=", self, other)

    def __gt__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.comparison(">", self, other)

    def __ge__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.comparison(">=", self, other)

    def __eq__(self, other: LaneValue | Number) -> LaneValue:  # type: ignore[override]
        return self.function.comparison("==", self, other)

    def __and__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.integer("and", self, other)

    def __or__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.integer("or", self, other)

    def __xor__(self, other: LaneValue | Number) -> LaneValue:
        return self.function.integer("xor", self, other)

    def __lshift__(self, by: int) -> LaneValue:
        return self.function.integer("shl", self, by)

    def __rshift__(self, by: int) -> LaneValue:
        """Shift right; the sign is extended."""
        return self.function.integer("ashr", self, by)

    def is_nan(self) -> LaneValue:
        return self.function.line("i1", f"fcmp uno {{{self.type}}} {self.text}, {self.text}")

    def abs(self) -> LaneValue:
        return self.function.intrinsic("fabs", self)

    def sqrt(self) -> LaneValue:
        return self.function.intrinsic("sqrt", self)

    def floor(self) -> LaneValue:
        return self.function.intrinsic("floor", self)

    def copysign(self, sign: LaneValue) -> LaneValue:
        return self.function.intrinsic("copysign", self, sign)

    def bits(self, type: str) -> LaneValue:
        """Reinterpret the bits as another type."""
        return self.function.line(type, f"bitcast {{{self.type}}} {self.text} to {{{type}}}")

    def to(self, type: str) -> LaneValue:
        """Convert between floats, between integers (keeping the low bits), or from an integer to a float."""
        widths = int(self.type[1:]), int(type[1:])
        kinds = self.type[0] + type[0]
        how = {"ff": ("fpext", "fptrunc"), "ii": ("sext", "trunc"), "if": ("sitofp", "sitofp")}[kinds]
        return self.function.line(type, f"{how[widths[1] < widths[0]]} {{{self.type}}} {self.text} to {{{type}}}")

    def at_least(self, low: float) -> LaneValue:
        """Return the larger of this value and `low`; NaN stays NaN."""
        bound = self.function.number(low, self.type)
        return self.function.select(bound > self, bound, self)

    def at_most(self, high: float) -> LaneValue:
        """Return the smaller of this value and `high`; NaN stays NaN."""
        bound = self.function.number(high, self.type)
        return self.function.select(bound < self, bound, self)

    def clamped(self, size: float) -> LaneValue:
        """Clamp this value to the range from -size to size; NaN stays NaN."""
        return self.at_most(size).at_least(-size)


class _Product(LaneValue):
    """A product of floats. It is computed and rounded, unless a sum that reads it is fused with it."""

    def __init__(self, x: LaneValue, y: LaneValue) -> None:
        self.function, self.type, self.factors = x.function, x.type, (x, y)

    @cached_property
    def text(self) -> str:  # type: ignore[override]
        t, (x, y) = f"{{{self.type}}}", self.factors
        product = self.function.line(self.type, f"fmul {t} {x.text}, {y.text}")
        return self.function.intrinsic("arithmetic.fence", product).text


class LaneFunction:
    """A function under construction, as LLVM text."""

    def __init__(self, k: Emitter, lanes: int) -> None:
        self.k, self.lanes = k, lanes
        self._lines: list[str] = []
        self._operands: list[tuple[Expr, str]] = []

    def operand(self, value: Expr, type: str) -> LaneValue:
        """Add an operand to the function, and return it."""
        self._operands.append((value, type))
        return LaneValue(self, f"%x{len(self._operands) - 1}", type)

    def result(self, value: LaneValue) -> Expr:
        """Return a call of the function on its operands, with `value` as its result."""
        last = f"%r = freeze {{{value.type}}} {value.text}"  # evaluating `value` may add a line
        body = "\n".join([*self._lines, last])
        types = " ".join(t for _, t in self._operands) + f" -> {value.type}"
        name = "f" + hashlib.sha256(f"{types} {body}".encode()).hexdigest()[:16]
        return call_lanewise(self.k, name, _TVM[value.type], self.lanes, [x for x, _ in self._operands], types, body)

    def line(self, type: str, text: str) -> LaneValue:
        """Add an instruction and return its result."""
        name = f"%v{len(self._lines)}"
        self._lines.append(f"{name} = {text}")
        return LaneValue(self, name, type)

    def number(self, value: Number, type: str) -> LaneValue:
        """Return a constant; a float is rounded to the type."""
        if type[0] != "f":
            return LaneValue(self, f"[{type} {int(value)}]", type)
        return LaneValue(self, f"[{type} {hexadecimal(float(np.float32(value)) if type == 'f32' else value)}]", type)

    def binary(self, sign: str, x: LaneValue, y: LaneValue | Number) -> LaneValue:
        y = self._of(y, x.type)
        if x.type[0] != "f":
            return self.line(x.type, f"{_ARITHMETIC[sign]} {{{x.type}}} {x.text}, {y.text}")
        if sign == "*":
            return _Product(x, y)
        if sign in "+-" and isinstance(x, _Product):
            return self.intrinsic("fmuladd", *x.factors, -y if sign == "-" else y)
        if sign in "+-" and isinstance(y, _Product):
            left, right = y.factors  # the second factor may be a constant, whose negation takes no instruction
            return self.intrinsic("fmuladd", left, -right if sign == "-" else right, x)
        return self.line(x.type, f"f{_ARITHMETIC[sign]} {{{x.type}}} {x.text}, {y.text}")

    def integer(self, said: str, x: LaneValue, y: LaneValue | Number) -> LaneValue:
        return self.line(x.type, f"{said} {{{x.type}}} {x.text}, {self._of(y, x.type).text}")

    def comparison(self, sign: str, x: LaneValue, y: LaneValue | Number) -> LaneValue:
        how = _ORDER[sign]
        said = f"fcmp o{how}" if x.type[0] == "f" else f"icmp {how if how == 'eq' else 's' + how}"
        return self.line("i1", f"{said} {{{x.type}}} {x.text}, {self._of(y, x.type).text}")

    def select(self, condition: LaneValue, then: LaneValue | Number, otherwise: LaneValue) -> LaneValue:
        """Return `then` in lanes in which the condition holds, else `otherwise`."""
        chosen = self._of(then, otherwise.type).text
        t = f"{{{otherwise.type}}}"
        return self.line(otherwise.type, f"select {{i1}} {condition.text}, {t} {chosen}, {t} {otherwise.text}")

    def intrinsic(self, name: str, *operands: LaneValue) -> LaneValue:
        """Call an LLVM intrinsic whose name ends in the type of its operands."""
        t = operands[0].type
        given = ", ".join(f"{{{t}}} {x.text}" for x in operands)
        return self.line(t, f"call {{{t}}} @llvm.{name}{{.{t}}}({given})")

    def _of(self, value: LaneValue | Number, type: str) -> LaneValue:
        return value if isinstance(value, LaneValue) else self.number(value, type)
