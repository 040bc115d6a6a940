"""Building blocks of vector functions: polynomials (also piecewise), integer parts, powers of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from treadle.backends.tvm.kernels.arithmetic.lane_function import ORDER, WIDE, LaneValue, form

MAGIC = {"f32": 1.5 * 2.0**23, "f64": 1.5 * 2.0**52}
"""A number near which adjacent numbers of the float type differ by 1, so that adding it rounds to integers."""

_MAGIC_BITS = 0x4B400000  # the bits of MAGIC in f32
_FRACTION = {"f32": 23, "f64": 52}
_BIAS = {"f32": 127, "f64": 1023}
_INTEGER = {"f32": "i32", "f64": "i64"}
_SQRT_HALF = {"f32": 0x3F3504F3, "f64": 0x3FE6A09E667F3BCD}


def polynomial(x: LaneValue, coefficients: Sequence[float]) -> LaneValue:
    """Evaluate a polynomial by Horner's rule. The coefficient of the highest power comes first."""
    value = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        value = value * x + c
    return value


PIECES = 16
"""Number of table entries that one vector holds."""


def pieces(of: Callable[[float], float], step: float, degree: int) -> tuple[tuple[float, ...], ...]:
    """Return coefficients, highest power first, of polynomials in x - n step around n step, for n from 0 to 15.

    Each coefficient is a tuple with one entry for each piece. The last piece is the constant value of `of` at its
    center.
    """
    inside = [_interpolated(of, n * step, step / 2, degree) for n in range(PIECES - 1)]
    return tuple(zip(*inside, [0.0] * degree + [of((PIECES - 1) * step)], strict=True))


def _interpolated(of: Callable[[float], float], center: float, half: float, degree: int) -> list[float]:
    """Return coefficients, highest power first, of the polynomial that interpolates a function at Chebyshev points."""
    points = [half * math.cos(math.pi * (i + 0.5) / (degree + 1)) for i in range(degree + 1)]
    powers = np.vander(np.array(points), degree + 1)
    return list(np.linalg.solve(powers, np.array([of(center + x) for x in points])))


def piecewise(x: LaneValue, table: Sequence[Sequence[float]], step: float) -> LaneValue:
    """Evaluate in each lane the polynomial of the piece in which x is, for x from 0 to 15 steps. Needs `WIDE`. See
    `pieces`.
    """
    raised, whole = rounded_product(x, 1.0 / step)
    index = raised.bits("i32")
    rest = x - whole * step
    value = _looked_up(index, table[0])
    for row in table[1:]:
        value = value * rest + _looked_up(index, row)
    return value


def _looked_up(index: LaneValue, entries: Sequence[float]) -> LaneValue:
    """Return the table entries whose numbers are the low four bits of an index."""
    return LaneValue("lookup", "f32", (index,), tuple(entries))


def rounded_product(x: LaneValue, factor: float) -> tuple[LaneValue, LaneValue]:
    """Return the integer n nearest to x * factor, below 2^21, in two forms: n + MAGIC, whose low bits are n, and n."""
    raised = x * factor + MAGIC[x.type]
    nearest = (x * factor).nearest()
    in_order = raised - MAGIC[x.type]
    return form(ORDER, raised, nearest + MAGIC[x.type]), form(ORDER, in_order, nearest)


def power_of_two(raised: LaneValue) -> LaneValue:
    """Return 2^n, a normal number, from n + MAGIC."""
    f, i = raised.type, _INTEGER[raised.type]
    return ((raised.bits(i) << _FRACTION[f]) + (_BIAS[f] << _FRACTION[f])).bits(f)


def fraction_above(x: LaneValue) -> LaneValue:
    """Return x - floor(x), or 0 for an infinity, in one instruction. Needs `WIDE`."""
    return LaneValue("fraction", x.type, (x,))


def times_power_of_two(x: LaneValue, power: LaneValue) -> LaneValue:
    """Return x * 2^floor(power), rounded once, in one instruction. Needs `WIDE`."""
    return LaneValue("scale", x.type, (x, power))


def scaled(x: LaneValue, raised: LaneValue, whole: LaneValue) -> LaneValue:
    """Return x * 2^n in f32 for x near 1 and n from -252 to 254, rounded once; the result may be subnormal or inf.

    raised, whole  n + MAGIC, and n

    AVX-512 has an instruction for this. Otherwise x is multiplied by two factors; the first product is exact.
    """
    n = raised.bits("i32") - _MAGIC_BITS
    first = n >> 1
    factors = [((part + _BIAS["f32"]) << _FRACTION["f32"]).bits("f32") for part in (first, n - first)]
    return form(WIDE, times_power_of_two(x, whole), x * factors[0] * factors[1])


def mantissa_and_exponent(x: LaneValue) -> tuple[LaneValue, LaneValue]:
    """Return m in [sqrt 1/2, sqrt 2) and an integer e with x = m 2^e, for a positive normal x. Both are floats."""
    f, i = x.type, _INTEGER[x.type]
    e = (x.bits(i) - _SQRT_HALF[f]) >> _FRACTION[f]
    m = (x.bits(i) - (e << _FRACTION[f])).bits(f)
    # f64's exponent fits into 32 bits; without AVX-512, converting 64-bit integers to floats is slow
    return m, (e if i == "i32" else e.to("i32")).to(f)
