"""One GGUF file, memory-mapped; metadata and tensor table are checked completely before any value is returned.

Source: the GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

    "GGUF", version u32, tensors u64, keys u64
    keys      times:   key string, type u32, value
    tensors   times:   name string, rank u32, sizes u64[rank] (innermost first), block type u32, offset u64
    padding to general.alignment (default 32), then each tensor's blocks, at a multiple of the alignment

    string    length u64, then bytes in UTF-8
    array     type u32, count u64, then the values

The project has its own, strict reader. It compares every count, length and size with the number of remaining bytes
before it uses them, so that the work is proportional to the file's size. The `gguf` library provides the block size of
each type, and decodes the rarer types; its own reader neither checks lengths nor bounds its work. Arrays of arrays are
refused, as in llama.cpp.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import FileState, PathLike, RegularFile, open_regular
from treadle.files.limits import limits_of
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.gguf_blocks import PLAIN, GGUFTensor, dequantised
from treadle.frontends.gguf_header import BOOL, DAMAGED, MAGIC, SCALARS, STRING, GGUFLimits, HeaderReader, HeaderValue
from treadle.frontends.mapped_tensors import MappedTensors
from treadle.ir.errors import CheckpointError


class GGUFFile(MappedTensors[GGUFTensor]):
    """The metadata and tensors of one file. It need not be closed. If the file changes while it is mapped, reads are
    refused.
    """

    def __init__(
        self, file: FileState, data: mmap.mmap, values: Mapping[str, HeaderValue], tensors: Mapping[str, GGUFTensor]
    ) -> None:
        super().__init__(file, tensors, data)
        self._values = dict(values)

    @classmethod
    def open(cls, path: PathLike, limits: GGUFLimits | Mapping[str, int] | None = None) -> GGUFFile:
        """Map the file and check everything before the tensors' blocks; no block is read.

        Raises CheckpointError, with the byte and the field, if the file does not exist, is not a regular file, breaks
        the format, or exceeds a limit; FrontendError if the gguf library is not installed.
        """
        shown = shown_path(path)
        with open_regular(path, shown) as file:
            return cls.read(file, limits)

    @classmethod
    def read(cls, file: RegularFile, limits: GGUFLimits | Mapping[str, int] | None = None) -> GGUFFile:
        """Map an open file, as `open` does."""
        shown = file.state.label
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
        """The value of general.architecture: "llama", ... Raises CheckpointError if it is missing."""
        return self.text("general.architecture")

    def has(self, key: str) -> bool:
        """Return True if the metadata has a key."""
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string. Raises CheckpointError if it is missing and has no default, or if the value is not a
        string.
        """
        value = self._scalar(key, default is not None)
        if value is None:
            return default or ""
        if value.kind != STRING:
            self.fail(key, "must be a string")
        return self._string(key, value.at)

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """Return an integer of any width from least to most. Raises CheckpointError."""
        value = self._scalar(key, default is not None)
        if value is None:
            return default or 0
        found = self._number(value)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            self.fail(key, f"must be an integer from {least} to {most}", repr(found))
        return found

    def number(self, key: str, default: float | None = None, *, least: float = 0.0, most: float = 1e12) -> float:
        """Return a finite number from least to most. Raises CheckpointError."""
        value = self._scalar(key, default is not None)
        if value is None:
            return default or 0.0
        found = self._number(value)
        if not isinstance(found, int | float) or isinstance(found, bool) or not least <= found <= most:
            self.fail(key, f"must be a number from {least:g} to {most:g}", repr(found))
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """Return a bool. Raises CheckpointError if the value is not a bool."""
        value = self._scalar(key, True)
        if value is None:
            return default
        if value.kind != BOOL:
            self.fail(key, "must be true or false")
        return bool(self._number(value))

    def texts(self, key: str) -> list[str]:
        """Return an array of strings. Raises CheckpointError if the key is missing, or if its value is not an array of
        strings in UTF-8.
        """
        value = self._present(key)
        if value.starts is None:
            self.fail(key, "must be an array of strings")
        return [self._string(key, at) for at in value.starts]

    def numbers(self, key: str) -> npt.NDArray[Any]:
        """Return an array of numbers, a read-only view of the file. Raises CheckpointError."""
        value = self._present(key)
        if value.count is None or value.kind not in SCALARS:
            self.fail(key, "must be an array of numbers")
        dtype = np.dtype(SCALARS[value.kind][1])
        return np.frombuffer(self._data, np.uint8, value.count * dtype.itemsize, value.at).view(dtype)

    def fail(self, key: str, what: str, received: str | None = None, hint: str | None = None) -> NoReturn:
        """Raise CheckpointError for the value of a key, with its byte."""
        value = self._values.get(key)
        place = f"byte {value.at}, key {printable(key)}" if value is not None else f"key {printable(key)}"
        raise CheckpointError(f"{printable(key)} {what}", received=received, within=f"{self.path}: {place}", hint=hint)

    def _present(self, key: str) -> HeaderValue:
        value = self._values.get(key)
        if value is None:
            self.fail(key, "is missing from the metadata")
        return value

    def _scalar(self, key: str, optional: bool) -> HeaderValue | None:
        value = self._values.get(key) if optional else self._present(key)
        if value is not None and value.count is not None:
            self.fail(key, "must be a single value", f"an array of {value.count}")
        return value

    def _number(self, value: HeaderValue) -> Any:
        return struct.unpack_from(SCALARS[value.kind][1], self._data, value.at)[0] if value.kind in SCALARS else None

    def _string(self, key: str, at: int) -> str:
        (length,) = struct.unpack_from("<Q", self._data, at)
        try:
            return self._data[at + 8 : at + 8 + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"a string of {printable(key)} is not UTF-8",
                received=error.reason,
                within=f"{self.path}: byte {at + 8 + error.start}, key {printable(key)}",
                hint=DAMAGED,
            ) from None

    # -- tensors -----------------------------------------------------------------------------------------------

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as a read-only array of its shape. Plain numbers are a view of the file; blocks are
        dequantized to float32.

        Raises CheckpointError if there is no such tensor, or if its block type cannot be dequantized.
        """
        record, raw = self.record(name), self.raw(name)
        if record.blocks in PLAIN:
            dtype = np.dtype(PLAIN[record.blocks])
            made = (raw if record.begin % dtype.itemsize == 0 else raw.copy()).view(dtype)
        else:
            made = dequantised(record, raw, self.path)
        made = made.reshape(record.shape)
        made.flags.writeable = False
        return made

    def block_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's blocks as a read-only view of the file, u8[..., bytes of a row]; see
        `treadle.ir.encodings`.

        Raises CheckpointError if there is no such tensor, if its block type is not an encoding, or if the scale of a
        block is infinite or NaN: a product would give NaN for every text.
        """
        record = self.record(name)
        if record.encoding is None:
            raise CheckpointError(
                f"the type of tensor {printable(name)} is not a supported block quantization",
                received=str(record),
                within=self.path,
            )
        held = self.raw(name).reshape(*record.shape[:-1], -1)
        damaged = record.encoding.first_not_finite(held)
        if damaged is not None:
            number, scale = damaged
            at = record.begin + number * record.encoding.bytes(record.encoding.elements(record.shape[-1]))
            raise CheckpointError(
                "a block's scale is NaN or infinite",
                received=scale,
                within=f"{self.path}: byte {at}, block {number} of {record.blocks}, tensor {printable(name)}",
                hint=DAMAGED,
            )
        return held

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, {len(self._values)} keys, {len(self)} tensors)"


def _open(file: RegularFile, shown: str, limits: GGUFLimits) -> GGUFFile:
    size = os.fstat(file.fileno()).st_size
    magic = file.read(4)
    if magic != MAGIC:
        raise CheckpointError(
            "not a GGUF file",
            received=f"the first bytes are {magic!r}" if magic else "an empty file",
            within=f"{shown}: byte 0, magic",
            hint=DAMAGED,
        )
    data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    reader = HeaderReader(data, shown, limits)
    values, tensors = reader.read()
    return GGUFFile(file.state, data, values, tensors)
