"""What weights alone decide is computed once: it moves to the entry `bind`, and is read by name from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.hashing import op_key
from treadle.ir.naming import free_name
from treadle.ir.ops.call import Call
from treadle.ir.ops.layout import Relayout
from treadle.ir.transforms.clone import clone_node, clone_value
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord

MOST_GROWTH = 8
"""What `bind` makes takes at most this many times the bytes of all weights, which count as what they are decoded."""
_ALWAYS = 1 << 20  # bytes that are taken in any case
Use = tuple[Node, int]

_MOST_MOVED = 1 << 10  # values that a block leaves to others: blocks that call others twice, and so on, double them


ReadsBlocks = Callable[[Node, int], bool]
"""Whether a node of the backend reads the operand at a position in blocks, if a decode gives it."""


@dataclass(frozen=True)
class HoistWeights(Pass):
    """main: y = linear(x, concat($a, $b))   -->   bind: $ab = concat($a, $b)      main: y = linear(x, $ab)

    What a block computes from its weights becomes a block of its own, which `bind` calls with the block's scopes; the
    block reads it as weights. Calls of it with the same weights are one (ALBERT). What weights decide in one call of a
    block and not in another is computed at the calls. What several entries compute from the same weights is made once,
    and all of them read it.

    reads_blocks  what reads encoded weights in blocks: a decode stays before it, and `bind` keeps the blocks

    Refuses: a graph that has `bind` already. What would make `bind` hold more than eight times the bytes of all
    weights, and a megabyte, is computed at every call, as before. A decode of which a reader takes numbers alone is
    done once, and told: blocks and numbers of one weight would be there twice.
    """

    rewrites: ClassVar[bool] = False
    reads_blocks: ReadsBlocks | None = field(default=None, repr=False)

    @property
    def options(self) -> str:
        return ""

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        if graph.bind is not None:
            log.notes.append("the graph has bind already")
            return 0
        if not any(weight_only_nodes(function) for function in graph.functions.values()):
            return 0
        _rename_bind(graph)
        held = sum(v.type.decoded.bytes_at({}) for v in graph.parameters.values() if not v.type.symbols)
        hoisting = _Hoisting(graph, MOST_GROWTH * held + _ALWAYS, log, self.reads_blocks or _reads_none)
        for function in list(graph.functions.values()):
            hoisting.call_made(function)
            # what is made of the same weights for several readers is made once: layers that share them (ALBERT)
            hoisting.changes += CommonSubexpressions().run(function, graph, log)
            if function not in graph.entries:
                hoisting.out_of_block(function)
        hoisting.out_of_entries()
        if not hoisting.changes:
            return 0
        log.touched = None
        return len(graph.made) or hoisting.changes


@dataclass(frozen=True)
class _Moved:
    """What a block left to others: a block that makes it, and the block's arguments before, by its arguments now.

    formals  for each argument that the block takes now: one that it took before, or a result of the block that makes it
    """

    maker: Function
    before: tuple[Value, ...]
    formals: tuple[Value | int, ...]


class _Hoisting:
    def __init__(self, graph: Graph, budget: int, log: PassRecord, reads_blocks: ReadsBlocks) -> None:
        self.graph, self.budget, self.log, self.reads_blocks = graph, budget, log, reads_blocks
        self.moved: dict[str, _Moved] = {}
        self.makers: dict[str, Function] = {}
        self.changes = 0

    def makes(self, node: Node) -> bool:
        """Whether a node calls a block that makes what another left."""
        return node.op.callee in self.makers

    # -- a block -----------------------------------------------------------------------------------------------

    def call_made(self, function: Function) -> None:
        """Before each call of a block that left something, have it made; the call passes it."""
        nodes: list[Node] = []
        calls: dict[str, tuple[Call, Call]] = {}  # the calls of a block are one op, whose keys are found once
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
        """Take what a block computes from its weights out of it."""
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
        if not maker.outputs:  # nobody reads what is computed
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
        """What a function computes from weights alone, but for decodes before what reads blocks."""
        nodes = weight_only_nodes(function, self.makes)
        uses = function.uses() if any(node.op.decodes for node in nodes) else {}
        staying = {node for node in nodes if node.op.decodes and self._is_read_in_blocks(node, function, uses)}
        return self._affordable({node: None for node in nodes if node not in staying})

    def _is_read_in_blocks(self, node: Node, function: Function, uses: Mapping[Value, Sequence[Use]]) -> bool:
        """Whether all who read what a decode gives read its blocks; the log tells who does not."""
        (blocks,) = node.inputs
        readers = _readers(node.result, uses)
        others = [reader.op.name for reader, at in readers if not self.reads_blocks(reader, at)]
        others += ["the caller"] * (node.result in function.results)
        if not others and readers:
            return True
        if others:
            what, place = blocks.name, describe_source(node.source, node.scope) or function.name
            told = ", ".join(dict.fromkeys(others))
            self.log.notes.append(f"{what} is decoded once: {told} reads no {blocks.type.encoding} blocks, {place}")
        return False

    def _affordable(self, nodes: Mapping[Node, None]) -> dict[Node, None]:
        """Those whose results, and what these are made of, fit by themselves."""
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
        """Move what entries compute from weights to `bind`, as far as the budget goes."""
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
    """The entry `bind` while it is filled with what entries compute; equal nodes of several entries are one.

    taken  names that nothing which is made may have
    """

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.names: dict[Value, str] = {}
        """What is made, under which name."""
        self._parameters: dict[str, Value] = {}
        self._nodes: dict[tuple[object, ...], Node] = {}

    def copy(self, entry: Function, nodes: Iterable[Node]) -> Mapping[Value | None, Value | None]:
        """Take over nodes of an entry, in order; returns what stands for each of its weights and of their results."""
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
        """The name of what is made; the one wanted, numbered if it is taken, where it has none yet."""
        assert value is not None
        if value not in self.names:
            self.names[value] = free_name(wanted, self.taken)
            self.taken.add(self.names[value])
        return self.names[value]

    def finish(self, bind: Function) -> None:
        """Put all that is there into the entry."""
        bind.parameters = self._parameters
        bind.nodes = needed_nodes(list(self._nodes.values()), self.names)
        bind.outputs = {name: value for value, name in self.names.items()}


def _readers(value: Value, uses: Mapping[Value, Sequence[Use]]) -> list[Use]:
    """Who reads a value, or what lays it out anew."""
    found: list[Use] = []
    for node, at in uses.get(value, ()):
        found += _readers(node.result, uses) if isinstance(node.op, Relayout) else [(node, at)]
    return found


def _reads_none(node: Node, position: int) -> bool:
    return False


def _path(node: Node, value: Value) -> str:
    """The name of what is made: the value's under its node's scope; what is laid out, and how; what is decoded."""
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
    """Give a block that is called `bind` another name: the entry takes it."""
    block = graph.functions.get("bind")
    if block is None:
        return
    block.name = free_name("bind_block", graph.functions)
    graph.functions = {f.name: f for f in graph.functions.values()}
    for _, node in graph.walk():
        if node.op.callee == "bind":
            node.op = Call.of(block)
