"""Weights in the formats of bitsandbytes: 4 bits (Dettmers et al. 2023), and 8 bits of LLM.int8 (Dettmers et al. 2022).

    weight               u8[N K / 2, 1]       codes of the rows, one after the other, the first of two in the high half
    weight.absmax        f32[N K / 64]        a scale per block of 64 codes; or u8, with the three parts below
    weight.quant_map     f32[16]              the values of codes
    weight.quant_state.bitsandbytes__nf4      u8, JSON: blocksize, shape, nested_blocksize, nested_offset (or __fp4)

    weight.nested_absmax f32, one per 256 of absmax;   weight.nested_quant_map f32[256]

    w = quant_map[q] a      a = absmax, or nested_quant_map[absmax] nested_absmax + nested_offset

    weight               i8[N, K]             8 bits
    SCB                  f32[N]               the largest magnitude of each row
    weight_format        u8, 0: by rows

    w = q (SCB / 127)

The library computes (q SCB) / 127, which may differ in the last place. Products of inputs beyond `llm_int8_threshold`,
which LLM.int8 computes in 16 bits, are computed as all others.

Source: https://github.com/bitsandbytes-foundation/bitsandbytes, `QuantState` in `bitsandbytes/functional.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from treadle.files.strict_json import read_json_object
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.quantized.module_parts import ModuleParts
from treadle.frontends.quantized.quantized_weights import GroupedIntegers, QuantizedWeight, Read, block_length
from treadle.frontends.quantized.settings import QuantizationSettings
from treadle.ir.encodings.coded_forms import table_of
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.encodings.rounded_forms import packed_pairs
from treadle.ir.transforms.rounded_inputs import InputRounding

Array = np.ndarray[Any, Any]

_STATE = ".weight.quant_state.bitsandbytes__"
_LARGEST_STATE = 1 << 12  # bytes of JSON
_LARGEST_SIZE = 1 << 31
_SIZES = tuple(1 << n for n in range(4, 13))


def read_bitsandbytes(settings: QuantizationSettings, parts: ModuleParts) -> Mapping[str, QuantizedWeight]:
    """Return the weights of a folder of bitsandbytes. Raises CheckpointError: see `open_quantized`."""
    eight = settings.flag("load_in_8bit", False, aliases=("_load_in_8bit",))
    four = settings.flag("load_in_4bit", not eight, aliases=("_load_in_4bit",))
    if eight == four:
        raise settings.error("load_in_8bit", eight, f"{not four}, as load_in_4bit is {four}".lower())
    if eight:
        rows = {f"{module}.weight": _rows(module, parts) for module in parts.modules(".SCB")}
        parts.roundings |= dict.fromkeys(rows, InputRounding("int8", outliers=settings.get("llm_int8_threshold") != 0))
        return rows
    settings.choice("bnb_4bit_quant_storage", ("uint8",), "uint8")
    made: dict[str, QuantizedWeight] = {}
    for kind in ("nf4", "fp4"):
        for module in parts.modules(f"{_STATE}{kind}"):
            made[f"{module}.weight"] = _weight(module, kind, parts)
    return made


def _rows(module: str, parts: ModuleParts) -> GroupedIntegers:
    """Return a weight of 8 bits."""
    name, scales, order = (f"{module}.{part}" for part in ("weight", "SCB", "weight_format"))
    record = parts.take(name, ("i8",), (None, None))
    outputs, size = record.shape
    parts.take(scales, ("f32",), (outputs,))
    if parts.has(order):
        parts.take(order, ("u8",), ())
        if (stored := int(parts.array(order))) != 0:
            raise parts.error(order, "rows are stored in the order of a GPU kernel", str(stored), "0: by rows")

    def factors() -> tuple[Array, Array]:
        largest = parts.checked_scales(scales, parts.array(scales), zero=True)
        return (largest / np.float32(127))[:, None], np.full((outputs, 1), 128, np.int32)

    def integers(rows: slice) -> Array:
        return parts.codes(name)[rows] ^ np.uint8(128)

    return GroupedIntegers(record, "bitsandbytes, 8 bits", (outputs, size), 8, size, integers, factors)


def _weight(module: str, kind: str, parts: ModuleParts) -> _Codes:
    name, state = f"{module}.weight", f"{module}{_STATE}{kind}"
    record = parts.take(state, ("u8",), (None,))
    if record.nbytes > _LARGEST_STATE:
        raise parts.error(state, "the state of a weight is too long", str(record), f"at most {_LARGEST_STATE} bytes")
    found = read_json_object(parts.array(state).tobytes(), parts.checkpoint.place(state), nesting=4, values=64)
    shape, block = found.get("shape"), found.get("blocksize")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(n) is int and 0 < n < _LARGEST_SIZE for n in shape)
    ):
        raise parts.error(state, "the shape of a weight must be two positive numbers", f"shape {shape!r}"[:80])
    if type(block) is not int or block not in _SIZES:
        raise parts.error(state, "unsupported blocksize", repr(block)[:80], "one of " + ", ".join(map(str, _SIZES)))
    if found.get("quant_type", kind) != kind:
        raise parts.error(state, f"the state of {kind} names another type", repr(found["quant_type"])[:80])
    count = shape[0] * shape[1]
    words = parts.take(name, ("u8",), (-(-count // 2), 1))
    scales = -(-count // block)
    parts.take(f"{name}.quant_map", ("f32",), (16,))
    absmax = parts.take(f"{name}.absmax", ("f32", "u8"), (scales,))
    nested, offset = found.get("nested_blocksize", 256), found.get("nested_offset", 0.0)
    if absmax.dtype == "u8":
        if type(nested) is not int or nested not in _SIZES or not isinstance(offset, float | int):
            raise parts.error(state, "unsupported scales of scales", f"{nested!r}, {offset!r}"[:80])
        parts.take(f"{name}.nested_absmax", ("f32",), (-(-scales // nested),))
        parts.take(f"{name}.nested_quant_map", ("f32",), (256,))
    stored = f"bitsandbytes {kind}, 4 bits in blocks of {block}"
    return _Codes(words, stored, (shape[0], shape[1]), kind, block, nested, float(offset), parts)


@dataclass(frozen=True, eq=False)
class _Codes(QuantizedWeight):
    """A weight whose codes and scales run over all rows.

    kind    "nf4" or "fp4"
    block   number of codes with one scale
    nested  number of scales with one scale, if the scales are codes, and their offset
    """

    first: TensorRecord
    stored: str
    shape: tuple[int, int]
    kind: str
    block: int
    nested: int
    offset: float
    parts: ModuleParts = field(repr=False)

    @cached_property
    def form(self) -> Encoding | None:
        length = block_length(self.block)
        form = f"{self.kind}_groups"
        usual = np.array_equal(self._map(), table_of(form))
        return None if length is None or self.shape[1] % self.block or not usual else Encoding(form, length)

    @property
    def why_decoded(self) -> str:
        return f"a row of {self.shape[1]} is not a multiple of a block of {self.block} codes of {self.kind}"

    def _map(self) -> Array:
        name = f"{self.first.name}.quant_map"
        return self.parts.checked_scales(name, np.asarray(self.parts.array(name), np.float32), zero=True)

    def _scales(self) -> Array:
        name = f"{self.first.name}.absmax"
        held = self.parts.array(name)
        if held.dtype == np.uint8:
            base, of = f"{self.first.name}.nested_quant_map", f"{self.first.name}.nested_absmax"
            values = self.parts.checked_scales(base, self.parts.array(base), zero=True)[held]
            values = (
                values
                * np.repeat(self.parts.checked_scales(of, self.parts.array(of), zero=True), self.nested)[: len(held)]
            )
            held = values + np.float32(self.offset)
        return self.parts.checked_scales(name, held, zero=True)

    def _codes(self) -> Array:
        """Return the codes of all rows, one after the other."""
        bytes = self.parts.codes(self.first.name).reshape(-1)
        made = np.empty((len(bytes), 2), np.uint8)
        made[:, 0], made[:, 1] = bytes >> np.uint8(4), bytes & np.uint8(15)
        return made.reshape(-1)[: self.shape[0] * self.shape[1]]

    def reader(self) -> Read:
        assert self.form is not None
        n = self.form.elements(self.shape[1])
        record = self.form.block.record(n)
        pairs = self.parts.codes(self.first.name).reshape(self.shape[0], -1, n // 2)
        scales = self._scales().reshape(self.shape[0], -1)

        def read(rows: slice) -> Array:
            of_rows = pairs[rows]
            made = np.empty(of_rows.shape[:2], record)
            made["scale"] = np.repeat(scales[rows], self.block // n, axis=1)
            made["q"] = packed_pairs(of_rows, high_first=True)
            return made.view(np.uint8).reshape(len(made), -1)

        return read

    def numbers(self) -> Array:
        made: Array = self._map()[self._codes()]
        made *= np.repeat(self._scales(), self.block)[: len(made)]
        return made.reshape(self.shape)
