"""Lane functions in C: one text for plain C and C++, CUDA, OpenCL and Metal.

The text uses names that the prelude of the language defines: `TREADLE_FUNCTION`, the qualifiers of a function;
`treadle_i64` and `treadle_u64`; and for each float type the functions of `_FUNCTIONS`, as `TREADLE_SQRT_F32`. A kernel
may use them, too. See `lane_function` for the guarantees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treadle.backends.tvm.kernels.arithmetic.lane_function import (
    EXACT,
    ORDER,
    LaneFunction,
    LanePrinter,
    LaneValue,
    hex_float,
    lacking,
)

_TYPES = {"bool": "bool", "i8": "signed char", "u8": "unsigned char", "i16": "short", "u16": "unsigned short"}
_TYPES |= {"i32": "int", "u32": "unsigned int", "i64": "treadle_i64", "u64": "treadle_u64"}
_TYPES |= {"f16": "unsigned short", "f32": "float", "f64": "double"}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^", "shl": "<<"}
_SIGNS |= {"shr": ">>", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_WRAPPING = ("add", "sub", "mul", "shl")
_CALLS = {"mul": "mul", "div": "div", "sqrt": "sqrt", "abs": "abs", "floor": "floor", "nearest": "rint"}
_CALLS |= {"copysign": "copysign", "fma": "fma", "is_nan": "is_nan"}


@dataclass(frozen=True)
class Language:
    """A dialect of C.

    qualifiers  qualifiers of a device function
    long        name of a signed integer of 64 bits
    f32, f64    the functions of the float types, in the order of `_FUNCTIONS`
    start       first lines of the prelude
    functions   functions of the prelude that f32 and f64 name
    features    the features that select forms of a lane function
    lacks       types that the language lacks
    """

    qualifiers: str
    long: str
    f32: tuple[str, ...]
    f64: tuple[str, ...]
    start: str = ""
    functions: str = ""
    features: frozenset[str] = frozenset({ORDER})
    lacks: frozenset[str] = frozenset()


_FUNCTIONS = ("mul", "div", "fma", "sqrt", "abs", "floor", "rint", "copysign", "bits_of", "of_bits", "is_nan")
_OPERATORS = ("((x) * (y))", "((x) / (y))")
_MATH = ("fabs", "floor", "rint", "copysign")
_MATH_F32, _MATH_METAL = tuple(f"{name}f" for name in _MATH), tuple(f"metal::{name}" for name in _MATH)
_PARAMETERS = {"mul": "x, y", "div": "x, y", "fma": "x, y, z", "copysign": "x, y"}
_UNEQUAL, _NAN_BITS = "((x) != (x))", "((as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u)"

_COPIED = """\
static inline unsigned int treadle_bits32(float x) { unsigned int y; __builtin_memcpy(&y, &x, 4); return y; }
static inline float treadle_float32(unsigned int x) { float y; __builtin_memcpy(&y, &x, 4); return y; }
static inline treadle_u64 treadle_bits64(double x) { treadle_u64 y; __builtin_memcpy(&y, &x, 8); return y; }
static inline double treadle_float64(treadle_u64 x) { double y; __builtin_memcpy(&y, &x, 8); return y; }
"""
_CUDA_BITS = """\
static __device__ __forceinline__ treadle_u64 treadle_bits64(double x) { return __double_as_longlong(x); }
static __device__ __forceinline__ double treadle_float64(treadle_u64 x) { return __longlong_as_double(x); }
"""

LANGUAGES: Mapping[str, Language] = {
    # compiled with -ffp-contract=off: GCC ignores the pragma
    "c": Language(
        "static inline",
        "long long",
        (*_OPERATORS, "fmaf", "sqrtf", *_MATH_F32, "treadle_bits32", "treadle_float32", _UNEQUAL),
        (*_OPERATORS, "fma", "sqrt", *_MATH, "treadle_bits64", "treadle_float64", _UNEQUAL),
        "#include <math.h>\n#include <stdbool.h>\n",
        _COPIED,
        EXACT,
    ),
    # defined by the compiler, without a header; products in _rn are never contracted
    "cuda": Language(
        "static __device__ __forceinline__",
        "long long",
        (
            "__fmul_rn",
            "__fdiv_rn",
            "__fmaf_rn",
            "__fsqrt_rn",
            *_MATH_F32,
            "__float_as_uint",
            "__uint_as_float",
            _UNEQUAL,
        ),
        ("__dmul_rn", "__ddiv_rn", "__fma_rn", "__dsqrt_rn", *_MATH, "treadle_bits64", "treadle_float64", _UNEQUAL),
        functions=_CUDA_BITS,
        features=EXACT,
    ),
    # built with -cl-fp32-correctly-rounded-divide-sqrt, if the device has it
    "opencl": Language(
        "static inline",
        "long",
        (*_OPERATORS, "fma", "sqrt", *_MATH, "as_uint", "as_float", "isnan"),
        (*_OPERATORS, "fma", "sqrt", *_MATH, "as_ulong", "as_double", "isnan"),
        "#pragma OPENCL FP_CONTRACT OFF\n",
    ),
    # compiled without fast math
    "metal": Language(
        "static inline",
        "long",
        (*_OPERATORS, "metal::fma", "metal::sqrt", *_MATH_METAL, "as_type<uint>", "as_type<float>", _NAN_BITS),
        (),
        "#include <metal_stdlib>\n#pragma METAL fp math_mode(safe)\n#pragma METAL fp contract(off)\n",
        lacks=frozenset({"f64"}),
    ),
}
"""The dialects by name. OpenCL devices may lack f64, so no form of a function uses it there."""


def _macro(name: str, type: str) -> str:
    return f"TREADLE_{name}_{type}".upper()


def prelude(language: str) -> str:
    """Return the lines before all lane functions of a kernel's text, for a language of `LANGUAGES`."""
    made = LANGUAGES[language]
    lines = [f"typedef {made.long} treadle_i64;", f"typedef unsigned {made.long} treadle_u64;"]
    lines.append(f"#define TREADLE_FUNCTION {made.qualifiers}")
    lines += made.functions.splitlines()
    for type, texts in (("f32", made.f32), ("f64", made.f64)):
        for name, text in zip(_FUNCTIONS, texts, strict=bool(texts)):
            parameters = _PARAMETERS.get(name, "x")
            body = text if "(x)" in text else f"{text}({parameters})"
            lines.append(f"#define {_macro(name, type)}({parameters}) {body}")
    return made.start + "\n".join(lines) + "\n"


class CText(LanePrinter):
    """The printer of C; `language` is a name of `LANGUAGES`."""

    def __init__(self, function: LaneFunction, features: frozenset[str], language: str = "c") -> None:
        super().__init__(function, features)
        self.language = language

    def text(self) -> str:
        f = self.function
        operands = ", ".join(f"{self._type(t)} {self.variable(i, 'x')}" for i, t in enumerate(f.operands))
        lines = "\n".join(f"  {line}" for line in self.lines())
        return f"TREADLE_FUNCTION {self._type(f.result)} {f.symbol}({operands}) {{\n{lines}\n}}\n"

    def constant(self, value: LaneValue) -> str:
        if value.is_float:
            return self._float(float(value.attribute), value.type)  # type: ignore[arg-type]
        whole = int(value.attribute)  # type: ignore[call-overload]
        if value.type == "bool":
            return "true" if whole else "false"
        if value.type[0] == "u":
            return f"({_TYPES['u64']}){whole}u" if value.type == "u64" and whole < 2**32 else f"{whole}u"
        if abs(whole) < 2**31:
            return str(whole) if whole >= 0 else f"({whole})"
        return f"({_TYPES[value.type]})0x{whole % 2 ** int(value.type[1:]):x}u"

    def _float(self, value: float, type: str) -> str:
        if value == value and abs(value) < float("inf"):
            return f"({hex_float(value)}{'f' if type == 'f32' else ''})"
        bits = 0x7FC00000 if value != value else 0x7F800000 if value > 0 else 0xFF800000
        made = f"{_macro('of_bits', 'f32')}({bits:#x}u)"
        return made if type == "f32" else f"({_TYPES[type]}){made}"

    def statement(self, value: LaneValue, name: str, text: str) -> list[str]:
        return [f"const {self._type(value.type)} {name} = {text};"]

    def returned(self, text: str) -> str:
        return f"return {text};"

    def expression(self, value: LaneValue, types: list[str], operands: list[str]) -> str:
        op, made, kind = value.op, self._type(value.type), types[0]
        if op == "rounded":
            return operands[0]
        if op == "select":
            return f"{operands[0]} ? {operands[1]} : {operands[2]}"
        if op == "neg":
            return f"-{operands[0]}"
        if op in ("bits", "to"):
            return self._converted(value.type, kind, operands[0], reinterpreted=op == "bits")
        if op in _CALLS and kind[0] == "f":
            return f"{_macro(_CALLS[op], kind)}({', '.join(operands)})"
        if op in _WRAPPING and kind[0] in "iu":
            wide = _TYPES["u64" if kind[1:] == "64" else "u32"]  # signed arithmetic must not overflow
            right = operands[1] if op == "shl" else f"({wide}){operands[1]}"
            return f"({made})(({wide}){operands[0]} {_SIGNS[op]} {right})"
        text = f"{operands[0]} {_SIGNS[op]} {operands[1]}"
        return text if kind[0] == "f" or value.type == "bool" != kind else f"({made})({text})"

    def _converted(self, type: str, source: str, text: str, *, reinterpreted: bool) -> str:
        made = self._type(type)
        if made == self._type(source):
            return text
        if reinterpreted and "f" in (type[0], source[0]) and "f16" not in (type, source):
            if type[0] == "f":
                return f"{_macro('of_bits', type)}(({_TYPES['u' + type[1:]]}){text})"
            text = f"{_macro('bits_of', source)}({text})"
        return f"({made}){text}"

    def _type(self, type: str) -> str:
        if type in LANGUAGES[self.language].lacks:
            raise lacking(self.language.title(), type, self.function)
        return _TYPES[type]
