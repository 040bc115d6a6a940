"""Pieces that vector functions are made of: polynomials, whole parts, powers of two."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction, LaneValue

MAGIC = {"f32": 1.5 * 2.0**23, "f64": 1.5 * 2.0**52}
"""Where the numbers of a float type are one apart."""

_MAGIC_BITS = 0x4B400000  # of f32's
_FRACTION = {"f32": 23, "f64": 52}
_BIAS = {"f32": 127, "f64": 1023}
_INTEGER = {"f32": "i32", "f64": "i64"}
_SQRT_HALF = {"f32": 0x3F3504F3, "f64": 0x3FE6A09E667F3BCD}


def polynomial(x: LaneValue, coefficients: Sequence[float]) -> LaneValue:
    """By Horner's rule, the highest power's coefficient first."""
    value = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        value = value * x + c
    return value


def rounded_product(x: LaneValue, factor: float) -> tuple[LaneValue, LaneValue]:
    """The whole number nearest to x * factor, below 2^21: plus MAGIC, whose low bits then hold it; and itself."""
    raised = x * factor + MAGIC[x.type]
    return raised, raised - MAGIC[x.type]


def power_of_two(raised: LaneValue) -> LaneValue:
    """2^n, where n + MAGIC is given and 2^n is a normal number."""
    f, i = raised.type, _INTEGER[raised.type]
    return ((raised.bits(i) << _FRACTION[f]) + (_BIAS[f] << _FRACTION[f])).bits(f)


def scaled(f: LaneFunction, x: LaneValue, raised: LaneValue, whole: LaneValue) -> LaneValue:
    """x * 2^n in f32 for x near 1 and n from -252 to 254, rounded once, to a subnormal number or to inf if need be.

    Given n + MAGIC and n. AVX-512 has an instruction for it; else by two factors, the first of which loses nothing.
    """
    if "avx512f" in f.k.isa.needs and f.lanes == 16:
        mask = "{f32} zeroinitializer, i16 -1, i32 4"
        name = "@llvm.x86.avx512.mask.scalef.ps.512"
        return f.line("f32", f"call {{f32}} {name}({{f32}} {x.text}, {{f32}} {whole.text}, {mask})")
    n = raised.bits("i32") - _MAGIC_BITS
    first = n >> 1
    factors = [((part + _BIAS["f32"]) << _FRACTION["f32"]).bits("f32") for part in (first, n - first)]
    return x * factors[0] * factors[1]


def mantissa_and_exponent(x: LaneValue) -> tuple[LaneValue, LaneValue]:
    """m in [sqrt 1/2, sqrt 2) and e, a whole number, with x = m 2^e, for a positive normal x. Both are floats."""
    f, i = x.type, _INTEGER[x.type]
    e = (x.bits(i) - _SQRT_HALF[f]) >> _FRACTION[f]
    m = (x.bits(i) - (e << _FRACTION[f])).bits(f)
    # of f64's exponent the low half is enough, and 64-bit integers become floats slowly where AVX-512 is not there
    return m, (e if i == "i32" else e.to("i32")).to(f)
