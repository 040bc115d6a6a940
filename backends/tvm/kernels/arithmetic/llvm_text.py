"""Lane functions in LLVM, for vectors."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction, LanePrinter, LaneValue

_FLOATS = {"f16": "half", "f32": "float", "f64": "double"}
_INTEGER = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor", "shl": "shl"}
_SIGNED = {"div": "sdiv", "rem": "srem", "shr": "ashr"}
_UNSIGNED = {"div": "udiv", "rem": "urem", "shr": "lshr"}
_FLOAT = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTRINSICS = {"abs": "fabs", "sqrt": "sqrt", "floor": "floor", "nearest": "nearbyint", "copysign": "copysign"}
_INTRINSICS |= {"fma": "fmuladd"}
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


class LlvmText(LanePrinter):
    """The printer of LLVM text for `lanes` lanes."""

    def __init__(self, function: LaneFunction, features: frozenset[str], lanes: int) -> None:
        super().__init__(function, features)
        self.lanes = lanes

    def text(self) -> str:
        f = self.function
        operands = ", ".join(f"{self._type(t)} {self.variable(i, 'x')}" for i, t in enumerate(f.operands))
        lines = "\n".join(self.lines())
        return f"define {self._type(f.result)} @{f.symbol}_{self.lanes}({operands}) alwaysinline {{\n{lines}\n}}\n"

    def variable(self, number: int, letter: str = "v") -> str:
        return f"%{letter}{number}"

    def constant(self, value: LaneValue) -> str:
        text = str(value.attribute)
        if value.is_float:
            text = hexadecimal(float(text))
        elif value.type == "bool":
            text = "true" if value.attribute else "false"
        return f"splat ({_scalar(value.type)} {text})" if self.lanes > 1 else text

    def statement(self, value: LaneValue, name: str, text: str) -> list[str]:
        if value.op != "mul" or not value.is_float:
            return [f"{name} = {text}"]
        fenced = self._call("arithmetic.fence", value.type, [f"{name}p"])  # so that it is not fused with a sum
        return [f"{name}p = {text}", f"{name} = {fenced}"]

    def returned(self, text: str) -> str:
        return f"ret {self._type(self.function.result)} {text}"

    def expression(self, value: LaneValue, types: list[str], operands: list[str]) -> str:
        op, kind = value.op, types[0]
        t, both = self._type(kind), ", ".join(operands)
        if op in _INTRINSICS:
            return self._call(_INTRINSICS[op], value.type, operands)
        if op in _COMPARISONS:
            return f"{_comparison(op, kind)} {t} {both}"
        if op in ("bits", "to"):
            made = self._type(value.type)
            how = _conversion(kind, value.type) if op == "to" else "bitcast"
            return operands[0] if made == t else f"{how} {t} {operands[0]} to {made}"
        if op == "select":
            chosen = self._type(value.type)
            return f"select {t} {operands[0]}, {chosen} {operands[1]}, {chosen} {operands[2]}"
        if op == "is_nan":
            return f"fcmp uno {t} {operands[0]}, {operands[0]}"
        if op == "neg":
            return f"fneg {t} {both}"
        if op == "rounded":
            return both
        if op in _WIDE:
            return _WIDE[op](value, operands)
        names = _FLOAT if value.is_float else _INTEGER | (_UNSIGNED if kind[0] in "ub" else _SIGNED)
        return f"{names[op]} {t} {both}"

    def _call(self, name: str, type: str, operands: Sequence[str]) -> str:
        t, suffix = self._type(type), f"v{self.lanes}{type}" if self.lanes > 1 else type
        return f"call {t} @llvm.{name}.{suffix}({', '.join(f'{t} {x}' for x in operands)})"

    def _type(self, type: str) -> str:
        return f"<{self.lanes} x {_scalar(type)}>" if self.lanes > 1 else _scalar(type)


def hexadecimal(value: float) -> str:
    """Return a float constant that LLVM reads exactly, in the precision of float32 or float64."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def _scalar(type: str) -> str:
    return _FLOATS.get(type) or ("i1" if type == "bool" else f"i{type[1:]}")


def _comparison(op: str, type: str) -> str:
    if type[0] == "f":
        return f"fcmp {'u' if op == 'ne' else 'o'}{op}"
    return f"icmp {op}" if op in ("eq", "ne") else f"icmp {'u' if type[0] in 'ub' else 's'}{op}"


def _conversion(source: str, type: str) -> str:
    signed = source[0] == "i"
    if type[0] != "f":
        if source[0] == "f":
            return "fptosi" if type[0] == "i" else "fptoui"
        if source != "bool" and int(type[1:]) < int(source[1:]):
            return "trunc"
        return "sext" if signed else "zext"
    if source[0] != "f":
        return "sitofp" if signed else "uitofp"
    return "fptrunc" if int(type[1:]) < int(source[1:]) else "fpext"


# -- instructions of AVX-512 ---------------------------------------------------------------------------------

_V = "<16 x float>"


def _lookup(value: LaneValue, operands: list[str]) -> str:
    entries: Sequence[float] = value.attribute  # type: ignore[assignment]
    table = ", ".join(f"float {hexadecimal(float(np.float32(entry)))}" for entry in entries)
    return f"call {_V} @llvm.x86.avx512.permvar.sf.512({_V} <{table}>, <16 x i32> {operands[0]})"


def _fraction(value: LaneValue, operands: list[str]) -> str:
    """x minus the largest integer below it, which is encoded as 9"""
    name = "@llvm.x86.avx512.mask.reduce.ps.512"
    return f"call {_V} {name}({_V} {operands[0]}, i32 9, {_V} zeroinitializer, i16 -1, i32 4)"


def _scale(value: LaneValue, operands: list[str]) -> str:
    name, x, power = "@llvm.x86.avx512.mask.scalef.ps.512", *operands
    return f"call {_V} {name}({_V} {x}, {_V} {power}, {_V} zeroinitializer, i16 -1, i32 4)"


_WIDE = {"lookup": _lookup, "fraction": _fraction, "scale": _scale}
