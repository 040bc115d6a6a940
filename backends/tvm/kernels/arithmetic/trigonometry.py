"""sin and cos in float32 as vector code.

The argument is reduced in float64, where n * pi/2 for an integer n below 2^27 is subtracted exactly. For larger
arguments, which are rare in practice, C's library is called lane by lane.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction
from treadle.backends.tvm.kernels.arithmetic.polynomials import polynomial, rounded_product
from treadle.ir.types import f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

HUGE = 2.0**27
# pi/2 in three parts of 26, 26 and 53 bits: products of the first two with an integer below 2^27 are exact
_PARTS = (1.5707963109016418, 1.5893254712295857e-08, 6.123233995736766e-17)
_SIN = tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(5, -1, -1))  # next term: 7e-12 at pi/4
_COS = tuple((-1.0) ** n / math.factorial(2 * n) for n in range(6, -1, -1))


def sin(k: Emitter, x: Expr, lanes: int) -> Expr:
    """sin x, within 1 ulp; NaN at infinities."""
    return _wave(k, x, "sin", 0, lanes)


def cos(k: Emitter, x: Expr, lanes: int) -> Expr:
    """cos x, within 1 ulp; NaN at infinities."""
    return _wave(k, x, "cos", 1, lanes)


def _wave(k: Emitter, x: Expr, name: str, quadrants: int, lanes: int) -> Expr:
    """sin(x + quadrants pi/2)"""
    f = LaneFunction(k, lanes)
    x = k.let(x)
    wide = f.operand(x, "f32").to("f64")
    raised, whole = rounded_product(wide, 2.0 / math.pi)
    r = wide
    for part in _PARTS:
        r = r - whole * part
    square = r * r
    quadrant = raised.bits("i64").to("i32") + quadrants
    turned = f.select((quadrant & 1) == 0, polynomial(square, _SIN) * r, polynomial(square, _COS))
    made = f.select((quadrant & 2) == 0, turned, -turned).to("f32")
    return _with_huge(k, x, k.let(f.result(made)), name, lanes)


def _with_huge(k: Emitter, x: Expr, made: Expr, name: str, lanes: int) -> Expr:
    """Return `made`, replaced by the results of C's library in lanes in which x is huge and finite."""
    given, found = k.registers(lanes, f32, "given"), k.registers(lanes, f32, "found")
    k.store(given, [0], x, lanes)
    k.store(found, [0], made, lanes)
    with k.when(_any_huge(k, x, lanes)), k.loop(lanes, "lane") as lane:
        size = k.let(k.absolute(k.load(given, [lane])))
        with k.when(k.both(size >= k.number(HUGE, f32), size < k.number(float("inf"), f32))):
            k.store(found, [lane], k.libm(name, f32, k.load(given, [lane])))
    return k.load(found, [0], lanes)


def _any_huge(k: Emitter, x: Expr, lanes: int) -> Expr:
    """Return a scalar that is true if any lane is huge and finite."""
    vector, bits = f"<{lanes} x i1>", f"i{lanes}"
    name = f"treadle_any_huge_{lanes}"
    number = f"<{lanes} x float>" if lanes > 1 else "float"

    def text() -> str:
        filled = (lambda c: f"splat (float {c})") if lanes > 1 else str
        suffix = f"v{lanes}f32" if lanes > 1 else "f32"
        condition, joined = (vector, f"%b = bitcast {vector} %c to {bits}") if lanes > 1 else ("i1", "")
        answer = f"%r = icmp ne {bits} %b, 0" if lanes > 1 else "%r = or i1 %c, false"
        return f"""
define i1 @{name}({number} %x) alwaysinline {{
  %a = call {number} @llvm.fabs.{suffix}({number} %x)
  %huge = fcmp oge {number} %a, {filled("0x41A0000000000000")}
  %finite = fcmp olt {number} %a, {filled("0x7FF0000000000000")}
  %c = and {condition} %huge, %finite
  {joined}
  {answer}
  ret i1 %r
}}
"""

    return k.llvm(name, text, "bool", x)
