"""e^x, ln x, x^y and functions composed of them, as vector code in float32.

Every function is correct for all of float32: infinities, NaN, subnormal operands and results. Errors are in units in
the last place (ulp), and hold for fused and for separate multiplication and addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.lane_function import (
    DOUBLE,
    WIDE,
    LaneFunction,
    LaneValue,
    form,
    number,
    where,
)
from treadle.backends.tvm.kernels.arithmetic.polynomials import (
    PIECES,
    fraction_above,
    mantissa_and_exponent,
    pieces,
    piecewise,
    polynomial,
    power_of_two,
    rounded_product,
    scaled,
    times_power_of_two,
)

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the first has nine bits, so its product with an exponent is exact
LEAST_NORMAL = -87.33654022216797  # the lowest float32 whose e^x is a normal number

# (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, within 3e-9 of e^r; minimax, fitted
_EXP = (1.3818697771057487e-3, 8.368715643882751e-3, 4.166829213500023e-2, 0.1666652113199234, 0.4999999403953552)
# (2^f - 1) / f for 0 <= f < 1, within 3e-6 of 2^f; minimax, fitted
_EXP2 = (1.3426811434328556e-2, 5.224204808473587e-2, 0.24128064513206482, 0.6930447220802307)
# (ln(1 + f) - f + f^2 / 2) / f^3 for 1 + f within a factor of sqrt 2 of 1, within 8e-10 of ln(1 + f); minimax, fitted
_LOG = (
    0.06749271601438522,
    -0.11670099198818207,
    0.11883548647165298,
    -0.12406233698129654,
    0.14220358431339264,
    -0.16667988896369934,
    0.2000207155942917,
    -0.25000008940696716,
    0.3333331346511841,
)
# tanh x = x P(x^2) / Q(x^2), within 2.2e-8; minimax, fitted
_TANH_P = (1.3384286567941217e-8, 2.0635819964809343e-5, 3.4974575974047184e-3, 0.1338268667459488, 1.0)
_TANH_Q = (7.790247309458209e-7, 3.2885168911889195e-4, 2.5884360074996948e-2, 0.46716007590293884, 1.0)
_TANH_ONE = 9.0190525  # from here on the quotient is 1
# erf x = x P(x^2) / Q(x^2), within 5.2e-8; minimax, fitted
_ERF_P = (
    2.222541525043198e-6,
    2.7472441433928907e-4,
    3.1193518079817295e-3,
    5.074167624115944e-2,
    0.17474965751171112,
    1.128379225730896,
)
_ERF_Q = (
    3.9359227230306715e-5,
    1.0146143613383174e-3,
    1.366138644516468e-2,
    0.10769747197628021,
    0.4882024824619293,
    1.0,
)
_ERF_ONE = 3.9295185
# Phi(x) - 1/2 = x P(x^2) / Q(x^2), Phi the normal distribution, within 2.9e-8; minimax, fitted
_PHI_P = (
    2.314514446766225e-8,
    6.1818745962227695e-6,
    1.5593616990372539e-4,
    4.597449209541082e-3,
    3.2677680253982544e-2,
    0.3989422917366028,
)
_PHI_Q = (
    1.196538732983754e-6,
    6.909333023941144e-5,
    1.811605179682374e-3,
    2.795341983437538e-2,
    0.24857769906520844,
    1.0,
)
_PHI_HALF = 5.5575676
# The same polynomial in pieces of degree 4, within 1.7e-7. From 14.5 steps on it rounds to 1/2
_PHI_STEP = 49 / 128
_PHI_PIECES = pieces(lambda x: 0.5 * math.erf(x * math.sqrt(0.5)) if x < 14.5 * _PHI_STEP else 0.5, _PHI_STEP, 4)

# ln m = 2 (s + s^3/3 + s^5/5 + ...) with s = (m - 1) / (m + 1), |s| < 0.172: the omitted terms are below 1e-13
_LOG2_SERIES = tuple(2.0 * LOG2_E / n for n in range(15, 0, -2))
# 2^f = sum of (f ln 2)^n / n! for |f| <= 1/2, within 3e-12
_EXP2_SERIES = tuple(math.log(2.0) ** n / math.factorial(n) for n in range(9, -1, -1))


def _of_floats(formula: Callable[..., LaneValue]) -> LaneFunction:
    """Return a formula as a lane function of f32, with the formula's name and docstring."""
    made = LaneFunction(f"{formula.__name__.strip('_')}_f32", ("f32",) * formula.__code__.co_argcount, "f32", formula)
    made.__doc__ = formula.__doc__
    return made


@_of_floats
def exp(x: LaneValue) -> LaneValue:
    """e^x, within 1.1 ulp: inf from 88.73 on, subnormal from -87.33 down, 0 below -103.98."""
    return _exp(x)


@_of_floats
def exp_nonpositive(x: LaneValue) -> LaneValue:
    """e^x for x <= 0 in fewer instructions than `exp`; results that would be subnormal are 0."""
    p, raised, _ = _reduced_exp(x.at_least(LEAST_NORMAL))
    return where(x < LEAST_NORMAL, 0.0, p * power_of_two(raised))


@_of_floats
def exp_for_pairs(x: LaneValue) -> LaneValue:
    """e^x for x <= 0 with the accuracy of bf16, within 4e-6 + 1e-7 |x|, in half the instructions; e^0 is 1.

    Without AVX-512 this is `exp`: all instruction sets that multiply bf16 pairs have AVX-512.
    """
    y = x * LOG2_E
    fraction = fraction_above(y)
    wide = times_power_of_two(polynomial(fraction, _EXP2) * fraction + 1.0, y)
    return form(WIDE, wide, _exp(x))


def _exp(x: LaneValue) -> LaneValue:
    return scaled(*_reduced_exp(x.at_most(89.0).at_least(-104.0)))


@_of_floats
def expm1(x: LaneValue) -> LaneValue:
    """e^x - 1, within 4 ulp: near 0, the polynomial of e^x without its constant 1; elsewhere e^x minus 1."""
    p, raised, whole = _reduced_exp(x.at_most(89.0).at_least(-104.0))
    # If the exponent n is 0, the reduced argument is x itself, so the polynomial is evaluated at x.
    near = polynomial(x, _EXP) * (x * x) + x
    return where(whole == 0.0, near, scaled(p, raised, whole) - 1.0)


@_of_floats
def log1p(x: LaneValue) -> LaneValue:
    """ln(1 + x), within 4 ulp; -inf at -1, NaN below."""
    return _log1p(x)


@_of_floats
def softplus(x: LaneValue) -> LaneValue:
    """max(x, 0) + ln(1 + e^-|x|), within 6 ulp."""
    return x.at_least(0.0) + _log1p(_exp(-x.abs()))


def _log1p(x: LaneValue) -> LaneValue:
    """ln(u) x / (u - 1) with u = 1 + x; the factor x / (u - 1) corrects the rounding of u        (Kahan)"""
    u = (x + 1.0).rounded()
    kept = u - 1.0
    found = _log(u)
    near = where(kept == 0.0, x, found * (x / kept))
    return where(x.abs() < 1.0, near, found)


def _reduced_exp(x: LaneValue) -> tuple[LaneValue, LaneValue, LaneValue]:
    """Return e^(x - n ln 2) for the integer n nearest to x / ln 2, and n in the two forms of `rounded_product`."""
    raised, whole = rounded_product(x, LOG2_E)
    r = (x - whole * LN2_HIGH).rounded() - whole * LN2_LOW
    return polynomial(r, _EXP) * (r * r) + r + 1.0, raised, whole


@_of_floats
def sigmoid(x: LaneValue) -> LaneValue:
    """1 / (1 + e^-x), within 3 ulp. If e^-x is inf, the result is 0; the exact result is subnormal."""
    return 1.0 / (_exp(-x) + 1.0)


@_of_floats
def silu(x: LaneValue) -> LaneValue:
    """x / (1 + e^-x), within 3 ulp. If e^-x is inf, the result is 0."""
    return x / (_exp(-x) + 1.0)


@_of_floats
def quick_gelu(x: LaneValue) -> LaneValue:
    """x / (1 + e^(-1.702 x)), within 5 + 2.2 |x| roundings: roundings of the exponent are multiplied by its size."""
    return x / (_exp(x * -1.702) + 1.0)


@_of_floats
def gelu_tanh(x: LaneValue) -> LaneValue:
    """x/2 (1 + tanh u) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): the right-hand form has no cancellation.

    Within 5 + 9.2 |u| roundings: roundings of the exponent are multiplied by its size. The left-hand form has no
    correct digits for x below -6.
    """
    scale = -2.0 * math.sqrt(2.0 / math.pi)
    return x / (_exp(x * (x * x * (0.044715 * scale) + scale)) + 1.0)


@_of_floats
def tanh(x: LaneValue) -> LaneValue:
    """tanh x, within 7 ulp, 0.9 on average; exactly 1 from 9.02 on."""
    return _odd_quotient(x.clamped(_TANH_ONE), _TANH_P, _TANH_Q).clamped(1.0)


@_of_floats
def erf(x: LaneValue) -> LaneValue:
    """erf x, within 7 ulp, 1 on average; exactly 1 from 3.93 on."""
    return _odd_quotient(x.clamped(_ERF_ONE), _ERF_P, _ERF_Q).clamped(1.0)


@_of_floats
def _gelu(x: LaneValue) -> LaneValue:
    size = x.abs()
    wide = size * piecewise(size.at_most((PIECES - 1) * _PHI_STEP), _PHI_PIECES, _PHI_STEP)
    part = _odd_quotient(x.clamped(_PHI_HALF), _PHI_P, _PHI_Q).clamped(0.5)
    return form(WIDE, wide + x * 0.5, x * part + x * 0.5)


def gelu(k: Emitter, lanes: int, x: Expr) -> Expr:
    """x Phi(x), within 4e-7 |x|: below 0, digits cancel in the formula. 0 below -5.56, NaN at -inf."""
    if lanes < PIECES and "avx512f" in k.isa.needs:  # so that fewer lanes get the same bits as 16
        wide = k.splat(x, PIECES) if lanes == 1 else k.shuffle([x] * (PIECES // lanes), range(PIECES))
        return k.shuffle([k.let(_gelu(k, PIECES, k.let(wide)))], range(lanes))
    return _gelu(k, lanes, x)


def _odd_quotient(x: LaneValue, above: tuple[float, ...], below: tuple[float, ...]) -> LaneValue:
    """x P(x^2) / Q(x^2). Near the end of the interval, rounding may make the result exceed the function's limit."""
    square = x * x
    return x * polynomial(square, above) / polynomial(square, below)


@_of_floats
def log(x: LaneValue) -> LaneValue:
    """ln x, within 1 ulp; -inf at 0, NaN below."""
    return _log(x)


def _log(value: LaneValue) -> LaneValue:
    small = value < 2.0**-126
    m, e = mantissa_and_exponent(where(small, value * 2.0**23, value))
    e = where(small, e - 23.0, e)
    z = m - 1.0
    square = z * z
    low = z * square * polynomial(z, _LOG) + e * LN2_LOW - square * 0.5
    found = where(value < math.inf, low + z + e * LN2_HIGH, value)
    outside = where(value == 0.0, -math.inf, number(math.nan, "f32"))
    return where(value > 0.0, found, outside)


@_of_floats
def power(x: LaneValue, y: LaneValue) -> LaneValue:
    """x^y = 2^(y log2 |x|) in f64, rounded once. The sign is the sign of x for odd y. Special cases are as in C.

    In languages without f64, the exponent y log2 |x| is computed in f32. It has a few roundings, which are multiplied
    by its size: at most 128, so the error is up to 1e-4 of the result.
    """
    found = form(DOUBLE, _power_of_size(x, y, "f64"), _power_of_size(x, y, "f32"))
    half, integral = y * 0.5, y.floor() == y
    odd = integral & (half > half.floor())
    found = where((x.bits("i32") < 0) & odd, -found, found)
    real = integral | (x >= 0.0) | (x == -math.inf) | x.is_nan()
    found = where(real, found, math.nan)
    return where((y == 0.0) | (x == 1.0), 1.0, found)


def _power_of_size(x: LaneValue, y: LaneValue, type: str) -> LaneValue:
    """|x|^y, computed in a float type"""
    size = x.abs()
    wide = size.to(type)
    m, e = mantissa_and_exponent(wide)
    s = (m - 1.0) / (m + 1.0)
    log2 = s * polynomial(s * s, _LOG2_SERIES) + e
    log2 = where(wide < math.inf, log2, wide)
    log2 = where(wide == 0.0, -math.inf, log2)
    product = log2 * y.to(type)
    w = where((size == 1.0) & (y.abs() == math.inf), 0.0, product).clamped(200.0)
    raised, whole = rounded_product(w, 1.0)
    mantissa = polynomial(w - whole, _EXP2_SERIES)
    return (mantissa * power_of_two(raised)).to("f32") if type == "f64" else scaled(mantissa, raised, whole)
