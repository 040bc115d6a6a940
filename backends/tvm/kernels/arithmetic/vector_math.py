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
from functools import partial
from operator import add, and_, mul, neg, or_, sub, truediv
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.tvm.kernels.arithmetic import exponentials, integer_arithmetic, trigonometry
from treadle.backends.tvm.kernels.arithmetic.comparisons import compare
from treadle.backends.tvm.kernels.arithmetic.conversions import NARROW, convert, working
from treadle.backends.tvm.kernels.arithmetic.exponentials import exp, exp_nonpositive
from treadle.backends.tvm.kernels.arithmetic.lane_function import (
    DOUBLE,
    LaneFunction,
    LaneValue,
    form,
    lane_type,
    number,
    where,
)
from treadle.ir.errors import GraphError
from treadle.ir.ops.rounding import FORMATS, FloatFormat
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


def _per_lane(name: str, formula: Callable[..., LaneValue]) -> Callable[..., Expr]:
    """Create a function from a formula whose operands have one dtype, which is also the dtype of the result.

    name  a name that determines the formula; if it is empty, see `LaneFunction`
    """

    def function(k: Emitter, dtype: DType, lanes: int, *operands: Expr, ties: str = "even") -> Expr:
        """Emit the op. `ties` of a maximum or minimum is ignored, since it affects only the gradient."""
        t = lane_type(dtype)
        return LaneFunction(name and f"{name}_{dtype.name}", (t,) * len(operands), t, formula)(k, lanes, *operands)

    return function


def formula(make: Callable[..., LaneValue]) -> Callable[..., Expr]:
    """Create a function of floats from a formula, for f32 and f64: `formula(lambda x: x / (x.abs() + 1.0))`.

    `make` takes a `LaneValue` for each operand and returns a `LaneValue`.
    """
    return _per_lane("", make)


def _maximum(x: LaneValue, y: LaneValue) -> LaneValue:
    """The larger value; NaN if either is NaN"""
    return where((x >= y) | x.is_nan() if x.is_float else x > y, x, y)


def _minimum(x: LaneValue, y: LaneValue) -> LaneValue:
    return where((x <= y) | x.is_nan() if x.is_float else x < y, x, y)


def _sign(x: LaneValue) -> LaneValue:
    if x.type[0] == "u":
        return (x != 0).to(x.type)
    if not x.is_float:
        return (x > 0).to(x.type) - (x < 0).to(x.type)
    return where(x > 0.0, 1.0, where(x < 0.0, -1.0, where(x.is_nan(), x, 0.0)))


def _divided(part: int, of_integers: Callable[..., LaneValue]) -> Callable[..., Expr]:
    """Create a function of floats from a part of `_float_division`, and a function of integers."""
    integers = _per_lane(of_integers.__name__, of_integers)

    def function(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
        if dtype.is_int:
            return integers(k, dtype, lanes, x, y)
        return _float_division(k, dtype, lanes, x, y, part)

    return function


def _float_division(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr, part: int) -> Expr:
    """Return floor(x / y), or the remainder if `part` is 1. The remainder is computed exactly by C's library; signs of
    zeros are as in Python.
    """
    t = dtype.name
    x, y = k.let(x), k.let(y)
    remainder = k.let(k.libm("fmod", dtype, lanes, x, y))
    name, formula = (("floor_divide", _floor_of_quotient), ("mod", _signed_rest))[part]
    return LaneFunction(f"{name}_{t}", (t, t, t), t, formula)(k, lanes, x, y, remainder)


def _is_down(rest: LaneValue, divisor: LaneValue) -> LaneValue:
    """Return true if the remainder of C's library has another sign than the divisor."""
    return ((rest < 0.0) | (rest > 0.0)) & ((rest < 0.0) ^ (divisor < 0.0))


def _floor_of_quotient(dividend: LaneValue, divisor: LaneValue, rest: LaneValue) -> LaneValue:
    whole = (dividend - rest) / divisor
    whole = where(_is_down(rest, divisor), whole - 1.0, whole)
    floor = whole.floor()
    floor = where(whole - floor > 0.5, floor + 1.0, floor)
    quotient = dividend / divisor
    divided = where(whole == 0.0, number(0.0, rest.type).copysign(quotient), floor)
    return where(divisor == 0.0, quotient, divided)


def _signed_rest(dividend: LaneValue, divisor: LaneValue, rest: LaneValue) -> LaneValue:
    down = where(_is_down(rest, divisor), rest + divisor, rest)
    return where(rest == 0.0, number(0.0, rest.type).copysign(divisor), down)


def _pow(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
    return k.libm("pow", dtype, lanes, x, y) if dtype is f64 else exponentials.power(k, lanes, x, y)


# -- functions of one operand --------------------------------------------------------------------------------


def _function(single: Callable[..., Expr], double: str | Callable[..., Expr]) -> Callable[..., Expr]:
    """Create a function of one float from `single`, vector code for f32, and `double`, the name of a function of C's
    library for f64, or code that calls it.
    """

    def function(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
        if dtype is f32:
            return single(k, lanes, x)
        x = k.let(x)
        return k.libm(double, f64, lanes, x) if isinstance(double, str) else double(k, x, lanes)

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
    return one / (one + k.libm("exp", f64, lanes, -x))


def _silu_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    return x / (k.number(1.0, f64, lanes) + k.libm("exp", f64, lanes, -x))


def _quick_gelu_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    return x / (k.number(1.0, f64, lanes) + k.libm("exp", f64, lanes, x * k.number(-1.702, f64, lanes)))


def _gelu_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    half = k.let(x * k.number(0.5, f64, lanes))
    return half + half * k.libm("erf", f64, lanes, x * k.number(math.sqrt(0.5), f64, lanes))


def _gelu_tanh_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    scale, cubic = k.number(math.sqrt(2.0 / math.pi), f64, lanes), k.number(0.044715, f64, lanes)
    half, one = k.number(0.5, f64, lanes), k.number(1.0, f64, lanes)
    return half * x * (one + k.libm("tanh", f64, lanes, scale * (x + cubic * x * x * x)))


def _softplus_f64(k: Emitter, x: Expr, lanes: int) -> Expr:
    zero = k.number(0.0, f64, lanes)
    size = k.let(k.select(x > zero, -x, x))
    return k.select(zero > x, zero, x) + k.libm("log1p", f64, lanes, k.libm("exp", f64, lanes, size))


def _round_to(k: Emitter, dtype: DType, lanes: int, x: Expr, format: str, saturate: bool = False) -> Expr:
    """Round to a format of `FORMATS`."""
    name = f"round_to_{format}{'_saturated' * saturate}_{dtype.name}"
    made = partial(_rounded_to, format=FORMATS[format], saturate=saturate)
    return LaneFunction(name, (dtype.name,), dtype.name, made)(k, lanes, x)


def _rounded_to(x: LaneValue, format: FloatFormat, saturate: bool) -> LaneValue:
    rounded = _rounded_in_f64(x.to("f64").abs(), format).to(x.type)
    if x.type == "f32":
        rounded = form(DOUBLE, rounded, _rounded_in_f32(x.abs(), format))
    beyond = format.largest if saturate or format.beyond is None else format.beyond
    rounded = where(rounded > format.largest, beyond, rounded)
    rounded = where(x.is_nan(), 0.0 if format.beyond is None else math.nan, rounded)
    signed = rounded.copysign(x)
    return signed if format.minus_zero else where(signed == 0.0, 0.0, signed)


def _rounded_in_f64(size: LaneValue, format: FloatFormat) -> LaneValue:
    """Round by adding a number whose last bit has the format's spacing. f64 contains all numbers of the formats."""
    size = size.at_most(2.0**200)
    exponent, least = size.bits("i64") & (0x7FF << 52), (format.least + 1023) << 52
    exponent = where(exponent < least, least, exponent)
    large = (exponent + ((52 - format.fraction) << 52)).bits("f64")
    return size + large - large


def _rounded_in_f32(size: LaneValue, format: FloatFormat) -> LaneValue:
    """Round the bits, and numbers below the format's least normal number by adding a number with their spacing."""
    cut = 23 - format.fraction
    bits = size.bits("u32")
    normal = ((bits + ((bits >> cut) & 1) + ((1 << (cut - 1)) - 1)) >> cut) << cut
    large = 2.0 ** (format.least + cut)
    return where(size < 2.0**format.least, (size + large).rounded() - large, normal.bits("f32"))


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


def _logical(name: str, formula: Callable[..., LaneValue]) -> Callable[..., Expr]:
    def function(k: Emitter, dtype: DType, lanes: int, *operands: Expr) -> Expr:
        return LaneFunction(name, ("bool",) * len(operands), "bool", formula)(k, lanes, *operands)

    return function


def _where(k: Emitter, dtype: DType, lanes: int, condition: Expr, x: Expr, y: Expr) -> Expr:
    t = lane_type(dtype)
    return LaneFunction(f"where_{dtype.name}", ("bool", t, t), t, where)(k, lanes, condition, x, y)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    **{f.__name__: _per_lane(f.__name__, f) for f in (add, sub, mul, neg, LaneValue.abs)},
    "div": _per_lane("div", truediv),
    "sign": _per_lane("sign", _sign),
    "maximum": _per_lane("maximum", _maximum),
    "minimum": _per_lane("minimum", _minimum),
    "floor_divide": _divided(0, integer_arithmetic.floor_divide),
    "mod": _divided(1, integer_arithmetic.mod),
    "pow": _pow,
    "exp": _function(exp, "exp"),
    "log": _function(exponentials.log, "log"),
    "expm1": _function(exponentials.expm1, "expm1"),
    "log1p": _function(exponentials.log1p, "log1p"),
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _per_lane("reciprocal", lambda x: 1.0 / x),
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
    "logical_and": _logical("logical_and", and_),
    "logical_or": _logical("logical_or", or_),
    "logical_not": _logical("logical_not", lambda x: x ^ True),
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
