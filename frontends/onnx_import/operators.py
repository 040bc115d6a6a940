"""The table of ONNX operators, and the interface through which a handler reads a node.

    @operator("Gelu", latest=20)
    def _gelu(site: Site) -> Made:
        tanh = site.text("approximate", "none") == "tanh"
        return site.b.gelu_tanh(site.x(0)) if tanh else site.b.gelu(site.x(0))

A handler is registered for its operator's versions up to the latest version that it implements. Later versions, from
newer opsets, are refused. If an operator has no handler, or its handler calls `decompose`, the node is replaced by the
function body in the operator's specification, if there is one. If the handler did not read an attribute, the node is
refused, since the attribute might change the meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded, UnsupportedOnnx
from treadle.frontends.onnx_import.rules.elements import Element
from treadle.frontends.onnx_import.values import Array, Known, as_sizes
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import FrontendError, Hint
from treadle.ir.ops.axis_names import place
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DType

if TYPE_CHECKING:
    from treadle.frontends.onnx_import.importer import Importer
    from treadle.frontends.onnx_import.scopes import Scope

Result = Known | Expr | Array | None
"""A result of a handler: a value with its element type, a value of the specification's type, known content, or None."""
Made: TypeAlias = Any
"""The return type of a handler: a `Result`, or one for each output. Results beyond the node's outputs are dropped.
(Any, as a builder's methods, and so the results of ops, are Any.)
"""
Handler = Callable[["OnnxSite"], Made]


class Decomposed(Exception):
    """Raised by a handler to replace the node by its operator's function body."""


@dataclass(frozen=True)
class Operator:
    """A handler, and the versions of its operator that it implements.

    first, latest  the versions, by the opsets that introduced them
    moves          positions of the inputs whose elements it only moves; None: it computes
    types          positions of the inputs of which it reads only the element type
    weighs         returns True for a node on constants whose result is a weight, which is not evaluated at import
    """

    name: str
    handler: Handler
    first: int
    latest: int
    moves: tuple[int, ...] | None
    types: tuple[int, ...]
    weighs: Callable[[OnnxSite], bool] | None = None


OPERATORS: dict[tuple[str, str], Operator] = {}
"""Operators by domain and name."""


def operator(
    name: str,
    latest: int = 1,
    *,
    first: int = 1,
    domain: str = "",
    moves: tuple[int, ...] | None = None,
    types: tuple[int, ...] = (),
    weighs: Callable[[OnnxSite], bool] | None = None,
) -> Callable[[Handler], Handler]:
    """Register the handler of an operator; see `Operator`. `moves=(-1,)` stands for every input."""

    def register(handler: Handler) -> Handler:
        OPERATORS[domain, name] = Operator(name, handler, first, latest, moves, types, weighs)
        return handler

    return register


MICROSOFT = "com.microsoft"
"""The domain of operators that ONNX Runtime's optimizer and quantizer write."""

Number = int  # inside OnnxSite, int is a method


class OnnxSite:
    """One node during its import: its operands and attributes, and the builder for its translation.

    b        the builder
    version  the operator's version: the opset that introduced the form which this model uses
    wanted   for each output, True if it is used
    scope    the names that the node may refer to
    """

    def __init__(
        self,
        importer: Importer,
        b: Builder,
        node: Any,
        version: int,
        inputs: Sequence[Known | None],
        where: str,
        wanted: Sequence[bool],
        scope: Scope,
    ) -> None:
        self.scope = scope
        self.importer, self.b, self.node, self.version, self.where = importer, b, node, version, where
        self.inputs, self.wanted = list(inputs), list(wanted)
        self.attributes = {a.name: a for a in node.attribute}
        self.read: set[str] = set()

    # -- operands ----------------------------------------------------------------------------------------------

    def has(self, position: int) -> bool:
        """Return True if an optional input is present."""
        return position < len(self.inputs) and self.inputs[position] is not None

    def value(self, position: int) -> Known:
        """Return an input's value. Raises FrontendError if it is missing."""
        found = self.inputs[position] if position < len(self.inputs) else None
        if found is None:
            self.malformed(f"input {position} is missing")
        return found

    def x(self, position: int) -> Expr:
        """Return an input as a value of the graph."""
        return self.value(position).expr(self.b)

    def maybe(self, position: int) -> Expr | None:
        """Return an input as a value of the graph, or None if it is optional and absent."""
        return self.x(position) if self.has(position) else None

    def all(self) -> list[Expr]:
        """Return all inputs as values of the graph. Raises FrontendError if one is missing."""
        return [self.x(i) for i in range(len(self.inputs))]

    def element(self, position: int) -> Element:
        """Return an input's element type."""
        return self.value(position).type

    def shape(self, position: int) -> tuple[Size, ...]:
        return self.value(position).shape

    # -- values that must be known at import --------------------------------------------------------------------------

    def content(self, position: int) -> Array:
        """Return an input's elements, which must be known at import. Raises StaticArgumentNeeded if they depend on an
        input of the model, UnsupportedOnnx if they depend on other data.
        """
        value = self.value(position)
        if value.content is not None:
            return value.content
        name = self.node.input[position] if position < len(self.node.input) else f"input {position}"
        if value.roots:
            argument = min(value.roots)
            error = StaticArgumentNeeded(
                f"the values of input {printable(argument)} determine a shape, an axis or a bound",
                received=f"{printable(name)}: {value.type}[{', '.join(map(str, value.shape))}]",
                within=self.where,
                hint=Hint(f"static={{{argument!r}: its value}}", f"--set {argument}=VALUE"),
            )
            error.argument = argument
            raise error
        self.refuse(f"needs the elements of {printable(name)}, which depend on data")

    def numbers(self, position: int) -> tuple[int, ...]:
        """Return an input's elements as integers. Refuses symbolic sizes."""
        content = self.content(position)
        if content.dtype == object:
            self.refuse(f"{printable(self.node.input[position])} must not depend on a symbolic size")
        return tuple(int(n) for n in content.flat)

    def sizes(self, position: int) -> list[Size]:
        """Return an input's elements as sizes."""
        return as_sizes(self.content(position))

    def size(self, position: int) -> Size:
        """Return an input's only element as a size."""
        sizes = self.sizes(position)
        if len(sizes) != 1:
            self.malformed(f"input {position} must have one element")
        return sizes[0]

    def scalar(self, position: int) -> Any:
        """Return an input's only element as a number."""
        content = self.content(position)
        if content.size != 1 or content.dtype == object:
            self.refuse(f"{printable(self.node.input[position])} must be a constant with one element")
        return content.reshape(())[()]

    def bounds(self, size: Size) -> Bounds:
        """Return the minimum and the maximum of a size."""
        return size.bounds(self.importer.graph.symbols)

    def axis(self, axis: int, rank: int) -> int:
        """Return an axis argument as a position, with negative numbers counted from the last axis."""
        if not -rank <= axis < rank:
            self.malformed(f"there is no axis {axis} in a tensor of rank {rank}")
        return place(axis, rank)

    # -- attributes --------------------------------------------------------------------------------------------

    def _attribute(self, name: str, kind: int) -> Any:
        self.read.add(name)
        found = self.attributes.get(name)
        if found is None:
            return None
        if found.ref_attr_name:
            self.malformed(f"attribute {name} refers to a function's attribute that does not exist")
        if found.type and found.type != kind:
            self.malformed(f"attribute {name} has another type than in the operator")
        return found

    def int(self, name: str, default: Any = None) -> Any:
        """Return an integer attribute."""
        found = self._attribute(name, 2)
        return default if found is None else int(found.i)

    def float(self, name: str, default: Any = None) -> Any:
        """Return a float attribute. The default is rounded to float32, too."""
        found = self._attribute(name, 1)
        if found is None:
            return None if default is None else float(np.float32(default))
        return float(found.f)

    def text(self, name: str, default: str = "") -> str:
        found = self._attribute(name, 3)
        return default if found is None else found.s.decode("utf-8", "replace")

    def ints(self, name: str) -> tuple[int, ...] | None:  # type: ignore[valid-type]
        found = self._attribute(name, 7)
        return None if found is None else tuple(found.ints)

    def ignore(self, *names: str) -> None:
        """Mark attributes as read that do not change the numbers."""
        self.read.update(names)

    def unread(self) -> list[str]:
        """Return the names of the attributes that the handler did not read."""
        return [name for name in self.attributes if name not in self.read]

    # -- building blocks for handlers -------------------------------------------------------------------------

    def constant(self, value: Any, dtype: DType) -> Expr:
        """Return a scalar constant."""
        return self.b.constant(np.asarray(value), dtype)

    def decompose(self) -> NoReturn:
        """Replace this node by its operator's function body."""
        raise Decomposed

    # -- refusals ----------------------------------------------------------------------------------------------

    def refuse(self, why: str, hint: str | None = None) -> NoReturn:
        """Raise UnsupportedOnnx for an unsupported case."""
        raise unsupported(self.node, self.version, self.where, why, hint)

    def number(self, size: Size, what: str) -> Number:
        """Return a size as a number. Refuses a size with symbols."""
        if size.constant is None:
            self.refuse_symbolic(f"{what} is {size}, and must be a number", size)
        return size.constant

    def refuse_symbolic(self, why: str, *sizes: Size) -> NoReturn:
        """Refuse a case that is unsupported for symbolic sizes, with a hint on how to fix the sizes."""
        symbols = sorted(frozenset().union(*(size.symbols for size in sizes)))
        given = ", ".join(f"{s}=8" for s in symbols)
        dims = ", ".join(f"{s!r}: 8" for s in symbols)
        on_line = " ".join(f"--set {s}=8" for s in symbols)
        self.refuse(why, Hint(f"numbers: treadle.compile(..., {given}), or dims={{{dims}}} of import_onnx", on_line))

    def mismatched(self, why: str, *sizes: Size) -> NoReturn:
        """Refuse sizes that must be equal. Without symbols, the node is damaged; with symbols, the case is
        unsupported.
        """
        if all(size.constant is not None for size in sizes):
            self.malformed(why)
        self.refuse_symbolic(why, *sizes)

    def malformed(self, why: str) -> NoReturn:
        """Raise FrontendError for a node that violates its operator's specification."""
        raise FrontendError(f"{printable(self.node.op_type)}: {why}", within=self.where)


def unsupported(node: Any, version: int | None, where: str, why: str, hint: str | None = None) -> UnsupportedOnnx:
    """Return the error for an unsupported node."""
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    error = UnsupportedOnnx(f"{printable(domain + node.op_type)}: {why}", within=where, hint=hint)
    error.op, error.version = domain + node.op_type, version
    return error
