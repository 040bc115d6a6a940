"""Lane functions in WGSL, the language of WebGPU.

WGSL has bool, i32, u32 and f32. Narrower integers are values of 32 bits in the range of their type, and an f16 is a u32
of its bits. An i64 is computed in 32 bits: it holds token ids, rows and positions, and values that do not fit are
refused where they are copied to the device. See `lane_function` for the guarantees, of which WGSL gives the fewest.
"""

from __future__ import annotations

from treadle.backends.tvm.kernels.arithmetic.lane_function import LanePrinter, LaneValue, hex_float, lacking

_TYPES = {"bool": "bool", "i8": "i32", "i16": "i32", "i32": "i32", "u8": "u32", "u16": "u32", "u32": "u32"}
_TYPES |= {"f16": "u32", "f32": "f32", "i64": "i32"}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^", "shl": "<<"}
_SIGNS |= {"shr": ">>", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_CALLS = {"sqrt": "sqrt", "abs": "abs", "floor": "floor", "nearest": "round", "fma": "fma"}
_CALLS |= {"copysign": "TREADLE_COPYSIGN_F32", "is_nan": "TREADLE_IS_NAN_F32", "rounded": "TREADLE_ROUNDED_F32"}

PRELUDE = """\
var<private> TREADLE_INFINITY: u32 = 0x7f800000u;
fn TREADLE_INFINITY_F32() -> f32 { return bitcast<f32>(TREADLE_INFINITY); }
fn TREADLE_NAN_F32() -> f32 { return bitcast<f32>(TREADLE_INFINITY | 0x400000u); }
fn TREADLE_IS_NAN_F32(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn TREADLE_ROUNDED_F32(x: f32) -> f32 {
  let bits: u32 = bitcast<u32>(x);
  return bitcast<f32>(bits + u32(bits == 0x7fc54321u));
}
fn TREADLE_COPYSIGN_F32(x: f32, sign: f32) -> f32 {
  return bitcast<f32>((bitcast<u32>(x) & 0x7fffffffu) | (bitcast<u32>(sign) & 0x80000000u));
}
fn TREADLE_MUL_F32(x: f32, y: f32) -> f32 { return x * y; }
fn TREADLE_FMA_F32(x: f32, y: f32, z: f32) -> f32 { return fma(x, y, z); }
"""
"""Lines before all lane functions of a kernel's text."""

FMOD = """\
fn TREADLE_FMOD_F32(x: f32, y: f32) -> f32 {
  let sign: u32 = bitcast<u32>(x) & 0x80000000u;
  let size: u32 = bitcast<u32>(x) & 0x7fffffffu;
  let divisor: u32 = bitcast<u32>(y) & 0x7fffffffu;
  if (divisor == 0u || divisor > 0x7f800000u || size >= 0x7f800000u) { return TREADLE_NAN_F32(); }
  if (size < divisor) { return x; }
  let shift: u32 = select(0u, countLeadingZeros(size) - 8u, size < 0x800000u);
  let other: u32 = select(0u, countLeadingZeros(divisor) - 8u, divisor < 0x800000u);
  var rest: u32 = select((size & 0x7fffffu) | 0x800000u, size << shift, size < 0x800000u);
  let by: u32 = select((divisor & 0x7fffffu) | 0x800000u, divisor << other, divisor < 0x800000u);
  var exponent: i32 = select(i32(size >> 23u), 1 - i32(shift), size < 0x800000u);
  let last: i32 = select(i32(divisor >> 23u), 1 - i32(other), divisor < 0x800000u);
  for (; exponent > last; exponent -= 1) {
    if (rest >= by) { rest -= by; }
    rest = rest << 1u;
  }
  if (rest >= by) { rest -= by; }
  if (rest == 0u) { return bitcast<f32>(sign); }
  let up: u32 = countLeadingZeros(rest) - 8u;
  rest = rest << up;
  exponent -= i32(up);
  if (exponent > 0) { return bitcast<f32>(sign | (u32(exponent) << 23u) | (rest & 0x7fffffu)); }
  return bitcast<f32>(sign | (rest >> u32(1 - exponent)));
}
"""
"""The exact remainder of a division, as C's `fmodf`. It subtracts the divisor bit by bit: WGSL's `%` divides, which is
inexact for large quotients.
"""


def narrowed(value: int) -> int | None:
    """Return a constant of i64 in 32 bits; None if it does not fit. The extremes of i64 become those of i32."""
    if value in (-(2**63), 2**63 - 1):
        return -(2**31) if value < 0 else 2**31 - 1
    return value if -(2**31) <= value < 2**31 else None


class WgslText(LanePrinter):
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
            whole = value.attribute if value.type != "i64" else narrowed(int(value.attribute))  # type: ignore[call-overload]
            if whole is None:
                raise lacking("WGSL", value.type, self.function)
            text = f"{whole}{self._type(value.type)[0]}"
            return "i32(-2147483648)" if text == "-2147483648i" else f"({text})" if text[0] == "-" else text
        x = float(value.attribute)  # type: ignore[arg-type]
        if x != x:
            return "TREADLE_NAN_F32()"
        if abs(x) == float("inf"):
            return "TREADLE_INFINITY_F32()" if x > 0 else "(-TREADLE_INFINITY_F32())"
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
        if kind[0] == "f" and op == "ne":  # `!=` is false for a NaN in naga's SPIR-V
            return f"!({operands[0]} == {operands[1]})"
        text = f"{operands[0]} {_SIGNS[op]} {operands[1]}"
        return _in_range(f"({text})", value.type) if op in ("add", "sub", "mul", "shl") else text

    def _converted(self, type: str, source: str, text: str, *, reinterpreted: bool) -> str:
        made = self._type(type)
        if made == self._type(source):
            return text if reinterpreted or _width(type) >= _width(source) else _in_range(text, type)
        made_of = f"bitcast<{made}>" if reinterpreted else made
        return _in_range(f"{made_of}({text})", type)

    def _type(self, type: str) -> str:
        if type not in _TYPES:
            raise lacking("WGSL", type, self.function)
        return _TYPES[type]


def _width(type: str) -> int:
    return 1 if type == "bool" else int(type[1:])


def _in_range(text: str, type: str) -> str:
    """Return an integer of 32 bits reduced to the low bits of a narrower type."""
    if type not in ("i8", "i16", "u8", "u16"):
        return text
    rest = 32 - _width(type)
    return f"({text} << {rest}u) >> {rest}u"
