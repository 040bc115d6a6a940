"""One model.bin of CTranslate2, memory-mapped; every record is checked before any array is returned.

Source: `Model::load` in CTranslate2's src/models/model.cc, which is the format's only description. All numbers are
little-endian. A string is a u16 length n, then n bytes that end in NUL.

    u32 version, string specification, u32 revision
    u32 number of variables; each:  string name, u8 rank, u32 dimension * rank, u8 dtype, u32 size, size bytes
    u32 number of aliases; each:    string alias, string name

This project has its own reader because the library offers none: it loads a file only into its own engine, and it trusts
the file's sizes. The supported version is 6, which its converters write (CURRENT_BINARY_VERSION in
specs/model_spec.py).

The reader refuses these files and reports the byte offset: an unknown version or dtype, an invalid string, a name that
appears twice, a size that does not equal dtype x shape, an alias of an unknown name, and records that end after or
before the end of the file.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import FileState, PathLike, RegularFile, open_regular
from treadle.files.limits import limit_hint, limits_of
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.mapped_tensors import MappedTensors, TensorRecord
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.safetensors_file import CheckpointLimits
from treadle.ir.errors import CheckpointError

_NAME = "model.bin"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_PICKLES = (b"PK", b"\x80")
_VERSION = 6
_DAMAGED = "fetch the file again: it is damaged, or not a model.bin of CTranslate2"
_DTYPES = (("f32", 4), ("i8", 1), ("i16", 2), ("i32", 4), ("f16", 2), ("bf16", 2))
"""Names of the format's dtypes and bytes of an element, indexed by the dtype's number."""
_NUMPY = {"f32": "<f4", "i8": "i1", "i16": "<i2", "i32": "<i4", "f16": "<f2"}
_LONGEST = 512  # bytes of a string
_LARGEST = 2**60  # elements


def find_ctranslate2(
    folder: PathLike | ModelFolder, limits: CheckpointLimits | Mapping[str, int] | None = None
) -> CTranslate2File | None:
    """Open the model.bin of a folder in CTranslate2's layout; return None if the folder has another layout.

    Safetensors in the same folder take precedence. A PyTorch pickle named model.bin is not a CTranslate2 file. Raises
    CheckpointError if the file is damaged, or is a link out of the folder.
    """
    place = ModelFolder.find(folder, limits)
    if not place.has(_NAME) or any(place.has(f"model{suffix}") for suffix in _WEIGHTS):
        return None
    with place.open(_NAME) as file:
        return None if file.peek(2).startswith(_PICKLES) else CTranslate2File.read(file, place.limits)


class CTranslate2File(MappedTensors[TensorRecord]):
    """The variables of one file: a mapping from names, in the file's order, to records and arrays.

    specification   the model's kind, as the file declares it: "WhisperSpec"
    revision        number of the specification's revision
    aliases         other names of variables, read-only; `record` and `array` accept them, `names` leaves them out
    """

    called = "variable"
    specification: str
    revision: int
    aliases: Mapping[str, str]

    def __init__(self, reader: _Reader, limits: CheckpointLimits) -> None:
        version = reader.number("version", "I")
        if version != _VERSION:
            reader.fail(
                "this version of the format is not supported", f"version {version}", f"version {_VERSION} is supported"
            )
        self.specification = reader.text("specification")
        self.revision = reader.number("revision", "I")
        records: dict[str, TensorRecord] = {}
        for _ in range(reader.count("variables", limits.tensors)):
            record = _read_variable(reader, limits)
            if record.name in records:
                reader.fail("a variable appears twice", printable(record.name))
            records[record.name] = record
        aliases: dict[str, str] = {}
        for _ in range(reader.count("aliases", limits.tensors)):
            alias, name = reader.text("alias"), reader.text("aliased name")
            if name not in records or alias in records or alias in aliases:
                reader.fail(
                    "an alias refers to an unknown variable, or its name is already used",
                    f"{printable(alias)} for {printable(name)}",
                )
            aliases[alias] = name
        if reader.at != len(reader.data):
            reader.fail("the file continues after its last record", f"{len(reader.data) - reader.at} bytes")
        super().__init__(reader.file, records, reader.data)
        self.aliases = MappingProxyType(aliases)

    @classmethod
    def open(
        cls, path: PathLike, limits: CheckpointLimits | Mapping[str, int] | None = None, *, shown: str | None = None
    ) -> CTranslate2File:
        """Map the file and check its records; the variables' bytes are not read.

        `shown` is the file's name in errors, by default the path. Raises CheckpointError if the file does not exist, is
        not a regular file, breaks the format, or exceeds a limit.
        """
        shown = shown or shown_path(path)
        with open_regular(path, shown) as file:
            return cls.read(file, limits_of(CheckpointLimits, limits))

    @classmethod
    def read(cls, file: RegularFile, limits: CheckpointLimits) -> CTranslate2File:
        """Map an open file, which may be closed afterwards. Raises CheckpointError as `open` does."""
        return cls(_Reader(_map(file), file.state), limits)

    def __contains__(self, name: object) -> bool:
        return name in self._records or name in self.aliases

    def record(self, name: str, /) -> TensorRecord:
        """Return the dtype, shape and offset of a variable. Raises CheckpointError, with the nearest names, if there is
        none.
        """
        return super().record(self.aliases.get(name, name))

    def array(self, name: str, /) -> npt.NDArray[Any]:
        """Return a variable as a read-only array, a view of the mapped file. Two kinds are copied: bf16, which NumPy
        lacks and which is widened to float32; and data whose offset is not a multiple of its element size, which is
        common in this format.

        Raises CheckpointError if there is no such variable, or if the file has changed since it was opened.
        """
        record, raw = self.record(name), self.raw(name)
        dtype = np.dtype(_NUMPY.get(record.dtype, "<u2"))
        array: npt.NDArray[Any] = (raw if record.begin % dtype.itemsize == 0 else raw.copy()).view(dtype)
        if record.dtype == "bf16":
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        array = array.reshape(record.shape)
        array.flags.writeable = False
        return array

    def __repr__(self) -> str:
        return f"CTranslate2File({self.label!r}, {self.specification}, {len(self)} variables)"


class _Reader:
    """A cursor that reads numbers and strings from the file's bytes. Errors give the byte at which the last value
    began.
    """

    def __init__(self, data: mmap.mmap, file: FileState) -> None:
        self.data = data
        self.file, self.shown = file, file.label
        self.at = 0
        self.began = 0
        self.field = "header"

    def fail(self, what: str, received: str, hint: str = _DAMAGED) -> NoReturn:
        place = f"{self.shown}: byte {self.began}, {self.field}"
        raise CheckpointError(what, received=received, within=place, hint=hint)

    def take(self, size: int, field: str) -> int:
        """Skip `size` bytes; return the offset of the first of them."""
        self.began, self.field = self.at, field
        if size > len(self.data) - self.at:
            self.fail("the file ends within a record", f"{len(self.data) - self.at} bytes where {size} should be")
        self.at += size
        return self.began

    def number(self, field: str, code: str) -> int:
        begin = self.take(struct.calcsize(code), field)
        return int(struct.unpack_from(f"<{code}", self.data, begin)[0])

    def count(self, field: str, limit: int) -> int:
        count = self.number(f"count of {field}", "I")
        if count > limit:
            self.fail(
                f"the file declares more {field} than the limit",
                f"{count}, limit {limit}",
                limit_hint("tensors", count),
            )
        return count

    def text(self, field: str) -> str:
        length = self.number(f"{field}, length", "H")
        if not 0 < length <= _LONGEST:
            self.fail(f"a text must have from 1 to {_LONGEST} bytes", f"{length} bytes")
        begin = self.take(length, field)
        data = self.data[begin : self.at]
        if data.find(0) != length - 1:
            self.fail("a text must end in its one NUL", printable(repr(data)))
        try:
            return data[:-1].decode()
        except UnicodeDecodeError:
            self.fail("a text must be UTF-8", printable(repr(data)))


def _read_variable(reader: _Reader, limits: CheckpointLimits) -> TensorRecord:
    name = reader.text("name")
    shown = printable(name)
    rank = reader.number(f"{shown}, rank", "B")
    if rank > limits.rank:
        reader.fail("a variable has more dimensions than the limit", f"rank {rank}, limit {limits.rank}")
    shape = tuple(reader.number(f"{shown}, dimension {i}", "I") for i in range(rank))
    if prod(max(size, 1) for size in shape) > _LARGEST:  # NumPy multiplies sizes in this way even if one of them is 0
        reader.fail("a variable has more elements than NumPy supports", str(shape))
    number = reader.number(f"{shown}, dtype", "B")
    if number >= len(_DTYPES):
        reader.fail("the dtype is not known", f"number {number}", f"a number from 0 to {len(_DTYPES) - 1}")
    dtype, width = _DTYPES[number]
    size = reader.number(f"{shown}, bytes", "I")
    if size != prod(shape) * width:
        wanted = f"{dtype}[{', '.join(map(str, shape))}] takes {prod(shape) * width}"
        reader.fail("a variable's bytes do not equal dtype x shape", f"{size} bytes, and dtype x shape needs {wanted}")
    begin = reader.take(size, f"{shown}, data")
    return TensorRecord(name, dtype, shape, begin, reader.at)


def _map(file: RegularFile) -> mmap.mmap:
    shown = file.state.label
    try:
        size = os.fstat(file.fileno()).st_size
        if size:
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError("the file cannot be read", received=str(error), within=shown) from None
    raise CheckpointError("the file is empty", within=f"{shown}: byte 0", hint=_DAMAGED)
