"""The verifier: all invariants of a graph, checked independently from the ops' own rules.

    graph      entries come last; the bounds of each symbol allow a size; initial values belong to parameters
    entries    `bind` has no inputs and no states, and its outputs are distinct results, under names that no weight has;
               a parameter or state has one type and one layout in all entries; no node calls an entry
    function   inputs, parameters, states and outputs have distinct names; types use declared symbols only
    node       operands are defined before, in the same function; results and node refer to each other
    types      equal the types that the op's rules infer from the operands; a constant has the type of its content
    calls      name a preceding function (so there is no recursion) and match its signature
    states     no node reads a version of a state, or a view of one, after its update or in the same node; the last
               version of a state is the one that the function declares; no output is a version; a call passes states
               as states
    layouts    only matrices have layouts; a call passes values in the layouts of its callee; inputs, states, weights of
               the graph, and outputs of its entries are row-major
    encodings  are read by ops that accept blocks, as their types declare; inputs and outputs of entries are not encoded

The verifier runs after every pass.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import zip_longest

from treadle.ir.analysis.state_views import StateViews
from treadle.ir.builder import describe_source
from treadle.ir.entry_order import are_entries
from treadle.ir.errors import TreadleError, VerifyError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.call import Call
from treadle.ir.text.attributes import attribute_symbols
from treadle.ir.text.printer import excerpt
from treadle.ir.types import Type, boolean


def verify(graph: Graph, only: Collection[str] | None = None) -> None:
    """Raise VerifyError for the first violated invariant, with the surrounding nodes and the user's line.

    only  the functions to check, if all other functions, and the signatures of these, are known to be unchanged
    """
    last = tuple(graph.functions)[-len(graph.entry_names) :]
    if not are_entries(graph.entry_names) or last != graph.entry_names:
        raise VerifyError(
            "a graph's entries are main, or prefill, step and verify, after bind and prologue, and they come last",
            received=f"entries {', '.join(graph.entry_names)}; functions {', '.join(graph.functions)}",
        )
    for symbol, bounds in graph.symbols.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", symbol):
            raise VerifyError(f"{symbol!r} is not a symbol's name", within="the graph's symbols")
        if bounds.upper is not None and bounds.upper < bounds.lower:
            raise VerifyError(f"the bounds of {symbol} allow no size", received=bounds.around(symbol))
    parameters = graph.parameters
    for name in graph.initial:
        if name not in parameters:
            raise VerifyError(f"an initial value is given for {name!r}, which is not a parameter")
    inputs = {v.name for v in graph.main.inputs}
    for name in graph.generated:
        if name not in inputs:
            raise VerifyError(f"a value for generated tokens is given for {name!r}, which is not an input")
    for name, value in parameters.items():
        if value.lies_in is not None:
            raise VerifyError(f"weight {name} must be row-major: only bind assigns layouts", received=_lying(value))
    earlier: dict[str, Function] = {}
    views = StateViews(graph)
    for name, function in graph.functions.items():
        if function.name != name:
            raise VerifyError(f"function {function.name!r} is registered as {name!r}")
        if only is None or name in only:
            _FunctionCheck(graph, function, earlier, views).run()
        earlier[name] = function
    if graph.bind is not None:
        _verify_bind(graph.bind)
    _verify_shared(graph)


def _verify_bind(bind: Function) -> None:
    """Check the arguments and results of `bind`."""
    if taken := [*bind.inputs, *bind.states.values()]:
        raise VerifyError(f"bind takes no {taken[0].kind}s", received=taken[0].name)
    seen: set[Value] = set()
    for name, value in bind.outputs.items():
        if value.node is None or value in seen:
            why = "must be the result of a node" if value.node is None else "must have one name"
            raise VerifyError(f"an output of bind {why}", received=repr(value), within=f"bind, ${name}")
        seen.add(value)
        if name in bind.parameters:
            raise VerifyError(f"bind assigns {name}, and reads a weight of that name", within="bind")


def _verify_shared(graph: Graph) -> None:
    """Check that entries agree on the parameters and states that they share."""
    if len(graph.entry_names) == 1:
        return
    known: dict[str, tuple[str, Value]] = {name: ("bind", value) for name, value in graph.derived_weights.items()}
    for entry in graph.entries:
        for name, value in {**entry.parameters, **entry.states}.items():
            place, there = known.setdefault(name, (entry.name, value))
            kind, there_kind = ("state" if each.kind == "state" else "parameter" for each in (value, there))
            if (there.kind == "state") != (value.kind == "state"):
                raise VerifyError(f"{name} is a {there_kind} in {place}, but a {kind} in {entry.name}")
            if (there.type, there.layout) != (value.type, value.layout):
                raise VerifyError(
                    f"{kind} {name} has another type or layout in {place} than in {entry.name}",
                    received=f"{place}: {_lying(there)}; {entry.name}: {_lying(value)}",
                )


def _lying(value: Value) -> str:
    return f"{value.type}" + (f" in {value.layout}" if value.layout is not None else "")


class _FunctionCheck:
    def __init__(self, graph: Graph, function: Function, earlier: dict[str, Function], views: StateViews) -> None:
        self.graph, self.function, self.earlier, self.views = graph, function, earlier, views
        self.declared = frozenset(graph.symbols)
        self.defined: set[Value | None] = {None}  # an absent operand needs no definition
        self.laid: set[Value | None] = set()
        """The defined values that are not row-major; usually there are none."""
        self.checked_types: set[int] = set()
        """Identities of checked types. A function's values share types, and hashing a type would take longer than
        checking it.
        """
        self.checked_calls: set[Op] = set()
        self.updated: dict[Value, Value] = {}
        """The next version of each version of a state, if it was updated."""
        self.bases: dict[Value, Value] = {}
        """The bases of views, in a function with states."""

    def run(self) -> None:
        names: set[str] = set()
        for value in self.function.inputs:
            if value.name in names:
                raise self.error(f"there are two inputs {value.name!r}")
            names.add(value.name)
            self.argument(value, "input")
        for name, value in self.function.parameters.items():
            if value.name != name:
                raise self.error(f"parameter {value.name!r} is held as {name!r}")
            self.argument(value, "parameter")
            if value.lies_in is not None and value.type.rank != 2:
                raise self.error(
                    f"parameter {name} is not a matrix, and has layout {value.layout}", received=str(value.type)
                )
        for name, value in self.function.states.items():
            if value.name != name:
                raise self.error(f"state {value.name!r} is held as {name!r}")
            if name in self.function.parameters:
                raise self.error(f"{name} is a parameter and a state")
            self.argument(value, "state")
        for index, node in enumerate(self.function.nodes):
            self.node(node, index)
        for name, value in self.function.outputs.items():
            if value.literal is None and value not in self.defined:
                raise self.error(f"output {name!r} is not defined in {self.function.name}", received=repr(value))
            if value.literal is not None:
                self.constant(value, None)
            if value.layout is not None and self.function in self.graph.later_entries:
                raise self.error(
                    f"output {name!r} of {self.function.name} has layout {value.layout}",
                    hint="outputs must be row-major",
                )
            if value.state is not None:
                raise self.error(f"output {name!r} is state {value.state.name}", hint="the caller has the state itself")
            if value.type.encoding is not None and self.function in self.graph.later_entries:
                raise self.error(f"output {name!r} of {self.function.name} is encoded", received=str(value.type))
            if self.base(value) in self.updated:
                raise self.error(f"output {name!r} is a view of an old version of a state")
        self.last_versions()

    def argument(self, value: Value, kind: str) -> None:
        if value.kind != kind or value.node is not None or value.literal is not None:
            raise self.error(f"{value.name!r} is among the {kind}s, but is not one of them", received=repr(value))
        if value.lies_in is not None:
            if kind != "parameter":
                raise self.error(f"{kind} {value.name!r} has layout {value.lies_in}", hint=f"{kind}s are row-major")
            self.laid.add(value)
        if value.type.encoding is not None and kind == "input" and self.function in self.graph.entries:
            raise self.error(
                f"input {value.name!r} is encoded", received=str(value.type), hint="only weights may be encoded"
            )
        if value.type.symbols:
            self.symbols(value.type, None)
        self.defined.add(value)

    def node(self, node: Node, index: int) -> None:
        for position, value in enumerate(() if self.defined.issuperset(node.operands) else node.operands):
            if value is None or value in self.defined:
                continue
            if value.kind == "constant" or value.literal is not None:
                self.constant(value, index)
            else:
                raise self.error(
                    f"operand {position} of {node.op.name} is not defined before it is used",
                    index,
                    received=repr(value),
                )
        if len(node.operands) != node.op.arity[1] or None in node.operands:
            self.arity(node, index)
        if node.op.callee is not None:
            self.call(node, index)
        inferred = self.inferred(node, index)
        given = tuple(v.type for v in node.results)
        if given != inferred:
            raise self.error(
                f"{node.op.name}: a result has another type than the op's rules infer",
                index,
                received=f"{_listed(given)}; inferred: {_listed(inferred)}",
            )
        for position, value in enumerate(node.results):
            if value.kind != "result" or value.node is not node or value.index != position or value.literal is not None:
                raise self.error(f"result {position} of {node.op.name} does not point back at it", index)
            if value in self.defined:
                raise self.error(f"result {position} of {node.op.name} is defined twice", index)
            if id(value.type) not in self.checked_types:
                self.symbols(value.type, index)
            self.defined.add(value)
            if value.layout is not None:
                self.laid.add(value)
        callee = node.op.called_in(self.earlier)
        if self.function.states or (callee is not None and callee.states):
            self.versions(node, index, callee)
            self.views.add(node, self.bases)
        if not attribute_symbols(node.op) <= self.declared:
            undeclared = attribute_symbols(node.op) - self.declared
            raise self.error(f"{node.op.name}: symbol {min(undeclared)} is not declared", index)

    def arity(self, node: Node, index: int) -> None:
        try:
            complete = len(node.op.arrange(node.operands)) == len(node.operands)
        except TreadleError as error:
            raise self.error(error.what, index) from None
        if not complete:
            raise self.error(f"{node.op.name}: absent operands must be None, not left out", index)

    def inferred(self, node: Node, index: int) -> tuple[Type, ...]:
        try:
            return node.op.infer([None if v is None else v.type for v in node.operands])
        except TreadleError as error:
            raise self.error(error.what, index, received=error.received, hint=error.hint) from None

    def call(self, node: Node, index: int) -> None:
        wanted = getattr(node.op, "takes_in", ())
        plain = not wanted and self.laid.isdisjoint(node.operands)  # nearly all values are row-major, and are read so
        for value, layout in zip_longest(() if plain else node.operands, wanted):
            if value is not None and value.layout != layout:
                raise self.error(
                    f"a call of {node.op.callee} passes {value.name} in another layout than the callee reads",
                    index,
                    received=f"{value.layout or 'row-major'}, but the callee reads {layout or 'row-major'}",
                )
        if node.op in self.checked_calls:  # true for all other calls of a block
            return
        callee = node.op.called_in(self.earlier)
        if callee is not None and callee in self.graph.entries:
            raise self.error(f"{self.function.name} calls {callee.name!r}, which is an entry", index)
        if callee is None:
            known = node.op.callee in self.graph.functions
            why = "does not come before it" if known else "is not in the graph"
            raise self.error(f"{self.function.name} calls {node.op.callee!r}, which {why}", index)
        signature = Call.of(callee)
        if node.op != signature:
            takes, gives = (_listed(getattr(node.op, part, ())) for part in ("takes", "gives"))
            raise self.error(
                f"a call of {callee.name} does not match its signature",
                index,
                received=f"({takes}) -> ({gives}); {callee.name} is ({_listed(signature.takes)}) -> "
                f"({_listed(signature.gives)})",
            )
        self.checked_calls.add(node.op)

    def versions(self, node: Node, index: int, callee: Function | None) -> None:
        """Check the states that a node reads and updates."""
        for value in node.inputs:
            base = self.base(value)
            if base in self.updated:
                view = "" if base is value else "a view of "
                raise self.error(
                    f"{node.op.name} reads {view}state {_state_name(base)} after its update",
                    index,
                    hint="nodes that read a state must precede its update",
                )
        for result, at in node.op.updates.items():
            before, made = node.operands[at], node.results[result]
            if before is None or before.state is None:
                continue
            name = _state_name(before)
            if [self.base(v) for v in node.inputs].count(before) > 1:
                raise self.error(f"{node.op.name} both updates and reads state {name}", index)
            if made.type != before.type:
                received = f"{before.type}, then {made.type}"
                raise self.error(
                    f"{node.op.name} updates state {name} with a value of another type", index, received=received
                )
            self.updated[before] = made
        if callee is not None:
            for given, formal in zip(node.operands, callee.arguments, strict=True):
                if given is not None and (given.state is not None) != (formal.kind == "state"):
                    name = given.name if given.state is None else f"state {_state_name(given)}"
                    raise self.error(f"a call of {callee.name} passes {name} as {formal.kind} {formal.name}", index)

    def base(self, value: Value) -> Value:
        """Return the version of a state that a value is a view of, or the value itself if it is not a view of a
        state.
        """
        return self.bases.get(value, value)

    def last_versions(self) -> None:
        """Check the last versions of states that the function declares."""
        function = self.function
        last: dict[str, Value] = {}
        for name, state in function.states.items():
            version = state
            while version in self.updated:
                version = self.updated[version]
            if version is not state:
                last[name] = version
        for name, value in function.updated.items():
            if name not in last or value is not last[name]:
                why = "it has no such state" if name not in function.states else "it is not the last version"
                raise self.error(
                    f"{function.name} declares a wrong last version of state {name}: {why}", received=repr(value)
                )
        if left := sorted(last.keys() - function.updated.keys()):
            raise self.error(f"{function.name} updates state {left[0]}, but does not declare its last version")

    def constant(self, value: Value, index: int | None) -> None:
        literal = value.literal
        if literal is None or value.kind != "constant" or value.node is not None:
            raise self.error("a value must have content exactly if it is a constant", index)
        if literal.dtype is boolean and literal.data.strip(b"\0\1"):
            raise self.error("a boolean's byte must be 0 or 1", index)
        if value.type != literal.type or len(literal.data) != literal.type.bytes_at({}):
            raise self.error(
                "a constant has another type than its content",
                index,
                received=f"{value.type} for {len(literal.data)} bytes of {literal.type}",
            )

    def symbols(self, type: Type, index: int | None) -> None:
        if undeclared := type.symbols - self.declared:
            known = [f"one of {', '.join(sorted(self.declared))}, the sizes of the inputs"] * bool(self.declared)
            hint = "; ".join([*known, "Graph.bound declares another"])
            raise self.error(f"symbol {min(undeclared)} is not declared", index, received=str(type), hint=hint)
        self.checked_types.add(id(type))

    def error(
        self, what: str, index: int | None = None, *, received: str | None = None, hint: str | None = None
    ) -> VerifyError:
        within, source = self.function.name, None
        if index is not None:
            node = self.function.nodes[index]
            within = f"{within}, op {index}\n{excerpt(self.graph, self.function, index)}"
            source = describe_source(node.source, node.scope)
        return VerifyError(what, received=received, within=within, source=source, hint=hint)


def _state_name(value: Value) -> str:
    state = value.state
    assert state is not None
    return state.name


def _listed(types: tuple[Type, ...]) -> str:
    return ", ".join(map(str, types))
