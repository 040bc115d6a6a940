"""The block forms of GGUF files: blocks of 32 elements with a 16-bit scale, and blocks of 256 with quantized scales
(k-quants).

Source: ggml's block structures and their dequantisation,
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Each decoder is bitwise identical to the `gguf` library,
special values included, and so follows its order of operations.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from treadle.ir.encodings.encoding import Array, BlockForm, block_form
from treadle.ir.errors import GraphError

SMALL, LARGE = 32, 256
"""The number of elements in a block, and in a block of the k-quants."""

_F16 = np.dtype("<f2")


def unpacked(packed: Array, run: int, width: int) -> Array:
    """Unpack numbers of `width` bits from u8[n, m] to u8[n, 8 / width * m]. For each run of `run` bytes, the result has
    the lowest bits of all its bytes, then the next bits of all, and so on.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    found: Array = ((runs >> shifts) & np.uint8((1 << width) - 1)).reshape(len(packed), -1)
    return found


class _GGUFForm(BlockForm):
    """A form whose blocks have a fixed length.

    fields  the component arrays of a block: name, dtype, and length
    """

    elements: int = SMALL
    fields: ClassVar[tuple[tuple[Any, ...], ...]]

    def __init__(self, group: int) -> None:
        if group:
            raise GraphError(
                f"{self.name} takes no group size: its blocks have {self.elements} elements",
                received=f"{self.name}({group})",
            )

    def record(self, elements: int) -> np.dtype[Any]:
        return np.dtype([*self.fields])


def _wide(component: Array) -> Array:
    """Convert one scale per block, f16[n], to f32[n, 1]."""
    made: Array = component.astype(np.float32)[:, None]
    return made


class _WholeForm(_GGUFForm):
    """A form of integers with one scale d per block, and an offset m, if it has that component."""

    whole = True

    @abstractmethod
    def numbers(self, blocks: Array) -> Array:
        """Return the integers of n records, i8[n, 32]."""

    def parts(self, blocks: Array) -> tuple[Array, Array, Array]:
        d = _wide(blocks["d"])
        return self.numbers(blocks), d, _wide(blocks["m"]) if "m" in (blocks.dtype.names or ()) else np.zeros_like(d)


def _above(low: Array, high: Array) -> Array:
    """Return five-bit numbers from their four low bits, and their high bits, which a block holds in four bytes."""
    made: Array = low | (np.unpackbits(high, axis=-1, bitorder="little") << np.uint8(4))
    return made


@block_form
class Q4_0(_WholeForm):
    """y = d (q - 8), q of 4 bits"""

    name = "q4_0"
    fields = (("d", _F16), ("qs", "u1", 16))

    def numbers(self, blocks: Array) -> Array:
        return unpacked(blocks["qs"], 16, 4).astype(np.int8) - np.int8(8)

    def decode(self, blocks: Array) -> Array:
        return _wide(blocks["d"]) * self.numbers(blocks).astype(np.float32)


@block_form
class Q4_1(_WholeForm):
    """y = d q + m, q of 4 bits"""

    name = "q4_1"
    fields = (("d", _F16), ("m", _F16), ("qs", "u1", 16))

    def numbers(self, blocks: Array) -> Array:
        return unpacked(blocks["qs"], 16, 4).astype(np.int8)

    def decode(self, blocks: Array) -> Array:
        return _wide(blocks["d"]) * self.numbers(blocks).astype(np.float32) + _wide(blocks["m"])


@block_form
class Q5_0(_WholeForm):
    """y = d (q - 16), q of 5 bits"""

    name = "q5_0"
    fields = (("d", _F16), ("qh", "u1", 4), ("qs", "u1", 16))

    def numbers(self, blocks: Array) -> Array:
        return _above(unpacked(blocks["qs"], 16, 4), blocks["qh"]).astype(np.int8) - np.int8(16)

    def decode(self, blocks: Array) -> Array:
        return _wide(blocks["d"]) * self.numbers(blocks).astype(np.float32)


@block_form
class Q5_1(_WholeForm):
    """y = d q + m, q of 5 bits"""

    name = "q5_1"
    fields = (("d", _F16), ("m", _F16), ("qh", "u1", 4), ("qs", "u1", 16))

    def numbers(self, blocks: Array) -> Array:
        return _above(unpacked(blocks["qs"], 16, 4), blocks["qh"]).astype(np.int8)

    def decode(self, blocks: Array) -> Array:
        return _wide(blocks["d"]) * self.numbers(blocks).astype(np.float32) + _wide(blocks["m"])


@block_form
class Q8_0(_WholeForm):
    """y = d q, q of 8 bits"""

    name = "q8_0"
    fields = (("d", _F16), ("qs", "i1", 32))

    def numbers(self, blocks: Array) -> Array:
        made: Array = blocks["qs"]
        return made

    def decode(self, blocks: Array) -> Array:
        return self.numbers(blocks).astype(np.float32) * _wide(blocks["d"])


# -- k-quants: blocks of 256 in groups, whose scales are small integers times the block's scale ------------------------


class _KForm(_GGUFForm):
    """A form of integers in groups of 16 or 32. The scale of a group is the block's scale d times a small integer. If
    the block has another scale dmin, a second small integer times dmin is subtracted.
    """

    elements = LARGE
    whole = True

    @abstractmethod
    def numbers(self, blocks: Array) -> Array:
        """Return the integers of n records, i8[n, 256]."""

    @abstractmethod
    def small(self, blocks: Array) -> tuple[Array, Array | None]:
        """Return the small integers of groups, [n, groups]: the factors of d, and the factors of dmin."""

    def parts(self, blocks: Array) -> tuple[Array, Array, Array]:
        d, least = self._scales(blocks)
        return self.numbers(blocks), d, np.zeros_like(d) if least is None else -least

    def decode(self, blocks: Array) -> Array:
        d, least = self._scales(blocks)
        made = d[..., None] * self.numbers(blocks).reshape(*d.shape, -1).astype(np.float32)
        return (made if least is None else made - least[..., None]).reshape(-1, LARGE)

    def _scales(self, blocks: Array) -> tuple[Array, Array | None]:
        scales, least = self.small(blocks)
        d = _wide(blocks["d"]) * scales.astype(np.float32)
        return d, None if least is None else _wide(blocks["dmin"]) * least.astype(np.float32)


def _scales_and_least(packed: Array) -> tuple[Array, Array]:
    """Unpack eight scales and eight minima of 6 bits each from 12 bytes."""
    first, second, rest = (packed[:, at : at + 4] for at in (0, 4, 8))
    scales = [first & 63, (rest & 15) | ((first >> 2) & 48)]
    least = [second & 63, (rest >> 4) | ((second >> 2) & 48)]
    return np.concatenate(scales, axis=-1), np.concatenate(least, axis=-1)


@block_form
class Q2_K(_KForm):
    """y = d s q - dmin m: q of 2 bits; s and m of 4 bits, one of each for 16 elements"""

    name = "q2_k"
    fields = (("scales", "u1", 16), ("qs", "u1", 64), ("d", _F16), ("dmin", _F16))

    def numbers(self, blocks: Array) -> Array:
        return unpacked(blocks["qs"], 32, 2).astype(np.int8)

    def small(self, blocks: Array) -> tuple[Array, Array | None]:
        return blocks["scales"] & 15, blocks["scales"] >> 4


@block_form
class Q3_K(_KForm):
    """y = d (s - 32) (q - 4): q of 3 bits; s of 6 bits, one for 16 elements"""

    name = "q3_k"
    fields = (("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", _F16))

    def numbers(self, blocks: Array) -> Array:
        low, without = unpacked(blocks["qs"], 32, 2), unpacked(blocks["hmask"], 32, 1) ^ np.uint8(1)
        made: Array = low.astype(np.int8) - (without << np.uint8(2)).astype(np.int8)  # a clear bit subtracts 4
        return made

    def small(self, blocks: Array) -> tuple[Array, Array | None]:
        packed = blocks["scales"]
        scales = unpacked(packed[:, :8], 8, 4) | (unpacked(packed[:, 8:], 4, 2) << np.uint8(4))
        return scales.astype(np.int8) - np.int8(32), None


@block_form
class Q4_K(_KForm):
    """y = d s q - dmin m: q of 4 bits; s and m of 6 bits, one of each for 32 elements"""

    name = "q4_k"
    fields = (("d", _F16), ("dmin", _F16), ("scales", "u1", 12), ("qs", "u1", 128))

    def numbers(self, blocks: Array) -> Array:
        return unpacked(blocks["qs"], 32, 4).astype(np.int8)

    def small(self, blocks: Array) -> tuple[Array, Array | None]:
        return _scales_and_least(blocks["scales"])


@block_form
class Q5_K(_KForm):
    """y = d s q - dmin m: q of 5 bits; s and m of 6 bits, one of each for 32 elements"""

    name = "q5_k"
    fields = (("d", _F16), ("dmin", _F16), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128))

    def numbers(self, blocks: Array) -> Array:
        q: Array = unpacked(blocks["qs"], 32, 4) | (unpacked(blocks["qh"], 32, 1) << np.uint8(4))
        return q.astype(np.int8)

    def small(self, blocks: Array) -> tuple[Array, Array | None]:
        return _scales_and_least(blocks["scales"])


@block_form
class Q6_K(_KForm):
    """y = d s (q - 32): q of 6 bits; s of 8 bits, one for 16 elements"""

    name = "q6_k"
    fields = (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", _F16))

    def numbers(self, blocks: Array) -> Array:
        q: Array = unpacked(blocks["ql"], 64, 4) | (unpacked(blocks["qh"], 32, 2) << np.uint8(4))
        return q.astype(np.int8) - np.int8(32)

    def small(self, blocks: Array) -> tuple[Array, Array | None]:
        return blocks["scales"], None


_E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


@block_form
class MXFP4(_GGUFForm):
    """y = q 2^(e - 127), q an e2m1 float of 4 bits (OCP microscaling formats)"""

    name = "mxfp4"
    fields = (("e", "u1"), ("qs", "u1", 16))

    def decode(self, blocks: Array) -> Array:
        e = blocks["e"].astype(np.uint32)  # half of the power, which float32 holds for each e, and twice the float
        half = np.where(e < 2, np.uint32(1 << 21) << np.minimum(e, 1), (np.maximum(e, 1) - 1) << np.uint32(23))
        made: Array = _E2M1_TWICE[unpacked(blocks["qs"], 16, 4)]
        made *= half.astype(np.uint32).view(np.float32)[:, None]
        return made

    def sample(self, rng: np.random.Generator, count: int, elements: int) -> Array:
        made = super().sample(rng, count, elements)
        made["e"] = 116 + made["e"] % 8
        return made
