"""sin and cos in float32 as vector code.

The argument is reduced in float64, where n * pi/2 for an integer n below 2^27 is subtracted exactly. For larger
arguments, which are rare in practice, C's library is called lane by lane. If float64 is slow or does not exist
(`Emitter.integer_angles`), every argument is multiplied by bits of 2/pi in integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction, LaneValue, number, where
from treadle.backends.tvm.kernels.arithmetic.polynomials import polynomial, rounded_product
from treadle.ir.types import f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

HUGE = 2.0**27
# pi/2 in three parts of 26, 26 and 53 bits: products of the first two with an integer below 2^27 are exact
_PARTS = (1.5707963109016418, 1.5893254712295857e-08, 6.123233995736766e-17)
# 32 zeros, and the first 224 bits of 2/pi
_TWO_OVER_PI = (0x0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB)
_SIN = tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(5, -1, -1))  # next term: 7e-12 at pi/4
_COS = tuple((-1.0) ** n / math.factorial(2 * n) for n in range(6, -1, -1))


def sin(k: Emitter, lanes: int, x: Expr) -> Expr:
    """sin x, within 1 ulp, or within 1.5 with `k.integer_angles`; NaN at infinities."""
    return _wave(k, lanes, x, "sin", 0)


def cos(k: Emitter, lanes: int, x: Expr) -> Expr:
    """cos x, within 1 ulp, or within 1.5 with `k.integer_angles`; NaN at infinities."""
    return _wave(k, lanes, x, "cos", 1)


def _wave(k: Emitter, lanes: int, x: Expr, name: str, quadrants: int) -> Expr:
    """sin(x + quadrants pi/2)"""
    if k.integer_angles:
        formula = lambda x: _in_quadrant(*_reduced_by_integers(x), quadrants)  # noqa: E731
        return LaneFunction(f"{name}_by_integers_f32", ("f32",), "f32", formula)(k, lanes, x)
    x = k.let(x)
    near = LaneFunction(f"{name}_f32", ("f32",), "f32", lambda x: _in_quadrant(*_reduced(x), quadrants).to("f32"))
    return _with_huge(k, x, k.let(near(k, lanes, x)), name, lanes)


def _in_quadrant(r: LaneValue, quadrant: LaneValue, quadrants: int) -> LaneValue:
    """sin(r + (quadrant + quadrants) pi/2), for |r| <= pi/4"""
    square = r * r
    quadrant = quadrant + quadrants
    if r.type == "f64":
        sine, cosine = polynomial(square, _SIN) * r, polynomial(square, _COS)
    else:  # the largest terms come last, so that other roundings are small
        sine = square * polynomial(square, _SIN[:-1]) * r + r
        cosine = (square * polynomial(square, _COS[:-2]) - 0.5) * square + 1.0
    turned = where((quadrant & 1) == 0, sine, cosine)
    return where((quadrant & 2) == 0, turned, -turned)


def _reduced(x: LaneValue) -> tuple[LaneValue, LaneValue]:
    """Return r in f64, |r| <= pi/4, and an integer n with x = r + n pi/2, for |x| < `HUGE`."""
    wide = x.to("f64")
    raised, whole = rounded_product(wide, 2.0 / math.pi)
    r = wide
    for part in _PARTS:
        r = r - whole * part
    return r, raised.bits("i64").to("i32")


def _reduced_by_integers(x: LaneValue) -> tuple[LaneValue, LaneValue]:
    """Return r in f32, |r| <= pi/4, and the low bits of an integer n with x = r + n pi/2.        (Payne and Hanek 1983)

    |x| is m 2^s with an integer m below 2^24. m is multiplied by 96 bits of 2/pi, whose first has the weight 2^(1 - s),
    so that all terms before them are multiples of 4. The result has two bits of an integer, and 62 of a fraction.
    """
    bits = x.bits("u32")
    m, place = (bits & 0x7FFFFF) | 0x800000, ((bits >> 23) & 0xFF) - 120  # of the first bit, in the words below
    words = [_chosen(place >> 5, _TWO_OVER_PI[i : i + 5]) for i in range(4)]
    shift = place & 31
    high, middle, low = ((a << shift) | ((b >> 1) >> (shift ^ 31)) for a, b in pairwise(words))
    _, carried = _product(m, low)
    last, upper = _product(m, middle)
    last = last + carried
    first = high * m + upper + (last < carried).to("u32")
    fraction, rest = (first << 2) | (last >> 30), last << 2
    negative = fraction >= 0x80000000
    fraction, rest = (where(negative, part ^ 0xFFFFFFFF, part) for part in (fraction, rest))
    high, low = (fraction >> 8).to("f32"), ((fraction << 24) | (rest >> 8)).to("f32")
    first_part = float(np.float32(math.pi / 2 * 2.0**-24))
    second_part = math.pi / 2 * 2.0**-24 - first_part
    turned = high * first_part + (high * second_part + low * (math.pi / 2 * 2.0**-56))
    n = (first + 0x20000000) >> 30
    below = x < 0.0
    r = where(below ^ negative, -turned, turned)
    small = x.abs() <= math.pi / 4
    r = where(small, x, where(x.abs() < math.inf, r, math.nan))
    return r, where(small, 0, where(below, 0 - n, n)).bits("i32")


def _chosen(index: LaneValue, entries: Sequence[int]) -> LaneValue:
    """Return the entry of this number"""
    made = number(entries[-1], "u32")
    for i, entry in enumerate(entries[:-1]):
        made = where(index == i, entry, made)
    return made


def _product(x: LaneValue, y: LaneValue) -> tuple[LaneValue, LaneValue]:
    """Return the low and the high 32 bits of a product of two u32."""
    (x0, x1), (y0, y1) = ((value & 0xFFFF, value >> 16) for value in (x, y))
    cross, other = x0 * y1, x1 * y0
    middle = ((x0 * y0) >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    return x * y, x1 * y1 + (cross >> 16) + (other >> 16) + (middle >> 16)


def _with_huge(k: Emitter, x: Expr, near: Expr, name: str, lanes: int) -> Expr:
    """Return `near`, replaced by the results of C's library in lanes in which x is huge and finite."""
    given, found = k.registers(lanes, f32, "given"), k.registers(lanes, f32, "found")
    k.store(given, [0], x, lanes)
    k.store(found, [0], near, lanes)
    with k.when(k.any_of_lanes(_IS_HUGE(k, lanes, x), lanes)), k.loop(lanes, "lane") as lane:
        size = k.let(k.absolute(k.load(given, [lane])))
        with k.when(k.both(size >= k.number(HUGE, f32), size < k.number(float("inf"), f32))):
            k.store(found, [lane], k.libm(name, f32, 1, k.load(given, [lane])))
    return k.load(found, [0], lanes)


def _is_huge(x: LaneValue) -> LaneValue:
    size = x.abs()
    return (size >= HUGE) & (size < math.inf)


_IS_HUGE = LaneFunction("is_huge", ("f32",), "bool", _is_huge)
