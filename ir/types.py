"""Types: a dtype and dimensions, where a dimension is an ordered product of factors with sizes and labels.

    f32[B, S, 768]                      plain dimensions
    f32[B, heads=12, S, 64]             a labelled factor
    f32[B, S, (heads=12 64)]            one dimension of 768 that records its two factors
    f32[576, 1536] as q4_0              held in blocks, 4 bits per number: an encoding, see `treadle.ir.encodings`

Two types are equal if their dtypes and sizes are equal; factors and labels are annotations. A type never determines
which axes are *the same*: `treadle.ir.analysis.following` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy as np

from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import GraphError, ParseError, SizeError
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.sizing.sizes import Size, SizeLike, product
from treadle.ir.source_lines import user_line


@dataclass(frozen=True)
class DType:
    """An element type: its name, kind (`float`, `int` or `bool`) and width in bytes."""

    name: str
    kind: str
    bytes: int

    __iter__: ClassVar[None] = None
    """A dtype is not iterable: without this line, Python would iterate by calling `__getitem__` without end."""

    def __getitem__(self, dims: DimLike | tuple[DimLike, ...]) -> Type:
        """Return the tensor type of these dimensions: `f32["B S 768"]`, `i64["B, S"]` or `f32[2, 3]`."""
        if isinstance(dims, str):
            return parse_type(f"{self.name}[{dims}]")
        return Type(self, tuple(Dim.of(d) for d in (dims if isinstance(dims, tuple) else (dims,))))

    def __call__(self, *_: object) -> NoReturn:
        """Raise GraphError: a dtype is neither a constructor of types nor a conversion."""
        name = self.declared_name
        dims = _ or ("B S",)  # the dimensions of a type, or a value to convert
        if len(dims) == 1 and isinstance(dims[0], tuple):  # a shape
            dims = dims[0]
        each = ", ".join(f'"{dim}"' if isinstance(dim, str) else repr(dim) for dim in dims)
        if len(dims) == 1 and not isinstance(dims[0], str):
            hint = f"t.constant({each}, {name})" if isinstance(dims[0], int | float) else f"x.to({name})"
        else:
            hint = f"{name}[{each}]"
        raise GraphError(
            f"{self.name} is a dtype, and not called",
            received=each[:80],
            source=str(user_line() or "") or None,
            hint=hint,
        )

    def __eq__(self, other: object) -> bool:
        """Return True for the same dtype, also if PyTorch, NumPy or a text names it: `x.dtype == torch.float32`."""
        if other is self or isinstance(other, DType):
            return other is self or other.name == self.name
        if not isinstance(other, str | type) and type(other).__name__ != "dtype" and not isinstance(other, np.dtype):
            return NotImplemented
        from treadle.ir.wording.other_spellings import dtype_word

        return dtype_word(other) == self.declared_name

    @property
    def declared_name(self) -> str:
        """The name in declarations: `t.f32`, `t.boolean`."""
        return f"t.{'boolean' if self.kind == 'bool' else self.name}"

    @property
    def numpy(self) -> np.dtype[Any] | None:
        """The NumPy dtype of the same bits, or None for bf16."""
        return _NUMPY.get(self.name)

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        return self.kind == "int"

    def holds(self, number: float) -> bool:
        """Return True if the dtype can hold a number: an integer in range for integers, 0 or 1 for bool. A float dtype
        may round the number, but a finite number must stay finite.
        """
        if self.kind == "bool":
            return number in (0, 1)
        if self.is_int:
            limits = np.iinfo(self.numpy or np.int64)
            return math.isfinite(number) and number == int(number) and limits.min <= number <= limits.max
        return not math.isfinite(number) or abs(number) <= self.greatest

    @property
    def greatest(self) -> float:
        """The greatest finite number of a float dtype."""
        return float(np.finfo(self.numpy).max) if self.numpy is not None else _LARGEST_BF16

    @property
    def spacing(self) -> float:
        """The distance from 1 to the next number, in a float dtype."""
        return float(np.finfo(self.numpy).eps) if self.numpy is not None else 2.0**-7

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


f64, f32, f16, bf16 = (DType(n, "float", w) for n, w in (("f64", 8), ("f32", 4), ("f16", 2), ("bf16", 2)))
i64, i32, i16, i8, u8 = (DType(n, "int", w) for n, w in (("i64", 8), ("i32", 4), ("i16", 2), ("i8", 1), ("u8", 1)))
boolean = DType("bool", "bool", 1)

DTYPES: Mapping[str, DType] = {d.name: d for d in (f64, f32, f16, bf16, i64, i32, i16, i8, u8, boolean)}
_NUMPY: dict[str, np.dtype[Any]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_LARGEST_BF16 = (2 - 2.0**-7) * 2.0**127
_FROM_NUMPY = {dtype: DTYPES[name] for name, dtype in _NUMPY.items()}


def dtype_of(array: np.ndarray[Any, Any]) -> DType | None:
    """Return the dtype that holds an array's elements, or None if there is none."""
    return _FROM_NUMPY.get(array.dtype)


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a dimension, with its size. The label is for readers and is ignored in comparisons."""

    size: Size
    label: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.label}={self.size}" if self.label else str(self.size)


class Dim:
    """One dimension: an ordered product of factors, outermost first. Two dimensions are equal if their sizes are
    equal.
    """

    __slots__ = ("factors", "size")

    def __init__(self, factors: Iterable[Factor]) -> None:
        flat = tuple(factors)
        self.factors = flat
        self.size = flat[0].size if len(flat) == 1 else product(f.size for f in flat)

    @staticmethod
    def of(value: DimLike, label: str | None = None) -> Dim:
        """Return a dimension of one factor from a size, an integer or text such as `S+1`."""
        return value if isinstance(value, Dim) else Dim([Factor(Size.of(value), label)])

    @property
    def is_one(self) -> bool:
        return self.size.constant == 1

    @property
    def label_hint(self) -> str | None:
        """The hint of an error for this dimension in place of a size: an example of a pattern with its label. None if
        it has no label.
        """
        if len(self.factors) != 1 or self.factors[0].label is None:
            return None
        label = self.factors[0].label
        return f't.rearrange(x, "b s ({label}={self.size} d) -> b {label} s d") labels a part of an axis'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.size == other.size

    def __hash__(self) -> int:
        return hash(self.size)

    def __str__(self) -> str:
        if len(self.factors) == 1:
            return str(self.factors[0])
        return "(" + " ".join(map(str, self.factors)) + ")"

    def __repr__(self) -> str:
        return f"Dim({self})"


DimLike: TypeAlias = "Dim | Size | int | str"


@dataclass(frozen=True)
class Type:
    """A tensor's dtype and dimensions; rank 0 is a scalar. If there is an encoding, they describe the decoded value.

    Raises GraphError for an encoding of another dtype than f32, or along an axis that does not exist, has no constant
    size, or is not an integer number of blocks.
    """

    dtype: DType
    dims: tuple[Dim, ...] = ()
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        if self.encoding is None:
            return
        axis, plain = self.encoding.axis, Type(self.dtype, self.dims)
        if self.dtype is not f32:
            raise GraphError("only f32 can be encoded", received=f"{plain} as {self.encoding}")
        if not -self.rank <= axis < self.rank:
            raise GraphError(f"there is no axis {axis} to encode along", received=f"{plain} as {self.encoding}")
        size = self.dims[axis].size.constant
        if size is None:
            raise GraphError("an encoded axis must have a constant size", received=f"{plain} as {self.encoding}")
        self.encoding.bytes(size)
        last = axis % self.rank == self.rank - 1
        object.__setattr__(self, "encoding", self.encoding.along(-1 if last else axis % self.rank))

    @property
    def rank(self) -> int:
        return len(self.dims)

    @cached_property
    def shape(self) -> tuple[Size, ...]:
        """The sizes of the dimensions."""
        return tuple(d.size for d in self.dims)

    @cached_property
    def elements(self) -> Size:
        """The number of elements."""
        return product(self.shape)

    @cached_property
    def symbols(self) -> frozenset[str]:
        return frozenset().union(*(s.symbols for s in self.shape))

    @cached_property
    def static_shape(self) -> tuple[int, ...] | None:
        """The shape as integers, or None if a size holds a symbol."""
        sizes = tuple(s.constant for s in self.shape)
        return None if None in sizes else sizes  # type: ignore[return-value]

    def evaluate(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape for given values of symbols."""
        return tuple(s.evaluate(values) for s in self.shape)

    def substitute(self, values: Mapping[str, SizeLike]) -> Type:
        """Return the type with symbols replaced by sizes, and with the same labels."""
        if not self.symbols.intersection(values):
            return self
        factors = [[Factor(f.size.substitute(values), f.label) for f in dim.factors] for dim in self.dims]
        return Type(self.dtype, tuple(map(Dim, factors)), self.encoding)

    @cached_property
    def storage_type(self) -> Type:
        """The type of the array that holds the value: the type itself, or for an encoded type u8, with the blocked
        axis in bytes.
        """
        if self.encoding is None:
            return self
        dims, size = list(self.dims), self.dims[self.encoding.axis].size.constant
        assert size is not None  # checked on construction
        dims[self.encoding.axis] = Dim.of(self.encoding.bytes(size))
        return Type(u8, tuple(dims))

    def is_held_like(self, other: Type) -> bool:
        """Return True if one array can hold values of both types: dtype, shape and encoding are equal."""
        return (
            self.storage_type.dtype is other.storage_type.dtype and self.storage_type.shape == other.storage_type.shape
        )

    @property
    def decoded(self) -> Type:
        """The type without an encoding."""
        return self if self.encoding is None else Type(self.dtype, self.dims)

    def as_encoded(self, encoding: Encoding | str) -> Type:
        """Return the type with an encoding. Raises GraphError as the class does."""
        return Type(self.dtype, self.dims, parse_encoding(encoding) if isinstance(encoding, str) else encoding)

    def bytes_at(self, values: Mapping[str, int]) -> int:
        """Return the number of bytes of a dense tensor of this type, in its encoding, for given values of symbols."""
        return self.storage_type.elements.evaluate(values) * self.storage_type.dtype.bytes

    def __or__(self, other: None) -> OptionalType:
        """Return the type of a model's optional input: `i64["B"] | None`."""
        return OptionalType(self)

    def with_dtype(self, dtype: DType) -> Type:
        return self if dtype is self.dtype else Type(dtype, self.dims, self.encoding)

    @cached_property
    def text(self) -> str:
        """The type's text, such as `f32[B, S, 768]`, with factors, labels and encoding. Types that differ in any detail
        differ in it.
        """
        return f"{self.dtype}[{', '.join(map(str, self.dims))}]{_as(self.encoding)}"

    @property
    def plain_text(self) -> str:
        """The type's text without factors and labels. Equal types have the same plain text."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{_as(self.encoding)}"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class OptionalType:
    """The type of an optional input: the model may be declared with the input or without it."""

    type: Type


def _as(encoding: Encoding | None) -> str:
    return "" if encoding is None else f" as {encoding}"


_TYPE = re.compile(r"\s*([a-z]\w*)\s*\[(.*)\]\s*(?:as\s+(\w+(?:\([^()]*\))?)\s*)?", re.DOTALL)


@lru_cache(maxsize=4096)
def parse_type(text: str) -> Type:
    """Parse a type such as `f32[B, S, (heads=12 64)]`. Dimensions are separated by commas, or by spaces if there is no
    comma.

    Raises ParseError for an unknown dtype or a malformed dimension, SizeError for a malformed size in a dimension,
    GraphError for an encoding that is unknown or does not match.
    """
    match = _TYPE.fullmatch(text)
    if match is None:
        raise ParseError(f"not a type: {text!r}", hint="a dtype and dimensions, such as f32[B, S, 768]")
    name, inner, encoding = match.groups()
    if name not in DTYPES:
        raise ParseError(f"unknown dtype {name!r}", received=text, hint="one of " + ", ".join(DTYPES))
    try:
        found = Type(DTYPES[name], tuple(_parse_dim(part, text) for part in _split_dims(inner)))
    except SizeError as error:
        error.received = error.received or text
        raise
    return found if encoding is None else found.as_encoded(encoding)


def _split_dims(inner: str) -> Iterator[str]:
    separators = "," if _has_outer_comma(inner) else " \t\n"
    depth, start = 0, 0
    for at, char in enumerate(inner):
        depth += (char == "(") - (char == ")")
        if depth == 0 and char in separators:
            if inner[start:at].strip() or separators == ",":
                yield inner[start:at]
            start = at + 1
    if inner[start:].strip():
        yield inner[start:]


def _has_outer_comma(inner: str) -> bool:
    depth = 0
    for char in inner:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            return True
    return False


def _parse_dim(part: str, text: str) -> Dim:
    part = part.strip()
    if not part:
        raise ParseError(f"not a type: {text!r}", hint="a dimension is empty")
    if part.startswith("(") and part.endswith(")") and _is_balanced(part[1:-1]):
        pieces = list(_split_dims(part[1:-1]))
        if len(pieces) > 1:
            return Dim([_parse_factor(piece, text) for piece in pieces])
    return Dim([_parse_factor(part, text)])


def _is_balanced(text: str) -> bool:
    """Return True if each parenthesis in the text closes one that the text opened."""
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return False
    return depth == 0


def _parse_factor(part: str, text: str) -> Factor:
    label, equals, size = part.rpartition("=")
    if equals and not re.fullmatch(r"[A-Za-z_]\w*", label.strip()):
        raise ParseError(f"not a label: {label!r}", received=text)
    return Factor(parse_size(size), label.strip() if equals else None)
