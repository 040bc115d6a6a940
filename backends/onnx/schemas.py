"""The types of ONNX's operators: element types, their codes, and the schemas of the onnx package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from treadle.ir.types import DTYPES, DType, bf16, boolean, f16, f32, i8, i16, i32, i64, u8

CODES: Mapping[str, tuple[int, str]] = {
    "f32": (1, "float"),
    "u8": (2, "uint8"),
    "i8": (3, "int8"),
    "i16": (5, "int16"),
    "i32": (6, "int32"),
    "i64": (7, "int64"),
    "bool": (9, "bool"),
    "f16": (10, "float16"),
    "f64": (11, "double"),
    "bf16": (16, "bfloat16"),
}
"""ONNX's code and name of each dtype."""

NARROW: Mapping[str, tuple[int, DType]] = {
    f"f{name.removeprefix('float')}": (code, DType(f"f{name.removeprefix('float')}", "float", 1))
    for name, code in {
        "float8e4m3fn": 17,
        "float8e4m3fnuz": 18,
        "float8e5m2": 19,
        "float8e5m2fnuz": 20,
        "float4e2m1": 23,
    }.items()
}
"""ONNX's code and our dtype of float formats that only `round_to` uses; a cast to such a format and back rounds."""

INT4, UINT4 = DType("i4", "int", 1), DType("u4", "int", 1)
"""The dtypes of 4-bit integers, which are only read by DequantizeLinear."""

NAMED = {f"tensor({name})": DTYPES[ours] for ours, (_, name) in CODES.items()}
NAMED |= {"tensor(int4)": INT4, "tensor(uint4)": UINT4}


def code_of(dtype: DType) -> int:
    """Return ONNX's code of a dtype of the file."""
    return {INT4: 22, UINT4: 21}[dtype] if dtype in (INT4, UINT4) else CODES[dtype.name][0]


WIDER: Mapping[DType, tuple[DType, ...]] = {
    boolean: (u8, i32),
    u8: (i32, i64),
    i8: (i32, i64),
    i16: (i32, i64),
    i32: (i64,),
    f16: (f32,),
    bf16: (f32,),
}
"""The dtypes in which an operator is applied if it does not support a dtype; the first supported one is chosen."""

NO_KERNEL: Mapping[str, frozenset[DType]] = {
    "Max": frozenset({i16}),
    "Min": frozenset({i16}),
    "ArgMax": frozenset({i16}),
    "Pad": frozenset({i16}),
    "Where": frozenset({i16, boolean}),
    "Einsum": frozenset({i16, i8, u8}),
    "TopK": frozenset({i16, i8, u8}),
    "ScatterND": frozenset({i8, u8, f16, bf16}),
    "ScatterElements": frozenset({f16, bf16}),
}
"""Dtypes that an operator has in the standard, but not in ONNX Runtime's CPU kernels. They are widened, too.

bf16 is not widened, except for sums at indices: other devices compute in bf16, and casts around every node would be
slow.
"""


@dataclass(frozen=True)
class OperatorSchema:
    """The types of an operator's inputs and outputs at an opset: type variables or dtypes, in order. The last input
    may be variadic.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: Mapping[str, frozenset[DType]]


@lru_cache(maxsize=1024)
def schema_of(op_type: str, opset: int) -> OperatorSchema | None:
    """Return an operator's schema, or None if the opset does not have the operator."""
    import onnx

    try:
        found = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None
    allowed = {}
    for constraint in found.type_constraints:
        dtypes = frozenset(NAMED[t] for t in constraint.allowed_type_strs if t in NAMED)
        lacking = NO_KERNEL.get(op_type, frozenset()) if len(dtypes) > 1 else frozenset()
        allowed[constraint.type_param_str] = dtypes - lacking
    return OperatorSchema(tuple(i.type_str for i in found.inputs), tuple(o.type_str for o in found.outputs), allowed)
