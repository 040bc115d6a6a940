"""One line of a Python module for the code generator: a node, whose operands are expressions as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.ir.graph import Node, Value
from treadle.ir.literals import Literal
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type

if TYPE_CHECKING:
    from treadle.backends.python.emission import FunctionWriter


@dataclass(frozen=True)
class Dialect:
    """The code of each op in a backend.

    name         the backend's name
    imports      the lines at the head of the module
    spellings    op name -> a template such as `np.exp({x})`, or a function of the `Line` that returns an
                 expression; for an op with several results, a tuple expression. An op that updates an
                 operand does so in place; if the value is not a state, the operand is a copy
    copied       a template of an array's copy, such as `{}.copy()`
    otherwise    the code of any other primitive op, which does not change its operands
    into         op name -> an expression that writes the result to the array `{out}` and returns it, for ops in the
                 storage plan; if `{out}` is None, to a new array. `{out_args}` is both destination and workspace as
                 arguments; a template with it is in `spellings` if it is also valid without these arguments
    reports      True if lines that read indices record errors in `status` instead of raising them
    """

    name: str
    imports: tuple[str, ...]
    spellings: Mapping[str, Spelling]
    copied: str
    otherwise: Callable[[Line], str]
    into: Mapping[str, Spelling] = field(default_factory=dict)
    reports: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Return the names that emitted text refers to: the names of the imports and of the tables."""
        return frozenset(line.split()[-1] for line in self.imports) | {
            "constants",
            "reference",
            "weights",
            "states",
            "device",
            "poison",
            "memory",
            "status",
        }

    def spell(self, line: Line) -> str:
        """Return the expression of a node. Raises BackendError for an op that the dialect cannot express."""
        template = self.into.get(line.op.name) if line.has_destination else None
        spelling = template or self.spellings.get(line.op.name, self.otherwise)
        return spelling.format_map(line) if isinstance(spelling, str) else spelling(line)


class Line:
    """A node to be emitted: `line.x` is the expression of the operand x, as text.

    A scalar constant is written as a number only if another operand has the same dtype, so that the number cannot
    change the result's dtype.

    out              the planned destination of the result, as text; None if a library allocates the result
    work             the planned workspace of the call, as text; None: there is none
    has_destination  True if the call has a destination or a workspace, or if a result that may be a view must be copied
    """

    def __init__(
        self, writer: FunctionWriter, node: Node, out: str | None = None, work: str | None = None, copies: bool = False
    ) -> None:
        self._writer, self.out, self.work = writer, out, work
        self.has_destination = out is not None or work is not None or copies
        self.node = node
        self.op: Any = node.op
        self.names = node.op.operand_names(len(node.operands))
        self._values = dict(zip(self.names, node.operands, strict=True))
        self._dtypes = {v.type.dtype for v in node.inputs if v.literal is None or v.literal.shape != ()}
        dialect = writer.program.dialect
        in_place = node.op.updates if node.op.name in dialect.spellings else {}
        self._copied = {node.operands[at]: dialect.copied for at in in_place.values() if not self.updates_state}

    def __getitem__(self, name: str) -> str:
        if name == "out" and self.out is not None:
            return self.out
        if name == "out_args":
            return self.out_args
        value = self._values[name]
        return "None" if value is None else self._text(value)

    def __getattr__(self, name: str) -> str:
        if name not in self._values:
            raise AttributeError(name)
        return self[name]

    @property
    def out_args(self) -> str:
        """The destination and the workspace as arguments of a call: `, out=memory.x, work=memory.x_work`."""
        arguments = (("out", self.out), ("work", self.work))
        return "".join(f", {name}={text}" for name, text in arguments if text is not None)

    @property
    def on_device(self) -> bool:
        """True if the host cannot read values during a call."""
        return self._writer.program.dialect.reports

    @property
    def report_args(self) -> str:
        """The argument of a call that records errors: `, report=(status, 3)`. Empty if the call raises them."""
        return f", report=(status, {self._writer.reporter(self.node)})" if self.on_device else ""

    def as_read_by(self, kind: type[Line]) -> Line:
        """Return the same node as another kind of line."""
        return kind(self._writer, self.node, self.out, self.work)

    def _text(self, value: Value) -> str:
        if value.literal is not None and value.literal.shape == () and value.type.dtype in self._dtypes:
            return number(value.literal)
        return self._read(value)

    def _read(self, value: Value) -> str:
        """Return a value as the text of an array. It is a copy if the node changes the value and the value is not a
        state.
        """
        text = self._writer.read(value)
        return self._copied[value].format(text) if value in self._copied else text

    @property
    def updates_state(self) -> bool:
        """Return True if the node changes a state."""
        return any(value.state is not None for value in self.node.results)

    @property
    def arrays(self) -> str:
        """Return all operands that are present, as arrays."""
        return ", ".join(map(self._read, self.node.inputs))

    def array(self, name: str) -> str:
        """Return an operand as an array, even if it is a scalar constant."""
        value = self._values[name]
        return "None" if value is None else self._read(value)

    def has(self, name: str) -> bool:
        """Return True if an optional operand is present."""
        return self._values[name] is not None

    def type(self, name: str) -> Type:
        """Return the type of an operand that is present."""
        value = self._values[name]
        assert value is not None
        return value.type

    @property
    def result(self) -> Type:
        """The type of the first result."""
        return self.node.results[0].type

    def size(self, size: Size) -> str:
        """Return a size as an expression of the function's symbols."""
        return self._writer.size(size)

    def shape(self, sizes: Iterable[Size]) -> str:
        """Return sizes as a tuple."""
        return as_tuple([self.size(s) for s in sizes])

    def by_reference(self, **spelled: str) -> str:
        """Return a call of the op's NumPy reference, with the sizes that the op's attributes need.

        spelled  expressions by operand name, which replace the usual text of these operands
        """
        symbols = sorted({s for v in self.node.op.attributes.values() for s in symbols_of(v)})
        sizes = [f"{s}={self.size(Size.symbol(s))}" for s in symbols]
        read = ["None" if v is None else self._writer.read(v) for v in self.node.operands]
        operands = [spelled.get(name, text) for name, text in zip(self.names, read, strict=True)]
        return f"reference.{self._writer.program.reference(self.node)}({', '.join([*operands, *sizes])})"


Spelling = str | Callable[[Line], str]


def number(literal: Literal) -> str:
    """Return a scalar constant as a Python number, with only as many digits as its dtype needs."""
    scalar = literal.array[()]
    # float16 may be computed in float32, where the shortest digits of the float16 would be another number. The shortest
    # digits of the largest float32 exceed it, and a library may refuse them.
    short = literal.dtype.name == "f32" and abs(float(str(scalar))) <= float(np.finfo(np.float32).max)
    return _as_python(str(scalar) if short else repr(scalar.item()))


def float_text(value: float) -> str:
    """Return a float attribute as a Python number."""
    return _as_python(repr(value))


def _as_python(text: str) -> str:
    return text if text.lstrip("-") not in ("inf", "nan") else f'float("{text}")'


def as_tuple(items: Sequence[str]) -> str:
    """Return a tuple of expressions, or a pattern of several names, as Python text."""
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def symbols_of(value: Any) -> frozenset[str]:
    """Return the symbols in an attribute that is a size or a tuple of sizes."""
    if isinstance(value, Size):
        return value.symbols
    if isinstance(value, tuple):
        return frozenset().union(*map(symbols_of, value))
    return frozenset()
