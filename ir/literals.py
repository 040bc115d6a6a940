"""Constants of a graph: immutable elements of any dtype, including bf16."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DType, Type, bf16, dtype_of, f32


@dataclass(frozen=True)
class Literal:
    """A constant's elements: immutable, hashed by content. Bytes are little-endian, row-major.

    NumPy lacks bf16, so bf16 elements are stored in two bytes each, and read and written as float32. The bytes of an
    encoded constant are its blocks, in their held form.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes = field(repr=False)
    encoding: Encoding | None = None

    @staticmethod
    def of(value: Any, dtype: DType | None = None) -> Literal:
        """Build a literal from a number, nested list or NumPy array.

        If `dtype` is given, the elements are converted to it: floats are rounded, but not to infinity; integers and
        booleans must be exact. Without `dtype`, Python's floats become f32. Raises GraphError for values that cannot be
        converted.
        """
        try:
            array = np.asarray(value)
        except ValueError as error:  # lists of different lengths
            raise GraphError("cannot build a constant from lists of different lengths", received=str(error)) from None
        except (RuntimeError, TypeError) as error:  # a tensor of PyTorch with a gradient, on a GPU, or in bf16
            raise GraphError(
                f"cannot build a constant from a {type(value).__name__}",
                received=str(error)[:80],
                hint='t.parameter("w", 8) declares a weight; w.detach().cpu().float() is a constant',
            ) from None
        if array.dtype == np.object_ and all(isinstance(each, Size | int | float) for each in array.flat):
            numbers = [operator.index(each) if isinstance(each, Size) else each for each in array.flat]
            array = np.array(numbers).reshape(array.shape)
            if array.dtype == np.object_:
                bits = max(each.bit_length() for each in numbers if isinstance(each, int))
                raise GraphError(f"a constant cannot hold an integer of {bits} bits", hint="a float")
        if dtype is None and array.dtype == np.float64 and not isinstance(value, np.ndarray | np.generic):
            dtype = f32
        kind = dtype or dtype_of(array)
        if kind is None or array.dtype.kind not in "biuf":
            raise GraphError(
                f"a constant cannot hold {array.dtype}",
                received=f"{value!r}"[:80],
                hint="numbers and booleans only",
            )
        try:
            with np.errstate(invalid="ignore", over="raise"):
                stored = _to_bfloat16(array) if kind is bf16 else array.astype(kind.numpy)
        except FloatingPointError:
            largest = array.flat[np.argmax(np.abs(np.where(np.isfinite(array), array, 0)))]
            raise GraphError(
                f"{largest} is out of the range of {kind}",
                hint='float("inf"), or cast the other operand to a wider dtype',
            ) from None
        if not kind.is_float and array.dtype != stored.dtype and not np.array_equal(stored, array):
            wrong = array[stored != array].flat[0]
            raise GraphError(f"{wrong} is not of dtype {kind}", hint="cast the other operand, or round the number")
        contiguous = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<"))
        return Literal(kind, tuple(array.shape), contiguous.tobytes())

    @staticmethod
    def of_blocks(blocks: np.ndarray[Any, Any], type: Type) -> Literal:
        """Return an encoded constant from the u8 array that holds it. Raises GraphError if the array does not match the
        type.
        """
        shape = type.static_shape
        if shape is None or blocks.dtype != np.uint8 or blocks.shape != type.storage_type.static_shape:
            raise GraphError(f"{type} is held in {type.storage_type}", received=f"{blocks.dtype}{list(blocks.shape)}")
        return Literal(type.dtype, shape, np.ascontiguousarray(blocks).tobytes(), type.encoding)

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """A read-only array of the elements, or of an encoded constant's blocks."""
        if self.encoding is not None:
            return np.frombuffer(self.data, np.uint8).reshape(self.type.storage_type.static_shape or ())
        if self.dtype is bf16:
            words = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << 16
            return words.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=self.dtype.numpy).reshape(self.shape)

    @property
    def scalar(self) -> float | int | bool | None:
        """The Python number of a rank-0 constant, else None."""
        return self.array.item() if self.shape == () else None

    @property
    def wide(self) -> np.ndarray[Any, Any]:
        """The elements, floats in float64. A scalar in f32 becomes the shortest decimal that rounds to it.

        That decimal is the number as the user wrote it: 1e-05, and not 9.999999747e-06. So an op's body in float64
        agrees with the op, whose attributes are Python numbers.
        """
        if self.dtype is f32 and self.shape == () and self.encoding is None:
            return np.array(float(str(self.array[()])))
        return self.array.astype(np.float64) if self.array.dtype.kind == "f" else self.array

    @property
    def type(self) -> Type:
        found = self.dtype[self.shape] if self.shape else Type(self.dtype)
        return found if self.encoding is None else found.as_encoded(self.encoding)


def _to_bfloat16(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the upper halves of float32 words, rounded to nearest even; a NaN stays a NaN.

    Raises FloatingPointError if a finite number would become infinite.
    """
    values = np.ascontiguousarray(array, dtype=np.float32)
    words = values.view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    if np.any(((rounded & 0x7FFF) == 0x7F80) & np.isfinite(values)):
        raise FloatingPointError
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
