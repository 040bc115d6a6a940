"""Integer arithmetic with NumPy's semantics: overflow wraps around, division rounds down, and nothing traps.

All code is LLVM text, since TVM declares to LLVM that signed additions never overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.lanewise import call_lanewise, llvm_type
from treadle.ir.types import DType

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


def integer_function(k: Emitter, name: str, dtype: DType, lanes: int, *operands: Expr) -> Expr:
    """Emit one of `add sub mul neg abs sign maximum minimum floor_divide mod`, on integers of any width."""
    i, unsigned = llvm_type(dtype), dtype.name == "u8"
    template = _UNSIGNED.get(name, _BODIES[name]) if unsigned else _BODIES[name]
    body = template.replace("TYPE", "{" + i + "}").replace("NUMBER", i)
    body = body.replace("SIGN", "u" if unsigned else "s")
    tvm_name = ("uint" if unsigned else "int") + str(8 * dtype.bytes)
    types = " ".join([i] * len(operands)) + f" -> {i}"
    return call_lanewise(k, f"{name}_{dtype.name}", tvm_name, lanes, operands, types, body)


# A division by 0 traps, and so does the division of the lowest number by -1. Both divisors are replaced by 1.
_DIVISION = """%zero = icmp eq TYPE %x1, [NUMBER 0]
%minus = icmp eq TYPE %x1, [NUMBER -1]
%trap = or {i1} %zero, %minus
%y = select {i1} %trap, TYPE [NUMBER 1], TYPE %x1
%q = sdiv TYPE %x0, %y
%p = mul TYPE %q, %y
%rest = sub TYPE %x0, %p
%left = icmp ne TYPE %rest, [NUMBER 0]
%signs = xor TYPE %rest, %y
%unlike = icmp slt TYPE %signs, [NUMBER 0]
%down = and {i1} %left, %unlike
"""
_UNSIGNED_DIVISION = """%zero = icmp eq TYPE %x1, [NUMBER 0]
%y = select {i1} %zero, TYPE [NUMBER 1], TYPE %x1
"""

_BODIES = {
    "add": "%r = add TYPE %x0, %x1",
    "sub": "%r = sub TYPE %x0, %x1",
    "mul": "%r = mul TYPE %x0, %x1",
    "neg": "%r = sub TYPE [NUMBER 0], %x0",
    "abs": """%n = sub TYPE [NUMBER 0], %x0
%c = icmp slt TYPE %x0, [NUMBER 0]
%r = select {i1} %c, TYPE %n, TYPE %x0""",
    "sign": """%c = icmp sgt TYPE %x0, [NUMBER 0]
%up = zext {i1} %c to TYPE
%d = icmp slt TYPE %x0, [NUMBER 0]
%down = sext {i1} %d to TYPE
%r = or TYPE %up, %down""",
    "maximum": "%c = icmp SIGNgt TYPE %x0, %x1\n%r = select {i1} %c, TYPE %x0, TYPE %x1",
    "minimum": "%c = icmp SIGNlt TYPE %x0, %x1\n%r = select {i1} %c, TYPE %x0, TYPE %x1",
    "floor_divide": _DIVISION
    + """%step = sext {i1} %down to TYPE
%floor = add TYPE %q, %step
%negated = sub TYPE [NUMBER 0], %x0
%other = select {i1} %zero, TYPE [NUMBER 0], TYPE %negated
%r = select {i1} %trap, TYPE %other, TYPE %floor""",
    "mod": _DIVISION
    + """%added = select {i1} %down, TYPE %y, TYPE [NUMBER 0]
%r = add TYPE %rest, %added""",
}
_UNSIGNED = {
    "abs": "%r = or TYPE %x0, [NUMBER 0]",
    "sign": "%c = icmp ne TYPE %x0, [NUMBER 0]\n%r = zext {i1} %c to TYPE",
    "floor_divide": _UNSIGNED_DIVISION
    + """%q = udiv TYPE %x0, %y
%r = select {i1} %zero, TYPE [NUMBER 0], TYPE %q""",
    "mod": _UNSIGNED_DIVISION + "%r = urem TYPE %x0, %y",
}
