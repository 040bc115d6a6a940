"""Building of the prologue: values that do not depend on the tokens are computed once per row and stored in states.

cross.k = rearrange(linear(encoded, $k))      -->   prologue: %cross.k = append(%cross.k, ..., rows, zeros)
attention(q, cross.k, cross.v)                      step:     cached_attention(q, %cross.k, %cross.v, ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.ir.builder import Builder, Expr
from treadle.ir.entry_order import ENTRIES
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.naming import free_name
from treadle.ir.ops.call import Call
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.transforms.clone import clone_function
from treadle.ir.types import Dim, Type, i64
from treadle.passes.stepping.kept_values import StepStates
from treadle.passes.stepping.survey import Context, Kind, Survey


@dataclass(frozen=True)
class _Made:
    """A block of the prologue, with the arguments of the model's block that it takes, and the outputs that it
    returns.
    """

    function: Function
    takes: list[Value] = field(default_factory=list)
    gives: list[int] = field(default_factory=list)


class Prologue:
    """A builder of the entry `prologue` in a graph. It runs after the step functions are built, which determine the
    values to store.
    """

    def __init__(self, survey: Survey, graph: Graph, states: StepStates) -> None:
        self.survey, self.graph, self.states = survey, graph, states
        self.copies: dict[str, Function] = {}
        self._known: dict[tuple[int, frozenset[int]], _Made] = {}

    def build(self, function: Function) -> None:
        """Build the entry. Its inputs are the inputs that do not extend along the tokens, and the slots of the rows."""
        context = self.survey.main
        body = _Body(self, context, function, is_entry=True)
        for value in context.function.inputs:
            if (
                context.kind(value) is Kind.KEPT
            ):  # declared even if it is unused, since callers pass all declared inputs
                body.read(value)
        body.build({v: name for name, v in context.function.outputs.items() if context.kind(v) is Kind.KEPT})

    def leaves(self, context: Context) -> bool:
        """Return True if a function, or a function that it calls, stores a value for a step."""
        return bool(self.states.kept.get(id(context))) or any(map(self.leaves, context.callees.values()))

    def block(self, context: Context, outputs: frozenset[int]) -> _Made:
        """Return a block that stores the values that a step reads, and computes these outputs."""
        key = (id(context), outputs)
        if key not in self._known:
            function = Function(free_name(f"{context.function.name}_prologue", {*ENTRIES, *self.graph.functions}))
            body = _Body(self, context, function, is_entry=False)
            named = list(context.function.outputs.items())
            body.build({named[n][1]: named[n][0] for n in sorted(outputs)})
            self.graph.add_function(function)
            self._known[key] = _Made(function, body.takes, sorted(outputs))
        return self._known[key]

    def copied(self, name: str) -> Function:
        """Return a copy of a function of the model."""
        if name not in self.copies:
            source = self.survey.graph.functions[name]
            copy = clone_function(source, free_name(name, {*ENTRIES, *self.graph.functions}))
            for node in copy.nodes:
                if node.op.callee is not None:
                    node.op = Call.of(self.copied(node.op.callee))
            self.graph.add_function(copy)
            self.copies[name] = copy
        return self.copies[name]


class _Body:
    def __init__(self, prologue: Prologue, context: Context, function: Function, *, is_entry: bool) -> None:
        self.prologue, self.context, self.is_entry = prologue, context, is_entry
        self.b = Builder(prologue.graph, function)
        self.values: dict[Value, Expr] = {}
        self.takes: list[Value] = []
        self._rows: Expr | None = None

    def build(self, outputs: Mapping[Value, str]) -> None:
        """Build the code that computes the values to store and the given outputs."""
        states = self.prologue.states
        kept = states.kept.get(id(self.context), {})
        for node in self._needed([*kept, *outputs]):
            with self.b.placed_as(node):
                self._add(node)
        for value, state in kept.items():
            x = self.read(value)
            if value.type.rank == 1:
                x = self.b.rearrange(x, pattern="b -> b 1")
            self._leave(state.name, state.type, x, state.axis)
        if self.is_entry:
            rows = self.rows  # declared even if nothing is stored
            for name, size in states.memories.items():
                length = self.b.expand(self.b.size(value=size), shape=(*rows.shape, ONE))
                state_name = states.length_name(self.context, name)
                self._leave(state_name, Type(i64, (Dim.of(states.slots), Dim.of(ONE))), length, 1)
        self.b.outputs(**{name: self.read(value) for value, name in outputs.items()})

    def _needed(self, roots: list[Value]) -> list[Node]:
        """Return the nodes that compute the roots, and the calls that store something."""
        wanted, found = set(roots), []
        for node in reversed(self.context.function.nodes):
            inner = self.context.callees.get(node)
            mixed = inner is not None and self._is_mixed(node)
            if not any(v in wanted for v in node.results) and not (mixed and self.prologue.leaves(inner)):  # type: ignore[arg-type]
                continue
            found.append(node)
            for value in node.inputs:
                if self.context.kind(value) is not Kind.STEPPED:
                    wanted.add(value)
        return found[::-1]

    def _is_mixed(self, node: Node) -> bool:
        return any(self.context.kind(v) is Kind.STEPPED for v in node.inputs)

    def read(self, value: Value) -> Expr:
        if value.literal is not None:
            return self.b.expr(Value.constant(value.literal))
        if value not in self.values:
            if value.kind == "parameter":
                self.values[value] = self.b.parameter(value.name, value.type)
            else:
                self.takes.append(value)
                self.values[value] = self.b.input(value.name, value.type)
        return self.values[value]

    @property
    def rows(self) -> Expr:
        """The slot of each row: i64[b]."""
        if self._rows is None:
            taken = {v.name for v in self.context.function.inputs}
            type = Type(i64, (Dim.of(Size.symbol(self.prologue.survey.rows)),))
            self._rows = self.b.input(free_name("rows", taken), type)
        return self._rows

    def _leave(self, name: str, type: Type, x: Expr, axis: int) -> None:
        zeros = self.b.expand(self.b.constant(0, i64), shape=self.rows.shape)
        self.b.append(self.b.state(name, type), x, self.rows, zeros, axis=axis)

    def _add(self, node: Node) -> None:
        inner = self.context.callees.get(node)
        if inner is not None and self._is_mixed(node):
            self._call(node, inner)
            return
        op = node.op if node.op.callee is None else Call.of(self.prologue.copied(node.op.callee))
        made = self.b.emit(op, [None if v is None else self.read(v).value for v in node.operands])
        for old, new in zip(node.results, made.results, strict=True):
            new.name = old.name
            self.values[old] = self.b.expr(new)

    def _call(self, node: Node, inner: Context) -> None:
        outputs = frozenset(n for n, v in enumerate(node.results) if self.context.kind(v) is Kind.KEPT)
        made = self.prologue.block(inner, outputs)
        actual = dict(zip(inner.function.arguments, node.operands, strict=True))
        values: list[Expr] = []
        for formal in made.function.inputs:
            source = next((v for v in made.takes if v.name == formal.name), None)
            given = None if source is None else actual[source]
            values.append(self.rows if given is None else self.read(given))
        for name in made.function.parameters:
            value = actual[inner.function.parameters[name]]
            assert value is not None
            values.append(self.read(value))
        states = [
            self.b.state(self.prologue.states.name_of_call(self.context, node, name), v.type)
            for name, v in made.function.states.items()
        ]
        results = self.b.call(made.function, [*values, *states])
        for n, x in zip(made.gives, results, strict=True):
            self.values[node.results[n]] = x
