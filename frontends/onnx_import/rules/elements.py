"""Element types of ONNX files, and the dtypes that carry them.

    FLOAT, INT64, BOOL, ...             the dtype of the same values
    UINT16, UINT32                      a wider integer; results are taken modulo 2^16, 2^32
    UINT64                              i64 with the same bits; operations that depend on the sign have a special form
    UINT4, INT4, UINT2, INT2            u8 or i8
    BFLOAT16                            bf16, or on request f32 with each result rounded
    FLOAT8E4M3FN, ..., FLOAT4E2M1       f32, each result rounded
    STRING, COMPLEX64, COMPLEX128       none: refused

The carrier represents every number exactly. `carried` converts arrays of the file's own type to arrays that a graph
takes; `restored` converts results back.

Source: TensorProto of onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.frontends.onnx_import.errors import UnsupportedOnnx
from treadle.ir.errors import FrontendError
from treadle.ir.ops.rounding import FORMATS
from treadle.ir.types import DType, bf16, boolean, f16, f32, f64, i8, i16, i32, i64, u8

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Element:
    """An element type of ONNX.

    name      its name in TensorProto.DataType
    number    its number in TensorProto.DataType
    carrier   the dtype that holds its values in a graph
    bits      bits of one element in a file
    field     the field of TensorProto for elements that are not stored as raw bytes
    least     for an integer: its minimum; `greatest`: its maximum
    format    a float format of `round_to`, if the carrier is wider than the type
    """

    name: str
    number: int
    carrier: DType
    bits: int
    field: str = "int32_data"
    least: int | None = None
    greatest: int | None = None
    format: str | None = None

    @property
    def wraps(self) -> int | None:
        """The modulus of its arithmetic if the carrier has another modulus, else None."""
        if self.name in ("UINT16", "UINT32") and self.greatest is not None:
            return self.greatest + 1
        return None

    @property
    def is_int(self) -> bool:
        return self.least is not None

    @property
    def is_float(self) -> bool:
        return self.carrier.is_float

    def __str__(self) -> str:
        return self.name


def _integer(name: str, number: int, carrier: DType, bits: int, field: str = "int32_data") -> Element:
    signed = not name.startswith("U")
    least = -(2 ** (bits - 1)) if signed else 0
    return Element(name, number, carrier, bits, field, least, least + 2**bits - 1)


_ELEMENTS = {
    e.number: e
    for e in (
        Element("FLOAT", 1, f32, 32, "float_data"),
        _integer("UINT8", 2, u8, 8),
        _integer("INT8", 3, i8, 8),
        _integer("UINT16", 4, i32, 16),
        _integer("INT16", 5, i16, 16),
        _integer("INT32", 6, i32, 32),
        _integer("INT64", 7, i64, 64, "int64_data"),
        Element("BOOL", 9, boolean, 8),
        Element("FLOAT16", 10, f16, 16),
        Element("DOUBLE", 11, f64, 64, "double_data"),
        _integer("UINT32", 12, i64, 32, "uint64_data"),
        _integer("UINT64", 13, i64, 64, "uint64_data"),
        Element("BFLOAT16", 16, bf16, 16),
        Element("FLOAT8E4M3FN", 17, f32, 8, format="f8e4m3fn"),
        Element("FLOAT8E4M3FNUZ", 18, f32, 8, format="f8e4m3fnuz"),
        Element("FLOAT8E5M2", 19, f32, 8, format="f8e5m2"),
        Element("FLOAT8E5M2FNUZ", 20, f32, 8, format="f8e5m2fnuz"),
        _integer("UINT4", 21, u8, 4),
        _integer("INT4", 22, i8, 4),
        Element("FLOAT4E2M1", 23, f32, 4, format="f4e2m1"),
        _integer("UINT2", 25, u8, 2),
        _integer("INT2", 26, i8, 2),
    )
}
_REFUSED = {0: "UNDEFINED", 8: "STRING", 14: "COMPLEX64", 15: "COMPLEX128", 24: "FLOAT8E8M0"}


def element(number: int, *, bf16_in_f32: bool = False) -> Element:
    """Return the element type with this number. Raises UnsupportedOnnx for a type that no dtype carries."""
    found = _ELEMENTS.get(number)
    if found is None:
        raise UnsupportedOnnx(f"element type {_REFUSED.get(number, number)} is not supported")
    if found.carrier is bf16 and bf16_in_f32:
        return replace(found, carrier=f32, format="bf16")
    return found


@lru_cache(maxsize=256)
def named(name: str) -> Element:
    """Return the element type for a name in TensorProto.DataType, or the one that an IR dtype carries exactly."""
    for e in _ELEMENTS.values():
        if name == e.name:
            return e
    for e in _ELEMENTS.values():
        whole = e.bits == 8 * e.carrier.bytes and e.name != "UINT64"
        if whole and name == e.carrier.name and e.format is None:
            return e
    raise FrontendError(f"element type {name} is not supported")


# -- bytes of a file -----------------------------------------------------------------------------------------------


def decode(element: Element, data: Array, count: int) -> Array:
    """Decode `count` elements from bytes to the carrier's dtype. Bytes are u8, little-endian; elements smaller than a
    byte are packed, the first in the lowest bits.

    bf16 is decoded to float32. The result is a view if NumPy has the same layout.
    """
    dtype, made = element.carrier.numpy, data
    if element.bits < 8:
        made = _unpacked(element, data, count)
    elif element.name == "BFLOAT16":
        made = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif element.format is not None:
        made = _values(element.format, 8)[data]
    elif element.wraps is not None:
        made = data.view(f"<u{element.bits // 8}").astype(dtype)
    elif element.carrier is boolean:
        made = data != 0 if np.any(data > 1) else data.view(np.bool_)
    elif dtype is not None:
        made = data.view(dtype.newbyteorder("<"))
    return made


def _unpacked(element: Element, data: Array, count: int) -> Array:
    """Unpack elements of less than a byte."""
    shifts = np.arange(8 // element.bits, dtype=np.uint8) * element.bits
    codes: Array = ((data[:, None] >> shifts) & (2**element.bits - 1)).reshape(-1)[:count]
    if element.format is not None:
        return np.asarray(_values(element.format, element.bits)[codes])
    codes = codes.astype(np.int16)
    assert element.greatest is not None
    return np.where(codes > element.greatest, codes - 2**element.bits, codes).astype(element.carrier.numpy)


@lru_cache(maxsize=16)
def _values(format: str, bits: int) -> Array:
    """Return the value of each code of a small float format, float32[2^bits]."""
    known = FORMATS[format]
    codes = np.arange(2 ** (bits - 1))
    exponent, fraction = codes >> known.fraction, codes & (2**known.fraction - 1)
    normal = np.ldexp(1 + fraction / 2**known.fraction, exponent - 1 + known.least)
    half = np.where(exponent == 0, np.ldexp(fraction / 2**known.fraction, known.least), normal)
    if known.beyond is not None and known.minus_zero:
        # fn: only the last code is NaN. Else the first code above the largest number is infinite, and the rest are NaN.
        first = int(np.argmax(half > known.largest))
        half[first:] = np.nan
        if np.isinf(known.beyond):
            half[first] = np.inf
    negative = -half
    if not known.minus_zero:
        negative[0] = np.nan
    return np.concatenate([half, negative]).astype(np.float32)


# -- arrays of a caller --------------------------------------------------------------------------------------------


def carried(element: Element, array: Any) -> Array:
    """Convert an array of an ONNX element type to the dtype that the graph uses for it."""
    given: Array = np.asarray(array)
    bits64: Array = given.astype(np.uint64) if element.name == "UINT64" else given
    return bits64.view(np.int64) if element.name == "UINT64" else given.astype(element.carrier.numpy or np.float32)


def restored(element: Element, array: Any) -> Array:
    """Convert a graph's result to the ONNX element type. If NumPy lacks this type, return the array unchanged."""
    found: Array = np.asarray(array)
    if element.name == "UINT64":
        return found.view(np.uint64)
    return found.astype(element.name.lower()) if element.wraps is not None else found
