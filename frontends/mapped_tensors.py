"""The tensors of a memory-mapped file of any format: a mapping from names, in the file's order, to records and
bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import FileState
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor's entry in a file.

    dtype         f64 f32 f16 bf16, i64 i32 i16 i8, u64 u32 u16 u8, bool, c64, or a narrow float: f8_e4m3, ...
    begin, end    byte range of the tensor in the file, counted from the file's start
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of the tensor's blocks along the last axis; None for plain numbers and for block types without
        an encoding.
        """
        return None

    @property
    def outputs_first(self) -> bool:
        """True for the weight of a linear layer that is read as [outputs, inputs], whatever order a table of names
        expects in the file.
        """
        return False

    @property
    def nbytes(self) -> int:
        """Number of bytes of the tensor in the file."""
        return self.end - self.begin

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


Record = TypeVar("Record", bound=TensorRecord)


class MappedTensors(Generic[Record]):
    """The common base of the readers of all formats.

    A mapping need not be closed: its arrays keep it alive, and the last one releases it. The file must not be changed
    while it is mapped. Before each array is created, the file's size is checked. If the file is truncated later, the
    operating system ends a process that reads the array, as for every memory-mapped file.

    path     the file's name in errors
    called   the format's word for a tensor
    """

    called = "tensor"

    def __init__(self, file: FileState, records: Mapping[str, Record], data: mmap.mmap) -> None:
        self.file, self.path = file, file.label
        self._records = dict(records)
        self._data = data

    @property
    def label(self) -> str:
        """The file's name in errors."""
        return self.path

    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the file's order."""
        return tuple(self._records)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def record(self, name: str, /) -> Record:
        """Return a tensor's entry in the file. Raises CheckpointError, with the nearest names, if there is none."""
        record = self._records.get(name)
        if record is None:
            near = NearestNames(self._records).of(name, 3)
            raise CheckpointError(
                f"the file has no {self.called} {printable(name)}",
                received=f"{len(self._records)} {self.called}s",
                within=self.path,
                hint="did you mean " + " or ".join(map(printable, near)) if near else None,
            )
        return record

    def raw(self, name: str, /) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes as stored in the file, u8[nbytes]: a read-only view, whatever the tensor's dtype.

        Raises CheckpointError if there is no such tensor, or if the file has changed since it was opened.
        """
        record = self.record(name)
        self.file.check()
        return np.frombuffer(self._data, np.uint8, record.nbytes, record.begin)

    def bits(self, name: str, /) -> npt.NDArray[np.uint16]:
        """Return the bits of a bf16 tensor, u16 of its shape, read-only. The array is a view of the file if its offset
        is even.
        """
        record, raw = self.record(name), self.raw(name)
        bits = (raw if record.begin % 2 == 0 else raw.copy()).view("<u2").reshape(record.shape)
        bits.flags.writeable = False
        return bits
