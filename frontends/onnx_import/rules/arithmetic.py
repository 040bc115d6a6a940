"""ONNX operators on two or more operands, element by element: arithmetic, comparisons, logic, selection."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.recipes.activations import chosen
from treadle.frontends.recipes.quotients import remainder_like_dividend, truncated_quotient
from treadle.ir.builder import Builder, Expr
from treadle.ir.types import f32, f64, i64

_SIGN_BIT = -(2**63)


def in_order(b: Builder, x: Expr, unsigned: bool) -> Expr:
    """Return numbers that compare as x does. uint64 is stored in the bits of an i64, so its first bit is flipped."""
    return x + b.constant(_SIGN_BIT, i64) if unsigned else x


def _is_uint64(site: OnnxSite, position: int = 0) -> bool:
    return site.element(position).name == "UINT64"


# -- arithmetic ----------------------------------------------------------------------------------------------------


@operator("Add", latest=14, first=7)
def _add(site: OnnxSite) -> Made:
    return site.x(0) + site.x(1)


@operator("Sub", latest=14, first=7)
def _sub(site: OnnxSite) -> Made:
    return site.x(0) - site.x(1)


@operator("Mul", latest=14, first=7)
def _mul(site: OnnxSite) -> Made:
    return site.x(0) * site.x(1)


@operator("Div", latest=14, first=7)
def _div(site: OnnxSite) -> Made:
    """Divide; integers toward zero."""
    x, y = site.x(0), site.x(1)
    if x.dtype.is_float:
        return x / y
    if _is_uint64(site):
        return _unsigned_quotient(site.b, x, y)
    element = site.element(0)
    return x // y if element.least == 0 else truncated_quotient(site.b, x, y)


def _unsigned_quotient(b: Builder, x: Expr, y: Expr) -> Expr:
    """Return x / y of unsigned 64-bit integers that are stored in i64.

    If the divisor is 2^63 or more, the quotient is 0 or 1. Otherwise, twice the quotient of x/2 is correct or too small
    by 1.
    """
    zero, one, two = (b.constant(n, i64) for n in (0, 1, 2))
    half = b.where(x < zero, x // two + b.constant(2**62, i64) + b.constant(2**62, i64), x // two)
    near = (half // b.where(y > zero, y, one)) * two
    rest = x - near * y
    near = near + b.where(in_order(b, rest, True) >= in_order(b, y, True), one, zero)
    large = b.where(in_order(b, x, True) >= in_order(b, y, True), one, zero)
    return b.where(y < zero, large, near)


@operator("Mod", latest=28)
def _mod(site: OnnxSite) -> Made:
    """Remainder with the sign of the dividend (fmod=1) or of the divisor (fmod=0)."""
    b, x, y = site.b, site.x(0), site.x(1)
    like_dividend = site.int("fmod", 0)
    if _is_uint64(site):
        return x - _unsigned_quotient(b, x, y) * y
    if x.dtype.is_float and not like_dividend:
        # Signed zeros and infinite divisors follow version 28. Earlier versions do not define them.
        zero = b.constant(0.0, x.dtype)
        rest = b.mod(x, y)
        infinite = b.equal(b.abs(y), b.constant(float("inf"), x.dtype)) & (b.abs(x) < b.abs(y))
        same = b.equal(x < zero, y < zero) | b.equal(x, zero)
        return b.where(infinite, b.where(same, x, y), rest)
    if not like_dividend or site.element(0).least == 0:
        return b.mod(x, y)
    if not x.dtype.is_float:
        return x - truncated_quotient(b, x, y) * y
    infinite = b.equal(b.abs(y), b.constant(float("inf"), x.dtype)) & (b.abs(x) < b.abs(y))
    return b.where(infinite, x, remainder_like_dividend(b, x, y))


@operator("Pow", latest=15, first=7)
def _pow(site: OnnxSite) -> Made:
    """x^y. The exponent may have another type; the result has the type of the base."""
    b, x, y = site.b, site.x(0), site.x(1)
    base = site.element(0)
    if base.name == "UINT64" or (site.element(1).name == "UINT64" and not base.is_float):
        site.refuse("powers of uint64 are not supported")
    if base.is_float:
        exponent = site.value(1).content
        if exponent is not None and exponent.dtype != object and exponent.size == 1 and float(exponent.flat[0]) == 2.0:
            return x * x if len(y.shape) <= len(x.shape) else b.pow(x, y.cast(x.dtype))
        if y.dtype is f64 and x.dtype is f32:
            return b.pow(x.cast(f64), y).cast(x.dtype)
        return b.pow(x, y.cast(x.dtype))
    if base.bits > 32 or (y.dtype.is_int and site.element(1).bits > 32):
        content = site.value(1).content
        if content is None or content.dtype == object or content.size != 1 or not 0 <= int(content.flat[0]) <= 8:
            return b.pow(x.cast(f64), y.cast(f64)).cast(x.dtype)
        whole = int(content.flat[0])
        if whole == 0:
            return x * 0 + 1
        return reduce(lambda z, _: z * x, range(whole - 1), x)
    return b.pow(x.cast(f64), y.cast(f64)).cast(x.dtype)


def _folding(name: str, latest: int, combine: Callable[[OnnxSite, Expr, Expr], Expr]) -> None:
    """Register an operator that combines any number of operands."""

    @operator(name, latest=latest, first=6)
    def _combined(site: OnnxSite) -> Made:
        parts = site.all()
        if len(parts) == 1:
            return parts[0]
        return reduce(lambda x, y: combine(site, x, y), parts)


def _extremum(name: str) -> Callable[[OnnxSite, Expr, Expr], Expr]:
    """Return the rule for two operands. If one is a constant, the rule is a clamp, whose bound passes the gradient, as
    in PyTorch, which exports clamp(min=0) as Max. Otherwise, equal operands share the gradient.
    """

    def combine(site: OnnxSite, x: Expr, y: Expr) -> Expr:
        b = site.b
        if _is_uint64(site):
            flip = b.constant(_SIGN_BIT, i64)
            return b.apply(name, x + flip, y + flip) + flip  # type: ignore[no-any-return]
        constants = [v.value.literal is not None for v in (x, y)]
        ties = "even" if constants[0] == constants[1] else "y" if constants[0] else "x"
        return b.apply(name, x, y, ties=ties)  # type: ignore[no-any-return]

    return combine


_folding("Max", 13, _extremum("maximum"))
_folding("Min", 13, _extremum("minimum"))
_folding("Sum", 13, lambda site, x, y: x + y)


@operator("Mean", latest=13, first=6)
def _mean(site: OnnxSite) -> Made:
    parts = site.all()
    return reduce(lambda x, y: x + y, parts) / float(len(parts))


# -- comparisons and logic -----------------------------------------------------------------------------------------


def _comparison(name: str, ours: str, latest: int, ordered: bool = True) -> None:
    @operator(name, latest=latest, first=7)
    def _compared(site: OnnxSite) -> Made:
        x, y = (in_order(site.b, x, ordered and _is_uint64(site)) for x in (site.x(0), site.x(1)))
        return site.b.apply(ours, x, y)


_comparison("Equal", "equal", 19, ordered=False)
_comparison("Greater", "greater", 13)
_comparison("Less", "less", 13)
_comparison("GreaterOrEqual", "greater_equal", 16)
_comparison("LessOrEqual", "less_equal", 16)


@operator("And", latest=7, first=7)
def _and(site: OnnxSite) -> Made:
    return site.x(0) & site.x(1)


@operator("Or", latest=7, first=7)
def _or(site: OnnxSite) -> Made:
    return site.x(0) | site.x(1)


@operator("Xor", latest=7, first=7)
def _xor(site: OnnxSite) -> Made:
    return site.b.not_equal(site.x(0), site.x(1))


@operator("Not")
def _not(site: OnnxSite) -> Made:
    return ~site.x(0)


@operator("Where", latest=16, moves=(1, 2))
def _where(site: OnnxSite) -> Made:
    return chosen(site.b, site.x(0), site.x(1), site.x(2))


@operator("Clip", latest=13, first=6)
def _clip(site: OnnxSite) -> Made:
    """Clip to bounds. Either bound may be absent. If the lower bound exceeds the upper one, the upper bound is used."""
    b, x = site.b, site.x(0)
    unsigned = _is_uint64(site)
    if site.version < 11:
        low, high = site.float("min"), site.float("max")
        lower = None if low is None else site.constant(low, x.dtype)
        upper = None if high is None else site.constant(high, x.dtype)
    else:
        lower, upper = site.maybe(1), site.maybe(2)
    x = in_order(b, x, unsigned)
    if lower is not None:
        x = b.maximum(x, in_order(b, lower, unsigned), ties="x")
    if upper is not None:
        x = b.minimum(x, in_order(b, upper, unsigned), ties="x")
    return in_order(b, x, unsigned)
