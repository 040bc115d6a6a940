"""Weights of codes: narrow floats, and entries of a table, with scales of groups of inputs or blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.quantized.quantized_weights import QuantizedWeight, Read, block_length, unpack_low_first
from treadle.frontends.quantized.scale_blocks import ScaleBlocks
from treadle.ir.encodings.coded_forms import table_of
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.encodings.rounded_forms import packed_pairs
from treadle.ir.errors import CheckpointError

Array = np.ndarray[Any, Any]

E4M3, E2M1, MXFP4 = "e4m3_groups", "e2m1_groups", "mxfp4"
"""The forms of floats of 8 and of 4 bits. In MXFP4, scales are powers of two of 32 floats each."""


@dataclass(frozen=True, eq=False)
class CodedWeight(QuantizedWeight):
    """w[n, k] = table[q[n, k]] scale[n, g]

    code    name of the form, whose table gives the values of codes
    scales  the scales, in groups of inputs
    codes   returns the codes of a range of rows, u8[n, K]; for codes of 4 bits their bytes, u8[n, K / 2], the first of
            two in the low half
    """

    first: TensorRecord
    stored: str
    shape: tuple[int, int]
    code: str
    scales: ScaleBlocks
    codes: Read

    @cached_property
    def form(self) -> Encoding | None:
        length = None if self.scales.members is not None else block_length(self.scales.group)
        if self.code == MXFP4:
            return Encoding(MXFP4)
        return None if length is None else Encoding(self.code, length)

    @property
    def why_decoded(self) -> str:
        return f"rows of {self.shape[1]} are not an integer number of blocks with one scale"

    def reader(self) -> Read:
        assert self.form is not None
        size, scales = self.shape[1], self.scales.factors()
        n = self.form.elements(size)
        record = self.form.block.record(n)

        def read(rows: slice) -> Array:
            stored, of_rows = self._checked(rows), scales[rows]
            made = np.empty((len(stored), size // n), record)
            if self.code == MXFP4:
                made["e"] = np.frexp(of_rows)[1] + 126  # 2^(e - 127) is 0.5 times 2^(e - 126)
                made["qs"] = packed_pairs(stored.reshape(made["qs"].shape))
                return made.view(np.uint8).reshape(len(made), -1)
            made["scale"] = np.repeat(of_rows, self.scales.group // n, axis=1)
            codes = stored.reshape(made["q"].shape)
            made["q"] = codes if self.code == E4M3 else packed_pairs(codes)
            return made.view(np.uint8).reshape(len(made), -1)

        return read

    def numbers(self) -> Array:
        if self.form is not None:
            return self.form.decode(self.blocks())
        stored = self._checked(slice(None))
        codes = stored if self.code == E4M3 else unpack_low_first(stored, 4)
        made: Array = table_of(self.code)[codes]
        made *= self.scales.factors()[:, np.arange(self.shape[1]) // self.scales.group]
        return made

    def _checked(self, rows: slice) -> Array:
        """Return the codes of a range of rows as they are stored. Raises CheckpointError for a code of NaN."""
        codes = self.codes(rows)
        if self.code == E4M3 and (bad := (codes & 0x7F) == 0x7F).any():
            at = int(bad.reshape(-1).argmax())
            first = rows.indices(self.shape[0])[0] * self.shape[1]
            raise CheckpointError(
                "a weight is NaN",
                received=f"byte 0x{int(codes.reshape(-1)[at]):02x}",
                within=f"byte {self.first.begin + first + at}, tensor {self.first.name}",
            )
        return codes
