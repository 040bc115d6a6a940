"""A strict reader of the header of a GGUF file: see `treadle.frontends.gguf_file` for the format."""

from __future__ import annotations

import math
import mmap
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from treadle.files.limits import MORE, limit_hint
from treadle.files.shown_names import printable
from treadle.frontends.gguf_blocks import PLAIN, GGUFTensor, import_gguf
from treadle.ir.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MOST_DIMS = 4  # limit of ggml
DAMAGED = "fetch the file again: it is damaged, or not a GGUF file"

SCALARS: Mapping[int, tuple[str, str]] = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"),
    6: ("f32", "<f"), 7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
"""Our name and the `struct` format of each scalar type, by the format's number. 8 is a string, 9 an array."""

STRING, ARRAY, BOOL = 8, 9, 7


@dataclass(frozen=True)
class GGUFLimits:
    """Limits of a file's sizes; a file that exceeds a limit is refused. Every field may be set higher.

    header_bytes   bytes before the tensors' blocks
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
class HeaderValue:
    """A metadata value, decoded on access: the offset of the value and, for an array, of its items.

    kind     the format's number of the value's type; for an array, of the items' type
    count    None for a scalar
    starts   offset of each string of an array, its length included
    """

    kind: int
    at: int
    count: int | None = None
    starts: array[int] | None = None


class HeaderReader:
    """A cursor over the header. `place` names the item that is being read; errors report it."""

    def __init__(self, data: mmap.mmap, shown: str, limits: GGUFLimits) -> None:
        self.data = data
        self.shown = shown
        self.limits = limits
        self.end = len(data)
        self.at = len(MAGIC)
        self.place = "version"
        self.strings = 0

    def fail(
        self, what: str, received: str | None = None, hint: str | None = DAMAGED, at: int | None = None
    ) -> NoReturn:
        """Raise CheckpointError for a byte, by default the byte at the cursor."""
        place = f"byte {self.at if at is None else at}, {self.place}"
        raise CheckpointError(what, received=received, within=f"{self.shown}: {place}", hint=hint)

    def take(self, count: int) -> int:
        """Skip `count` bytes; return the offset of the first of them."""
        at = self.at
        if count > self.end - at:
            self.fail("the file ends too early", f"{count} bytes are needed, and {self.end - at} are left")
        self.at = at + count
        if self.at > self.limits.header_bytes:
            self.past("header_bytes", "the header is longer")
        return at

    def past(self, limit: str, what: str) -> NoReturn:
        """Raise the error for a value that exceeds a limit."""
        most = getattr(self.limits, limit)
        self.fail(f"{what} than the limit", f"limit {most}", limit_hint(limit, MORE * most))

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.take(8))[0])

    def count(self, limit: str) -> int:
        """Read a number of entries, and check it against a limit."""
        number = self.u64()
        if number > getattr(self.limits, limit):
            self.at -= 8
            self.past(limit, f"the file declares more {limit}")
        return number

    def skip_string(self) -> None:
        """Skip a string."""
        at = self.at
        self.take(self.u64())
        if self.at - at - 8 > self.limits.text_bytes:
            self.at = at
            self.past("text_bytes", "a string is longer")

    def string(self) -> str:
        """Read a string that is a name."""
        at = self.at
        self.skip_string()
        try:
            return self.data[at + 8 : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail("a name is not UTF-8", error.reason, at=at + 8 + error.start)

    def read(self) -> tuple[dict[str, HeaderValue], dict[str, GGUFTensor]]:
        """Read the whole header."""
        version = self.u32()
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0 and version
            self.fail(
                "this version of the format is not supported",
                "a big-endian file" if swapped else f"version {version}",
                "versions 2 and 3, little-endian, are supported; convert the file again with a current llama.cpp",
                at=len(MAGIC),
            )
        self.place = "number of tensors"
        tensors = self.count("tensors")
        self.place = "number of keys"
        values = self.read_values(self.count("keys"))
        return values, self.read_tensors(tensors, self.alignment(values))

    # -- metadata ----------------------------------------------------------------------------------------------

    def read_values(self, count: int) -> dict[str, HeaderValue]:
        values: dict[str, HeaderValue] = {}
        for number in range(count):
            self.place = f"key {number} of {count}"
            at = self.at
            key = self.string()
            self.place = f"key {printable(key)}"
            if key in values:
                self.fail("a key appears twice", at=at)
            values[key] = self.read_value(self.kind())
        return values

    def kind(self) -> int:
        """Read the number of a value's type."""
        at = self.at
        number = self.u32()
        if number not in SCALARS and number not in (STRING, ARRAY):
            self.fail("there is no such value type", f"type {number}", at=at)
        return number

    def read_value(self, kind: int) -> HeaderValue:
        at = self.at
        if kind == ARRAY:
            return self.read_array()
        if kind == STRING:
            self.skip_string()
        else:
            self.take(struct.calcsize(SCALARS[kind][1]))
            if kind == BOOL and self.data[at] > 1:
                self.fail("a bool is neither 0 nor 1", f"byte 0x{self.data[at]:02x}", at=at)
        return HeaderValue(kind, at)

    def read_array(self) -> HeaderValue:
        kind = self.kind()
        if kind == ARRAY:
            self.fail("an array holds arrays", hint="an array of numbers or of strings", at=self.at - 4)
        at = self.at
        count = self.u64()
        start = self.at
        if kind != STRING:
            item = struct.calcsize(SCALARS[kind][1])
            self.take(count * item)
            return HeaderValue(kind, start, count)
        if count * 8 > self.end - start:
            self.fail("the file ends too early", f"an array of {count} strings", at=at)
        self.strings += count
        if self.strings > self.limits.strings:
            self.at = at
            self.past("strings", "the arrays hold more strings")
        return HeaderValue(kind, start, count, self.string_starts(count))

    def string_starts(self, count: int) -> array[int]:
        """Return the offset of each of `count` strings, and move the cursor past them."""
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
        self.skip_string()  # reports the error
        self.fail("the file ends too early")

    # -- tensors -----------------------------------------------------------------------------------------------

    def alignment(self, values: Mapping[str, HeaderValue]) -> int:
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
        """Read the table of tensors. Each tensor's blocks must begin where the previous tensor's blocks end, as
        llama.cpp requires.
        """
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
                self.fail("a tensor's name appears twice", at=at)
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
                self.fail("a tensor does not begin where the previous tensor ends", f"{offset}, not {reached}", at=at)
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
        """Return the tensors with their offsets in the file; `base` is the offset of the first block."""
        tensors = {}
        for name, (blocks, shape, offset, nbytes, at) in entries.items():
            begin = base + offset
            if begin + nbytes > self.end:
                self.place = f"tensor {printable(name)}"
                self.fail("the file ends before its tensors do", f"{begin + nbytes} bytes, of {self.end}", at=at)
            dtype = blocks if blocks in PLAIN else "f32"
            tensors[name] = GGUFTensor(name, dtype, shape, begin, begin + nbytes, blocks)
        return tensors

    def shape(self) -> tuple[int, ...]:
        """Read a tensor's sizes, outermost first."""
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
