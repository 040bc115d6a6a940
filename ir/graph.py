"""The graph: functions of nodes in program order, in SSA form; weights are stored outside the graph.

    Graph      functions by name, callees first, its entries last; bounds of its symbols; initial values of weights
    Function   inputs, parameters, states, nodes, outputs, updated states
    Node       an op applied to values, with its scope and the user's line
    Value      an input, a parameter (weight), a state, a constant, or a node's result

A repeated block is one function; a node whose op is `Call` applies it with its own weights. Symbols belong to the
graph: `S` means the same size in every function.

An entry is a function that can be run. `main` is the declared model, and usually the only entry. `bind` runs before it,
once, when weights are passed: it has no inputs, and its outputs are derived weights, which later entries read by name
like weights. In place of `main`, a graph derived for generation has `prefill`, `step` and `verify`.

A state outlives a call. The result of an op that updates a state is tied to its operand: it is a new version of the
state. No node reads a version after its update, so the state may be written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from treadle.ir.entry_order import ENTRIES, ONCE, are_entries
from treadle.ir.errors import GraphError
from treadle.ir.generated_values import GeneratedValue
from treadle.ir.initial_values import Init as Init
from treadle.ir.literals import Literal as Literal
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.source_lines import SourceLine
from treadle.ir.types import Type
from treadle.ir.wording.other_interfaces import GRAPH_ATTRIBUTES
from treadle.ir.wording.unknown_attributes import with_attribute_hints

if TYPE_CHECKING:
    import networkx

    from treadle.ir.layouts import Layout
    from treadle.ir.operation import Op


class Value:
    """One tensor in a function. Compared by identity.

    kind   "input", "parameter", "state" (its first version), "constant" or "result"
    name   the name of an input, a parameter or a state; for a result a hint that the printer makes unique
    node   the node that computes a result, else None; `index` is the result's position among the node's results
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
        """The layout of a parameter; for other values see `layout`."""

    @property
    def layout(self) -> Layout | None:
        """The order of the value's elements in memory; None means row-major. A result's layout is determined by its
        op.
        """
        return self.lies_in if self.node is None else self.node.op.result_layout(self.index)

    @property
    def weight(self) -> Value | None:
        """The parameter that this value is or decodes: the value itself, or the encoded parameter. None if the value is
        not a weight.
        """
        if self.kind == "parameter":
            return self
        node = self.node
        return node.inputs[0].weight if node is not None and node.op.decodes else None

    @property
    def before(self) -> Value | None:
        """The previous version of this value: the operand that its op updates. None for any other value."""
        if self.node is None:
            return None
        at = self.node.op.updates.get(self.index)
        return None if at is None else self.node.operands[at]

    @property
    def state(self) -> Value | None:
        """The first version of the state that this value is a version of. None if the value is not a version of a
        state.
        """
        value = self
        while (before := value.before) is not None:
            value = before
        return value if value.kind == "state" else None

    @staticmethod
    def constant(literal: Literal) -> Value:
        """Return a constant; scalars are printed in place."""
        return Value("constant", literal.type, "constant", literal)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}: {self.type}>"


class Node:
    """An op applied to operands (None for an absent optional operand), with its results."""

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
        if len(types) == 1:  # for nearly all nodes
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
    def named_results(self) -> tuple[Value, ...]:
        """The results that have names in the graph's text. For a call these are its outputs; the callee names the
        updated states.
        """
        return self.results if self.op.callee is None else self.results[: len(self.results) - len(self.op.updates)]

    @property
    def is_elementwise(self) -> bool:
        """True if the node's op works on each element independently: see `Op.is_elementwise`."""
        return self.op.is_elementwise(self._ranks)

    @property
    def is_contraction(self) -> bool:
        """True if the node's op is a product that sums over an axis of two operands: see `Op.is_contraction`."""
        return self.op.is_contraction(self._ranks)

    @property
    def is_multilinear(self) -> bool:
        """True if the node's op is linear in each operand: see `Op.is_multilinear`."""
        return self.op.is_multilinear(len(self.operands))

    @property
    def _ranks(self) -> list[int | None]:
        return [None if v is None else v.type.rank for v in self.operands]

    def __repr__(self) -> str:
        return f"<{self.op.name} {self.scope or '-'} {self.source or ''}>"


class Function:
    """A list of nodes in program order between inputs, parameters, states and named outputs.

    updated  the last version of each state that the function updates, by the state's name
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.parameters: dict[str, Value] = {}
        self.states: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.outputs: dict[str, Value] = {}
        self.updated: dict[str, Value] = {}

    @property
    def arguments(self) -> tuple[Value, ...]:
        """The function's arguments, in the order of a call's operands: the inputs, the parameters, then the states."""
        return (*self.inputs, *self.parameters.values(), *self.states.values())

    @property
    def results(self) -> tuple[Value, ...]:
        """The function's results, in the order of a call's results: the outputs, then the updated states."""
        if not self.updated:
            return tuple(self.outputs.values())
        return (*self.outputs.values(), *[self.updated[name] for name in self.states if name in self.updated])

    def replace_results(self, by: Callable[[Value], Value]) -> None:
        """Replace the outputs and the updated states by other values."""
        self.outputs = {name: by(v) for name, v in self.outputs.items()}
        self.updated = {name: by(v) for name, v in self.updated.items()}

    def uses(self) -> dict[Value, list[tuple[Node, int]]]:
        """Return, for each used value, the nodes that read it with the operand's position, in program order."""
        found: dict[Value, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for position, value in enumerate(node.operands):
                if value is not None:
                    found.setdefault(value, []).append((node, position))
        return found

    def __repr__(self) -> str:
        return f"<function {self.name}: {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}>"


def _is_empty(function: Function) -> bool:
    return not (function.arguments or function.nodes or function.outputs)


def needed_nodes(nodes: Sequence[Node], values: Iterable[Value]) -> list[Node]:
    """Return the nodes that the values depend on, and all collectives. `nodes` are in program order."""
    needed = set(values)
    found: list[Node] = []
    for node in reversed(nodes):
        if node.op.meets_ranks or any(v in needed for v in node.results):
            needed.update(node.inputs)
            found.append(node)
    return found[::-1]


@with_attribute_hints("a graph", GRAPH_ATTRIBUTES)
class Graph:
    """A whole program: its functions (callees before callers, entries last), symbols and initial values.

    name          the model's name
    entry_names   the functions that are entries, in the order in which they run: `main`, or `prefill`, `step` and
                  `verify`; before them `bind` and `prologue`, if present
    generated     the values of inputs for generated tokens, by the input's name
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.functions: dict[str, Function] = {"main": Function("main")}
        self.entry_names: tuple[str, ...] = ("main",)
        self.symbols: dict[str, Bounds] = {}
        self.initial: dict[str, Init] = {}
        self.generated: dict[str, GeneratedValue] = {}

    @property
    def main(self) -> Function:
        """The last entry: the declared model, or `verify` in a graph derived for generation."""
        return self.functions[self.entry_names[-1]]

    @property
    def bind(self) -> Function | None:
        """The entry that runs once, when weights are passed; None if the graph has no such entry."""
        return self.functions["bind"] if "bind" in self.entry_names else None

    @property
    def entries(self) -> tuple[Function, ...]:
        """The functions that can be run, in the order in which they run."""
        return tuple([self.functions[name] for name in self.entry_names])

    @property
    def later_entries(self) -> tuple[Function, ...]:
        """The entries that users call, which read derived weights: all but `bind`."""
        return tuple([self.functions[name] for name in self.entry_names if name != "bind"])

    @property
    def derived_weights(self) -> Mapping[str, Value]:
        """The derived weights by name, as computed by `bind`: its outputs."""
        return self.bind.outputs if self.bind is not None else {}

    @property
    def parameters(self) -> Mapping[str, Value]:
        """The weights by their full names: all parameters except derived weights, which an earlier entry computes."""
        if len(self.entry_names) == 1:
            return self.main.parameters
        made = self.derived_weights
        return {name: v for e in self.entries for name, v in e.parameters.items() if name not in made}

    @property
    def entry_parameters(self) -> Mapping[str, Value]:
        """The parameters of the entries that users call: weights, and derived weights."""
        if len(self.later_entries) == 1:
            return self.main.parameters
        return {name: v for e in self.later_entries for name, v in e.parameters.items()}

    @property
    def states(self) -> Mapping[str, Value]:
        """The states of all entries by their full names: the first version of each."""
        if len(self.entry_names) == 1:
            return self.main.states
        found: dict[str, Value] = {}
        for entry in self.entries:
            for name, value in entry.states.items():
                found.setdefault(name, value)
        return found

    def add_function(self, function: Function) -> None:
        """Add a function before the entries. Raises GraphError if the name is taken."""
        if function.name in self.functions:
            raise GraphError(f"the graph has a function {function.name!r} already")
        entries = [self.functions.pop(name) for name in self.entry_names]
        self.functions[function.name] = function
        self.functions |= {entry.name: entry for entry in entries}

    def add_entry(self, name: str) -> Function:
        """Add an entry at its position in the order of entries, and return its function. `prefill`, `step` or `verify`
        replaces an empty `main`.

        Raises GraphError if the name is taken, is not the name of an entry, or cannot be combined with the graph's
        entries.
        """
        if name in self.functions:
            raise GraphError(f"the graph has a function {name!r} already")
        kept = [n for n in self.entry_names if n != "main" or name in ONCE or not _is_empty(self.functions[n])]
        names = tuple([n for n in ENTRIES if n in kept or n == name])
        if name not in ENTRIES or not are_entries(names):
            raise GraphError(
                f"the graph cannot have an entry {name!r}",
                received=f"entries {', '.join(self.entry_names)}",
                hint="bind and prologue, then either main, or prefill, step and verify",
            )
        made = Function(name)
        entries = {entry.name: entry for entry in self.entries} | {name: made}
        blocks = {n: f for n, f in self.functions.items() if n not in self.entry_names}
        self.functions, self.entry_names = blocks | {n: entries[n] for n in names}, names
        return made

    def bound(self, symbol: str, bounds: Bounds) -> None:
        """Narrow a symbol's bounds. Raises GraphError for a lower bound below 1, or if no size is left."""
        if bounds.lower < 1:
            raise GraphError(
                f"{symbol} cannot have a lower bound below 1",
                received=bounds.around(symbol),
                hint="an axis that may be empty has a size such as S-1",
            )
        known = self.symbols.get(symbol, Bounds())
        narrowed = known.intersect(bounds)
        if narrowed.upper is not None and narrowed.upper < narrowed.lower:
            raise GraphError(
                f"the bounds of {symbol} allow no size",
                received=f"{known.around(symbol)}, {bounds.around(symbol)}",
            )
        self.symbols[symbol] = narrowed

    def callee(self, node: Node) -> Function | None:
        """Return the function that a call applies, or None for any other op. Raises GraphError if the graph lacks the
        function.
        """
        name = node.op.callee
        if name is None:
            return None
        if name not in self.functions:
            raise GraphError(f"call of an unknown function {name!r}", hint="one of " + ", ".join(self.functions))
        return self.functions[name]

    def needed_by(self, *functions: Function) -> list[Function]:
        """Return these functions and the functions that they call, directly or not, callees first."""
        needed, waiting = set(functions), list(functions)
        while waiting:
            for node in waiting.pop().nodes:
                callee = self.callee(node)
                if callee is not None and callee not in needed:
                    needed.add(callee)
                    waiting.append(callee)
        return [each for each in self.functions.values() if each in needed]

    def walk(self) -> Iterator[tuple[Function, Node]]:
        """Yield every node of every distinct function, callees first."""
        for function in self.functions.values():
            for node in function.nodes:
                yield function, node

    def __eq__(self, other: object) -> bool:
        """Return True if the graphs are structurally equal: ops, attributes, types and wiring; not value names, scopes
        or source lines.
        """
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
        """Return the graph's text as HTML, for notebooks."""
        from treadle.ir.text.printer import print_graph
        from treadle.ir.wording.notebook_html import html_code

        return html_code(repr(self)[1:-1], print_graph(self), open=True)

    def to_networkx(self, function: str = "main") -> networkx.MultiDiGraph:
        """Return one function as a networkx graph: a vertex per argument, constant, node, output and updated state; an
        edge per use of a value.

        Vertices are integers in program order with `label`, `op` (or `kind`), `type`, `scope` and `source`; edges carry
        `value` (its type as text), `result` and `operand` positions. The graph serves to compute dominators, cuts,
        intervals and layouts. Raises GraphError for an unknown function.
        """
        from treadle.ir.analysis.networkx_vertices import networkx_graph

        return networkx_graph(self, function)
