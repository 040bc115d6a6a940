"""Tensors that a GGUF file stores in blocks: their entries in the file, and their decoded values.

Encodings (`treadle.ir.encodings`) decode their own block types; the gguf library decodes the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.installation import pip_install
from treadle.files.shown_names import printable
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.ir.encodings.encoding import FORMS, Encoding
from treadle.ir.errors import CheckpointError, FrontendError

_DEQUANTISED_AT_ONCE = 1 << 20  # bytes of blocks; the library needs a few times as much temporary memory
PLAIN: Mapping[str, str] = {
    "f32": "<f4", "f16": "<f2", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"
}  # fmt: skip
"""Block types that are plain arrays; all others are dequantized to float32."""


@dataclass(frozen=True, slots=True)
class GGUFTensor(TensorRecord):
    """One tensor's entry in the file.

    dtype         dtype of `array`: f32 for every block type that is dequantized
    blocks        the tensor's type in the file: "q4_1", "q8_0", "f16", ...
    begin, end    byte range of the tensor's blocks, counted from the file's start
    """

    blocks: str = "f32"

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of the tensor's blocks, which run along the last axis; None for plain numbers and for rarer
        block types.
        """
        return Encoding(self.blocks) if self.blocks in FORMS else None

    def __str__(self) -> str:
        stored = f" stored as {self.blocks}" if self.blocks != self.dtype else ""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{stored}"


def dequantised(record: GGUFTensor, raw: npt.NDArray[np.uint8], shown: str) -> npt.NDArray[np.float32]:
    """Return the elements of a tensor's blocks, in float32; `shown` is the file's name in errors. Raises
    CheckpointError.
    """
    if record.encoding is not None:
        made: npt.NDArray[np.float32] = record.encoding.decode(raw.reshape(*record.shape[:-1], -1))
        return made
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType[record.blocks.upper()]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, size)
    found = np.empty((len(blocks), elements), np.float32)
    step = max(1, _DEQUANTISED_AT_ONCE // size)
    try:
        with np.errstate(all="ignore"):  # a scale may have any value, NaN and infinities included
            for start in range(0, len(blocks), step):
                part = blocks[start : start + step].reshape(1, -1)  # one row: the library processes few rows at a time
                found[start : start + step] = gguf.dequantize(part, kind).reshape(-1, elements)
    except NotImplementedError:
        raise CheckpointError(
            f"blocks of type {record.blocks} cannot be dequantized",
            within=f"{shown}: byte {record.begin}, tensor {printable(record.name)}",
        ) from None
    return found


def import_gguf() -> Any:
    """Import the gguf library. Raises FrontendError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise FrontendError(
            "reading GGUF files needs the package gguf", received=str(error), hint=pip_install("gguf")
        ) from error
    return gguf
