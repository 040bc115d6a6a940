"""What weights alone decide is computed once: it moves to the entry `bind`, and is read by name from then on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.ops.call import Call
from treadle.ir.ops.layout import Relayout
from treadle.ir.transforms.clone import clone_node, clone_value
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord

MOST_GROWTH = 8
"""What `bind` makes takes at most this many times the bytes of all weights: four bits may become float32, no more."""
_ALWAYS = 1 << 20  # bytes that are taken in any case
_MOST_MOVED = 1 << 10  # values that a block leaves to others: blocks that call others twice, and so on, double them


@dataclass(frozen=True)
class HoistWeights(Pass):
    """main: y = linear(x, concat($a, $b))   -->   bind: $ab = concat($a, $b)      main: y = linear(x, $ab)

    What a block computes from its weights becomes a block of its own, which `bind` calls with the block's scopes; the
    block reads it as weights. Calls of it with the same weights are one (ALBERT). What weights decide in one call of a
    block and not in another is computed at the calls.

    Refuses: a graph that has `bind` already. What would make `bind` hold more than eight times the bytes of all
    weights, and a megabyte, is computed at every call, as before.
    """

    rewrites: ClassVar[bool] = False

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        if graph.bind is not None:
            log.notes.append("the graph has bind already")
            return 0
        if not any(weight_only_nodes(function) for function in graph.functions.values()):
            return 0
        _rename_bind(graph)
        held = sum(v.type.bytes_at({}) for v in graph.parameters.values() if not v.type.symbols)
        hoisting = _Hoisting(graph, MOST_GROWTH * held + _ALWAYS, log)
        for function in list(graph.functions.values()):
            hoisting.call_made(function)
            # what is made of the same weights for several readers is made once: layers that share them (ALBERT)
            hoisting.changes += CommonSubexpressions().run(function, graph, log)
            if function is not graph.main:
                hoisting.out_of_block(function)
        hoisting.out_of_main()
        if not hoisting.changes:
            return 0
        log.touched = None
        return len(graph.made) or hoisting.changes


@dataclass(frozen=True)
class _Moved:
    """What a block left to others: a block that makes it, and the block's arguments before, by its arguments now.

    formals  for each weight that the block takes now: one that it took before, or a result of the block that makes it
    """

    maker: Function
    before: tuple[Value, ...]
    formals: tuple[Value | int, ...]


class _Hoisting:
    def __init__(self, graph: Graph, budget: int, log: PassRecord) -> None:
        self.graph, self.budget, self.log = graph, budget, log
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
        for node in function.nodes:
            moved = self.moved.get(node.op.callee or "")
            if moved is None:
                nodes.append(node)
                continue
            actual = dict(zip(moved.before, node.operands, strict=True))
            formals = {v.name: v for v in moved.before if v.kind == "parameter"}
            operands = tuple([actual[formals[name]] for name in moved.maker.parameters])
            types = [v.type for v in moved.maker.outputs.values()]
            making = Node(Call.of(moved.maker), operands, types, scope=node.scope, source=node.source)
            for name, value in zip(moved.maker.outputs, making.results, strict=True):
                value.name = name
            nodes.append(making)
            node.operands = tuple([making.results[f] if isinstance(f, int) else actual[f] for f in moved.formals])
            node.op = Call.of(self.graph.functions[str(node.op.callee)])
            nodes.append(node)
        function.nodes = nodes

    def out_of_block(self, function: Function) -> None:
        """Take what a block computes from its weights out of it."""
        nodes = self._affordable(weight_only_nodes(function, self.makes))
        if not nodes or sum(len(node.results) for node in nodes) > _MOST_MOVED:
            return
        before = function.arguments
        left = [node for node in function.nodes if node not in nodes]
        read = {*(v for node in left for v in node.inputs), *function.outputs.values()}
        kept = {name: v for name, v in function.parameters.items() if v in read}
        maker = Function(_free_name(f"bind_{function.name}", self.graph.functions))
        values: dict[Value | None, Value | None] = {None: None}
        for name, value in function.parameters.items():
            values[value] = maker.parameters[name] = clone_value(value)
        maker.nodes = [clone_node(node, values, function) for node in nodes]
        replaced: dict[Value, Value] = {}
        taken = set(function.parameters)
        for node in nodes:
            for value in node.results:
                if value in read:
                    name = _free_name(_path(node, value), taken)
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
        formals = (*function.inputs, *(position.get(name, v) for name, v in kept.items()))
        self.moved[function.name] = _Moved(maker, before, formals)
        self.makers[maker.name] = maker
        function.nodes, function.parameters = left, kept
        _replace(function, replaced)
        self._add_before(maker, function)

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

    # -- main --------------------------------------------------------------------------------------------------

    def out_of_main(self) -> None:
        """Move what main computes from weights to `bind`, as far as the budget goes."""
        graph, main = self.graph, self.graph.main
        nodes = self._affordable(weight_only_nodes(main, self.makes))
        left = needed_nodes([node for node in main.nodes if node not in nodes], main.outputs.values())
        wanted = {*(v for node in left for v in node.inputs), *main.outputs.values()}
        chosen: dict[Value, str] = {}
        taken = set(main.parameters)
        for node in nodes:
            read = [v for v in node.results if v in wanted]
            bytes = sum(v.type.bytes_at({}) for v in read)
            if bytes > self.budget:
                place = describe_source(node.source, node.scope) or "main"
                self.log.notes.append(f"{node.op.name} stays in main: {bytes:,} bytes, {place}")
                continue
            self.budget -= bytes
            for value in read:
                chosen[value] = _free_name(_path(node, value), taken)
                taken.add(chosen[value])
        if not chosen:
            return
        self.changes += len(chosen)
        bind = graph.add_bind()
        values: dict[Value | None, Value | None] = {None: None}
        for name, value in main.parameters.items():
            values[value] = bind.parameters[name] = clone_value(value)
        needed = needed_nodes(list(nodes), chosen)
        bind.nodes = [clone_node(node, values, main) for node in needed]
        replaced: dict[Value, Value] = {}
        for value, name in chosen.items():
            made = values[value]
            assert made is not None
            bind.outputs[name] = made
            stands = replaced[value] = Value("parameter", value.type, name)
            stands.lies_in = value.layout
        _replace(main, replaced)
        main.nodes = needed_nodes(main.nodes, main.outputs.values())
        main.parameters |= {v.name: v for v in replaced.values()}
        used = {v for entry in (bind, main) for node in entry.nodes for v in node.inputs} | {*main.outputs.values()}
        bind.parameters = {name: v for name, v in bind.parameters.items() if v in used}
        main.parameters = {name: v for name, v in main.parameters.items() if v in used or name not in bind.parameters}


def _path(node: Node, value: Value) -> str:
    """The name of what is made: the value's under its node's scope; for a relayout, what is laid out, and how."""
    if isinstance(node.op, Relayout):
        (of,) = node.inputs
        path = of.name if of.node is None else _path(of.node, of)
        return f"{path}.{node.op.to.kind}"
    return ".".join(filter(None, (node.scope, value.name)))


def _free_name(base: str, taken: Collection[str]) -> str:
    """A name that is not taken, numbered where it would be."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def _replace(function: Function, values: Mapping[Value, Value]) -> None:
    for node in function.nodes:
        if any(v in values for v in node.inputs):
            node.operands = tuple([None if v is None else values.get(v, v) for v in node.operands])
    function.outputs = {name: values.get(v, v) for name, v in function.outputs.items()}


def _rename_bind(graph: Graph) -> None:
    """Give a block that is called `bind` another name: the entry takes it."""
    block = graph.functions.get("bind")
    if block is None:
        return
    block.name = _free_name("bind_block", graph.functions)
    graph.functions = {f.name: f for f in graph.functions.values()}
    for _, node in graph.walk():
        if node.op.callee == "bind":
            node.op = Call.of(block)
