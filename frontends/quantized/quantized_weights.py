"""Quantized weights of linear layers as blocks of an encoding.

A weight is f32[N, K], outputs by inputs, whatever the order in its file. Integers in groups,

    w[n, k] = scale[n, g] (q[n, k] - zero[n, g])        g: the group of k

become blocks along K. A group that is longer than a block is stored as several blocks of the same scale, which is
exact. If the inputs of a group are not neighbors (GPTQ's `desc_act`), the columns are stored group by group, and
`order` has the input of each column. A weight whose groups are not blocks (odd or unequal lengths) has no encoding, and
is decoded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from treadle.files.converted_arrays import pieces
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.encodings.rounded_forms import packed_nibbles, packed_pairs

Array = np.ndarray[Any, Any]

Read = Callable[[slice], Array]
"""A function that returns a range of a weight's rows."""

_LENGTHS = (256, 128, 64, 32, 16)
"""Lengths of blocks, in order of preference: fewer scales first."""


@dataclass(frozen=True, slots=True)
class QuantizedRecord(TensorRecord):
    """A quantized weight's entry: its decoded dtype and shape, and the bytes of its integers in the file.

    form    the encoding in which its blocks stay; None if it is decoded
    stored  the format in the file, in words
    """

    form: Encoding | None = None
    stored: str = ""

    @property
    def encoding(self) -> Encoding | None:
        return self.form

    @property
    def outputs_first(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}] stored as {self.stored}"


class QuantizedWeight(ABC):
    """A weight of a linear layer, or of experts, in a checkpoint.

    shape   (N, K): outputs and inputs; or (E, N, K): experts, outputs and inputs
    stored  the format in the file, in words
    first   the entry of the tensor with its integers
    """

    shape: tuple[int, ...]
    stored: str
    first: TensorRecord

    @property
    @abstractmethod
    def form(self) -> Encoding | None:
        """The encoding of `blocks`, or None if the weight is decoded."""

    @abstractmethod
    def reader(self) -> Read:
        """Return a function that returns the blocks of a range of rows of the first axis, for a weight that has a form.
        It raises CheckpointError for damaged numbers in them.
        """

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of `blocks`: (..., N, bytes of a row)."""
        assert self.form is not None
        return (*self.shape[:-1], self.form.bytes(self.shape[-1]))

    def blocks(self) -> Array:
        """Return the weight's blocks, u8 of `block_shape`, for a weight that has a form."""
        made, read = np.empty(self.block_shape, np.uint8), self.reader()
        for rows in pieces(len(made), made[:1].nbytes):
            made[rows] = read(rows)
        return made

    @abstractmethod
    def numbers(self) -> Array:
        """Return the decoded numbers, float32 of the shape."""

    @property
    def order(self) -> Array | None:
        """The input of each column of the blocks, i32[K]; None if they are in order."""
        return None

    @property
    def why_decoded(self) -> str:
        """The reason why a weight has no form."""
        return f"rows of {self.shape[-1]} elements are not an integer number of blocks"

    def record(self, name: str) -> QuantizedRecord:
        """Return the weight's entry under a name."""
        return QuantizedRecord(name, "f32", self.shape, self.first.begin, self.first.end, self.form, self.stored)


@dataclass(frozen=True, eq=False)
class GroupedIntegers(QuantizedWeight):
    """Integers of 2, 3, 4 or 8 bits in groups of inputs.

    bits      bits of an integer
    group     inputs of a group, which divides K; K: a group is a whole row
    integers  returns q of a range of rows, u8[n, K], from 0 to 2^bits - 1
    factors   returns the scales, f32[N, G], and the zeros, integers of the same shape
    members   the group of each input, if they are in another order than k // group: i64[K]
    pairs     for 4 bits that are stored in pairs along k: returns the bytes of a range of rows, u8[n, K / 2], the
              first of two integers in the low half; None
    """

    first: TensorRecord
    stored: str
    shape: tuple[int, int]
    bits: int
    group: int
    integers: Read
    factors: Callable[[], tuple[Array, Array]]
    members: Array | None = None
    pairs: Read | None = None

    @cached_property
    def order(self) -> Array | None:
        if self.members is None:
            return None
        return np.argsort(self.members, kind="stable").astype(np.int32)

    @cached_property
    def _unequal(self) -> bool:
        """True if groups have different numbers of inputs."""
        return self.members is not None and bool((np.bincount(self.members) != self.group).any())

    def _factors(self) -> tuple[Array, Array]:
        """Return the scales and zeros, computed again at each call: they are too large to be kept for all weights."""
        scales, zeros = self.factors()
        return scales, zeros.astype(np.int32)

    @cached_property
    def length(self) -> int | None:
        """The number of elements of a block, or None if there are no blocks."""
        return None if self._unequal else block_length(self.group)

    @cached_property
    def form(self) -> Encoding | None:
        scales, zeros = self._factors()
        symmetric = bool((zeros == 1 << (self.bits - 1)).all())
        if self.bits == 8 and symmetric and self.members is None and self.group == self.shape[1]:
            return Encoding("int8_rows")
        if self.length is None:
            return None
        if self.bits == 8:
            return Encoding("int8_groups" if symmetric else "int8_zero_groups", self.length)
        with np.errstate(over="ignore"):
            halves = np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
        if not halves:
            return Encoding("uint4_wide_groups", self.length)
        return Encoding("int4_groups" if symmetric else "uint4_groups", self.length)

    @property
    def why_decoded(self) -> str:
        if self._unequal:
            return f"its groups do not all have {self.group} inputs"
        return f"groups of {self.group} are not an integer number of blocks"

    def reader(self) -> Read:
        form = self.form
        assert form is not None
        size, (scales, zeros) = self.shape[1], self._factors()
        n = form.elements(size)
        record = form.block.record(n)
        repeated = 1 if self.group == size == n else self.group // n

        def read(rows: slice) -> Array:
            of_rows = scales[rows]
            made = np.empty((len(of_rows), size // n), record)
            made["scale"] = np.repeat(of_rows, repeated, axis=1)
            if "zero" in (record.names or ()):
                made["zero"] = np.repeat(zeros[rows] - (128 if self.bits == 8 else 0), repeated, axis=1)
            if self.pairs is not None and self.order is None:
                made["q"] = packed_pairs(self.pairs(rows).reshape(-1, size // n, n // 2))
                return made.view(np.uint8).reshape(len(made), -1)
            q = self.integers(rows)
            if self.order is not None:
                q = np.take(q, self.order, axis=1)  # several times as fast as an index
            if self.bits == 8:
                made["q"] = (q ^ np.uint8(128)).view(np.int8).reshape(made["q"].shape)
            else:
                if form.form == "int4_groups" and self.bits < 4:
                    q = q + np.uint8(8 - (1 << (self.bits - 1)))
                made["q"] = packed_nibbles(q.reshape(len(made), size // n, n))
            return made.view(np.uint8).reshape(len(made), -1)

        return read

    def numbers(self) -> Array:
        if self.form is not None:
            made: Array = self.form.decode(self.blocks())
            return made if self.order is None else np.take(made, np.argsort(self.order), axis=1)
        scales, zeros = (np.asarray(x, np.float32) for x in self._factors())
        members = np.arange(self.shape[1]) // self.group if self.members is None else self.members
        made = self.integers(slice(None)).astype(np.float32)
        made -= zeros[:, members]
        made *= scales[:, members]
        return made


def block_length(group: int) -> int | None:
    """Return the number of elements of a block, for groups of this length; None if they are not whole blocks."""
    return next((n for n in _LENGTHS if group % n == 0), None)


def unpack_low_first(words: Array, bits: int) -> Array:
    """Return the integers of rows of little-endian words or bytes, u8[n, bits of a row / bits]: integer i is at bit
    `bits` i of its row.
    """
    bytes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return bytes
    if bits == 3:
        ones = np.unpackbits(bytes, axis=1, bitorder="little").reshape(len(bytes), -1, 3)
        made: Array = ones[..., 0] | (ones[..., 1] << np.uint8(1)) | (ones[..., 2] << np.uint8(2))
        return made
    mask, found = np.uint8((1 << bits) - 1), np.empty((*bytes.shape, 8 // bits), np.uint8)
    last = 8 // bits - 1
    np.bitwise_and(bytes, mask, out=found[..., 0])
    for i in range(1, last):
        np.bitwise_and(bytes >> np.uint8(bits * i), mask, out=found[..., i])
    np.right_shift(bytes, np.uint8(bits * last), out=found[..., last])
    return found.reshape(len(bytes), -1)
