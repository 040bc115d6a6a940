"""An encoding of a type: a registered block form, along one axis.

    f32[576, 1536] as q4_0                   blocks of 32 along the last axis
    f32[768, 2304] as int8_rows(axis=0)      a block per column: the axis that a product sums over
    f32[576, 1536] as int4_groups(64)        a form with a parameter

The type has the dtype and shape of the decoded value; the encoding is its storage format. An encoded value is held in a
u8 array of the value's shape, except that the blocked axis counts bytes: f32[576, 1536] as q4_0 is held in u8[576,
864]. A line along that axis is a sequence of blocks, and a block is a record of component arrays. So operations along
other axes (joining, slicing and selecting rows) work on the held array as on any other.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np

from treadle.ir.errors import GraphError

Array = np.ndarray[Any, Any]

_TEXT = re.compile(r"([a-z]\w*)(?:\(([^()]*)\))?")
MOST_IN_LINE = 1 << 24
"""The number of elements in the longest line that may be a single block."""
_AT_ONCE = 1 << 20  # elements decoded in one step; temporaries are several times as large


class BlockForm(ABC):
    """A block form: the storage format of a block of neighbours along an axis.

    name       the form's name in a type's text
    elements   the number of elements in a block; None: a whole line, whatever its length
    encodes    True if values can be encoded to the form; all forms can be decoded
    spacing    for a form with `encodes`, the spacing of a block's numbers relative to the largest of them
    marks      True if a block with NaN or infinite numbers can be encoded: the whole block decodes to NaN
    grouped    True if its name takes the number of elements in a block: int4_groups(32)
    whole      True if a block holds 8-bit integers in groups, each with a scale and an offset: see `parts`
    """

    name: ClassVar[str]
    elements: int | None
    encodes: ClassVar[bool] = False
    spacing: ClassVar[float] = 0.0
    marks: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    @abstractmethod
    def record(self, elements: int) -> np.dtype[Any]:
        """Return the dtype of a block of `elements`: a NumPy record of component arrays, without padding,
        little-endian.
        """

    @abstractmethod
    def decode(self, blocks: Array) -> Array:
        """Decode n records to f32[n, elements]. Never raises: the bytes may have any value, and scales may be NaN or
        infinite.
        """

    def parts(self, blocks: Array) -> tuple[Array, Array, Array]:
        """Return (q, d, c) with y = d q + c, for n records of a form that is `whole`. q is i8[n, elements]; d and c are
        f32[n, spans].

        Each element of d and c applies to the same number of neighbours in the block. Raises GraphError for other
        forms.
        """
        raise GraphError(f"{self.name} is not a form of integers in groups with scales")

    def encode(self, values: Array) -> Array:
        """Encode f32[n, elements] to n records. The values must be finite, unless `marks` is True. Raises GraphError
        for a value out of range.
        """
        raise GraphError(f"{self.name} can be read, but not written")

    def sample(self, rng: np.random.Generator, count: int, elements: int) -> Array:
        """Draw `count` records for tests: component arrays of any bits, 16-bit and 32-bit floats of about 0.01."""
        record = self.record(elements)
        made = np.frombuffer(rng.bytes(count * record.itemsize), record).copy()
        for name in record.names or ():
            if record[name].kind == "f":
                made[name] = (rng.standard_normal(made[name].shape) * 0.01).astype(record[name].base)
        return made


_Form = TypeVar("_Form", bound=type[BlockForm])

FORMS: dict[str, Callable[[int], BlockForm]] = {}
"""Every registered form by name. Grouped forms take the number of elements in a block, the others 0."""


def block_form(form: _Form) -> _Form:
    """Register a form under its name. A class decorator."""
    if form.name in FORMS:
        raise GraphError(f"block form {form.name!r} is registered already")
    FORMS[form.name] = form
    return form


@dataclass(frozen=True)
class Encoding:
    """A block form along one axis of a type.

    form   the form's name in `FORMS`
    group  the number of elements in a block for grouped forms, else 0
    axis   the blocked axis of the type; -1 is the last, and types hold no other negative one
    """

    form: str
    group: int = 0
    axis: int = -1

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise GraphError(f"unknown encoding {self.form!r}", hint="one of " + ", ".join(FORMS))
        _ = self.block  # raises for an invalid group

    @cached_property
    def block(self) -> BlockForm:
        """The block form."""
        return FORMS[self.form](self.group)

    def along(self, axis: int) -> Encoding:
        """Return the same form along another axis."""
        return self if axis == self.axis else replace(self, axis=axis)

    # -- sizes -------------------------------------------------------------------------------------------------

    def elements(self, size: int) -> int:
        """Return the number of elements in a block, on an axis of this size."""
        return size if self.block.elements is None else self.block.elements

    def bytes(self, size: int) -> int:
        """Return the number of bytes in a line of `size` elements. Raises GraphError if that is not an integer number
        of blocks.
        """
        elements = self.elements(size)
        if self.block.elements is None and not 0 < size <= MOST_IN_LINE:
            raise GraphError(f"a line of {self.form} has from 1 to {MOST_IN_LINE} elements", received=str(size))
        if size % elements:
            raise GraphError(
                f"an axis of {size} is not an integer number of {self.form} blocks", received=f"blocks of {elements}"
            )
        return size // elements * self.block.record(elements).itemsize

    def size(self, bytes: int) -> int:
        """Return the number of elements in a line of `bytes` bytes: the inverse of `bytes`."""
        if self.block.elements is None:
            return bytes - self.block.record(0).itemsize
        return bytes // self.block.record(self.block.elements).itemsize * self.block.elements

    def bits(self, size: int) -> float:
        """Return the average number of bits per element on an axis of this size, including the scales."""
        return 8 * self.bytes(size) / size

    # -- arrays ------------------------------------------------------------------------------------------------

    def decode(self, blocks: Array) -> Array:
        """Decode a held array to float32."""
        lines = np.moveaxis(blocks, self.axis, -1)
        size = self.size(lines.shape[-1])
        elements = self.elements(size)
        blocks = np.ascontiguousarray(lines).reshape(-1).view(self.block.record(elements))
        made = np.empty((len(blocks), elements), np.float32)
        step = max(1, _AT_ONCE // elements)
        with np.errstate(all="ignore"):  # a scale may have any value
            for start in range(0, len(blocks), step):
                made[start : start + step] = self.block.decode(blocks[start : start + step])
        return np.moveaxis(made.reshape(*lines.shape[:-1], size), -1, self.axis)

    def first_not_finite(self, blocks: Array) -> tuple[int, str] | None:
        """Find the first block with an infinite or NaN scale, in an array held along its last axis. Return the index of
        the block and the name of the scale, or None if all scales are finite.
        """
        record = self.block.record(self.elements(self.size(blocks.shape[-1])))
        blocks = blocks.reshape(-1).view(record)
        found: list[tuple[int, str]] = []
        for name in record.names or ():
            kind = record[name].base
            if kind.kind != "f":
                continue
            exponent = {2: 0x7C00, 4: 0x7F800000}[
                kind.itemsize
            ]  # exponent bits all set: NaN or infinite; comparing integers needs no copy
            words = blocks[name].view(f"<u{kind.itemsize}")
            for start in range(0, len(words), _AT_ONCE):
                beyond = (words[start : start + _AT_ONCE] & exponent) == exponent
                if beyond.any():
                    at = start + int(beyond.reshape(len(beyond), -1).any(axis=-1).argmax())
                    found.append((at, f"{name} = {blocks[name][at]}"))
                    break
        return min(found, default=None)

    def encode(self, values: Array, *, computed: bool = False) -> Array:
        """Encode values to a held array whose decoded elements are near them. Raises GraphError for a value out of
        range.

        computed  the values are activations, not weights: if the form can mark a block, a block with a NaN or infinite
                  number is marked, and nothing is raised
        """
        with np.errstate(over="ignore"):  # values that are too large raise below
            wide = np.asarray(values, np.float32)
        if not (computed and self.block.marks) and not np.isfinite(wide).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(wide))[0])
            raise GraphError(f"{self.form} holds finite values", received=f"{wide[index]} at {list(index)}")
        lines = np.moveaxis(wide, self.axis, -1)
        size = lines.shape[-1]
        bytes, elements = self.bytes(size), self.elements(size)
        rows = lines.reshape(-1, elements)
        made = np.empty(len(rows), self.block.record(elements))
        step = max(1, _AT_ONCE // elements)
        with np.errstate(invalid="ignore"):
            for start in range(0, len(rows), step):
                made[start : start + step] = self.block.encode(np.ascontiguousarray(rows[start : start + step]))
        return np.moveaxis(made.view(np.uint8).reshape(*lines.shape[:-1], bytes), -1, self.axis)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Draw a held array of values of this shape, for tests."""
        size = shape[self.axis]
        before = tuple(np.delete(shape, self.axis % len(shape)))
        bytes, elements = self.bytes(size), self.elements(size)
        count = int(np.prod(shape)) // elements
        drawn = self.block.sample(rng, count, elements).view(np.uint8).reshape(*before, bytes)
        return np.moveaxis(drawn, -1, self.axis)

    # -- text --------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        inside = [str(self.group)] if self.group else []
        inside += [f"axis={self.axis}"] if self.axis != -1 else []
        return f"{self.form}({', '.join(inside)})" if inside else self.form


def parse_encoding(text: str) -> Encoding:
    """Parse an encoding. Raises GraphError."""
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise GraphError("not an encoding", received=text[:40], hint="q4_0, int8_rows or int4_groups(32)")
    found = {"group": 0, "axis": -1}
    given: set[str] = set()
    for word in [w.strip() for w in match[2].split(",")] if match[2] else []:
        name, equals, number = word.rpartition("=")
        name = name.strip() if equals else "group"
        number = number.strip()
        digits = number.removeprefix("-") if name == "axis" else number
        if name not in found or name in given or not (digits.isascii() and digits.isdigit() and len(digits) < 7):
            raise GraphError(f"unknown or repeated option {word!r} of form {match[1]}", received=text[:40])
        found[name] = int(number)
        given.add(name)
    return Encoding(match[1], found["group"], found["axis"])
