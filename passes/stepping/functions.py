"""Building of the functions of a step: every op is applied again, by its own rule, to the new tokens.

An op that maps the axis stays unchanged; any other op on the axis defines its form at a step (`Op.stepped`). A function
is built once for each combination of needed outputs and forms of arguments; its states are declared when they are first
used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.ir.analysis.encounters import Scanned
from treadle.ir.builder import Builder, Expr
from treadle.ir.entry_order import ENTRIES
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.naming import free_name
from treadle.ir.operation import Op
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.stepping import Kept, Stepping
from treadle.ir.types import Dim, DType, Type, i64
from treadle.passes.stepping.demands import ALL, LAST, Demanding, Demands, Extent, Extents, pickable
from treadle.passes.stepping.errors import refusal
from treadle.passes.stepping.kept_values import StepStates
from treadle.passes.stepping.rows import Stepped, apply_by_row
from treadle.passes.stepping.sampled import SAMPLED, TokenChooser
from treadle.passes.stepping.survey import Context, Kind, Survey

ROWS, LAST_TOKEN = ("rows", "start"), "last"
"""The per-row inputs of an entry; see `treadle.passes.stepping.derivation`."""
CAPACITY = "C"
"""The symbol of the number of positions of a cache; `unused_symbol` returns another one if the model has it."""
SLOTS = "R"
"""The symbol of the number of slots of a state, as with `CAPACITY`."""

Wanted = tuple[Value, Extent]


@dataclass(frozen=True)
class _Made:
    """A built function, with its inputs and outputs.

    takes   its inputs in order: a value of the model's function in an extent, or the name of per-row data
    gives   its outputs in order: the index of the model's output, its extent, and True if it gained the rows
    """

    function: Function
    takes: list[Wanted | str] = field(default_factory=list)
    gives: list[tuple[int, Extent, bool]] = field(default_factory=list)


def unused_symbol(symbol: str, symbols: Collection[str]) -> str:
    """Return a symbol, or repetitions of it, such that no symbol of the model is equal or begins with it and "_"."""
    unused = symbol
    while any(each == unused or each.startswith(f"{unused}_") for each in symbols):
        unused += symbol
    return unused


class StepFunctions:
    """A builder of the functions of a step. Each function is built once.

    cache  the dtype in which caches store keys and values; None: their own dtype
    """

    def __init__(self, survey: Survey, graph: Graph, states: StepStates, cache: DType | None = None) -> None:
        self.survey, self.graph, self.states, self.cache = survey, graph, states, cache
        self.demanding = Demanding()
        self.carries = False
        """True if a node that was built carries a sum from step to step."""
        self._known: dict[object, _Made] = {}

    def entry(
        self, name: str, extent: Extent, *, single: bool = False, chooser: TokenChooser | None = None
    ) -> Function:
        """Build an entry that computes the model's outputs in an extent.

        single   True for one token per row
        chooser  replaces the logits by a token of each row
        """
        context = self.survey.main
        values = context.function.outputs.values()
        extents = tuple(
            frozenset()
            if context.kind(v) is Kind.KEPT
            else LAST
            if extent is Extent.LAST and pickable(context, v)
            else ALL
            for v in values
        )
        body = _Body(self, context, self.demanding.of(context, extents), self.graph.add_entry(name), single)
        body.declare([*ROWS, LAST_TOKEN] if extent is Extent.LAST else ROWS)
        body.build()
        body.finish(extents, chooser)
        return body.made.function

    def block(
        self, context: Context, extents: tuple[Extents, ...], arguments: dict[Wanted, Stepped], single: bool
    ) -> _Made:
        """Return a block that computes its outputs in these extents, from arguments of these types."""
        argument_keys = tuple((v.name, extent, x.expr.type.text, x.by_row) for (v, extent), x in arguments.items())
        key = (id(context), extents, argument_keys, single)
        if key not in self._known:
            suffix = "_step" if single else "_last" if LAST in extents else ""
            name = free_name(f"{context.function.name}{suffix}", {*ENTRIES, *self.graph.functions})
            function = Function(name)
            body = _Body(self, context, self.demanding.of(context, extents), function, single, arguments)
            body.build()
            body.finish(extents)
            self.graph.add_function(function)
            self._known[key] = body.made
        return self._known[key]


class _Body:
    """One function while it is being built."""

    def __init__(
        self,
        functions: StepFunctions,
        context: Context,
        demands: Demands,
        function: Function,
        single: bool,
        arguments: dict[Wanted, Stepped] | None = None,
    ) -> None:
        self.functions, self.context, self.demands, self.single = functions, context, demands, single
        self.arguments = arguments
        self.made = _Made(function)
        self.b = Builder(functions.graph, function)
        self.values: dict[Wanted, Stepped] = {}
        self.known: dict[str, Expr] = {}
        self.axis = functions.survey.axis

    def declare(self, names: Sequence[str]) -> None:
        """Declare the tokens, then the per-row inputs, even unused ones, since callers pass all of them."""
        for value in self.context.function.inputs:
            if self.context.kind(value) is Kind.STEPPED:
                self.read(value, Extent.ALL)
        for name in names:
            self.data(name)

    def build(self) -> None:
        for node in self.context.function.nodes:
            if all(not self.demands.of(v) or self.context.kind(v) is Kind.KEPT for v in node.results):
                continue
            with self.b.placed_as(node):
                if node.op.callee is not None:
                    self._call(node)
                else:
                    self._apply(node)

    def finish(self, extents: Sequence[Extents], chooser: TokenChooser | None = None) -> None:
        """Name outputs and updated states."""
        outputs: dict[str, Expr] = {}
        for position, (name, value) in enumerate(self.context.function.outputs.items()):
            for extent in sorted(extents[position], key=lambda f: f.value):
                x = self.read(value, extent)
                self.made.gives.append((position, extent, x.by_row))
                outputs[name if len(extents[position]) == 1 else free_name(f"{name}_{extent.value}", outputs)] = x.expr
        if chooser is not None:
            logits = outputs.pop(chooser.logits)
            outputs[free_name(SAMPLED, self._input_names)] = chooser.token(self.b, logits, self._option)
        self.b.outputs(**outputs)

    def _option(self, name: str, dtype: DType) -> Expr:
        """Return an input of sampling, [b]."""
        return self.b.input(free_name(name, self._input_names), self._row_type.with_dtype(dtype))

    @property
    def _input_names(self) -> set[str]:
        return {v.name for v in self.context.function.inputs}

    # -- values ------------------------------------------------------------------------------------------------

    def read(self, value: Value, extent: Extent) -> Stepped:
        """Return a value for all tokens, or for each row's last token."""
        if value.literal is not None:
            return Stepped(self.b.expr(Value.constant(value.literal)))
        if not self.context.dims(value) or self.single:
            extent = Extent.ALL
        found = self.values.get((value, extent))
        if found is None:
            found = self._argument(value, extent)
        if found is None:
            assert extent is Extent.LAST, f"{value.name} is read before it is computed"
            found = self._last(value)
        self.values[value, extent] = found
        return found

    def _argument(self, value: Value, extent: Extent) -> Stepped | None:
        """Return a value that is an argument, which is declared when it is first read. Return None for any other
        value.
        """
        if value.node is not None:
            return None
        if value.kind == "parameter":
            return Stepped(self.b.parameter(value.name, value.type))
        if self.arguments is None:
            if extent is Extent.LAST:
                return None
            return Stepped(self.b.input(value.name, self._type(value.type)))
        given = self.arguments.get((value, extent))
        if given is None:
            return None
        self.made.takes.append((value, extent))
        name = value.name if extent is Extent.ALL else f"{value.name}_last"
        return Stepped(self.b.input(name, given.expr.type), given.by_row)

    def _type(self, type: Type) -> Type:
        return type.substitute({self.axis: 1}) if self.single else type

    def _last(self, value: Value) -> Stepped:
        """Select each row's last token of a value for all tokens: [b, s, ...] -> [b, 1, ...]."""
        x = self.read(value, Extent.ALL)
        rows, axis = self.context.row_dim(value), self.context.whole_dim(value)
        assert axis is not None
        if x.by_row:
            rows, axis = 0, axis + 1
        assert rows is not None
        names = [f"x{n}" for n in range(x.expr.rank)]
        row, token = names[rows], names[axis]
        others = [name for name in names if name not in (row, token)]
        flat = self.b.rearrange(x.expr, pattern=f"{' '.join(names)} -> ({row} {token}) {' '.join(others)}")
        picked = self.b.gather(flat, self.data("last_rows"), axis=0)
        back = ["1" if name == token else name for name in names]
        return Stepped(self.b.rearrange(picked, pattern=f"{' '.join([row, *others])} -> {' '.join(back)}"), x.by_row)

    def kept(self, value: Value) -> Kept:
        """Return a value that the prologue stored in a state."""
        state = self.functions.states.keep(self.context, value)
        length = None
        if state.memory is not None:
            length = self.data(f"{self.functions.states.memory_name(state.memory)}_length")
        return Kept(self.state(state.name, state.type), self.data("rows"), length, value.type.rank == 1)

    # -- rows and states ---------------------------------------------------------------------------------------

    def data(self, name: str) -> Expr:
        """Return per-row data, i64[b]: an input, or data that is computed once."""
        if name not in self.known:
            self.known[name] = self._data(name) if self.arguments is None else self._passed(name)
        return self.known[name]

    def _passed(self, name: str) -> Expr:
        self.made.takes.append(name)
        taken = {v.name for v in self.made.function.inputs} | {v.name for v in self.context.function.inputs}
        return self.b.input(free_name(name, taken), self._row_type)

    def _data(self, name: str) -> Expr:
        """Return per-row data of an entry: an input, or data computed from inputs."""
        b = self.b
        scope, b.scope = b.scope, ""  # these nodes belong to no node of the model
        try:
            return self._found(name)
        finally:
            b.scope = scope

    def _found(self, name: str) -> Expr:
        b = self.b
        if name == "first":
            return self.data("start") + self.data("last")
        if name == "last_rows":
            size = Size.symbol(self.axis)
            return b.iota(size=Size.symbol(self.functions.survey.rows)) * b.size(value=size) + self.data("last")
        if name == "count":
            return self.data("last") + 1
        if name.endswith("_length"):
            held = self.functions.states.length_name(self.context, name.removesuffix("_length"))
            state = self.state(held, Type(i64, (Dim.of(self.functions.states.slots), Dim.of(ONE))))
            found: Expr = b.rearrange(b.gather(state, self.data("rows"), axis=0), pattern="b 1 -> b")
            return found
        return b.input(free_name(name, self._input_names), self._row_type)

    @property
    def _row_type(self) -> Type:
        return Type(i64, (Dim.of(Size.symbol(self.functions.survey.rows)),))

    def state(self, name: str, type: Type) -> Expr:
        """Return a state's current value."""
        return self.b.state(name, type)

    # -- nodes -------------------------------------------------------------------------------------------------

    def _apply(self, node: Node) -> None:
        last = self.demands.last_only.get(node)
        extent = Extent.ALL if last is None else Extent.LAST
        op = node.op.substitute({self.axis: 1}) if self.single or last is not None else node.op
        names = op.operand_names(len(node.operands))
        operands: list[Stepped | Kept | None] = []
        for i, value in enumerate(node.operands):
            if value is None:
                operands.append(None)
            elif self.context.kind(value) is Kind.KEPT:
                operands.append(self._read_kept(node, value, in_slots=names[i] in op.reads_slots))
            else:
                operands.append(self.read(value, Extent.LAST if last and i in last else Extent.ALL))
        asked = node in self.context.encounters or self.context.reads_positions(node)
        if asked or any(isinstance(x, Kept) for x in operands):
            results = self._stepped(node, op, extent, operands)
        else:
            plain = [x if isinstance(x, Stepped) else None for x in operands]
            if any(x is not None and x.by_row for x in plain):
                results = apply_by_row(self.b, node, op, plain, self.context.row_dim(node.results[0]))
            else:
                made = self.b.emit(op, [None if x is None else x.expr.value for x in plain])
                results = [Stepped(self.b.expr(v)) for v in made.results]
        for old, new in zip(node.results, results, strict=True):
            new.expr.value.name = old.name
            self.values[old, extent] = new

    def _read_kept(self, node: Node, value: Value, *, in_slots: bool) -> Stepped | Kept:
        kept = self.kept(value)
        if in_slots:
            return kept
        if kept.length is not None and not node.op.reads_slots:
            raise refusal(
                node,
                f"reads {value.name} at every step, although its size is known only when a row begins",
                hint="only attention can read values whose size differs by row",
            )
        return Stepped(kept.read())

    def _stepped(self, node: Node, op: Op, extent: Extent, operands: Sequence[Stepped | Kept | None]) -> list[Stepped]:
        met = self.context.encounters.get(node, ())
        if any(isinstance(x, Stepped) and x.by_row for x in operands):
            raise refusal(node, "mixes values that depend on the tokens' positions")
        reads = node.op.reads_positions or any(self.context.dims(v) for v in node.inputs)
        for value in (*node.inputs, *node.results) if reads else ():
            if self.context.dims(value) and self.context.rows.get(value) and self.context.row_dim(value) != 0:
                raise refusal(node, "mixes tokens, but their rows are not its first dimension")
        is_carried = any(isinstance(e.kind, Scanned) for e in met) and not node.op.reads_positions
        if is_carried and any(self.context.dims(v) and self.context.row_dim(v) is None for v in node.inputs):
            why = "carries along values that are the same in all rows"
            raise refusal(node, why, hint="sum up values that have rows")
        held = [frozenset[int]() if v is None else self.context.dims(v) for v in node.operands]
        states, data = self.functions.states, self.data
        step = Stepping(
            self.b,
            data("rows"),
            data("start"),
            data("first" if extent is Extent.LAST and not self.single else "start"),
            lambda: data("count"),
            states.slots,
            Size.symbol(states.capacity),
            self.functions.cache,
            lambda name, type: self.state(self._state_name(node, name), type),
        )
        made = op.stepped(step, [x.expr if isinstance(x, Stepped) else x for x in operands], held)
        if made is None:
            raise refusal(node, "mixes tokens in a way that has no step")
        self.functions.carries |= is_carried
        results = made if isinstance(made, tuple) else (made,)
        ranks = [v.type.rank for v in node.results]
        return [Stepped(x, x.rank > rank) for x, rank in zip(results, ranks, strict=True)]

    def _state_name(self, node: Node, name: str) -> str:
        return self.functions.states.name(self.context, (node, name), joined_scope(node.scope, name))

    def _call(self, node: Node) -> None:
        inner = self.context.callees[node]
        is_kept = [self.context.kind(v) is Kind.KEPT for v in node.results]
        extents = tuple(
            frozenset() if kept else self.demands.of(v) for kept, v in zip(is_kept, node.results, strict=True)
        )
        demands = self.functions.demanding.of(inner, extents)
        actual = dict(zip(inner.function.arguments, node.operands, strict=True))
        arguments: dict[Wanted, Stepped] = {}
        for formal, value in actual.items():
            if formal.kind == "parameter" or value is None or self.context.kind(value) is Kind.KEPT:
                continue
            for extent in sorted(demands.of(formal), key=lambda f: f.value):
                arguments[formal, extent] = self.read(value, extent)
        made = self.functions.block(inner, extents, arguments, self.single)
        inputs = [self.data(x) if isinstance(x, str) else arguments[x].expr for x in made.takes]
        weights: list[Expr] = []
        for name in made.function.parameters:
            value = actual[inner.function.parameters[name]]
            assert value is not None
            weights.append(self.read(value, Extent.ALL).expr)
        states = [
            self.state(self.functions.states.name_of_call(self.context, node, name), v.type)
            for name, v in made.function.states.items()
        ]
        outputs = self.b.call(made.function, [*inputs, *weights, *states])
        for (position, extent, by_row), x in zip(made.gives, outputs, strict=True):
            old = node.results[position]
            x.value.name = old.name
            self.values[old, extent] = Stepped(x, by_row)
