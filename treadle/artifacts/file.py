"""The container format of a `.treadle` file: named sections with hashes, in the layout of safetensors.

    8 bytes   n, an unsigned little-endian integer
    n bytes   the header, JSON: `__metadata__` (strings by name), then each section's dtype, shape and byte range
    the rest  the sections, each at a multiple of 64 bytes. A gap between two is a section `padding/i` of zeros.
              The last section, `seal`, is the SHA-256 of all bytes before the first section.

The metadata holds the SHA-256 of every section under `sha256:NAME`, so the seal covers the file. docs/artifacts.md
describes the sections; docs/decisions/0004-artifact-format.md gives the reasons for this layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from treadle.files.contained_files import PathLike
from treadle.files.limits import limit_hint
from treadle.files.shown_names import printable, shown_path
from treadle.files.whole_files import replacing, reporting_failed_writes
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.safetensors_file import CheckpointLimits as HeaderLimits
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.errors import CheckpointError, UsageError
from treadle.ir.literals import Literal
from treadle.ir.types import DType, bf16
from treadle.ir.types import u8 as _U8

Array = np.ndarray[Any, Any]

FORMAT = "treadle artifact"
VERSION = "2"
ALIGNMENT = 64

_HASH = "sha256:"
_SEAL = "seal"
_PADDING = "padding/"
_WEIGHT, _FILE = "weight/", "file/"
_TEXTS = ("declared", "graph", "log")
_OPTIONAL = ("sharding",)
_DAMAGED = "write the file again, or fetch it again: it was changed after it was written"


# -- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A named array, as stored in the file. `dtype` is the IR's dtype; the array of a bf16 section is passed as
    float32.
    """

    name: str
    dtype: DType
    values: Array

    @property
    def bytes(self) -> memoryview:
        """The array's bytes, little-endian and row-major: a view if the array has this layout, otherwise a copy."""
        values = self.values
        if self.dtype is bf16:
            return memoryview(Literal.of(values, bf16).data)
        ordered = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        return ordered.reshape(-1).view(np.uint8).data


def write_sections(
    path: Path,
    texts: Mapping[str, bytes],
    weights: Mapping[str, tuple[DType, Array]],
    metadata: Mapping[str, str],
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> str:
    """Write texts, weights and the files of a tokenizer to one file, completely or not at all. Return the seal, in
    hexadecimal digits.

    Equal arguments give equal bytes. Raises UsageError if the file cannot be written.
    """
    plain = {**texts, **{_FILE + name: data for name, data in files.items()}}
    sections = [Section(name, _U8, np.frombuffer(text, np.uint8)) for name, text in plain.items()]
    sections += [Section(_WEIGHT + name, dtype, values) for name, (dtype, values) in weights.items()]
    entries = {"format": FORMAT, "version": VERSION, **metadata}
    header: dict[str, Any] = {"__metadata__": entries}
    padded: list[Section] = []
    at = 0
    for section in sections:
        data = section.bytes
        entries[_HASH + section.name] = sha256(data).hexdigest()
        padded.append(section)
        shape = list(section.values.shape)
        header[section.name], at = _entry(section.dtype.name, shape, at, len(data)), at + len(data)
        if fill := -at % ALIGNMENT:
            padding = Section(f"{_PADDING}{len(padded)}", _U8, np.zeros(fill, np.uint8))
            padded.append(padding)
            header[padding.name], at = _entry("u8", [fill], at, fill), at + fill
    header[_SEAL] = _entry("u8", [32], at, 32)
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        wrong = next(name for name in (*texts, *weights, *metadata.values()) if error.object[error.start] in name)
        raise UsageError("a name cannot be written as UTF-8", received=printable(wrong)) from None
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    seal = sha256(head)
    with reporting_failed_writes("the artifact", path), replacing(path) as file:
        file.write(head)
        for section in padded:
            file.write(section.bytes)
        file.write(seal.digest())
    return seal.hexdigest()


def _entry(dtype: str, shape: list[int], begin: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype.upper(), "shape": shape, "data_offsets": [begin, begin + size]}


# -- reading -------------------------------------------------------------------------------------------------------


class SectionFile:
    """The sections of an artifact, memory-mapped. Layout and hashes are checked.

    metadata  the metadata that the writer stored
    seal      the SHA-256 of the bytes before the first section, in hexadecimal digits; it identifies the file's content
    """

    def __init__(self, path: PathLike, limits: HeaderLimits, *, check: bool = True) -> None:
        """Map the file, and check its layout, its seal, and the hashes of its texts.

        check  True to read every weight, too, and compare its hash

        Raises CheckpointError if the file is damaged, is not an artifact, or exceeds a limit. The error names the
        section or the byte.
        """
        self.path = shown_path(path)
        self._file = SafetensorsFile.open(path, limits)
        metadata = dict(self._file.metadata)
        if metadata.pop("format", None) != FORMAT:
            self.fail("not an artifact", "__metadata__, format", "treadle compile MODEL -o FILE.treadle writes one")
        version = metadata.pop("version", "")
        if version != VERSION:
            self.fail(
                "the artifact has an unsupported version",
                "__metadata__, version",
                f"this Treadle reads version {VERSION}",
                received=printable(version),
            )
        self._hashes = {k.removeprefix(_HASH): metadata.pop(k) for k in list(metadata) if k.startswith(_HASH)}
        self.metadata: Mapping[str, str] = metadata
        self.seal = self._check_seal()
        self._check_layout()
        for name in self._hashes:
            if check or not name.startswith(_WEIGHT):
                self._check_hash(name)

    def text(self, name: str, most_bytes: int, setting: str) -> str:
        """Return a section's text. Raises CheckpointError if the text is not UTF-8, or exceeds `most_bytes`; the error
        then names `setting`, the limit to raise.
        """
        data = self._file.raw(name)
        if len(data) > most_bytes:
            self.fail(
                "the section is longer than the limit",
                f"section {name}",
                limit_hint(setting, len(data)),
                received=f"{len(data)} bytes, limit {most_bytes}",
            )
        try:
            return str(data.data, "utf-8")
        except UnicodeDecodeError as error:
            self.fail("the section is not UTF-8", f"section {name}, byte {error.start} of it", _DAMAGED)

    def __contains__(self, name: str) -> bool:
        """Return True if the file has a section of this name."""
        return name in self._file

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the tokenizer by name; an empty mapping for a model without one."""
        names = [name for name in self._file if name.startswith(_FILE)]
        return {name.removeprefix(_FILE): self._file.raw(name).tobytes() for name in names}

    @property
    def weights(self) -> dict[str, TensorRecord]:
        """The record of each weight in the file, by the weight's name."""
        return {n.removeprefix(_WEIGHT): self._file[n] for n in self._file if n.startswith(_WEIGHT)}

    def weight(self, name: str) -> Array:
        """Return a read-only weight: a view of the mapped file, or, for bf16, a copy in float32."""
        return self._file.array(_WEIGHT + name)

    def fail(self, what: str, place: str, hint: str | None = None, *, received: str | None = None) -> NoReturn:
        """Raise CheckpointError about a place in the file; `what` is the error's message."""
        raise CheckpointError(what, received=received, within=f"{self.path}: {place}", hint=hint)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_seal(self) -> str:
        if _SEAL not in self._file:
            self.fail("the artifact has no seal", "header", _DAMAGED)
        record, expected = self._file[_SEAL], sha256(self._file.head).digest()
        if record.end != max(r.end for r in self._records()) or self._file.raw(_SEAL).tobytes() != expected:
            self.fail("the header has changed since it was sealed", f"byte {record.begin}, section {_SEAL}", _DAMAGED)
        return expected.hex()

    def _check_layout(self) -> None:
        """Check that every section is known and aligned, that padding is zero, and that every other section has a
        hash.
        """
        for record in self._records():
            if record.name == _SEAL:
                continue
            if record.name.startswith(_PADDING):
                data = self._file.raw(record.name)
                if record.dtype != "u8" or len(data) >= ALIGNMENT or data.any():
                    self.fail("padding must be fewer than 64 bytes, all zero", _place(record), _DAMAGED)
                continue
            if record.name not in (*_TEXTS, *_OPTIONAL) and not record.name.startswith((_WEIGHT, _FILE)):
                self.fail("the format has no such section", _place(record), f"this Treadle reads version {VERSION}")
            if record.begin % ALIGNMENT:
                self.fail(f"a section must begin at a multiple of {ALIGNMENT}", _place(record), _DAMAGED)
            if record.name not in self._hashes:
                self.fail("a section has no hash", _place(record), _DAMAGED)
        for name in (*_TEXTS, *self._hashes):
            if name not in self._file or name.startswith(_PADDING) or name == _SEAL:
                self.fail("a section is missing", f"section {printable(name)}", _DAMAGED)

    def _check_hash(self, name: str) -> None:
        received = sha256(self._file.raw(name).data).hexdigest()
        if received != self._hashes[name]:
            record = self._file[name]
            self.fail(
                "the section's bytes have changed since they were written",
                f"bytes {record.begin} to {record.end}, section {printable(name)}",
                _DAMAGED,
                received=f"sha256 {received}, recorded {printable(self._hashes[name])}",
            )

    def _records(self) -> Iterator[TensorRecord]:
        return (self._file[name] for name in self._file)


def _place(record: TensorRecord) -> str:
    return f"byte {record.begin}, section {printable(record.name)}"
