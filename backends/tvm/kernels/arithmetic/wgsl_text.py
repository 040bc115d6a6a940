"""Lane functions in WGSL, the language of WebGPU.

WGSL has bool, i32, u32 and f32. Narrower integers are values of 32 bits in the range of their type, and an f16 is a u32
of its bits. See `lane_function` for the guarantees, of which WGSL gives the fewest.
"""

from __future__ import annotations

from treadle.backends.tvm.kernels.arithmetic.lane_function import FunctionText, LaneValue, hex_float
from treadle.ir.errors import BackendError

_TYPES = {"bool": "bool", "i8": "i32", "i16": "i32", "i32": "i32", "u8": "u32", "u16": "u32", "u32": "u32"}
_TYPES |= {"f16": "u32", "f32": "f32"}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^", "shl": "<<"}
_SIGNS |= {"shr": ">>", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_CALLS = {"sqrt": "sqrt", "abs": "abs", "floor": "floor", "nearest": "round", "fma": "fma"}
_CALLS |= {"copysign": "treadle_copysign_f32", "is_nan": "treadle_is_nan_f32", "rounded": "treadle_rounded_f32"}

PRELUDE = """\
var<private> treadle_infinity: u32 = 0x7f800000u;
fn treadle_infinity_f32() -> f32 { return bitcast<f32>(treadle_infinity); }
fn treadle_nan_f32() -> f32 { return bitcast<f32>(treadle_infinity | 0x400000u); }
fn treadle_is_nan_f32(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn treadle_rounded_f32(x: f32) -> f32 { return select(x, 0.0f, bitcast<u32>(x) == 0x7fc54321u); }
fn treadle_copysign_f32(x: f32, sign: f32) -> f32 {
  return bitcast<f32>((bitcast<u32>(x) & 0x7fffffffu) | (bitcast<u32>(sign) & 0x80000000u));
}
fn treadle_mul_f32(x: f32, y: f32) -> f32 { return x * y; }
fn treadle_fma_f32(x: f32, y: f32, z: f32) -> f32 { return fma(x, y, z); }
"""
"""Lines before all lane functions of a kernel's text."""


class WgslText(FunctionText):
    """The printer of WGSL."""

    def text(self) -> str:
        f = self.function
        operands = ", ".join(f"{self.variable(i, 'x')}: {self._type(t)}" for i, t in enumerate(f.operands))
        lines = "\n".join(f"  {line}" for line in self.lines())
        return f"fn {f.symbol}({operands}) -> {self._type(f.result)} {{\n{lines}\n}}\n"

    def constant(self, value: LaneValue) -> str:
        if value.type == "bool":
            return "true" if value.attribute else "false"
        if not value.is_float:
            made, least = self._type(value.type), value.attribute == -(2**31)
            return "i32(-2147483648)" if least else f"({value.attribute}{made[0]})"
        x = float(value.attribute)  # type: ignore[arg-type]
        if x != x:
            return "treadle_nan_f32()"
        if abs(x) == float("inf"):
            return "treadle_infinity_f32()" if x > 0 else "(-treadle_infinity_f32())"
        return f"({hex_float(x)}f)"

    def statement(self, value: LaneValue, name: str, text: str) -> list[str]:
        return [f"let {name}: {self._type(value.type)} = {text};"]

    def returned(self, text: str) -> str:
        return f"return {text};"

    def expression(self, value: LaneValue, types: list[str], operands: list[str]) -> str:
        op, kind = value.op, types[0]
        if op == "select":
            return f"select({operands[2]}, {operands[1]}, {operands[0]})"
        if op == "neg":
            return f"-{operands[0]}"
        if op in ("bits", "to"):
            return self._converted(value.type, kind, operands[0], reinterpreted=op == "bits")
        if op in _CALLS:
            return f"{_CALLS[op]}({', '.join(operands)})"
        if op in ("shl", "shr"):
            count = value.operands[1]
            operands[1] = f"{count.attribute}u" if count.op == "number" else operands[1]
        if kind == "bool" and op == "xor":
            op = "ne"
        text = f"{operands[0]} {_SIGNS[op]} {operands[1]}"
        return _in_range(f"({text})", value.type) if op in ("add", "sub", "mul", "shl") else text

    def _converted(self, type: str, given: str, text: str, *, reinterpreted: bool) -> str:
        made = self._type(type)
        if made == self._type(given):
            return text if reinterpreted or _width(type) >= _width(given) else _in_range(text, type)
        made_of = f"bitcast<{made}>" if reinterpreted else made
        return _in_range(f"{made_of}({text})", type)

    def _type(self, type: str) -> str:
        if type not in _TYPES:
            raise BackendError(
                f"WGSL has no {type}, which the function {self.function.name} computes in",
                hint="compute in f32 or i32, or choose another target",
            )
        return _TYPES[type]


def _width(type: str) -> int:
    return 1 if type == "bool" else int(type[1:])


def _in_range(text: str, type: str) -> str:
    """Return an integer of 32 bits reduced to the low bits of a narrower type."""
    if type not in ("i8", "i16", "u8", "u16"):
        return text
    rest = 32 - _width(type)
    return f"({text} << {rest}u) >> {rest}u"
