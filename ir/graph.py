"""The graph: functions of nodes in program order, in SSA form, with weights held beside it.

    Graph      functions by name, callees first, its entries last; bounds of its symbols; initial values of weights
    Function   inputs, parameters, nodes, outputs
    Node       an op on values, with the scope and the user's line it came from
    Value      what flows: an input, a parameter (weight), a constant, or a node's result

A repeated block is one function; a node whose op is `Call` applies it with its own weights. Symbols are the graph's:
`S` means the same size in every function.

What runs by itself is an entry. `main` is what the user declared, and mostly the only one. `bind` runs before it, once,
when the weights are there: it takes no inputs, and its outputs are made parameters, which `main` reads by name as it
reads weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.ir.errors import GraphError
from treadle.ir.sizes import Bounds, Size
from treadle.ir.types import DType, Type, bf16, dtype_of, f32

if TYPE_CHECKING:
    import networkx

    from treadle.ir.layouts import Layout
    from treadle.ir.operation import Op


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of the user's: the file as it should be shown (relative where possible) and the line number."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Literal:
    """A constant's elements: immutable, hashed by content. Bytes are little-endian, row-major.

    NumPy has no bf16: such elements are kept in their two bytes, and read and written as float32.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @staticmethod
    def of(value: Any, dtype: DType | None = None) -> Literal:
        """From a number, nested list or NumPy array.

        `dtype` converts: floats round, but not to infinity; integers and truth values must be exact. Without it
        Python's floats are f32.
        Raises GraphError.
        """
        try:
            array = np.asarray(value)
        except ValueError as error:  # lists of different lengths
            raise GraphError("a constant cannot be made of this", received=str(error)) from None
        if array.dtype == np.object_ and all(isinstance(each, Size | int | float) for each in array.flat):
            numbers = [operator.index(each) if isinstance(each, Size) else each for each in array.flat]
            array = np.array(numbers).reshape(array.shape)
        if dtype is None and array.dtype == np.float64 and not isinstance(value, np.ndarray | np.generic):
            dtype = f32
        kind = dtype or dtype_of(array)
        if kind is None or array.dtype.kind not in "biuf":
            raise GraphError(
                f"a constant cannot hold {array.dtype}",
                received=f"{value!r}"[:80],
                hint="numbers and truth values only",
            )
        try:
            with np.errstate(invalid="ignore", over="raise"):
                stored = _to_bfloat16(array) if kind is bf16 else array.astype(kind.numpy)
        except FloatingPointError:
            largest = array.flat[np.argmax(np.abs(np.where(np.isfinite(array), array, 0)))]
            raise GraphError(
                f"{largest} is out of the range of {kind}",
                hint='float("inf"), or cast the other operand to a wider dtype',
            ) from None
        if not kind.is_float and array.dtype != stored.dtype and not np.array_equal(stored, array):
            wrong = array[stored != array].flat[0]
            raise GraphError(f"{wrong} is no {kind}", hint="cast the other operand, or round the number")
        contiguous = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<"))
        return Literal(kind, tuple(array.shape), contiguous.tobytes())

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """A read-only array of the elements."""
        if self.dtype is bf16:
            words = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << 16
            return words.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=self.dtype.numpy).reshape(self.shape)

    @property
    def scalar(self) -> float | int | bool | None:
        """The Python number of a rank-0 constant, else None."""
        return self.array.item() if self.shape == () else None

    @property
    def type(self) -> Type:
        return self.dtype[self.shape] if self.shape else Type(self.dtype)


def _to_bfloat16(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves of float32 words, rounded to nearest even; a NaN stays one.

    Raises FloatingPointError where a finite number would become infinite.
    """
    values = np.ascontiguousarray(array, dtype=np.float32)
    words = values.view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    if np.any(((rounded & 0x7FFF) == 0x7F80) & np.isfinite(values)):
        raise FloatingPointError
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


class Value:
    """One tensor in a function. Compared by identity.

    kind   "input", "parameter", "constant" or "result"
    name   an input's or parameter's own name; for a result a hint that the printer makes unique
    node   the node that makes a result, else None; `index` tells which of its results this is
    """

    __slots__ = ("index", "kind", "lies_in", "literal", "name", "node", "type")

    def __init__(
        self,
        kind: str,
        type: Type,
        name: str,
        literal: Literal | None = None,
        node: Node | None = None,
        index: int = 0,
    ) -> None:
        self.kind = kind
        self.type = type
        self.name = name
        self.literal = literal
        self.node = node
        self.index = index
        self.lies_in: Layout | None = None
        """The layout of a parameter; for others see `layout`."""

    @property
    def layout(self) -> Layout | None:
        """The order of its elements in memory; None is row-major. A result has the layout in which its op leaves it."""
        return self.lies_in if self.node is None else self.node.op.result_layout(self.index)

    @staticmethod
    def constant(literal: Literal) -> Value:
        """A constant; scalars print in place."""
        return Value("constant", literal.type, "constant", literal)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}: {self.type}>"


class Node:
    """An op applied to operands (None where an optional one is absent), giving results."""

    __slots__ = ("op", "operands", "results", "scope", "source")

    def __init__(
        self,
        op: Op,
        operands: Sequence[Value | None],
        types: Sequence[Type],
        name: str | None = None,
        scope: str = "",
        source: SourceLine | None = None,
    ) -> None:
        self.op = op
        self.operands: tuple[Value | None, ...] = tuple(operands)
        self.scope = scope
        self.source = source
        hint = name or op.name
        self.results: tuple[Value, ...]
        if len(types) == 1:  # nearly always
            self.results = (Value("result", types[0], hint, None, self),)
        else:
            self.results = tuple([Value("result", t, hint, None, self, i) for i, t in enumerate(types)])

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The operands that are present."""
        return tuple([v for v in self.operands if v is not None])

    @property
    def is_elementwise(self) -> bool:
        """Whether its op works on each element by itself: see `Op.is_elementwise`."""
        return self.op.is_elementwise(self._ranks)

    @property
    def is_contraction(self) -> bool:
        """Whether its op is a product that sums over an axis of two operands: see `Op.is_contraction`."""
        return self.op.is_contraction(self._ranks)

    @property
    def is_multilinear(self) -> bool:
        """Whether its op is linear in each operand: see `Op.is_multilinear`."""
        return self.op.is_multilinear(len(self.operands))

    @property
    def _ranks(self) -> list[int | None]:
        return [None if v is None else v.type.rank for v in self.operands]

    def __repr__(self) -> str:
        return f"<{self.op.name} {self.scope or '-'} {self.source or ''}>"


class Function:
    """A list of nodes in program order between inputs, parameters and named outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.parameters: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.outputs: dict[str, Value] = {}

    @property
    def arguments(self) -> tuple[Value, ...]:
        """What a call passes: the inputs, then the parameters, in order."""
        return (*self.inputs, *self.parameters.values())

    def uses(self) -> dict[Value, list[tuple[Node, int]]]:
        """For each used value, the nodes and operand positions that read it, in program order."""
        found: dict[Value, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for position, value in enumerate(node.operands):
                if value is not None:
                    found.setdefault(value, []).append((node, position))
        return found

    def __repr__(self) -> str:
        return f"<function {self.name}: {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}>"


def needed_nodes(nodes: Sequence[Node], values: Iterable[Value]) -> list[Node]:
    """Those of the nodes, which are in program order, that values are computed by."""
    needed = set(values)
    found: list[Node] = []
    for node in reversed(nodes):
        if any(v in needed for v in node.results):
            needed.update(node.inputs)
            found.append(node)
    return found[::-1]


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts when no checkpoint gives it: `zeros`, `ones`, `constant(2.5)`, `normal(0.02)`,
    `uniform(0.1)`.
    """

    kind: str
    scale: float | None = None

    def __str__(self) -> str:
        return self.kind if self.scale is None else f"{self.kind}({self.scale!r})"

    def draw(self, shape: tuple[int, ...], dtype: DType, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """An array of initial values. Raises GraphError for an unknown kind, or a dtype that NumPy does not have."""
        if dtype.numpy is None:
            raise GraphError(f"initial values cannot be drawn in {dtype}")
        scale = np.float32(1.0 if self.scale is None else self.scale)
        match self.kind:
            case "zeros":
                return np.zeros(shape, dtype.numpy)
            case "ones":
                return np.ones(shape, dtype.numpy)
            case "constant":
                return np.full(shape, self.scale or 0.0, dtype.numpy)
            case "normal":
                drawn = rng.standard_normal(shape, np.float32) * scale
            case "uniform":
                drawn = (rng.random(shape, np.float32) * 2 - 1) * scale
            case _:
                kinds = "zeros, ones, constant, normal or uniform"
                raise GraphError(f"unknown initial value {self.kind!r}", hint=kinds)
        return drawn.astype(dtype.numpy, copy=False)


class Graph:
    """A whole program: its functions (callees before callers, entries last), symbols and initial values.

    entry_names   which functions are entries, in the order in which they run: "main" alone, or "bind" before it
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.functions: dict[str, Function] = {"main": Function("main")}
        self.entry_names: tuple[str, ...] = ("main",)
        self.symbols: dict[str, Bounds] = {}
        self.initial: dict[str, Init] = {}

    @property
    def main(self) -> Function:
        return self.functions["main"]

    @property
    def bind(self) -> Function | None:
        """What runs once, when the weights are there; None where there is no such entry."""
        return self.functions["bind"] if "bind" in self.entry_names else None

    @property
    def entries(self) -> tuple[Function, ...]:
        """The functions that run by themselves, in the order in which they run."""
        return tuple([self.functions[name] for name in self.entry_names])

    @property
    def made(self) -> Mapping[str, Value]:
        """What `bind` makes, by name: results of its nodes."""
        return self.bind.outputs if self.bind is not None else {}

    @property
    def parameters(self) -> Mapping[str, Value]:
        """The weights by their full names: the parameters that no earlier entry makes."""
        if self.bind is None:
            return self.main.parameters
        made = self.made
        return {name: v for e in self.entries for name, v in e.parameters.items() if name not in made}

    def add_function(self, function: Function) -> None:
        """Put a function before the entries. Raises GraphError if the name is taken."""
        if function.name in self.functions:
            raise GraphError(f"the graph has a function {function.name!r} already")
        entries = [self.functions.pop(name) for name in self.entry_names]
        self.functions[function.name] = function
        self.functions |= {entry.name: entry for entry in entries}

    def add_bind(self) -> Function:
        """A new entry `bind` before `main`. Raises GraphError if the name is taken."""
        if "bind" in self.functions:
            raise GraphError("the graph has a function 'bind' already")
        main = self.functions.pop("main")
        made = self.functions["bind"] = Function("bind")
        self.functions["main"] = main
        self.entry_names = ("bind", "main")
        return made

    def bound(self, symbol: str, bounds: Bounds) -> None:
        """Narrow a symbol's bounds. Raises GraphError for a lower bound below 1, or if nothing is left."""
        if bounds.lower < 1:
            raise GraphError(
                f"{symbol} has no sizes below 1",
                received=bounds.around(symbol),
                hint="an axis that may be empty has a size such as S-1",
            )
        known = self.symbols.get(symbol, Bounds())
        narrowed = known.intersect(bounds)
        if narrowed.upper is not None and narrowed.upper < narrowed.lower:
            raise GraphError(
                f"no size is left for {symbol}",
                received=f"{known.around(symbol)}, {bounds.around(symbol)}",
            )
        self.symbols[symbol] = narrowed

    def callee(self, node: Node) -> Function | None:
        """The function that a call applies, or None for any other op. Raises GraphError if it does not exist."""
        name = node.op.callee
        if name is None:
            return None
        if name not in self.functions:
            raise GraphError(f"call of an unknown function {name!r}", hint="one of " + ", ".join(self.functions))
        return self.functions[name]

    def needed_by(self, function: Function) -> list[Function]:
        """The functions that one calls, directly or not, callees first, and itself last."""
        needed, waiting = {function}, [function]
        while waiting:
            for node in waiting.pop().nodes:
                callee = self.callee(node)
                if callee is not None and callee not in needed:
                    needed.add(callee)
                    waiting.append(callee)
        return [each for each in self.functions.values() if each in needed]

    def walk(self) -> Iterator[tuple[Function, Node]]:
        """Every node of every distinct function, callees first."""
        for function in self.functions.values():
            for node in function.nodes:
                yield function, node

    def __eq__(self, other: object) -> bool:
        """Structural equality: ops, attributes, types and wiring; not value names, scopes or source lines."""
        if not isinstance(other, Graph):
            return NotImplemented
        from treadle.ir.hashing import canonical_form

        return canonical_form(self) == canonical_form(other)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        from treadle.ir.text.printer import print_graph

        return print_graph(self)

    def __repr__(self) -> str:
        nodes = sum(len(f.nodes) for f in self.functions.values())
        return f"<graph {self.name}: {nodes} node{'s' * (nodes != 1)}>"

    def _repr_html_(self) -> str:
        """For notebooks: the graph as text."""
        from treadle.ir.notebook_html import html_code
        from treadle.ir.text.printer import print_graph

        return html_code(repr(self)[1:-1], print_graph(self), open=True)

    def to_networkx(self, function: str = "main") -> networkx.MultiDiGraph:
        """One function as a networkx graph: a vertex per argument, constant and node; an edge per use of a value.

        Vertices are integers in program order with `label`, `op` (or `kind`), `type`, `scope` and `source`; edges carry
        `value` (its type as text), `result` and `operand` positions. For dominators, cuts, intervals and layouts.
        Raises GraphError for an unknown function.
        """
        import networkx

        if function not in self.functions:
            raise GraphError(f"the graph has no function {function!r}", hint="one of " + ", ".join(self.functions))
        body = self.functions[function]
        out = networkx.MultiDiGraph(name=f"{self.name}.{function}")
        ids: dict[object, int] = {}

        def vertex(key: object, **notes: object) -> None:
            ids[key] = len(ids)
            out.add_node(ids[key], **notes)

        for value in body.arguments:
            vertex(value, label=value.name, kind=value.kind, type=str(value.type))
        for node in body.nodes:
            for value in node.inputs:
                if value.literal is not None and value not in ids:
                    vertex(value, label="constant", kind="constant", type=str(value.type))
            vertex(
                node,
                label=node.op.name,
                op=node.op.name,
                type=", ".join(str(v.type) for v in node.results),
                scope=node.scope,
                source=str(node.source or ""),
            )
            for position, operand in enumerate(node.operands):
                if operand is not None:
                    origin = ids[operand.node if operand.node is not None else operand]
                    out.add_edge(origin, ids[node], value=str(operand.type), result=operand.index, operand=position)
        for name, value in body.outputs.items():
            if value.literal is not None and value not in ids:
                vertex(value, label="constant", kind="constant", type=str(value.type))
            vertex(("output", name), label=name, kind="output", type=str(value.type))
            origin = ids[value.node if value.node is not None else value]
            out.add_edge(origin, ids["output", name], value=str(value.type), result=value.index, operand=0)
        return out
