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

from treadle.backends.tvm.kernels.arithmetic.lanewise import call_lanewise, compare, hexadecimal, llvm_type, tvm_type
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
    return isa.machine != "x86_64" or "f16c" in isa.needs


def narrow_cast(k: Emitter, value: Expr, held: str, dtype: DType, lanes: int) -> Expr | None:
    """Convert from or to f16 or bf16. Return None for any other conversion. `held` is TVM's name of the
    value's dtype.
    """
    if held == "uint16":
        return _from_f32(k, _bf16_to_f32(k, value, lanes), dtype, lanes)
    if held == "float16" and not (dtype is f32 and has_f16(k.isa)):
        wide = _half_to_f32(k, value, lanes) if not has_f16(k.isa) else k.cast(value, f32, lanes)
        return _from_f32(k, wide, dtype, lanes)
    if dtype is bf16:
        return _f32_to_bf16(k, value if held == "float32" else k.cast(value, f32, lanes), lanes)
    if dtype is f16 and held == "float64":
        return k.cast(_f64_to_odd_f32(k, value, lanes), f16, lanes)
    if dtype is f16 and held != "float32":
        return k.cast(k.cast(value, f32, lanes), f16, lanes)
    if dtype is f16 and not has_f16(k.isa):
        return _f32_to_half(k, value, lanes)
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
    """Return 0 or 1. The code is LLVM text, since TVM cannot bind an expression of bools to a name."""
    if dtype.name in NARROW:
        return k.cast(k.let(_from_bool(k, value, f32, lanes)), dtype, lanes)
    t = llvm_type(dtype)
    made = "or {i1} %x0, [i1 false]" if dtype is boolean else f"zext {{i1}} %x0 to {{{t}}}"
    body = f"%r = uitofp {{i1}} %x0 to {{{t}}}" if dtype.is_float else f"%r = {made}"
    return call_lanewise(k, f"bool_to_{dtype.name}", tvm_type(dtype), lanes, [value], f"i1 -> {t}", body)


def _float_to_int(k: Emitter, value: Expr, held: DType, dtype: DType, lanes: int) -> Expr:
    """Convert a float to an integer. Values that do not fit are replaced first, since LLVM's instruction is undefined
    for them.
    """
    f, i, limit = held.name, dtype.name, 2.0 ** (8 * dtype.bytes - 1)
    return call_lanewise(
        k,
        f"{f}_to_{i}",
        f"int{8 * dtype.bytes}",
        lanes,
        [value],
        f"{f} -> {i}",
        f"""%above = fcmp oge {{{f}}} %x0, [{f} {hexadecimal(-limit)}]
%below = fcmp olt {{{f}}} %x0, [{f} {hexadecimal(limit)}]
%fits = and {{i1}} %above, %below
%safe = select {{i1}} %fits, {{{f}}} %x0, {{{f}}} [{f} 0.0]
%made = fptosi {{{f}}} %safe to {{{i}}}
%r = select {{i1}} %fits, {{{i}}} %made, {{{i}}} [{i} {-(2 ** (8 * dtype.bytes - 1))}]""",
    )


def _bf16_to_f32(k: Emitter, bits: Expr, lanes: int) -> Expr:
    body = "%w = zext {i16} %x0 to {i32}\n%s = shl {i32} %w, [i32 16]\n%r = bitcast {i32} %s to {f32}"
    return call_lanewise(k, "bf16_to_f32", "float32", lanes, [bits], "i16 -> f32", body)


def _f32_to_bf16(k: Emitter, value: Expr, lanes: int) -> Expr:
    """Round to bf16: add half of the spacing, minus one bit if the kept part is even, and truncate. A NaN becomes a
    quiet NaN instead.
    """
    return call_lanewise(
        k,
        "f32_to_bf16",
        "uint16",
        lanes,
        [value],
        "f32 -> i16",
        """%b = bitcast {f32} %x0 to {i32}
%s = lshr {i32} %b, [i32 16]
%odd = and {i32} %s, [i32 1]
%half = add {i32} %odd, [i32 32767]
%up = add {i32} %b, %half
%quiet = or {i32} %b, [i32 4194304]
%nan = fcmp uno {f32} %x0, %x0
%c = select {i1} %nan, {i32} %quiet, {i32} %up
%h = lshr {i32} %c, [i32 16]
%r = trunc {i32} %h to {i16}""",
    )


def _half_to_f32(k: Emitter, value: Expr, lanes: int) -> Expr:
    """Move the bits to float32's fields, and multiply by 2^112 to correct the exponent (also of subnormals). inf and
    NaN are handled separately.
    """
    return call_lanewise(
        k,
        "f16_to_f32",
        "float32",
        lanes,
        [value],
        "f16 -> f32",
        f"""%h = bitcast {{f16}} %x0 to {{i16}}
%w = zext {{i16}} %h to {{i32}}
%m = and {{i32}} %w, [i32 32767]
%p = shl {{i32}} %m, [i32 13]
%f = bitcast {{i32}} %p to {{f32}}
%n = fmul {{f32}} %f, [f32 {hexadecimal(2.0**112)}]
%finite = bitcast {{f32}} %n to {{i32}}
%other = or {{i32}} %p, [i32 2139095040]
%big = icmp uge {{i32}} %m, [i32 31744]
%c = select {{i1}} %big, {{i32}} %other, {{i32}} %finite
%sign = and {{i32}} %w, [i32 32768]
%signed = shl {{i32}} %sign, [i32 16]
%b = or {{i32}} %c, %signed
%r = bitcast {{i32}} %b to {{f32}}""",
    )


def _f32_to_half(k: Emitter, value: Expr, lanes: int) -> Expr:
    """Round normal results as for bf16. Subnormal results are rounded by adding 1/2, whose last bit is 2^-24."""
    return call_lanewise(
        k,
        "f32_to_f16",
        "float16",
        lanes,
        [value],
        "f32 -> f16",
        """%b = bitcast {f32} %x0 to {i32}
%a = and {i32} %b, [i32 2147483647]
%s = lshr {i32} %a, [i32 13]
%odd = and {i32} %s, [i32 1]
%half = add {i32} %odd, [i32 4095]
%up = add {i32} %a, %half
%based = sub {i32} %up, [i32 939524096]
%normal = lshr {i32} %based, [i32 13]
%f = bitcast {i32} %a to {f32}
%raised = fadd {f32} %f, [f32 0.5]
%raisedb = bitcast {f32} %raised to {i32}
%subnormal = sub {i32} %raisedb, [i32 1056964608]
%small = icmp ult {i32} %a, [i32 947912704]
%finite = select {i1} %small, {i32} %subnormal, {i32} %normal
%past = icmp uge {i32} %a, [i32 1199566848]
%bounded = select {i1} %past, {i32} [i32 31744], {i32} %finite
%payload = and {i32} %s, [i32 1023]
%quiet = or {i32} %payload, [i32 32256]
%nan = icmp ugt {i32} %a, [i32 2139095040]
%c = select {i1} %nan, {i32} %quiet, {i32} %bounded
%top = lshr {i32} %b, [i32 16]
%sign = and {i32} %top, [i32 32768]
%all = or {i32} %c, %sign
%t = trunc {i32} %all to {i16}
%r = bitcast {i16} %t to {f16}""",
    )


def _f64_to_odd_f32(k: Emitter, value: Expr, lanes: int) -> Expr:
    """Round towards zero, and set the last bit if the result is inexact. Rounding this result to f16 then gives the
    same as rounding the f64 once.
    """
    return call_lanewise(
        k,
        "f64_to_odd_f32",
        "float32",
        lanes,
        [value],
        "f64 -> f32",
        """%n = fptrunc {f64} %x0 to {f32}
%back = fpext {f32} %n to {f64}
%b = bitcast {f32} %n to {i32}
%away = call {f64} @llvm.fabs{.f64}({f64} %back)
%size = call {f64} @llvm.fabs{.f64}({f64} %x0)
%over = fcmp ogt {f64} %away, %size
%step = zext {i1} %over to {i32}
%towards = sub {i32} %b, %step
%lost = fcmp one {f64} %away, %size
%odd = zext {i1} %lost to {i32}
%c = or {i32} %towards, %odd
%r = bitcast {i32} %c to {f32}""",
    )
