"""One safetensors file, memory-mapped; its header is checked completely before any array is returned.

Source: the safetensors format, https://github.com/huggingface/safetensors#format

    8 bytes   n, an unsigned little-endian integer
    n bytes   the header, a JSON object in UTF-8 that begins with '{' and may end in spaces:
                {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
                 "__metadata__": {"text": "text", ...}}
    the rest  the tensors' bytes, little-endian, row-major; begin and end count from here

The reader refuses these files and reports the byte or the field: a key that appears twice, an unknown dtype or field, a
size that does not equal dtype x shape, and ranges that overlap, leave gaps, or reach past the end of the file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import FileState, PathLike, RegularFile, open_regular
from treadle.files.limits import MORE, limit_hint, limits_of
from treadle.files.shown_names import printable, shown_path
from treadle.files.strict_json import JsonReader
from treadle.frontends.deferred_arrays import widened_bits
from treadle.frontends.mapped_tensors import MappedTensors, TensorRecord
from treadle.ir.errors import CheckpointError, UsageError

_LENGTH_BYTES = 8
_LARGEST = 2**63 - 1
_DAMAGED = "fetch the file again: it is damaged, or of another format than its name indicates"

# Bits of each dtype that the format knows. Our name of a dtype is the format's name in lower case.
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_NUMPY: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in (
        ("f64", "<f8"), ("f32", "<f4"), ("f16", "<f2"), ("c64", "<c8"), ("bool", "?"),
        ("i64", "<i8"), ("i32", "<i4"), ("i16", "<i2"), ("i8", "i1"),
        ("u64", "<u8"), ("u32", "<u4"), ("u16", "<u2"), ("u8", "u1"),
    )
}  # fmt: skip

# Formats that are often stored under the name of a safetensors file: the first bytes, the format, the hint; None:
# `conversion`.
_FOREIGN: tuple[tuple[bytes, str, str | None], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file that it stands for: git lfs pull"),
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickle files are", None),
    (b"\x80\x02", "a pickle", None),
    (b"GGUF", "a GGUF file", "rename it with the suffix .gguf"),
    (b"<!", "a web page", "fetch the file again: the download returned a page in its place"),
    (b"<htm", "a web page", "fetch the file again: the download returned a page in its place"),
)
PICKLE_SUFFIXES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))
_CONVERSION = """import safetensors.torch, torch
tensors = torch.load({file!r}, weights_only=True, map_location='cpu')
# if the file holds more than weights, select them: tensors = tensors["state_dict"], or another key
safetensors.torch.save_file({{k: v.contiguous().clone() for k, v in tensors.items()}}, {made!r})"""


def conversion(file: str) -> str:
    """Return the hint for a pickle: the code that converts it to a file beside it, and the command that installs what
    the code needs.
    """
    missing = [name for name in ("torch", "safetensors") if find_spec(name) is None]
    install = f"pip install {' '.join(missing)}, and " if missing else ""
    path = PurePath(file)
    others = [str(path.with_name(name)) for name in ("model.safetensors", f"{path.stem}.safetensors")]
    unused = [each for each in others if not os.path.exists(each)] or [f"{file}.safetensors"]
    made = file if path.suffix == ".safetensors" else unused[0]  # a pickle under that name is replaced
    return f"if you trust the file, {install}convert it:\n{_CONVERSION.format(file=file, made=made)}"


@dataclass(frozen=True)
class CheckpointLimits:
    """Limits of a checkpoint's sizes; a checkpoint that exceeds a limit is refused. Every field may be set higher.

    header_bytes    length of a safetensors header, and of the index of a sharded checkpoint
    tensors         tensors in one file, and in one index
    rank            dimensions of a tensor (NumPy holds at most 64)
    config_bytes    length of config.json
    values          values in config.json, and in the metadata of a file or of an index
    nesting         nesting depth of JSON objects and arrays (at most 100)

    Raises UsageError for a limit that is not a positive integer, or exceeds the supported maximum.
    """

    header_bytes: int = 32 * 2**20
    tensors: int = 250_000
    rank: int = 16
    config_bytes: int = 4 * 2**20
    values: int = 200_000
    nesting: int = 32

    def __post_init__(self) -> None:
        ceilings = {"rank": 64, "nesting": 100}
        for field in fields(self):
            value, most = getattr(self, field.name), ceilings.get(field.name, _LARGEST)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(
                    f"CheckpointLimits: {field.name} must be an integer from 1 to {most}", received=repr(value)
                )


class SafetensorsFile(MappedTensors[TensorRecord]):
    """The tensors of one file: a mapping from names, in the header's order, to records and arrays.

    metadata   the header's text-to-text map, read-only
    """

    metadata: Mapping[str, str]

    def __init__(
        self, file: FileState, records: Mapping[str, TensorRecord], metadata: Mapping[str, str], data: mmap.mmap
    ) -> None:
        super().__init__(file, records, data)
        self.metadata = MappingProxyType(dict(metadata))

    @classmethod
    def open(
        cls, path: PathLike, limits: CheckpointLimits | Mapping[str, int] | None = None, *, shown: str | None = None
    ) -> SafetensorsFile:
        """Map the file and check its header. No tensor is read; only the sizes of tensors are checked.

        `shown` is the file's name in errors, by default the path. Raises CheckpointError if the file does not exist, is
        not a regular file, has the name of a pickle, breaks the format, or exceeds a limit.
        """
        shown = shown or shown_path(path)
        refuse_pickle(PurePath(path).name, shown)
        with open_regular(path, shown) as file:
            return cls.read(file, limits_of(CheckpointLimits, limits))

    @classmethod
    def read(cls, file: RegularFile, limits: CheckpointLimits) -> SafetensorsFile:
        """Map an open file, which may be closed afterwards. Raises CheckpointError as `open` does."""
        try:
            return _open(file, file.state.label, limits)
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError("the file cannot be read", received=str(error), within=file.state.label) from None

    def __getitem__(self, name: str) -> TensorRecord:
        """Return a tensor's entry in the file. Raises CheckpointError, with the nearest names, if there is none."""
        return self.record(name)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as a read-only array of its shape, without a copy: a view of the mapped file.

        Two kinds are copied: bf16, which NumPy lacks and which is widened to float32 (exact; `raw` returns the stored
        bytes); and data whose offset is not a multiple of its element size.

        Raises CheckpointError if there is no such tensor, if NumPy has no dtype for it (narrow floats), if a bool is
        neither 0 nor 1, or if the file has changed since it was opened.
        """
        record, raw = self[name], self.raw(name)
        if record.dtype == "bf16":
            array: npt.NDArray[Any] = widened_bits(self.bits(name))
        else:
            dtype = _NUMPY.get(record.dtype)
            if dtype is None:
                raise CheckpointError(
                    "NumPy has no dtype that holds the tensor",
                    received=str(record),
                    within=f"{self.path}: tensor {printable(name)}",
                    hint="convert the checkpoint to bf16, f16 or f32",
                )
            if record.dtype == "bool":
                self._check_bools(record, raw)
            array = (raw if record.begin % dtype.itemsize == 0 else raw.copy()).view(dtype)
        array = array.reshape(record.shape)
        array.flags.writeable = False
        return array

    def _check_bools(self, record: TensorRecord, raw: npt.NDArray[np.uint8]) -> None:
        if raw.size and raw.max() > 1:
            at = int(np.argmax(raw > 1))
            raise CheckpointError(
                "a bool tensor holds a byte that is neither 0 nor 1",
                received=f"byte 0x{raw[at]:02x}",
                within=f"{self.path}: byte {record.begin + at}, tensor {printable(record.name)}",
                hint=_DAMAGED,
            )

    @property
    def head(self) -> bytes:
        """The bytes before the tensors, as stored in the file: the header's length and the header."""
        return self._data[: min((record.begin for record in self._records.values()), default=len(self._data))]

    def __repr__(self) -> str:
        return f"SafetensorsFile({self.path!r}, {len(self)} tensors)"


def refuse_pickle(name: str, shown: str) -> None:
    """Raise CheckpointError for a file name that PyTorch's pickles use."""
    if PurePath(name).suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            "a pickle can run any code when it is loaded, so none is ever loaded",
            received=printable(name),
            within=shown,
            hint=conversion(shown),
        )


def _open(file: RegularFile, shown: str, limits: CheckpointLimits) -> SafetensorsFile:
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)

    def fail(what: str, received: str, place: str, hint: str) -> NoReturn:
        if any(start[4:8]):  # these bytes would make a length of more than 4 GiB, so they are not a length
            for magic, nature, remedy in _FOREIGN:
                if start.startswith(magic):
                    received, hint = f"{received}; the first bytes match {nature}", remedy or conversion(shown)
        raise CheckpointError(what, received=received, within=f"{shown}: {place}", hint=hint)

    if len(start) < _LENGTH_BYTES:
        fail("the file is too short for a header", f"{size} bytes", "byte 0, header length", _DAMAGED)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if length > size - _LENGTH_BYTES:
        fail(
            "the header is longer than the file",
            f"a header length of {length} bytes, in a file of {size}",
            "byte 0, header length",
            _DAMAGED,
        )
    if length > limits.header_bytes:
        fail(
            "the header is longer than the limit",
            f"a header length of {length} bytes, limit {limits.header_bytes}",
            "byte 0, header length",
            limit_hint("header_bytes", length),
        )
    file.seek(_LENGTH_BYTES)
    header = file.read(length)
    if len(header) != length:
        fail("the file has become shorter while it was read", f"{len(header)} bytes", "header", _DAMAGED)
    if header[:1] != b"{":
        received = f"byte 0x{header[0]:02x}" if header else "a header of 0 bytes"
        fail("the header must begin with '{'", received, f"byte {_LENGTH_BYTES}, header", _DAMAGED)
    base = _LENGTH_BYTES + length
    reader = JsonReader(header, f"{shown}: header", nesting=limits.nesting, values=limits.values, base=_LENGTH_BYTES)
    records, metadata = _read_header(reader, limits, base)
    _check_ranges(records, shown, base, size)
    return SafetensorsFile(file.state, records, metadata, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def _read_header(
    reader: JsonReader, limits: CheckpointLimits, base: int
) -> tuple[dict[str, TensorRecord], dict[str, str]]:
    records: dict[str, TensorRecord] = {}
    metadata: dict[str, str] = {}
    for name in reader.members():
        if name == "__metadata__":
            reader.place = "__metadata__"
            if not reader.take_null():
                for key in reader.members("an object of texts"):
                    if len(metadata) == limits.values:
                        reader.fail(
                            "the metadata has more members than the limit",
                            received=f"limit {limits.values}",
                            hint=limit_hint("values", MORE * limits.values),
                        )
                    metadata[key] = reader.string("a text")
        elif len(records) == limits.tensors:
            reader.fail(
                "the file declares more tensors than the limit",
                received=f"limit {limits.tensors}",
                hint=limit_hint("tensors", MORE * limits.tensors),
            )
        else:
            records[name] = _read_record(reader, name, limits, base)
        reader.place = ""
    reader.end()
    return records, metadata


def _read_record(reader: JsonReader, name: str, limits: CheckpointLimits, base: int) -> TensorRecord:
    tensor = f"tensor {printable(name)}"
    reader.place = tensor
    dtype, shape, offsets = None, None, None
    for key in reader.members("an object of dtype, shape and data_offsets"):
        reader.place = f"{tensor}, {printable(key)}"
        if key == "dtype":
            dtype = _read_dtype(reader)
        elif key == "shape":
            shape = _read_shape(reader, limits.rank)
        elif key == "data_offsets":
            offsets = _read_offsets(reader)
        else:
            reader.fail("the format has no such field", hint="one of the fields dtype, shape and data_offsets")
    reader.place = tensor
    if dtype is None or shape is None or offsets is None:
        given = (("dtype", dtype), ("shape", shape), ("data_offsets", offsets))
        reader.fail("a tensor lacks " + " and ".join(key for key, value in given if value is None))
    begin, end = offsets
    elements = 1
    for dim in shape:
        elements *= dim
    bits = elements * _BITS[dtype]
    if bits % 8:
        reader.fail("a tensor does not end on a whole byte", received=f"{dtype}{list(shape)}, {bits} bits")
    if end - begin != bits // 8:
        reader.fail(
            "a tensor's bytes do not match its dtype and shape",
            received=f"data_offsets [{begin}, {end}] are {end - begin} bytes, {dtype}{list(shape)} needs {bits // 8}",
            hint=_DAMAGED,
        )
    return TensorRecord(name, dtype.lower(), shape, base + begin, base + end)


def _read_dtype(reader: JsonReader) -> str:
    dtype = reader.string()
    if dtype not in _BITS:
        reader.fail("unknown dtype", received=printable(dtype), hint="one of " + " ".join(_BITS))
    return dtype


def _read_shape(reader: JsonReader, rank: int) -> tuple[int, ...]:
    dims: list[int] = []
    # Upper bound of the number of bytes, with sizes of 0 counted as 1: NumPy cannot address an array of 2^63 bytes or
    # more.
    span = 8
    for count in reader.items("an array of sizes"):
        if count == rank:
            reader.fail(
                "the tensor has more dimensions than the limit",
                received=f"limit {rank}",
                hint=limit_hint("rank", min(MORE * rank, 64)),
            )
        dims.append(reader.size("a size"))
        span *= dims[-1] or 1
        if span > _LARGEST:
            reader.fail("the product of the shape is past 2^63 bytes", received=str(dims))
    return tuple(dims)


def _read_offsets(reader: JsonReader) -> tuple[int, int]:
    reader.expect(b"[", "before [begin, end]")
    begin = reader.size("begin")
    reader.expect(b",", "between begin and end")
    end = reader.size("end")
    reader.expect(b"]", "after [begin, end]")
    if end < begin:
        reader.fail("a tensor ends before it begins", received=f"[{begin}, {end}]", hint=_DAMAGED)
    return begin, end


def _check_ranges(records: Mapping[str, TensorRecord], shown: str, base: int, size: int) -> None:
    """Check that the tensors tile the bytes from `base` to `size`: each begins where the previous tensor ends."""

    def fail(what: str, received: str, record: TensorRecord, hint: str = _DAMAGED) -> NoReturn:
        place = f"tensor {printable(record.name)}, data_offsets [{record.begin - base}, {record.end - base}]"
        raise CheckpointError(what, received=received, within=f"{shown}: {place}", hint=hint)

    ordered = sorted(records.values(), key=lambda r: (r.begin, r.end))
    reached, before = base, ""
    for record in ordered:
        if record.end > size:
            fail(
                "the file ends before its tensors do",
                f"{size} bytes, and the header declares {max(r.end for r in ordered)}",
                record,
                "fetch the file again: its end is missing",
            )
        if record.begin < reached:
            fail(
                "two tensors share bytes",
                f"bytes {record.begin} to {min(record.end, reached)} of the file, also {printable(before)}'s",
                record,
            )
        if record.begin > reached:
            fail(
                "bytes before a tensor belong to no tensor",
                f"bytes {reached} to {record.begin} of the file",
                record,
            )
        reached, before = record.end, record.name
    if reached != size:
        raise CheckpointError(
            "bytes after the last tensor belong to no tensor",
            received=f"bytes {reached} to {size} of the file",
            within=f"{shown}: byte {reached}",
            hint=_DAMAGED,
        )
