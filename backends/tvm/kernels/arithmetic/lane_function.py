"""Functions of one lane as expressions, printed for every language in which kernels are written.

    softsign = LaneFunction("softsign_f32", ("f32",), "f32", lambda x: x / (x.abs() + 1.0))
    y = softsign(k, lanes, x)   # one call in the kernel, which the compiler inlines

    softsign.llvm(16)           # LLVM, for vectors of 16 lanes
    softsign.c("cuda")          # one device function in C, for "c", "cuda", "opencl" or "metal"
    softsign.wgsl()             # one function in WGSL, or BackendError for types that WGSL lacks

A kernel's text begins with the prelude of its language (`c_text.prelude`, `wgsl_text.PRELUDE`). The text of each
function that the kernel calls follows, under the name `LaneFunction.symbol`. Every call goes through
`Emitter.lane_function`.

TVM sees only calls. Its simplifier would take seconds for a long expression, and would apply rules to floats that
hold only for real numbers. A product that is added to a value is fused with the addition; any other product is rounded:
see `treadle.backends.tvm.kernels.fused_products`.

**Types** of values are `bool`, `i8` to `i64`, `u8` to `u64`, `f16`, `f32` and `f64`. Integers wrap around. A bf16 is a
`u16`, its bits. An `f16` has no arithmetic, only `bits`. In C, an f16 is an `unsigned short`. WGSL has no narrow
types: there, an f16, u8 or u16 is a `u32`, and an i8 or i16 is an `i32`, with its value.

**Guarantees.** LLVM and C compute the same bits, except the sign and payload of a NaN, which IEEE 754 leaves open.
Other languages give fewer guarantees. Each case has a replacement:

| operation | language without a guarantee | replacement |
|---|---|---|
| `x * y`, rounded before it is added | C, OpenCL, Metal may contract `x * y + z` | a pragma, `-ffp-contract=off` |
| the same | CUDA, unless it gets `--fmad=false` | `__fmul_rn`, which is never contracted |
| `x * y + z`, rounded once | WGSL: `fma` may round twice | none: errors are in bounds for both |
| `(x + m) - m` with m = 1.5 * 2^23 | WGSL may reassociate it to x | `nearest`, WGSL's `round` |
| `(x + 1) - 1` in `log1p`; `(x - n a) - n b` in `exp` | the same | `rounded`: integer arithmetic on bits |
| `x / y`, `sqrt` | OpenCL: 2.5 and 3 ulp | `-cl-fp32-correctly-rounded-divide-sqrt` |
| the same | WGSL: 2.5 ulp and more | none |
| f64 in `sin`, `cos`, `pow`, `round_to` | WGSL, Metal; slow in CUDA; optional in OpenCL | integers for angles; f32 |
| f64 operands or results | WGSL, Metal | none: BackendError names the function |
| i64 | WGSL | 32 bits: `wgsl_text` |
| inf and NaN as constants | WGSL refuses them | bits that are read from a variable |
| `x.is_nan()` | WGSL and Metal may assume that there are none | a comparison of bits |
| `x != y` with NaN | WGSL: false in one implementation | `!(x == y)` |
| `copysign` | WGSL has none | bits |
| f16 to f32, if the f16 is subnormal | WGSL, Metal, OpenCL may flush the shifted bits | an integer times 2^-24 |
| other subnormal operands and results | the same | none: numbers below 2^-126 may be 0 |
| comparisons with inf and NaN; signs of zeros | WGSL | none |
| `x >> n` of negative integers | C before C++20: defined by the compiler | none: all compilers extend the sign |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from treadle.ir.errors import BackendError
from treadle.ir.types import DType

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

Number = float | int

_LEAVES = ("operand", "number")
_serials = count()


class LaneValue:
    """A value in a lane function: an operation on other values. `type` is a type of the module's list.

    op         the name of a method or of an operator, or `fma`, `select`, `form`, `operand`, `number`
    attribute  the position of an operand, the value of a number, the feature of a form, the entries of a lookup
    serial     values are printed in the order of these numbers, the order in which they were created

    Comparisons return bool. A comparison of floats is false if one of them is NaN, except `!=`.
    """

    def __init__(self, op: str, type: str, operands: tuple[LaneValue, ...] = (), attribute: object = None) -> None:
        self.op, self.type, self.operands, self.attribute = op, type, operands, attribute
        self.serial = next(_serials)

    def __add__(self, other: LaneValue | Number) -> LaneValue:
        return self._sum("add", other)

    def __sub__(self, other: LaneValue | Number) -> LaneValue:
        return self._sum("sub", other)

    def __rsub__(self, other: Number) -> LaneValue:
        return number(other, self.type) - self

    def __mul__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("mul", other)

    def __truediv__(self, other: LaneValue | Number) -> LaneValue:
        """Divide floats; or integers, rounding towards zero."""
        return self._with("div", other)

    def __rtruediv__(self, other: Number) -> LaneValue:
        return number(other, self.type) / self

    def __mod__(self, other: LaneValue | Number) -> LaneValue:
        """Return the remainder of the division of integers."""
        return self._with("rem", other)

    def __neg__(self) -> LaneValue:
        return LaneValue("neg", self.type, (self,)) if self.is_float else 0 - self

    def __lt__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("lt", other, "bool")

    def __le__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("le", other, "bool")

    def __gt__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("gt", other, "bool")

    def __ge__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("ge", other, "bool")

    def __eq__(self, other: LaneValue | Number) -> LaneValue:  # type: ignore[override]
        return self._with("eq", other, "bool")

    def __ne__(self, other: LaneValue | Number) -> LaneValue:  # type: ignore[override]
        """Return true if the values differ or one of them is NaN."""
        return self._with("ne", other, "bool")

    __hash__ = object.__hash__

    def __and__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("and", other)

    def __or__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("or", other)

    def __xor__(self, other: LaneValue | Number) -> LaneValue:
        return self._with("xor", other)

    def __lshift__(self, by: LaneValue | int) -> LaneValue:
        """Shift left by less than the type's width; a count that is not a constant is a u32, and so is this value."""
        return self._with("shl", by)

    def __rshift__(self, by: LaneValue | int) -> LaneValue:
        """Shift right; the sign of a signed type is extended."""
        return self._with("shr", by)

    def is_nan(self) -> LaneValue:
        return LaneValue("is_nan", "bool", (self,))

    def abs(self) -> LaneValue:
        """Return the magnitude; the lowest integer of a type stays as it is."""
        if self.is_float:
            return LaneValue("abs", self.type, (self,))
        return self if self.type[0] == "u" else where(self < 0, -self, self)

    def sqrt(self) -> LaneValue:
        return LaneValue("sqrt", self.type, (self,))

    def floor(self) -> LaneValue:
        return LaneValue("floor", self.type, (self,))

    def nearest(self) -> LaneValue:
        """Round to the nearest integer, ties to even."""
        return LaneValue("nearest", self.type, (self,))

    def copysign(self, sign: LaneValue) -> LaneValue:
        return LaneValue("copysign", self.type, (self, sign))

    def rounded(self) -> LaneValue:
        """Return this value; no compiler may combine the sum that it is with another one."""
        return LaneValue("rounded", self.type, (self,))

    def bits(self, type: str) -> LaneValue:
        """Reinterpret the bits as another type of the same width."""
        return LaneValue("bits", type, (self,))

    def to(self, type: str) -> LaneValue:
        """Convert to another type. An integer keeps its low bits; a float must fit into the integer type."""
        return self if type == self.type else LaneValue("to", type, (self,))

    def at_least(self, low: float) -> LaneValue:
        """Return the larger of this value and `low`; NaN stays NaN."""
        bound = number(low, self.type)
        return where(bound > self, bound, self)

    def at_most(self, high: float) -> LaneValue:
        """Return the smaller of this value and `high`; NaN stays NaN."""
        bound = number(high, self.type)
        return where(bound < self, bound, self)

    def clamped(self, size: float) -> LaneValue:
        """Clamp this value to the range from -size to size; NaN stays NaN."""
        return self.at_most(size).at_least(-size)

    @property
    def is_float(self) -> bool:
        return self.type[0] == "f"

    def _with(self, op: str, other: LaneValue | Number, type: str = "") -> LaneValue:
        return LaneValue(op, type or self.type, (self, _of(other, self.type)))

    def _sum(self, op: str, other: LaneValue | Number) -> LaneValue:
        """Return a sum or difference, fused with a product that it adds."""
        y, minus = _of(other, self.type), op == "sub"
        if self.op == "form":
            return form(str(self.attribute), *(x._sum(op, y) for x in self.operands))
        if y.op == "form":
            return form(str(y.attribute), *(self._sum(op, x) for x in y.operands))
        if self.is_float and self.op == "mul":
            return LaneValue("fma", self.type, (*self.operands, _negated(y) if minus else y))
        if self.is_float and y.op == "mul":
            left, right = y.operands  # the second factor may be a constant, whose negation takes no instruction
            return LaneValue("fma", self.type, (left, _negated(right) if minus else right, self))
        return LaneValue(op, self.type, (self, y))


WIDE, DOUBLE, ORDER, SUBNORMAL = "avx512", "f64", "order", "subnormal"
"""Features of a language, for `form`: instructions of AVX-512 on 16 lanes; f64; sums in the order of the text; no
flushing of subnormal numbers to zero.
"""

EXACT = frozenset({DOUBLE, ORDER, SUBNORMAL})
"""The features of LLVM, C and CUDA."""


def lane_type(dtype: DType) -> str:
    """Return the type of a dtype's values in a lane function."""
    return "u16" if dtype.name == "bf16" else dtype.name


def tvm_type(type: str) -> str:
    """Return TVM's name of a lane function's type."""
    return type if type == "bool" else {"f": "float", "i": "int", "u": "uint"}[type[0]] + type[1:]


def number(value: Number, type: str) -> LaneValue:
    """Return a constant; a float is rounded to f32 if that is its type, and an integer wraps around."""
    if type == "f32":
        value = float(np.float32(value))
    elif type == "bool":
        value = int(bool(value))
    elif type[0] != "f":
        width, low = int(type[1:]), 0 if type[0] == "u" else 1 << (int(type[1:]) - 1)
        value = (int(value) + low) % (1 << width) - low
    return LaneValue("number", type, (), value)


def where(condition: LaneValue, then: LaneValue | Number, otherwise: LaneValue | Number) -> LaneValue:
    """Return `then` if the condition holds, else `otherwise`. Both are computed, and at most one is a Python number."""
    type = (otherwise if isinstance(otherwise, LaneValue) else then).type  # type: ignore[union-attr]
    return LaneValue("select", type, (condition, _of(then, type), _of(otherwise, type)))


def form(feature: str, value: LaneValue, otherwise: LaneValue) -> LaneValue:
    """Return `value` in languages that have a feature, else `otherwise`."""
    return LaneValue("form", value.type, (value, otherwise), feature)


def hex_float(value: float) -> str:
    """Return a finite float as a constant of C and WGSL, without the suffix of its type."""
    mantissa, _, exponent = value.hex().partition("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}"


def _of(value: LaneValue | Number, type: str) -> LaneValue:
    return value if isinstance(value, LaneValue) else number(value, type)


def _negated(x: LaneValue) -> LaneValue:
    return number(-float(x.attribute), x.type) if x.op == "number" else -x  # type: ignore[arg-type]


class LaneFunction:
    """A function of one lane.

    name      a name that determines the function. If it is empty, the name is a hash of the function's text
    operands  types of the operands
    result    type of the result
    formula   a Python function of `LaneValue`s that returns a `LaneValue`; it is called once, when the text is needed
    """

    def __init__(self, name: str, operands: tuple[str, ...], result: str, formula: Callable[..., LaneValue]) -> None:
        self._name, self.operands, self.result, self.formula = name, operands, result, formula

    def __call__(self, k: Emitter, lanes: int, *operands: Expr) -> Expr:
        """Return a call of the function on vectors of `lanes` lanes."""
        return k.lane_function(self, lanes, *operands)

    @cached_property
    def body(self) -> LaneValue:
        return self.formula(*(LaneValue("operand", t, (), i) for i, t in enumerate(self.operands)))

    @cached_property
    def name(self) -> str:
        if self._name:
            return self._name
        from treadle.backends.tvm.kernels.arithmetic.c_text import CText

        text = "\n".join(CText(self, EXACT).lines())
        return "f" + hashlib.sha256(f"{self.operands} {self.result} {text}".encode()).hexdigest()[:16]

    @property
    def symbol(self) -> str:
        """Name of the function in C and WGSL. LLVM's functions have the number of lanes at the end."""
        return f"treadle_{self.name}"

    def llvm(self, lanes: int, wide: bool = False) -> str:
        """Return the function in LLVM, for vectors of `lanes` lanes.

        wide  True to use instructions of AVX-512, for 16 lanes
        """
        from treadle.backends.tvm.kernels.arithmetic.llvm_text import LlvmText

        return LlvmText(self, EXACT | {WIDE} if wide else EXACT, lanes).text()

    def c(self, language: str = "c") -> str:
        """Return the function in C, for `language` c, cuda, opencl or metal.

        Raises BackendError if the language lacks a type of the function.
        """
        from treadle.backends.tvm.kernels.arithmetic.c_text import LANGUAGES, CText

        return CText(self, LANGUAGES[language].features, language).text()

    def wgsl(self) -> str:
        """Return the function in WGSL. Raises BackendError if it has values in u64 or f64, or constants of i64 that
        do not fit in 32 bits.
        """
        from treadle.backends.tvm.kernels.arithmetic.wgsl_text import WgslText

        return WgslText(self, frozenset()).text()


def lacking(language: str, type: str, function: LaneFunction) -> BackendError:
    """Return the error for a function with values of a type that a language lacks."""
    return BackendError(
        f"{language} has no {type}, which the function {function.name} computes in",
        hint=f"compute in {type[0]}32, or choose another target",
    )


class LanePrinter:
    """A printer of a lane function: one statement for each operation, in the order of creation.

    features  the language's features, which select the forms
    """

    def __init__(self, function: LaneFunction, features: frozenset[str]) -> None:
        self.function, self.features = function, features
        self.names: dict[LaneValue, str] = {}

    def lines(self) -> list[str]:
        """Return the function's statements, the last of which returns the result."""
        made: list[str] = []
        for value in sorted(self._reached(self._form(self.function.body)), key=lambda v: v.serial):
            if value.op != "mul":
                self._print(value, made)
        last = self._form(self.function.body)
        self._print(last, made)
        return [*made, self.returned(self.operand(last))]

    def _print(self, value: LaneValue, lines: list[str]) -> None:
        """Append the statement of a value, and before it the products that the value is the first to use."""
        if value in self.names or value.op in _LEAVES:
            return
        used = [self._form(x) for x in value.operands]
        for x in used:
            self._print(x, lines)
        operands = [self.operand(x) for x in used]
        text = self.expression(value, [x.type for x in used], operands)
        if text in operands:  # for example bits of an i32 as u32 in LLVM
            self.names[value] = text
            return
        self.names[value] = self.variable(len(self.names))
        lines += self.statement(value, self.names[value], text)

    def operand(self, value: LaneValue) -> str:
        """Return the text of a value where it is used."""
        value = self._form(value)
        if value.op == "operand":
            return self.variable(int(value.attribute), "x")  # type: ignore[call-overload]
        return self.constant(value) if value.op == "number" else self.names[value]

    def _form(self, value: LaneValue) -> LaneValue:
        while value.op == "form":
            value = value.operands[value.attribute not in self.features]
        return value

    def _reached(self, value: LaneValue) -> Iterator[LaneValue]:
        """Yield the operations that a value needs, each once."""
        seen: set[LaneValue] = set()
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value not in seen and value.op not in _LEAVES:
                seen.add(value)
                yield value
                waiting += map(self._form, value.operands)

    # -- defined by each language ----------------------------------------------------------------------------

    def variable(self, number: int, letter: str = "v") -> str:
        return f"{letter}{number}"

    def constant(self, value: LaneValue) -> str:
        raise NotImplementedError

    def expression(self, value: LaneValue, types: list[str], operands: list[str]) -> str:
        """Return the text of an operation on operands of these types, or an operand if there is nothing to do."""
        raise NotImplementedError

    def statement(self, value: LaneValue, name: str, text: str) -> list[str]:
        raise NotImplementedError

    def returned(self, text: str) -> str:
        raise NotImplementedError
