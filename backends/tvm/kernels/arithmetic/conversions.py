"""Conversions between dtypes, lane by lane, bitwise identical on every instruction set.

- f16 and bf16 are computed in f32. Results are rounded once, to nearest, ties to even; a NaN remains a NaN
- a bf16 is stored as its bits, a uint16: TVM's code generators have no arithmetic for bf16, and TVM's own rounding
  loses NaNs
- f16 is converted by instructions if there are any, else by integer arithmetic: LLVM would call a function of a
  compiler's library, with which kernels are not linked
- a float that does not fit an integer type becomes the lowest integer of the type (of i32 for narrower types, which
  keep its low bits), as on x86 and therefore in NumPy
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.comparisons import compare
from treadle.backends.tvm.kernels.arithmetic.lane_function import (
    SUBNORMAL,
    LaneFunction,
    LaneValue,
    form,
    lane_type,
    where,
)
from treadle.backends.tvm.kernels.isa import Isa
from treadle.ir.types import DTYPES, DType, bf16, boolean, f16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

NARROW = frozenset({"f16", "bf16"})
"""Names of the floats that are computed in f32."""

i32, i64 = DTYPES["i32"], DTYPES["i64"]


def working(dtype: DType) -> DType:
    """Return the dtype in which values of a dtype are computed."""
    return f32 if dtype.name in NARROW else dtype


def has_f16(isa: Isa) -> bool:
    """Return True if an instruction set converts between f16 and f32."""
    return isa.machine == "aarch64" or "f16c" in isa.needs


def narrow_cast(k: Emitter, value: Expr, held: str, dtype: DType, lanes: int) -> Expr | None:
    """Convert from or to f16 or bf16. Return None for any other conversion. `held` is TVM's name of the
    value's dtype.
    """
    if held == "uint16":
        return _from_f32(k, BF16_TO_F32(k, lanes, value), dtype, lanes)
    if held == "float16" and not (dtype is f32 and has_f16(k.isa)):
        wide = F16_TO_F32(k, lanes, value) if not has_f16(k.isa) else k.cast(value, f32, lanes)
        return _from_f32(k, wide, dtype, lanes)
    if dtype is bf16:
        return F32_TO_BF16(k, lanes, value if held == "float32" else k.cast(value, f32, lanes))
    if dtype is f16 and held == "float64":
        return k.cast(F64_TO_ODD_F32(k, lanes, value), f16, lanes)
    if dtype is f16 and held != "float32":
        return k.cast(k.cast(value, f32, lanes), f16, lanes)
    if dtype is f16 and not has_f16(k.isa):
        return F32_TO_F16(k, lanes, value)
    return None


def _from_f32(k: Emitter, wide: Expr, dtype: DType, lanes: int) -> Expr:
    return wide if dtype is f32 else k.cast(wide, dtype, lanes)


def convert(k: Emitter, value: Expr, held: DType, dtype: DType, lanes: int) -> Expr:
    """Emit the op `cast`. Unlike `k.cast`, the result is defined for every number; converted to bool, every number
    except 0 is true.
    """
    if held is boolean:
        return _from_bool(k, value, dtype, lanes)
    if held is dtype:
        return value
    if held.name in NARROW:
        value, held = k.let(k.cast(value, f32, lanes)), f32
        return value if dtype is f32 else convert(k, value, f32, dtype, lanes)
    if dtype is boolean:
        return compare(k, "ne", value, k.number(0, held, lanes), held, lanes)
    if held.is_float and dtype.is_int:
        wide = dtype if dtype.bytes > 4 else i32
        value = _float_to_int(k, value, held, wide, lanes)
        return value if wide is dtype else k.cast(k.let(value), dtype, lanes)
    return k.cast(value, dtype, lanes)


def _from_bool(k: Emitter, value: Expr, dtype: DType, lanes: int) -> Expr:
    """Return 0 or 1. TVM cannot bind an expression of bools to a name."""
    if dtype.name in NARROW:
        return k.cast(k.let(_from_bool(k, value, f32, lanes)), dtype, lanes)
    t = lane_type(dtype)
    return LaneFunction(f"bool_to_{t}", ("bool",), t, lambda x: x | 0 if t == "bool" else x.to(t))(k, lanes, value)


def _float_to_int(k: Emitter, value: Expr, held: DType, dtype: DType, lanes: int) -> Expr:
    """Convert a float to an integer. Values that do not fit are replaced first, since LLVM's instruction is undefined
    for them.
    """
    limit = 2 ** (8 * dtype.bytes - 1)

    def converted(x: LaneValue) -> LaneValue:
        fits = (x >= float(-limit)) & (x < float(limit))
        return where(fits, where(fits, x, 0.0).to(dtype.name), -limit)

    return LaneFunction(f"{held.name}_to_{dtype.name}", (held.name,), dtype.name, converted)(k, lanes, value)


def _to_bf16(x: LaneValue) -> LaneValue:
    """Round to bf16: add half of the spacing, minus one bit if the kept part is even, and truncate. A NaN becomes a
    quiet NaN instead.
    """
    bits = x.bits("u32")
    up = bits + (((bits >> 16) & 1) + 0x7FFF)
    quiet = bits | 0x400000
    return (where(x.is_nan(), quiet, up) >> 16).to("u16")


def _of_half(x: LaneValue) -> LaneValue:
    """Move the bits to float32's fields, and multiply by 2^112 to correct the exponent (also of subnormals). inf and
    NaN are handled separately.
    """
    wide = x.bits("u16").to("u32")
    size = wide & 0x7FFF
    fields = size << 13
    finite = (fields.bits("f32") * 2.0**112).bits("u32")
    small = (size.to("f32") * 2.0**-24).bits("u32")
    finite = form(SUBNORMAL, finite, where(size < 0x400, small, finite))
    return (where(size >= 0x7C00, fields | 0x7F800000, finite) | ((wide & 0x8000) << 16)).bits("f32")


def _to_half(x: LaneValue) -> LaneValue:
    """Round normal results as for bf16. Subnormal results are rounded by adding 1/2, whose last bit is 2^-24."""
    bits = x.bits("u32")
    size = bits & 0x7FFFFFFF
    kept = size >> 13
    normal = (size + ((kept & 1) + 0xFFF) - 0x38000000) >> 13
    subnormal = (size.bits("f32") + 0.5).bits("u32") - 0x3F000000
    finite = where(size < 0x38800000, subnormal, normal)
    bounded = where(size >= 0x47800000, 0x7C00, finite)
    quiet = (kept & 0x3FF) | 0x7E00
    made = where(size > 0x7F800000, quiet, bounded) | ((bits >> 16) & 0x8000)
    return made.to("u16").bits("f16")


def _to_odd(x: LaneValue) -> LaneValue:
    """Round towards zero, and set the last bit if the result is inexact. Rounding this result to f16 then gives the
    same as rounding the f64 once.
    """
    narrow = x.to("f32")
    away, size = narrow.to("f64").abs(), x.abs()
    over = away > size
    return ((narrow.bits("u32") - over.to("u32")) | (over | (away < size)).to("u32")).bits("f32")


BF16_TO_F32 = LaneFunction("bf16_to_f32", ("u16",), "f32", lambda x: (x.to("u32") << 16).bits("f32"))
F32_TO_BF16 = LaneFunction("f32_to_bf16", ("f32",), "u16", _to_bf16)
F16_TO_F32 = LaneFunction("f16_to_f32", ("f16",), "f32", _of_half)
F32_TO_F16 = LaneFunction("f32_to_f16", ("f32",), "f16", _to_half)
F64_TO_ODD_F32 = LaneFunction("f64_to_odd_f32", ("f64",), "f32", _to_odd)
