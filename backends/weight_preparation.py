"""Weight preparation: what a graph computes from weights alone is computed once, when the weights are bound.

    q_k_v_weight = concat($q.weight, $k.weight, $v.weight)        at every call
    y = linear(x, q_k_v_weight)

        -->   y = linear(x, $q_k_v_weight)                        at every call
              layer.0.q_k_v_weight = concat(...)                  once, by its recipe

    prepared = prepare_weights(graph)
    prepared.graph        reads prepared weights as parameters
    prepared.recipes      how each of them is made

The IR stays as the passes left it: weights keep the names of the checkpoint, and a graph prints, saves and compares
without a word of this. A backend prepares what it is about to lower. What a block computes from its weights moves to
its callers, until it stands in `main`, where every call has weights of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.python.emission import on_one_line
from treadle.ir.builder import describe_source
from treadle.ir.clone import clone_function
from treadle.ir.errors import BackendError, TreadleError
from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.hashing import op_key
from treadle.ir.ops.call import Call
from treadle.ir.text.attributes import attribute_text
from treadle.ir.types import bf16
from treadle.ir.weight_only import weight_only_nodes

Array = np.ndarray[Any, Any]

MOST_GROWTH = 8
"""Prepared weights take at most this many times the bytes of all weights: four bits may become float32, no more."""
_ALWAYS = 1 << 20  # bytes that are taken in any case
_MOST_MOVED = 1 << 12  # nodes of a block that are moved to its callers, for each call
_LONGEST_OPERAND = 160  # characters of what an op reads, in the line on a prepared weight


@dataclass(frozen=True, eq=False)
class Recipe:
    """How one prepared weight is made.

    result   what it is in the graph
    nodes    that make it, in order
    sources  the weights that these read, by name
    """

    result: Value
    nodes: tuple[Node, ...]
    sources: Mapping[str, Value]

    def make(self, weights: Mapping[str, Any]) -> Array:
        """The prepared weight as a NumPy array; one of bf16 as float32 numbers that bf16 holds.

        Raises BackendError where a node fails on these weights.
        """
        values: dict[Value, Any] = {v: _stored(as_numpy_weight(weights[name]), v) for name, v in self.sources.items()}
        for node in self.nodes:
            operands = [
                None if v is None else _constant(v) if v.literal is not None else values[v] for v in node.operands
            ]
            try:
                with np.errstate(all="ignore"):
                    made = node.op.at({}).reference(*operands)
            except Exception as error:
                raise BackendError(
                    f"{node.op.name}: failed on the weights that it reads",
                    received=error.what if isinstance(error, TreadleError) else f"{type(error).__name__}: {error}",
                    within=f"{self.result.name} = {self}",
                    source=describe_source(node.source, node.scope),
                ) from error
            for value, array in zip(node.results, made if isinstance(made, tuple) else (made,), strict=True):
                values[value] = _stored(array, value)
        found: Array = values[self.result]
        return found

    @cached_property
    def key(self) -> str:
        """Text that two recipes share exactly if they make the same of the same weights, in the order of `sources`."""
        ids: dict[Value, str] = {value: f"w{i}" for i, value in enumerate(self.sources.values())}
        digest = hashlib.sha256("".join(f"{value.type}\n" for value in self.sources.values()).encode())
        for node in self.nodes:
            read = []
            for v in node.operands:
                literal = v.literal if v is not None else None
                content = None if literal is None else hashlib.sha256(literal.data).hexdigest()
                read.append("-" if v is None else ids[v] if literal is None else f"{literal.type}:{content}")
            digest.update(f"{op_key(node.op)}({','.join(read)})\n".encode())
            for value in node.results:
                ids[value] = f"v{len(ids)}"
        return f"{ids[self.result]}:{digest.hexdigest()}"

    def __str__(self) -> str:
        texts: dict[Value, str] = {value: name for name, value in self.sources.items()}
        text = ""
        for node in self.nodes:
            read = [_operand(v, texts) for v in node.operands if v is not None]
            given = [f"{name}={attribute_text(value)}" for name, value in node.op.attributes.items()]
            text = f"{node.op.name}({', '.join(read + given)})"
            # What is read twice would be written twice, and so on, until it fills the memory.
            short = text if len(text) <= _LONGEST_OPERAND else f"{node.op.name}(...)"
            texts |= dict.fromkeys(node.results, short)
        return text


@dataclass(frozen=True)
class Prepared:
    """A graph whose weights may be prepared ones.

    source   as it was given, with the weights that a caller knows
    graph    to be lowered
    recipes  of the prepared weights among its parameters, by name
    """

    source: Graph
    graph: Graph
    recipes: Mapping[str, Recipe] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """A line for each prepared weight."""
        for name, recipe in self.recipes.items():
            yield on_one_line(f"{name} = {recipe}")


def prepare_weights(graph: Graph) -> Prepared:
    """A graph with the same meaning in which nothing is computed from weights alone; the given one is not changed.

    What would take more memory than `MOST_GROWTH` allows stays where it is.
    """
    if not any(weight_only_nodes(function) for function in graph.functions.values()):
        return Prepared(graph, graph)
    made = Graph(graph.name)
    made.symbols, made.functions = dict(graph.symbols), {}
    moved: dict[str, _Moved] = {}
    for name, function in graph.functions.items():
        copy = made.functions[name] = clone_function(function)
        _with_callees_nodes(copy, made, moved)
        _share(copy)
        if name != "main":
            moved[name] = _moved_out(copy)
    held = sum(v.type.bytes_at({}) for v in graph.parameters.values() if not v.type.symbols)
    recipes = _recipes(made.main, MOST_GROWTH * held + _ALWAYS)
    return Prepared(graph, made, recipes)


def as_numpy_weight(value: Any) -> Array:
    """A weight as a NumPy array in the processor's memory; a bf16 tensor as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


# -- from a block to its callers -------------------------------------------------------------------------------


@dataclass
class _Moved:
    """What was a block's own, and is its callers': nodes over the parameters that it had.

    before  its arguments while it had the nodes
    after   where each argument that it takes now comes from: an argument that it had, or a result of the nodes
    nodes   to be done by callers
    """

    before: tuple[Value, ...]
    after: tuple[Value, ...]
    nodes: tuple[Node, ...]


def _moved_out(function: Function) -> _Moved:
    """Take what a block computes from weights alone out of it; what is read of that becomes parameters."""
    before = function.arguments
    nodes = weight_only_nodes(function)
    if len(nodes) > _MOST_MOVED:  # blocks that call others twice, and so on, would fill the memory of who moves it all
        return _Moved(before, before, ())
    left = [node for node in function.nodes if node not in nodes]
    read = _read_by(left, function)
    replaced: dict[Value, Value] = {}
    origins: dict[Value, Value] = {}
    function.parameters = {name: v for name, v in function.parameters.items() if v in read}
    for node in nodes:
        for value in node.results:
            if value in read:
                name = _new_name(node, value, function.parameters)
                function.parameters[name] = replaced[value] = Value("parameter", value.type, name)
                origins[replaced[value]] = value
    function.nodes = left
    _replace(function, left, replaced)
    return _Moved(before, tuple(origins.get(v, v) for v in function.arguments), tuple(nodes))


def _with_callees_nodes(function: Function, graph: Graph, moved: Mapping[str, _Moved]) -> None:
    """Do before each call what its callee left to its callers."""
    nodes: list[Node] = []
    for node in function.nodes:
        known = moved.get(str(node.op.callee)) if node.op.callee is not None else None
        if known is None or known.before == known.after:
            nodes.append(node)
            continue
        values: dict[Value, Value | None] = dict(zip(known.before, node.operands, strict=True))
        for each in known.nodes:
            operands = [v if v is None or v.literal is not None else values[v] for v in each.operands]
            scope = ".".join(filter(None, (node.scope, each.scope)))
            copy = Node(each.op, operands, [v.type for v in each.results], scope=scope, source=each.source)
            for old, new in zip(each.results, copy.results, strict=True):
                new.name = old.name
                values[old] = new
            nodes.append(copy)
        node.operands = tuple(values[v] for v in known.after)
        node.op = Call.of(graph.functions[str(node.op.callee)])
        nodes.append(node)
    function.nodes = nodes


def _share(function: Function) -> None:
    """Make once what is made of the same weights for several calls, as where all layers have the same ones (ALBERT)."""
    known: dict[tuple[str, tuple[Value | None, ...]], Node] = {}
    replaced: dict[Value, Value] = {}
    for node in weight_only_nodes(function):
        _replace_operands(node, replaced)
        first = known.setdefault((op_key(node.op), node.operands), node)
        if first is not node:
            replaced |= zip(node.results, first.results, strict=True)
    _replace(function, function.nodes, replaced)
    function.nodes = [node for node in function.nodes if not replaced.keys() & node.results]


# -- in main ---------------------------------------------------------------------------------------------------


def _recipes(main: Function, budget: int) -> dict[str, Recipe]:
    """Make parameters of what main computes from weights alone, within so many bytes; how each is made."""
    nodes = weight_only_nodes(main)
    nodes = {n: None for n in nodes if all(v.type.bytes_at({}) <= budget for v in n.results)}
    nodes = _closed(nodes, main)
    read = _read_by([n for n in main.nodes if n not in nodes], main)
    recipes: dict[str, Recipe] = {}
    replaced: dict[Value, Value] = {}
    for node in nodes:
        for value in node.results:
            if value not in read or value.type.bytes_at({}) > budget:
                continue
            budget -= value.type.bytes_at({})
            name = _new_name(node, value, {**main.parameters, **recipes})
            recipes[name] = _recipe(value, nodes, main)
            replaced[value] = Value("parameter", value.type, name)
    _replace(main, [n for n in main.nodes if n not in nodes], replaced)  # recipes are made of the others
    main.nodes = needed_nodes(main.nodes, main.outputs.values())
    read = _read_by(main.nodes, main)
    main.parameters = {name: v for name, v in main.parameters.items() if v in read}
    main.parameters |= {v.name: v for v in replaced.values()}
    return recipes


def _closed(nodes: Mapping[Node, None], main: Function) -> dict[Node, None]:
    """Those that read results of one another only."""
    made = set(main.parameters.values())
    found: dict[Node, None] = {}
    for node in nodes:
        if all(v in made or v.literal is not None for v in node.inputs):
            found[node] = None
            made.update(node.results)
    return found


def _recipe(result: Value, nodes: dict[Node, None], main: Function) -> Recipe:
    names = {value: name for name, value in main.parameters.items()}
    chosen = needed_nodes(list(nodes), [result])
    sources = {names[v]: v for node in chosen for v in node.inputs if v in names}
    return Recipe(result, tuple(chosen), sources)


# -- both ------------------------------------------------------------------------------------------------------


def _read_by(nodes: Sequence[Node], function: Function) -> set[Value]:
    return {*(v for node in nodes for v in node.inputs), *function.outputs.values()}


def _replace(function: Function, nodes: Sequence[Node], values: Mapping[Value, Value]) -> None:
    """Let these nodes, and the function's outputs, read other values."""
    for node in nodes:
        _replace_operands(node, values)
    function.outputs = {name: values.get(v, v) for name, v in function.outputs.items()}


def _replace_operands(node: Node, values: Mapping[Value, Value]) -> None:
    if any(v in values for v in node.inputs):
        node.operands = tuple(None if v is None else values.get(v, v) for v in node.operands)


def _new_name(node: Node, value: Value, taken: Mapping[str, Any]) -> str:
    """The value's name under its node's scope, numbered where another has it."""
    base = name = ".".join(filter(None, (node.scope, value.name)))
    count = 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def _constant(value: Value) -> Array:
    assert value.literal is not None
    return value.literal.array


def _stored(array: Any, value: Value) -> Array:
    if value.type.dtype is bf16:
        return widened(rounded(np.asarray(array, np.float32)))
    return np.asarray(array, value.type.dtype.numpy)


def _operand(value: Value, texts: Mapping[Value, str]) -> str:
    if value.literal is None:
        return texts[value]
    return str(value.literal.scalar) if value.literal.shape == () else str(value.literal.type)
