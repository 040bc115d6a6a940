"""Hoisting of weights: values that depend on weights alone are computed once, in the entry `bind`. Other entries read
them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.hashing import op_key
from treadle.ir.naming import free_name
from treadle.ir.ops.call import Call
from treadle.ir.ops.layout import Relayout
from treadle.ir.transforms.clone import clone_node, clone_value
from treadle.passes.capabilities import PRIMITIVES, Capabilities
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.facts import PORTABLE, UNBOUND, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord

MOST_GROWTH = 8
"""The largest ratio of the bytes of derived weights to the bytes of all weights. Each weight is counted as decoded."""
_ALWAYS = 1 << 20  # the number of bytes that is allowed in any case
Use = tuple[Node, int]

_MOST_MOVED = (
    1 << 10
)  # derived weights of one block; if blocks call other blocks twice, and so on, their number doubles at each level


@dataclass(frozen=True)
class HoistWeights(Pass):
    """main: y = linear(x, concat($a, $b))   -->   bind: $ab = concat($a, $b)      main: y = linear(x, $ab)

    The part of a block that depends on its weights alone becomes a separate block, which `bind` calls under the
    original scopes; the block reads the results as weights. Calls of the new block with the same weights are merged
    (ALBERT). Values that depend on weights alone in one call of a block but not in another are computed at the calls.
    Values that several entries compute from the same weights are computed once, and all of these entries read the
    result.

    backend  the backend. If a node of it reads encoded weights as blocks, the decode stays directly before that node,
             and `bind` stores the blocks

    Refuses: a graph that already has `bind`. Values that would make `bind` hold more than eight times the bytes of all
    weights, and more than a megabyte, are computed at every call, as before. If some reader of a decode reads only
    numbers, the decode is done once, with a note: blocks and numbers of one weight would be stored twice.
    """

    rewrites: ClassVar[bool] = False
    ends: ClassVar[Facts] = frozenset({UNBOUND, PORTABLE})
    backend: Capabilities = PRIMITIVES

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        if graph.bind is not None:
            log.notes.append("the graph has bind already")
            return 0
        if not any(weight_only_nodes(function) for function in graph.functions.values()):
            return 0
        _rename_bind(graph)
        held = sum(v.type.decoded.bytes_at({}) for v in graph.parameters.values() if not v.type.symbols)
        hoisting = _Hoisting(graph, MOST_GROWTH * held + _ALWAYS, log, self.backend.reads_blocks)
        for function in list(graph.functions.values()):
            hoisting.call_made(function)
            # if several layers share weights (ALBERT), values that they derive from these weights are computed once
            hoisting.changes += CommonSubexpressions().run(function, graph, log)
            if function not in graph.entries:
                hoisting.out_of_block(function)
        hoisting.out_of_entries()
        if not hoisting.changes:
            return 0
        log.touched = None
        return len(graph.derived_weights) or hoisting.changes


@dataclass(frozen=True)
class _Moved:
    """The part of a block that was moved out, the block that computes it, and a source for each new argument.

    formals  for each new argument of the block: an old argument, or the index of a result of the block that computes it
    """

    maker: Function
    before: tuple[Value, ...]
    formals: tuple[Value | int, ...]


class _Hoisting:
    def __init__(self, graph: Graph, budget: int, log: PassRecord, reads_blocks: Callable[[Node, int], bool]) -> None:
        self.graph, self.budget, self.log, self.reads_blocks = graph, budget, log, reads_blocks
        self.moved: dict[str, _Moved] = {}
        self.makers: dict[str, Function] = {}
        self.changes = 0

    def makes(self, node: Node) -> bool:
        """Return True if a node calls a block that was moved out of another block."""
        return node.op.callee in self.makers

    # -- a block -----------------------------------------------------------------------------------------------

    def call_made(self, function: Function) -> None:
        """Before each call of a block with a moved part, insert a call of the block that computes this part. Pass its
        results to the original call.
        """
        nodes: list[Node] = []
        calls: dict[str, tuple[Call, Call]] = {}  # all calls of a block share one op, so its keys are computed once
        for node in function.nodes:
            moved = node.op.called_in(self.moved)
            if moved is None:
                nodes.append(node)
                continue
            actual = dict(zip(moved.before, node.operands, strict=True))
            formals = {v.name: v for v in moved.before if v.kind == "parameter"}
            operands = tuple([actual[formals[name]] for name in moved.maker.parameters])
            types = [v.type for v in moved.maker.outputs.values()]
            callee = self.graph.functions[str(node.op.callee)]
            if callee.name not in calls:
                calls[callee.name] = Call.of(moved.maker), Call.of(callee)
            make, call = calls[callee.name]
            making = Node(make, operands, types, scope=node.scope, source=node.source)
            for name, value in zip(moved.maker.outputs, making.results, strict=True):
                value.name = name
            nodes.append(making)
            node.operands = tuple([making.results[f] if isinstance(f, int) else actual[f] for f in moved.formals])
            node.op = call
            nodes.append(node)
        function.nodes = nodes

    def out_of_block(self, function: Function) -> None:
        """Move the nodes that a block computes from its weights alone out of the block."""
        nodes = self._moved_from(function)
        if not nodes or sum(len(node.results) for node in nodes) > _MOST_MOVED:
            return
        before = function.arguments
        left = [node for node in function.nodes if node not in nodes]
        read = {*(v for node in left for v in node.inputs), *function.results}
        kept = {name: v for name, v in function.parameters.items() if v in read}
        maker = Function(free_name(f"bind_{function.name}", self.graph.functions))
        values: dict[Value | None, Value | None] = {None: None}
        for name, value in function.parameters.items():
            values[value] = maker.parameters[name] = clone_value(value)
        maker.nodes = [clone_node(node, values, function) for node in nodes]
        replaced: dict[Value, Value] = {}
        taken = set(function.parameters)
        for node in nodes:
            for value in node.results:
                if value in read:
                    name = free_name(_path(node, value), taken)
                    taken.add(name)
                    stands = replaced[value] = kept[name] = Value("parameter", value.type, name)
                    stands.lies_in = value.layout
                    made = values[value]
                    assert made is not None
                    maker.outputs[name] = made
        if not maker.outputs:  # the results are unused
            return
        self.changes += 1
        maker.nodes = needed_nodes(maker.nodes, maker.outputs.values())
        used = {v for node in maker.nodes for v in node.inputs}
        maker.parameters = {name: v for name, v in maker.parameters.items() if v in used}
        position = {name: i for i, name in enumerate(maker.outputs)}
        weights = [position.get(name, v) for name, v in kept.items()]
        formals = (*function.inputs, *weights, *function.states.values())
        self.moved[function.name] = _Moved(maker, before, formals)
        self.makers[maker.name] = maker
        function.nodes, function.parameters = left, kept
        _replace(function, replaced)
        self._add_before(maker, function)

    def _moved_from(self, function: Function) -> dict[Node, None]:
        """Return the nodes of a function that depend on weights alone, except decodes whose readers read the blocks at
        every call, and the other readers of these.
        """
        nodes = weight_only_nodes(function, self.makes)
        uses = function.uses() if any(node.op.decodes for node in nodes) else {}
        staying: set[Value] = set()
        for node in nodes:
            read = node.op.decodes and any(reader not in nodes for reader, _ in _readers(node.result, uses))
            if not staying.isdisjoint(node.inputs) or (read and self._is_read_in_blocks(node, function, uses)):
                staying.update(node.results)
        return self._affordable({node: None for node in nodes if staying.isdisjoint(node.results)})

    def _is_read_in_blocks(self, node: Node, function: Function, uses: Mapping[Value, Sequence[Use]]) -> bool:
        """Return True if all readers of a decode read its blocks. Log the readers that do not."""
        (blocks,) = node.inputs
        readers = _readers(node.result, uses)
        others = [reader.op.name for reader, at in readers if not self.reads_blocks(reader, at)]
        others += ["the caller"] * (node.result in function.results)
        if not others and readers:
            return True
        if others:
            what, place = blocks.name, describe_source(node.source, node.scope) or function.name
            other_readers = ", ".join(dict.fromkeys(others))
            self.log.notes.append(
                f"{what} is decoded once: {other_readers} cannot read {blocks.type.encoding} blocks, {place}"
            )
        return False

    def _affordable(self, nodes: Mapping[Node, None]) -> dict[Node, None]:
        """Return the nodes whose results each fit into the budget, unless they read a result that does not fit."""
        large: set[Value] = set()
        found: dict[Node, None] = {}
        for node in nodes:
            if any(v in large for v in node.inputs) or any(v.type.bytes_at({}) > self.budget for v in node.results):
                large.update(node.results)
            else:
                found[node] = None
        return found

    def _add_before(self, maker: Function, function: Function) -> None:
        functions: dict[str, Function] = {}
        for name, each in self.graph.functions.items():
            if each is function:
                functions[maker.name] = maker
            functions[name] = each
        self.graph.functions = functions

    # -- entries -----------------------------------------------------------------------------------------------

    def out_of_entries(self) -> None:
        """Move the nodes that entries compute from weights alone to `bind`, within the budget."""
        graph, entries = self.graph, self.graph.later_entries
        bind = _Bind({name for entry in entries for name in (*entry.parameters, *entry.states)})
        replaced: dict[Value, Value] = {}
        for entry in entries:
            nodes = self._moved_from(entry)
            left = needed_nodes([node for node in entry.nodes if node not in nodes], entry.results)
            wanted = {*(v for node in left for v in node.inputs), *entry.results}
            copies = bind.copy(entry, nodes)
            for node in nodes:
                read = [v for v in node.results if v in wanted]
                bytes = sum(v.type.bytes_at({}) for v in read if copies[v] not in bind.names)
                if bytes > self.budget:
                    place = describe_source(node.source, node.scope) or entry.name
                    self.log.notes.append(f"{node.op.name} stays in {entry.name}: {bytes:,} bytes, {place}")
                    continue
                self.budget -= bytes
                for value in read:
                    stands = replaced[value] = Value(
                        "parameter", value.type, bind.name(copies[value], _path(node, value))
                    )
                    stands.lies_in = value.layout
        if not bind.names:
            return
        self.changes += len(bind.names)
        bind.finish(graph.add_entry("bind"))
        for entry in entries:
            left_in = {*entry.nodes}
            entry.parameters |= {v.name: v for old, v in replaced.items() if old.node in left_in}
            _replace(entry, replaced)
            entry.nodes = needed_nodes(entry.nodes, entry.results)
        used = {v for entry in graph.entries for node in entry.nodes for v in node.inputs}
        used.update(v for entry in entries for v in entry.results)
        made = graph.functions["bind"]
        made.parameters = {name: v for name, v in made.parameters.items() if v in used}
        for entry in entries:
            held = entry.parameters.items()
            entry.parameters = {name: v for name, v in held if v in used or name not in made.parameters}


class _Bind:
    """The nodes and outputs of the entry `bind`, collected from the entries. Equal nodes of several entries are merged.

    taken  names that derived weights may not have
    """

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.names: dict[Value, str] = {}
        """The name of each derived weight."""
        self._parameters: dict[str, Value] = {}
        self._nodes: dict[tuple[object, ...], Node] = {}

    def copy(self, entry: Function, nodes: Iterable[Node]) -> Mapping[Value | None, Value | None]:
        """Copy nodes of an entry, in order. Return the replacement of each of its weights and of the nodes' results."""
        values: dict[Value | None, Value | None] = {None: None}
        for name, value in entry.parameters.items():
            values[value] = self._parameters.setdefault(name, clone_value(value))
        for node in nodes:
            operands = [v if v is None or v.literal is not None else values[v] for v in node.operands]
            key = (op_key(node.op), *[v if v is None or v.literal is None else v.literal for v in operands])
            known = self._nodes.get(key)
            if known is None:
                self._nodes[key] = clone_node(node, values, entry)
            else:
                values.update(zip(node.results, known.results, strict=True))
        return values

    def name(self, value: Value | None, wanted: str) -> str:
        """Return the name of a derived weight. A new derived weight gets the wanted name, numbered if the name is
        taken.
        """
        assert value is not None
        if value not in self.names:
            self.names[value] = free_name(wanted, self.taken)
            self.taken.add(self.names[value])
        return self.names[value]

    def finish(self, bind: Function) -> None:
        """Store the collected nodes and outputs in the entry."""
        bind.parameters = self._parameters
        bind.nodes = needed_nodes(list(self._nodes.values()), self.names)
        bind.outputs = {name: value for value, name in self.names.items()}


def _readers(value: Value, uses: Mapping[Value, Sequence[Use]]) -> list[Use]:
    """Return the readers of a value. A relayout is replaced by the readers of its result."""
    found: list[Use] = []
    for node, at in uses.get(value, ()):
        found += _readers(node.result, uses) if isinstance(node.op, Relayout) else [(node, at)]
    return found


def _path(node: Node, value: Value) -> str:
    """Return the name of a derived weight: its scope and name, and a suffix for the kind of its layout, or
    "decoded".
    """
    if isinstance(node.op, Relayout):
        (of,) = node.inputs
        path = of.name if of.node is None else _path(of.node, of)
        return f"{path}.{node.op.to.kind}"
    if node.op.decodes and (weight := value.weight) is not None:
        return f"{weight.name}.decoded"
    return ".".join(filter(None, (node.scope, value.name)))


def _replace(function: Function, values: Mapping[Value, Value]) -> None:
    for node in function.nodes:
        if not values.keys().isdisjoint(node.operands):
            node.operands = tuple([None if v is None else values.get(v, v) for v in node.operands])
    function.replace_results(lambda v: values.get(v, v))


def _rename_bind(graph: Graph) -> None:
    """Rename a block that is called `bind`, since the entry takes this name."""
    block = graph.functions.get("bind")
    if block is None:
        return
    block.name = free_name("bind_block", graph.functions)
    graph.functions = {f.name: f for f in graph.functions.values()}
    for _, node in graph.walk():
        if node.op.callee == "bind":
            node.op = Call.of(block)
