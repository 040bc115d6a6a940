"""Elementwise functions as vector code: the operations of elementwise chains.

The results of every function are bitwise identical for any number of lanes.

- f32 is computed by polynomials (`exponentials`, `trigonometry`), f64 by C's math library lane by lane
- f16 and bf16 are computed in f32, and each op's result is rounded once (`conversions`)
- integers wrap around; dividing an integer by zero returns 0 (`integer_arithmetic`)

Arithmetic and comparisons are passed to LLVM directly: TVM would fold x * 0 to 0 and x == x to true, and assumes that
integers never overflow. Each op of a chain rounds separately (`treadle.backends.tvm.kernels.fused_products`), so that
an element's bits do not depend on the other ops of its chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.tvm.kernels.arithmetic import exponentials, trigonometry
from treadle.backends.tvm.kernels.arithmetic.conversions import NARROW, convert, working
from treadle.backends.tvm.kernels.arithmetic.exponentials import exp, exp_nonpositive
from treadle.backends.tvm.kernels.arithmetic.integer_arithmetic import integer_function
from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction, LaneValue
from treadle.backends.tvm.kernels.arithmetic.lanewise import by_lane, call_lanewise, compare, llvm_type, tvm_type
from treadle.ir.errors import GraphError
from treadle.ir.ops.rounding import FORMATS
from treadle.ir.types import DType, f16, f32, f64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

__all__ = [
    "ADDED",
    "DIVISIONS",
    "FUNCTIONS",
    "add_function",
    "emit",
    "exp",
    "exp_nonpositive",
    "formula",
    "is_pointwise",
    "working",
]

Typed = tuple[Any, DType]


def emit(k: Emitter, op: str, operands: Sequence[Typed], dtype: DType, lanes: int, **attributes: Any) -> Expr:
    """Emit an op on vectors of `lanes` lanes and return its value; `op` is a key of FUNCTIONS, `cast` or `constant`."""
    if op == "constant":
        value = attributes["value"]
        return k.number(float(np.float16(value)) if dtype is f16 else value, dtype, lanes)
    if op == "cast":
        ((x, held),) = operands
        return convert(k, x, held, dtype, lanes)
    values = [k.let(k.cast(x, f32, lanes)) if held.name in NARROW else x for x, held in operands]
    made = FUNCTIONS[op](k, working(operands[-1][1]), lanes, *values, **attributes)
    return k.cast(k.let(made), dtype, lanes) if dtype.name in NARROW else made


# -- arithmetic ----------------------------------------------------------------------------------------------

_FLOAT_BODIES = {
    "add": "%r = fadd TYPE %x0, %x1",
    "sub": "%r = fsub TYPE %x0, %x1",
    "mul": "%p = fmul TYPE %x0, %x1\n%r = call TYPE @llvm.arithmetic.fenceSUFFIX(TYPE %p)",
    "div": "%r = fdiv TYPE %x0, %x1",
    "neg": "%r = fneg TYPE %x0",
    "abs": "%r = call TYPE @llvm.fabsSUFFIX(TYPE %x0)",
    # NaN if either is NaN: selects x if x >= y or x is NaN, else y
    "maximum": """%c = fcmp oge TYPE %x0, %x1
%n = fcmp uno TYPE %x0, %x0
%d = or {i1} %c, %n
%r = select {i1} %d, TYPE %x0, TYPE %x1""",
    "minimum": """%c = fcmp ole TYPE %x0, %x1
%n = fcmp uno TYPE %x0, %x0
%d = or {i1} %c, %n
%r = select {i1} %d, TYPE %x0, TYPE %x1""",
    "sign": """%a = fcmp ogt TYPE %x0, [NUMBER 0.0]
%b = fcmp olt TYPE %x0, [NUMBER 0.0]
%n = fcmp uno TYPE %x0, %x0
%s = select {i1} %n, TYPE %x0, TYPE [NUMBER 0.0]
%t = select {i1} %b, TYPE [NUMBER -1.0], TYPE %s
%r = select {i1} %a, TYPE [NUMBER 1.0], TYPE %t""",
}


def _float_function(k: Emitter, name: str, dtype: DType, lanes: int, *operands: Expr) -> Expr:
    f = dtype.name
    body = _FLOAT_BODIES[name].replace("TYPE", "{" + f + "}").replace("NUMBER", f).replace("SUFFIX", "{." + f + "}")
    types = " ".join([f] * len(operands)) + f" -> {f}"
    return call_lanewise(k, f"{name}_{f}", f"float{8 * dtype.bytes}", lanes, operands, types, body)


def _arithmetic(name: str) -> Callable[..., Expr]:
    def function(k: Emitter, dtype: DType, lanes: int, *operands: Expr, ties: str = "even") -> Expr:
        """Emit the op. `ties` of a maximum or minimum is ignored, since it affects only the gradient."""
        computed = _float_function if dtype.is_float else integer_function
        return computed(k, name, dtype, lanes, *operands)

    return function


def _floor_divide(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
    if dtype.is_int:
        return integer_function(k, "floor_divide", dtype, lanes, x, y)
    return _float_division(k, dtype, lanes, x, y)[0]


def _mod(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
    if dtype.is_int:
        return integer_function(k, "mod", dtype, lanes, x, y)
    return _float_division(k, dtype, lanes, x, y)[1]


def _float_division(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> tuple[Expr, Expr]:
    """Return floor(x / y) and the remainder. The remainder is computed exactly by C's library; signs of zeros are as in
    Python.
    """
    t = dtype.name
    x, y = k.let(x), k.let(y)
    remainder = k.let(by_lane(k, "fmod", dtype, lanes, x, y))

    def parts(f: LaneFunction) -> tuple[LaneValue, LaneValue]:
        dividend, divisor, rest = f.operand(x, t), f.operand(y, t), f.operand(remainder, t)
        zero = f.number(0.0, t)
        down = ((rest < 0.0) | (rest > 0.0)) & ((rest < 0.0) ^ (divisor < 0.0))
        whole = (dividend - rest) / divisor
        whole = f.select(down, whole - 1.0, whole)
        floor = whole.floor()
        floor = f.select(whole - floor > 0.5, floor + 1.0, floor)
        quotient = dividend / divisor
        divided = f.select(whole == 0.0, zero.copysign(quotient), floor)
        divided = f.select(divisor == 0.0, quotient, divided)
        left = f.select(rest == 0.0, zero.copysign(divisor), f.select(down, rest + divisor, rest))
        return divided, left

    made = []
    for part in range(2):
        f = LaneFunction(k, lanes)
        made.append(f.result(parts(f)[part]))
    return made[0], made[1]


def _pow(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
    return by_lane(k, "pow", dtype, lanes, x, y) if dtype is f64 else exponentials.power(k, x, y, lanes)


# -- functions of floats -------------------------------------------------------------------------------------


def formula(make: Callable[..., LaneValue]) -> Callable[..., Expr]:
    """Create a function of floats from a formula, for f32 and f64: `formula(lambda x: x / (x.abs() + 1.0))`.

    `make` takes a `LaneValue` for each operand and returns a `LaneValue`.
    """

    def function(k: Emitter, dtype: DType, lanes: int, *operands: Expr) -> Expr:
        f = LaneFunction(k, lanes)
        return f.result(make(*[f.operand(x, dtype.name) for x in operands]))

    return function


# -- functions of one operand --------------------------------------------------------------------------------


def _function(single: Callable[..., Expr], double: str | Callable[..., Expr]) -> Callable[..., Expr]:
    """Create a function of one float from `single`, vector code for f32, and `double`, the name of a function of C's
    library for f64, or code that calls it.
    """

    def function(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
        if dtype is f32:
            return single(k, x, lanes)
        x = k.let(x)
        return by_lane(k, double, f64, lanes, x) if isinstance(double, str) else double(k, x, lanes)

    return function


def _sqrt(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
    return k.sqrt(x)


def _rsqrt(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
    return k.number(1.0, dtype, lanes) / k.sqrt(x)


def _floor(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
    return k.floor(x)


def _round(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
    return k.nearest(x)


def _relu(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
    zero = k.number(0.0, dtype, lanes)
    return k.select(zero > x, zero, x)  # NaN stays NaN


def _sigmoid_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    one = k.number(1.0, f64, lanes)
    return one / (one + by_lane(k, "exp", f64, lanes, -x))


def _silu_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    return x / (k.number(1.0, f64, lanes) + by_lane(k, "exp", f64, lanes, -x))


def _quick_gelu_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    return x / (k.number(1.0, f64, lanes) + by_lane(k, "exp", f64, lanes, x * k.number(-1.702, f64, lanes)))


def _gelu_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    half = k.let(x * k.number(0.5, f64, lanes))
    return half + half * by_lane(k, "erf", f64, lanes, x * k.number(math.sqrt(0.5), f64, lanes))


def _gelu_tanh_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    scale, cubic = k.number(math.sqrt(2.0 / math.pi), f64, lanes), k.number(0.044715, f64, lanes)
    half, one = k.number(0.5, f64, lanes), k.number(1.0, f64, lanes)
    return half * x * (one + by_lane(k, "tanh", f64, lanes, scale * (x + cubic * x * x * x)))


def _softplus_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    zero = k.number(0.0, f64, lanes)
    size = k.let(k.select(x > zero, -x, x))
    return k.select(zero > x, zero, x) + by_lane(k, "log1p", f64, lanes, by_lane(k, "exp", f64, lanes, size))


def _round_to(k: Emitter, dtype: DType, lanes: int, x: Expr, format: str, saturate: bool = False) -> Expr:
    """Round in f64, which contains all numbers of the formats, by adding a number whose last bit has the format's
    spacing.
    """
    known = FORMATS[format]
    f = LaneFunction(k, lanes)
    given = f.operand(x, dtype.name)
    wide = given.to("f64") if dtype is f32 else given
    size = wide.abs().at_most(2.0**200)
    exponent, least = size.bits("i64") & (0x7FF << 52), (known.least + 1023) << 52
    exponent = f.select(exponent < least, least, exponent)
    large = (exponent + ((52 - known.fraction) << 52)).bits("f64")
    rounded = size + large - large
    beyond = known.largest if saturate or known.beyond is None else known.beyond
    rounded = f.select(rounded > known.largest, beyond, rounded)
    rounded = f.select(wide.is_nan(), 0.0 if known.beyond is None else math.nan, rounded)
    signed = rounded.copysign(wide)
    if not known.minus_zero:
        signed = f.select(signed == 0.0, 0.0, signed)
    return f.result(signed.to("f32") if dtype is f32 else signed)


def _fake_quantize(
    k: Emitter, dtype: DType, lanes: int, x: Expr, scale: Expr, zero: Expr, least: int = -128, greatest: int = 127
) -> Expr:
    """Apply the functions of the op's body, in the order of the body."""

    def apply(op: str, number: Expr, by: Expr) -> Expr:
        return k.let(FUNCTIONS[op](k, dtype, lanes, number, by))

    steps = apply("add", k.nearest(apply("div", x, scale)), zero)
    for op, end in (("maximum", least), ("minimum", greatest)):
        steps = apply(op, steps, k.number(float(end), dtype, lanes))
    return apply("mul", apply("sub", steps, zero), scale)


# -- logic ---------------------------------------------------------------------------------------------------


def _comparison(how: str) -> Callable[..., Expr]:
    def function(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
        return compare(k, how, x, y, dtype, lanes)

    return function


def _logical(name: str, body: str) -> Callable[..., Expr]:
    def function(k: Emitter, dtype: DType, lanes: int, *operands: Expr) -> Expr:
        types = " ".join(["i1"] * len(operands)) + " -> i1"
        return call_lanewise(k, name, "bool", lanes, operands, types, body)

    return function


def _where(k: Emitter, dtype: DType, lanes: int, condition: Expr, x: Expr, y: Expr) -> Expr:
    t, tvm_name = llvm_type(dtype), tvm_type(dtype)
    body = f"%r = select {{i1}} %x0, {{{t}}} %x1, {{{t}}} %x2"
    return call_lanewise(k, f"where_{dtype.name}", tvm_name, lanes, [condition, x, y], f"i1 {t} {t} -> {t}", body)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    **{name: _arithmetic(name) for name in ("add", "sub", "mul", "div", "neg", "abs", "sign", "maximum", "minimum")},
    "floor_divide": _floor_divide,
    "mod": _mod,
    "pow": _pow,
    "exp": _function(exp, "exp"),
    "log": _function(exponentials.log, "log"),
    "expm1": _function(exponentials.expm1, "expm1"),
    "log1p": _function(exponentials.log1p, "log1p"),
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": formula(lambda x: 1.0 / x),
    "tanh": _function(exponentials.tanh, "tanh"),
    "erf": _function(exponentials.erf, "erf"),
    "sigmoid": _function(exponentials.sigmoid, _sigmoid_f64),
    "sin": _function(trigonometry.sin, "sin"),
    "cos": _function(trigonometry.cos, "cos"),
    "floor": _floor,
    "round": _round,
    "round_to": _round_to,
    "fake_quantize": _fake_quantize,
    "relu": _relu,
    "gelu": _function(exponentials.gelu, _gelu_f64),
    "gelu_tanh": _function(exponentials.gelu_tanh, _gelu_tanh_f64),
    "silu": _function(exponentials.silu, _silu_f64),
    "quick_gelu": _function(exponentials.quick_gelu, _quick_gelu_f64),
    "softplus": _function(exponentials.softplus, _softplus_f64),
    "equal": _comparison("eq"),
    "not_equal": _comparison("ne"),
    "less": _comparison("lt"),
    "less_equal": _comparison("le"),
    "greater": _comparison("gt"),
    "greater_equal": _comparison("ge"),
    "logical_and": _logical("logical_and", "%r = and {i1} %x0, %x1"),
    "logical_or": _logical("logical_or", "%r = or {i1} %x0, %x1"),
    "logical_not": _logical("logical_not", "%r = xor {i1} %x0, [i1 true]"),
    "where": _where,
}
"""Op names, and functions of (emitter, dtype, lanes, *operands, **attributes). `cast` and `constant` are not
included.
"""

ADDED: set[str] = set()
"""Names of the ops whose functions were added by `add_function`."""


def add_function(op: str, function: Callable[..., Expr]) -> None:
    """Register a function for an op of another package, so that elementwise chains may contain the op.

    Kernels with this op are cached only in memory, since the key of a cache file does not include the function. Raises
    GraphError for an op that already has a function.
    """
    if is_pointwise(op):
        raise GraphError(f"op {op!r} has a function in the tvm backend already")
    FUNCTIONS[op] = function
    ADDED.add(op)


def is_pointwise(op: str) -> bool:
    """Return True if a chain may contain the op of this name."""
    return op in FUNCTIONS or op == "cast"


DIVISIONS = frozenset({"floor_divide", "mod"})
"""Ops for which no instruction set has vector instructions."""
