"""Values of an ONNX file during import: their graph values, and their elements if these are known.

Exporters compute shapes with tensors: Shape, Gather, Mul, Concat, Reshape. Their elements are known at import, as
numbers or as sizes with the graph's symbols. A value whose elements are known is added to the graph only if an op reads
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.frontends.onnx_import.file import StoredTensor
from treadle.frontends.onnx_import.rules.elements import Element
from treadle.frontends.recipes.stored_triangles import is_square, triangle_of
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Value
from treadle.ir.literals import Literal
from treadle.ir.sizing.sizes import Size

Array = npt.NDArray[Any]

MOST_KNOWN = 4096
"""Maximum number of elements of a value that is evaluated at import."""
MOST_SYMBOLIC = 256
"""Maximum number of elements of a value that is evaluated at import, if they are symbolic sizes."""
IN_PLACE = 16
"""Maximum number of elements of a stored float tensor that becomes a constant of the graph; larger tensors are
weights.
"""


class Known:
    """A value of the file.

    type      its element type
    content   its elements: an array of numbers (in the carrier's dtype), an array of objects that are `Size`s, or None
    stored    its tensor in the file, or None
    roots     for a small value, the inputs that it is computed from: if they were static, its elements would be known
    moved     for a weight with rearranged elements: a function that builds the rearrangement in the graph
    steps     for the result of a QuantizeLinear: the value before it, and its scale and zero point
    """

    __slots__ = ("_content", "_expr", "_later", "_shape", "moved", "name", "roots", "steps", "stored", "type")

    def __init__(
        self,
        type: Element,
        *,
        expr: Expr | None = None,
        content: Array | None = None,
        stored: StoredTensor | None = None,
        name: str = "",
        roots: frozenset[str] = frozenset(),
    ) -> None:
        self.type, self.stored, self.name, self.roots = type, stored, name, roots
        self._expr, self._content = expr, content
        self._shape: tuple[Size, ...] | None = None
        self.moved: Callable[[], Expr] | None = None
        self.steps: QuantizedSteps | None = None
        self._later: Callable[[], Expr] | None = None

    @staticmethod
    def later(type: Element, shape: Sequence[Size], build: Callable[[], Expr]) -> Known:
        """Return a value of this shape that `build` adds to the graph when a node reads it."""
        made = Known(type)
        made._shape, made._later = tuple(shape), build
        return made

    @property
    def is_weight(self) -> bool:
        """True if the graph represents this ONNX value as a weight, or as a weight with rearranged elements."""
        if self.moved is not None:
            return True
        return self.stored is not None and self.stored.count > (IN_PLACE if self.type.is_float else MOST_KNOWN)

    @property
    def shape(self) -> tuple[Size, ...]:
        """Its sizes."""
        if self._expr is not None:
            return self._expr.shape
        if self._shape is None:
            held: Sequence[int] = self.stored.shape if self.stored is not None else self._content.shape  # type: ignore[union-attr]
            self._shape = tuple(Size.of(n) for n in held)
        return self._shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def content(self) -> Array | None:
        if self._content is None and self.stored is not None and self.stored.count <= MOST_KNOWN:
            self._content = self.stored.array()
        return self._content

    @property
    def is_symbolic(self) -> bool:
        """True if its elements are known, and some of them are symbolic sizes."""
        return self.content is not None and self.content.dtype == object

    @property
    def on_graph(self) -> Expr | None:
        """Its graph value, if it has one yet."""
        return self._expr

    def expr(self, b: Builder) -> Expr:
        """Return its graph value. On first access, a known value is added to the graph as a constant, a weight or
        sizes.
        """
        if self._expr is None:
            stored = self.stored
            build = self.moved or self._later
            if build is not None:
                self._expr = build()
            elif stored is not None and self.is_weight:
                square = self.type.format is None and is_square(stored.shape)
                triangle = triangle_of(stored.array()) if square else None
                carrier = self.type.carrier
                made = b.parameter(self.name, carrier[stored.shape]) if triangle is None else triangle.build(b, carrier)
                self._expr = made
            else:
                content = self.content
                assert content is not None
                self._expr = (
                    _of_sizes(b, content, self.type) if content.dtype == object else constant(b, content, self.type)
                )
        return self._expr


@dataclass(frozen=True)
class QuantizedSteps:
    """The operands of a QuantizeLinear: x, its scale and its zero point, with the node's attributes."""

    x: Known
    scale: Known
    zero: Known | None
    axis: int
    block: int


def constant(b: Builder, content: Array, type: Element) -> Expr:
    """Return a constant of the graph with bitwise identical elements."""
    dtype = type.carrier
    if dtype.numpy is None:
        return b.constant(content, dtype)
    held = np.asarray(content).astype(dtype.numpy, copy=False)
    data = np.ascontiguousarray(held, held.dtype.newbyteorder("<")).tobytes()
    return Expr(b, Value.constant(Literal(dtype, held.shape, data)))


def _of_sizes(b: Builder, content: Array, type: Element) -> Expr:
    """Return sizes as a tensor of the graph."""

    def one(size: Size) -> Expr:
        if size.constant is not None:
            return constant(b, np.asarray(size.constant), type)
        return b.size(value=size, dtype=type.carrier)

    if content.ndim == 0:
        return one(content.item())
    parts = [b.rearrange(one(size), pattern="-> 1") for size in content.flat]
    joined = parts[0] if len(parts) == 1 else b.concat(*parts, axis=0)
    return joined if content.ndim == 1 else b.reshape(joined, shape=content.shape)


def tidied(content: Iterable[Any], shape: Sequence[int], dtype: Any = np.int64) -> Array:
    """Return an array of numbers if all elements are numbers, else an array of sizes."""
    sizes = [Size.of(x) if isinstance(x, Size) else Size.of(int(x)) for x in content]
    numbers = [s.constant for s in sizes]
    if all(n is not None for n in numbers):
        return np.array(numbers, dtype).reshape(shape)
    made = np.empty(len(sizes), object)
    made[:] = sizes
    return made.reshape(shape)


def as_sizes(content: Array) -> list[Size]:
    """Return the elements of known content as sizes, in row-major order."""
    return [x if isinstance(x, Size) else Size.of(int(x)) for x in content.flat]
