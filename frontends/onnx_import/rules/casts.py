"""Cast and CastLike between element types, including types that are carried in a wider dtype."""

from __future__ import annotations

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.elements import Element
from treadle.frontends.onnx_import.values import Known
from treadle.ir.builder import Builder, Expr
from treadle.ir.types import boolean, f32, f64, i32, i64


@operator("Cast", latest=28, first=6)
def _cast(site: OnnxSite) -> Made:
    to = site.importer.element(site.int("to", 0))
    site.ignore("round_mode")  # applies to float8e8m0 only, which no dtype carries
    return cast(site, to, bool(site.int("saturate", 1)))


@operator("CastLike", latest=25, types=(1,))
def _cast_like(site: OnnxSite) -> Made:
    site.ignore("round_mode")
    return cast(site, site.element(1), bool(site.int("saturate", 1)))


def cast(site: OnnxSite, to: Element, saturate: bool) -> Known:
    """Convert input 0 to another element type."""
    return Known(to, expr=converted(site.b, site.x(0), site.element(0), to, saturate=saturate))


def converted(b: Builder, x: Expr, held: Element, to: Element, *, saturate: bool = True) -> Expr:
    """Convert x from one element type to another. Integers that do not fit lose their upper bits."""
    if held == to:
        return x
    if held.name == "UINT64" and to.is_float:
        x = _float_of_uint64(b, x, to)
    if to.format is not None:
        wide = x if x.dtype.is_float else x.cast(f32)
        wide = wide.cast(f32) if wide.dtype is not f64 else wide
        return b.round_to(wide, format=to.format, saturate=saturate and to.format != "bf16").cast(to.carrier)
    if to.is_float or to.carrier is boolean:
        return x.cast(to.carrier)
    if x.dtype.is_float:
        return _integer_of_float(b, x, to)
    if to.bits == 8 * to.carrier.bytes:
        return x.cast(to.carrier)
    return _wrapped(b, x, held, to)


def _wrapped(b: Builder, x: Expr, held: Element, to: Element) -> Expr:
    """Return the lower bits of an integer, if the carrier is wider than the type."""
    assert to.least is not None
    assert to.greatest is not None
    if held.least is not None and held.greatest is not None and held.name != "UINT64":
        fits = to.least <= held.least and held.greatest <= to.greatest
        if fits:
            return x.cast(to.carrier)
    wide = x.cast(i64) if x.dtype is not i64 else x
    low = b.mod(wide - to.least, 2**to.bits) + to.least if to.least else b.mod(wide, 2**to.bits)
    return low.cast(to.carrier)


def _integer_of_float(b: Builder, x: Expr, to: Element) -> Expr:
    """Drop the fraction. For integers of less than a byte, values out of range are wrapped."""
    if to.name == "UINT64":
        wide = x.cast(f64)
        half = b.constant(2.0**63, f64)
        upper = (wide - half).cast(i64) + b.constant(-(2**63), i64)
        return b.where(wide >= half, upper, b.where(wide >= half, b.constant(0.0, f64), wide).cast(i64))
    if to.bits >= 8:
        return x.cast(to.carrier)
    return _wrapped(b, x.cast(i32), _INT32, to)


def _float_of_uint64(b: Builder, x: Expr, to: Element) -> Expr:
    """Convert uint64 to float. For numbers of 2^63 and more: halve, keep the lost bit for rounding, and double the
    result.
    """
    zero, two = b.constant(0, i64), b.constant(2, i64)
    half = x // two + b.constant(2**62, i64) + b.constant(2**62, i64)
    odd = b.mod(x, two)
    sticky = half + b.where(b.equal(b.mod(half, two), zero), odd, zero)
    kind = f64 if to.carrier is f64 else f32
    return b.where(x < zero, sticky.cast(kind) * 2.0, x.cast(kind))


_INT32 = Element("INT32", 6, i32, 32, "int32_data", -(2**31), 2**31 - 1)
