"""Constants as text, exactly: `0.5`, `3:i32`, `f32[3]{1.0, 2.0, nan}`, `f32[768]{@0}` for bytes at the end of the text.

A single number is f32 if written as a float and i64 if written as an integer; any other dtype follows a colon. Elements
are in row-major order. Constants that are long, or that numbers cannot express exactly (a NaN with a payload), are
written as little-endian bytes in base64: either in place, or in the graph's section `data`, which contains equal bytes
only once.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from math import prod
from typing import Any

from treadle.ir.errors import GraphError
from treadle.ir.graph import Value
from treadle.ir.literals import Literal
from treadle.ir.text.scanner import Scanner, TextLimits
from treadle.ir.types import DTYPES, DType, Type, boolean, f32, i64, u8

IN_PLACE = 16
"""The largest number of elements that are written as numbers."""

_LINE = 96
_CONSTANT_WORK = 25  # the work of storing a constant, in addition to its text
_SUFFIX = re.compile(r":([a-z]\w*)")
_BOOL = re.compile(r"(true|false)(?!\w)")
_BLOB = re.compile(r"@(\d{1,9})")


# -- writing -------------------------------------------------------------------------------------------------------


class DataSection:
    """The bytes of long constants, numbered in order of first use."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}

    def number(self, data: bytes) -> int:
        return self.numbers.setdefault(data, len(self.numbers))

    def lines(self) -> list[str]:
        """Return the section's text, or nothing if it is empty."""
        out: list[str] = []
        for data, number in self.numbers.items():
            text = base64.b64encode(data).decode()
            pieces = [f'"{text[at : at + _LINE]}"' for at in range(0, len(text), _LINE)]
            out += [f"  @{number}:", *(f"    {piece}" for piece in pieces)]
        return ["data {", *out, "}"] if out else []


def constant_text(literal: Literal, data: DataSection | None = None) -> str:
    """Return a constant as text. A long constant is added to the data section, or written in place if `data` is
    None.
    """
    numbers = _exact_numbers(literal)
    if literal.shape == () and numbers:
        plain = literal.dtype in (f32, i64, boolean)
        return numbers[0] if plain else f"{numbers[0]}:{literal.dtype}"
    if numbers is not None:
        inside = ", ".join(numbers)
    elif data is not None and len(literal.data) > IN_PLACE:
        inside = f"@{data.number(literal.data)}"
    else:
        inside = f'base64 "{base64.b64encode(literal.data).decode()}"'
    return f"{literal.type}{{{inside}}}"


def _exact_numbers(literal: Literal) -> list[str] | None:
    """Return the elements as text that parses to the same bits, or None if there are too many or some cannot be
    expressed.
    """
    count = prod(literal.shape)
    if literal.encoding is not None or count > IN_PLACE or len(literal.data) != count * literal.dtype.bytes:
        return None
    again: Sequence[Any]
    if literal.dtype.is_float:
        texts = [str(x) for x in literal.array.flat]
        again = [float(t) for t in texts]
    elif literal.dtype.is_int:
        again = literal.array.ravel().tolist()
        texts = [str(x) for x in again]
    else:
        again = [bool(x) for x in literal.data]
        texts = ["true" if x else "false" for x in again]
    return texts if _bytes_of(again, literal.dtype) == literal.data else None


def _bytes_of(numbers: Sequence[Any], dtype: DType) -> bytes:
    return Literal.of(numbers, dtype).data


# -- reading -------------------------------------------------------------------------------------------------------


class ConstantReader:
    """A reader of the constants of one text. Constants whose bytes are at the end are completed by `read_data`."""

    def __init__(self, scanner: Scanner, limits: TextLimits) -> None:
        self.scanner = scanner
        self.left = limits.literal_bytes
        self.waiting: list[tuple[Value, Type, int, int]] = []

    def accept_scalar(self) -> Value | None:
        """Read and return a number or a boolean if one comes next, else None."""
        s = self.scanner
        start = s.skip()
        word = s.match(_BOOL)
        if word is not None:
            return Value.constant(self.literal(boolean, (), [word[1] == "true"], start))
        number = s.accept_number()
        if number is None:
            return None
        suffix = _SUFFIX.match(s.text, s.at)
        if suffix is None:
            return Value.constant(self.literal(i64 if isinstance(number, int) else f32, (), [number], start))
        if suffix[1] not in DTYPES:
            raise s.error(f"unknown dtype {suffix[1]!r}", s.at + 1, hint="one of " + ", ".join(DTYPES))
        s.at = suffix.end()
        return Value.constant(self.literal(DTYPES[suffix[1]], (), [number], start))

    def tensor(self) -> Value:
        """Read and return a constant such as `f32[3]{...}`."""
        s = self.scanner
        start = s.at
        type = s.type()
        shape = type.static_shape
        if shape is None or min(shape, default=0) < 0:
            raise s.error("a constant's dimensions must be integers", start, received=str(type))
        self.claim(type.bytes_at({}), start)
        s.spend(_CONSTANT_WORK, start)
        s.expect("{")
        blob = s.match(_BLOB)
        if blob is not None:
            value = Value("constant", Type(type.dtype, type.dims, type.encoding), "constant")
            self.waiting.append((value, type, int(blob[1]), start))
        elif s.accept_word("base64"):
            value = Value.constant(self.from_bytes(type, self.base64(), start))
        elif type.encoding is not None:
            raise s.error(
                f"expected base64, found {s.found()}", hint="the blocks of an encoded constant are written as bytes"
            )
        else:
            numbers: list[Any] = []
            while not s.sees(_CLOSE):
                if numbers:
                    s.expect(",")
                number = s.accept_number()
                if number is None:
                    word = s.match(_BOOL)
                    if word is None:
                        raise s.error(f"expected an element, found {s.found()}")
                    number = word[1] == "true"
                numbers.append(number)
                s.spend(1, start)
            value = Value.constant(self.literal(type.dtype, shape, numbers, start))
        s.expect("}")
        return value

    def read_data(self) -> None:
        """Read the section `data`, if it comes next, and complete the constants that refer to it."""
        s = self.scanner
        blobs: dict[int, bytes] = {}
        if s.accept_word("data"):
            s.expect("{")
            while (mark := s.match(_BLOB)) is not None:
                if int(mark[1]) in blobs:
                    raise s.error(f"two data entries have number {mark[1]}", mark.start())
                s.expect(":")
                blobs[int(mark[1])] = self.base64()
            s.expect("}")
        for value, type, number, at in self.waiting:
            if number not in blobs:
                raise s.error(f"no data entry has number {number}", at)
            value.literal = self.from_bytes(type, blobs[number], at)

    def base64(self) -> bytes:
        s = self.scanner
        start = s.skip()
        pieces: list[str] = []
        while not pieces or s.sees(_QUOTE):
            run = s.match(_PIECES)  # there may be many lines of base64
            pieces.append(run[0].translate(_BETWEEN) if run is not None else s.string())
        try:
            return base64.b64decode("".join(pieces), validate=True)
        except (binascii.Error, ValueError):
            raise s.error("malformed base64", start) from None

    def from_bytes(self, type: Type, data: bytes, at: int) -> Literal:
        shape = type.static_shape or ()
        wanted = type.bytes_at({})
        if len(data) != wanted:
            raise self.scanner.error(f"{type} takes {wanted} bytes, received {len(data)}", at)
        if type.dtype is boolean and data.strip(b"\0\1"):
            raise self.scanner.error("a boolean's byte must be 0 or 1", at)
        return Literal(type.dtype, shape, data, type.encoding)

    def claim(self, count: int, at: int) -> None:
        self.left -= count
        if self.left < 0:
            raise self.scanner.error(
                "the constants are too large",
                at,
                hint=f"at most {self.scanner.limits.literal_bytes} bytes in one text",
            )

    def literal(self, dtype: DType, shape: tuple[int, ...], numbers: Sequence[Any], at: int) -> Literal:
        s = self.scanner
        if len(numbers) != prod(shape):
            raise s.error(f"a constant with {prod(shape)} elements, received {len(numbers)}", at)
        for number in numbers:
            if isinstance(number, bool) != (dtype is boolean) or (dtype.is_int and not isinstance(number, int)):
                raise s.error(f"{str(number).lower()} is not of dtype {dtype}", at)
            if dtype.is_int and not _least(dtype) <= number <= _greatest(dtype):
                raise s.error(f"{number} is out of the range of {dtype}", at)
        try:
            return Literal(dtype, shape, _bytes_of(numbers, dtype))
        except GraphError as error:  # a float above the dtype's largest
            raise s.error(error.what, at) from None


def _least(dtype: DType) -> int:
    return 0 if dtype is u8 else -(2 ** (8 * dtype.bytes - 1))


def _greatest(dtype: DType) -> int:
    return 255 if dtype is u8 else 2 ** (8 * dtype.bytes - 1) - 1


_CLOSE = re.compile(r"\}")
_QUOTE = re.compile(r'"')
_BETWEEN = str.maketrans("", "", '" \t\n\r\f\v')
_PIECES = re.compile(r'(?:"[\w+/=]*+"\s*+)++', re.ASCII)
