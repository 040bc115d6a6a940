"""The names of dtypes in PyTorch."""

from __future__ import annotations

from treadle.ir.types import DType

DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
}
"""Our names of dtypes, and PyTorch's."""


def dtype_text(dtype: DType) -> str:
    """Return a dtype as text: `torch.float32`."""
    return f"torch.{DTYPES[dtype.name]}"
