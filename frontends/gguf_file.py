"""One GGUF file, memory-mapped: metadata and tensor table are checked whole before anything is handed out.

Source: the GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

    "GGUF", version u32, tensors u64, keys u64
    keys      times:   key string, type u32, value
    tensors   times:   name string, rank u32, sizes u64[rank] (innermost first), block type u32, offset u64
    padding to general.alignment (32 unless said), then the tensors' blocks, each at a multiple of it

    string    length u64, then bytes in UTF-8
    array     type u32, count u64, then the values

The reader is ours, and strict: a count, length or size is held against the bytes that are left before it is believed,
so that the work is in proportion to the file. The `gguf` library says how large a block of each type is and
dequantises; its own reader neither checks lengths nor bounds its work. Arrays of arrays are refused, as llama.cpp does.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike, open_regular
from treadle.files.limits import MORE, limit_hint, limits_of
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.safetensors_file import TensorRecord
from treadle.ir.errors import CheckpointError, FrontendError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MOST_DIMS = 4  # of ggml
_DEQUANTISED_AT_ONCE = 1 << 20  # bytes of blocks; the library's temporaries are some times that
_DAMAGED = "fetch the file again: it is damaged, or not a GGUF file"

_SCALARS: Mapping[int, tuple[str, str]] = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"),
    6: ("f32", "<f"), 7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
"""The format's numbers of scalar types, our names, and how `struct` reads them. 8 is a string, 9 an array."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_PLAIN: Mapping[str, str] = {
    "f32": "<f4", "f16": "<f2", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"
}  # fmt: skip
"""Block types that are arrays as they are; all others are dequantised to float32."""


@dataclass(frozen=True)
class GGUFLimits:
    """What a file may ask for before it is refused; every field may be set higher.

    header_bytes   everything before the tensors' blocks
    keys, tensors  entries of the two tables
    strings        strings in arrays, all together (a vocabulary and its merges)
    text_bytes     length of one string
    """

    header_bytes: int = 32 << 20
    keys: int = 10_000
    tensors: int = 20_000
    strings: int = 1_000_000
    text_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class GGUFTensor(TensorRecord):
    """What the file says of one tensor.

    dtype         what `array` gives: f32 for every block type that is dequantised
    blocks        the type in the file: "q4_1", "q8_0", "f16", ...
    begin, end    the bytes that its blocks take, counted from the file's start
    """

    blocks: str = "f32"

    def __str__(self) -> str:
        stored = f" stored as {self.blocks}" if self.blocks != self.dtype else ""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{stored}"


@dataclass(frozen=True, slots=True)
class _Value:
    """A metadata value, read when it is asked for: where it lies, and of an array its items.

    kind     the format's number of its type, of an array its items' type
    count    None for a scalar
    starts   where each string of an array begins, its length included
    """

    kind: int
    at: int
    count: int | None = None
    starts: array[int] | None = None


class GGUFFile:
    """The metadata and tensors of one file. Needs no closing; the file must not be changed while it is mapped."""

    def __init__(
        self, path: str, data: mmap.mmap, values: Mapping[str, _Value], tensors: Mapping[str, GGUFTensor]
    ) -> None:
        self.path = path
        self._data = data
        self._values = dict(values)
        self._tensors = dict(tensors)

    @classmethod
    def open(cls, path: PathLike, limits: GGUFLimits | Mapping[str, int] | None = None) -> GGUFFile:
        """Map the file and check everything before the tensors' blocks, of which it reads none.

        Raises CheckpointError, with the byte and the field, for a file that is not there, is not regular, breaks the
        format, or is past a limit; FrontendError where the gguf library is not installed.
        """
        shown = shown_path(path)
        with open_regular(path, shown) as file:
            try:
                return _open(file, shown, limits_of(GGUFLimits, limits))
            except (OSError, ValueError) as error:
                raise CheckpointError("the file cannot be read", received=str(error), within=shown) from None

    # -- metadata ----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """The metadata's keys, in the file's order."""
        return tuple(self._values)

    @property
    def architecture(self) -> str:
        """general.architecture: "llama", ... Raises CheckpointError where it is missing."""
        return self.text("general.architecture")

    def has(self, key: str) -> bool:
        """Whether the metadata has a key."""
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises CheckpointError where it is missing without a default, or is something else."""
        value = self._scalar(key, default is not None)
        if value is None:
            return default or ""
        if value.kind != _STRING:
            self.fail(key, "must be a string")
        return self._string(key, value.at)

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer of any width from least to most. Raises CheckpointError."""
        value = self._scalar(key, default is not None)
        if value is None:
            return default or 0
        found = self._number(value)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            self.fail(key, f"must be an integer from {least} to {most}", repr(found))
        return found

    def number(self, key: str, default: float | None = None, *, least: float = 0.0, most: float = 1e12) -> float:
        """A finite number from least to most. Raises CheckpointError."""
        value = self._scalar(key, default is not None)
        if value is None:
            return default or 0.0
        found = self._number(value)
        if not isinstance(found, int | float) or isinstance(found, bool) or not least <= found <= most:
            self.fail(key, f"must be a number from {least:g} to {most:g}", repr(found))
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises CheckpointError where it is something else."""
        value = self._scalar(key, True)
        if value is None:
            return default
        if value.kind != _BOOL:
            self.fail(key, "must be true or false")
        return bool(self._number(value))

    def texts(self, key: str) -> list[str]:
        """An array of strings. Raises CheckpointError where it is missing, something else, or not UTF-8."""
        value = self._present(key)
        if value.starts is None:
            self.fail(key, "must be an array of strings")
        return [self._string(key, at) for at in value.starts]

    def numbers(self, key: str) -> npt.NDArray[Any]:
        """An array of numbers, a read-only view of the file. Raises CheckpointError."""
        value = self._present(key)
        if value.count is None or value.kind not in _SCALARS:
            self.fail(key, "must be an array of numbers")
        dtype = np.dtype(_SCALARS[value.kind][1])
        return np.frombuffer(self._data, np.uint8, value.count * dtype.itemsize, value.at).view(dtype)

    def fail(self, key: str, what: str, received: str | None = None, hint: str | None = None) -> NoReturn:
        """Refuse the value of a key: raises CheckpointError with its byte."""
        value = self._values.get(key)
        place = f"byte {value.at}, key {printable(key)}" if value is not None else f"key {printable(key)}"
        raise CheckpointError(f"{printable(key)} {what}", received=received, within=f"{self.path}: {place}", hint=hint)

    def _present(self, key: str) -> _Value:
        value = self._values.get(key)
        if value is None:
            self.fail(key, "is missing from the metadata")
        return value

    def _scalar(self, key: str, optional: bool) -> _Value | None:
        value = self._values.get(key) if optional else self._present(key)
        if value is not None and value.count is not None:
            self.fail(key, "must be a single value", f"an array of {value.count}")
        return value

    def _number(self, value: _Value) -> Any:
        return struct.unpack_from(_SCALARS[value.kind][1], self._data, value.at)[0] if value.kind in _SCALARS else None

    def _string(self, key: str, at: int) -> str:
        (length,) = struct.unpack_from("<Q", self._data, at)
        try:
            return self._data[at + 8 : at + 8 + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"a string of {printable(key)} is not UTF-8",
                received=error.reason,
                within=f"{self.path}: byte {at + 8 + error.start}, key {printable(key)}",
                hint=_DAMAGED,
            ) from None

    # -- tensors -----------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The file's name in errors."""
        return self.path

    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the file's order."""
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def record(self, name: str) -> GGUFTensor:
        """What the file says of a tensor. Raises CheckpointError, with the nearest names, if it has none."""
        found = self._tensors.get(name)
        if found is None:
            near = NearestNames(self._tensors).of(name, 3)
            raise CheckpointError(
                f"the file has no tensor {printable(name)}",
                received=f"{len(self._tensors)} tensors",
                within=self.path,
                hint="did you mean " + " or ".join(map(printable, near)) if near else None,
            )
        return found

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's blocks as they lie in the file, u8[nbytes]: a read-only view. Raises CheckpointError."""
        record = self.record(name)
        if self._data.size() < len(self._data):
            raise CheckpointError(
                "the file has become shorter since it was opened",
                received=f"{self._data.size()} bytes, {len(self._data)} when it was opened",
                within=self.path,
            )
        return np.frombuffer(self._data, np.uint8, record.nbytes, record.begin)

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a read-only array of its shape: a view of the file where it holds plain numbers, else dequantised
        to float32.

        Raises CheckpointError if there is no such tensor, or its blocks are of a type that cannot be dequantised.
        """
        record, raw = self.record(name), self.raw(name)
        if record.blocks in _PLAIN:
            dtype = np.dtype(_PLAIN[record.blocks])
            made = (raw if record.begin % dtype.itemsize == 0 else raw.copy()).view(dtype)
        else:
            made = _dequantised(record, raw, self.path)
        made = made.reshape(record.shape)
        made.flags.writeable = False
        return made

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, {len(self._values)} keys, {len(self)} tensors)"


def _dequantised(record: GGUFTensor, raw: npt.NDArray[np.uint8], shown: str) -> npt.NDArray[np.float32]:
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType[record.blocks.upper()]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, size)
    made = np.empty((len(blocks), elements), np.float32)
    step = max(1, _DEQUANTISED_AT_ONCE // size)
    try:
        with np.errstate(all="ignore"):  # a scale may be anything, NaN and infinities included
            for start in range(0, len(blocks), step):
                part = blocks[start : start + step].reshape(1, -1)  # one row: the library takes few at a time
                made[start : start + step] = gguf.dequantize(part, kind).reshape(-1, elements)
    except NotImplementedError:
        raise CheckpointError(
            f"blocks of type {record.blocks} cannot be dequantised",
            within=f"{shown}: byte {record.begin}, tensor {printable(record.name)}",
        ) from None
    return made


def import_gguf() -> Any:
    """The gguf library. Raises FrontendError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise FrontendError(
            "reading GGUF files needs the package gguf", received=str(error), hint="pip install 'treadle[gguf]'"
        ) from error
    return gguf


# -- reading the header ------------------------------------------------------------------------------------------


def _open(file: BinaryIO, shown: str, limits: GGUFLimits) -> GGUFFile:
    size = os.fstat(file.fileno()).st_size
    magic = file.read(4)
    if magic != _MAGIC:
        raise CheckpointError(
            "not a GGUF file",
            received=f"the first bytes are {magic!r}" if magic else "an empty file",
            within=f"{shown}: byte 0, magic",
            hint=_DAMAGED,
        )
    data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    reader = _Reader(data, shown, limits)
    values, tensors = reader.read()
    return GGUFFile(shown, data, values, tensors)


class _Reader:
    """A cursor over the header. `place` names what is being read, for errors."""

    def __init__(self, data: mmap.mmap, shown: str, limits: GGUFLimits) -> None:
        self.data = data
        self.shown = shown
        self.limits = limits
        self.end = len(data)
        self.at = len(_MAGIC)
        self.place = "version"
        self.strings = 0

    def fail(
        self, what: str, received: str | None = None, hint: str | None = _DAMAGED, at: int | None = None
    ) -> NoReturn:
        """Raise CheckpointError at a byte, the cursor's unless said otherwise."""
        place = f"byte {self.at if at is None else at}, {self.place}"
        raise CheckpointError(what, received=received, within=f"{self.shown}: {place}", hint=hint)

    def take(self, count: int) -> int:
        """Move past `count` bytes; returns where they begin."""
        at = self.at
        if count > self.end - at:
            self.fail("the file ends too early", f"{count} bytes are needed, and {self.end - at} are left")
        self.at = at + count
        if self.at > self.limits.header_bytes:
            self.past("header_bytes", "all before the tensors' blocks is longer")
        return at

    def past(self, limit: str, what: str) -> NoReturn:
        """Refuse what is past a limit."""
        most = getattr(self.limits, limit)
        self.fail(f"{what} than the limit", f"limit {most}", limit_hint(limit, MORE * most))

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.take(8))[0])

    def count(self, limit: str) -> int:
        """A number of entries, held against a limit."""
        number = self.u64()
        if number > getattr(self.limits, limit):
            self.at -= 8
            self.past(limit, f"the file says that it has more {limit}")
        return number

    def skip_string(self) -> None:
        """Move past a string."""
        at = self.at
        self.take(self.u64())
        if self.at - at - 8 > self.limits.text_bytes:
            self.at = at
            self.past("text_bytes", "a string is longer")

    def string(self) -> str:
        """A string that is a name."""
        at = self.at
        self.skip_string()
        try:
            return self.data[at + 8 : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail("a name is not UTF-8", error.reason, at=at + 8 + error.start)

    def read(self) -> tuple[dict[str, _Value], dict[str, GGUFTensor]]:
        """The whole header."""
        version = self.u32()
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0 and version
            self.fail(
                "the file is of a version that is not read",
                "a big-endian file" if swapped else f"version {version}",
                "versions 2 and 3, little-endian, are read; convert the file again with a present llama.cpp",
                at=len(_MAGIC),
            )
        self.place = "number of tensors"
        tensors = self.count("tensors")
        self.place = "number of keys"
        values = self.read_values(self.count("keys"))
        return values, self.read_tensors(tensors, self.alignment(values))

    # -- metadata ----------------------------------------------------------------------------------------------

    def read_values(self, count: int) -> dict[str, _Value]:
        values: dict[str, _Value] = {}
        for number in range(count):
            self.place = f"key {number} of {count}"
            at = self.at
            key = self.string()
            self.place = f"key {printable(key)}"
            if key in values:
                self.fail("a key stands twice", at=at)
            values[key] = self.read_value(self.kind())
        return values

    def kind(self) -> int:
        """The number of a value's type."""
        at = self.at
        number = self.u32()
        if number not in _SCALARS and number not in (_STRING, _ARRAY):
            self.fail("there is no such type of a value", f"type {number}", at=at)
        return number

    def read_value(self, kind: int) -> _Value:
        at = self.at
        if kind == _ARRAY:
            return self.read_array()
        if kind == _STRING:
            self.skip_string()
        else:
            self.take(struct.calcsize(_SCALARS[kind][1]))
            if kind == _BOOL and self.data[at] > 1:
                self.fail("a bool is neither 0 nor 1", f"byte 0x{self.data[at]:02x}", at=at)
        return _Value(kind, at)

    def read_array(self) -> _Value:
        kind = self.kind()
        if kind == _ARRAY:
            self.fail("an array holds arrays", hint="arrays of numbers and of strings are read", at=self.at - 4)
        at = self.at
        count = self.u64()
        start = self.at
        if kind != _STRING:
            item = struct.calcsize(_SCALARS[kind][1])
            self.take(count * item)
            return _Value(kind, start, count)
        if count * 8 > self.end - start:
            self.fail("the file ends too early", f"an array of {count} strings", at=at)
        self.strings += count
        if self.strings > self.limits.strings:
            self.at = at
            self.past("strings", "the arrays hold more strings")
        return _Value(kind, start, count, self.string_starts(count))

    def string_starts(self, count: int) -> array[int]:
        """Where each of `count` strings begins; the cursor goes past them."""
        starts = array("q", bytes(8 * count))
        data, end, longest, length_at = self.data, self.end, self.limits.text_bytes, struct.Struct("<Q").unpack_from
        at = self.at
        for i in range(count):
            if end - at < 8:
                break
            (length,) = length_at(data, at)
            if length > longest or length > end - at - 8:
                break
            starts[i] = at
            at += 8 + length
        else:
            self.take(at - self.at)
            return starts
        self.at = at
        self.skip_string()  # which says what is wrong with it
        self.fail("the file ends too early")

    # -- tensors -----------------------------------------------------------------------------------------------

    def alignment(self, values: Mapping[str, _Value]) -> int:
        value = values.get(_ALIGNMENT)
        if value is None:
            return _DEFAULT_ALIGNMENT
        known = value.kind == 4 and value.count is None
        number = struct.unpack_from("<I", self.data, value.at)[0] if known else 0
        if not number or number & (number - 1):
            self.place = f"key {_ALIGNMENT}"
            self.fail("the alignment must be a power of two, as a u32", f"{number}" if known else None, at=value.at)
        return int(number)

    def read_tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        """The table, with each tensor's blocks where the one before it ends, as llama.cpp requires."""
        gguf = import_gguf()
        kinds = {int(k): (k.name.lower(), *gguf.GGML_QUANT_SIZES[k]) for k in gguf.GGML_QUANT_SIZES}
        entries: dict[str, tuple[str, tuple[int, ...], int, int, int]] = {}
        reached = 0
        for number in range(count):
            self.place = f"tensor {number} of {count}"
            at = self.at
            name = self.string()
            self.place = f"tensor {printable(name)}"
            if name in entries:
                self.fail("a tensor's name stands twice", at=at)
            shape = self.shape()
            at = self.at
            kind = kinds.get(self.u32())
            if kind is None:
                self.fail("there is no such block type", f"type {struct.unpack_from('<I', self.data, at)[0]}", at=at)
            blocks, elements, size = kind
            if shape[-1] % elements:
                self.fail(f"rows of {shape[-1]} are not whole blocks of {elements}", f"type {blocks}", at=at)
            at = self.at
            offset = self.u64()
            if offset != reached:
                self.fail("a tensor does not begin where the one before it ends", f"{offset}, not {reached}", at=at)
            nbytes = math.prod(shape) // elements * size
            entries[name] = blocks, shape, offset, nbytes, at
            reached = offset + nbytes + -nbytes % alignment
            if offset + nbytes > self.end:
                self.fail(
                    "the file ends before its tensors do", f"{nbytes} bytes of blocks, a file of {self.end}", at=at
                )
        return self.placed(entries, self.at + -self.at % alignment)

    def placed(
        self, entries: Mapping[str, tuple[str, tuple[int, ...], int, int, int]], base: int
    ) -> dict[str, GGUFTensor]:
        """The tensors at their places in the file, whose blocks begin at `base`."""
        tensors = {}
        for name, (blocks, shape, offset, nbytes, at) in entries.items():
            begin = base + offset
            if begin + nbytes > self.end:
                self.place = f"tensor {printable(name)}"
                self.fail("the file ends before its tensors do", f"{begin + nbytes} bytes, of {self.end}", at=at)
            dtype = blocks if blocks in _PLAIN else "f32"
            tensors[name] = GGUFTensor(name, dtype, shape, begin, begin + nbytes, blocks)
        return tensors

    def shape(self) -> tuple[int, ...]:
        """A tensor's sizes, outermost first."""
        at = self.at
        rank = self.u32()
        if not 1 <= rank <= _MOST_DIMS:
            self.fail(f"a tensor has 1 to {_MOST_DIMS} dimensions", f"{rank}", at=at)
        sizes = []
        for _ in range(rank):
            at = self.at
            sizes.append(self.u64())
            if not sizes[-1] or math.prod(sizes) >= 2**60:
                self.fail("a tensor's sizes must be positive, and their product below 2^60", str(sizes), at=at)
        return tuple(reversed(sizes))
