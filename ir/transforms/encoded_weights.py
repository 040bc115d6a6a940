"""Weights held in blocks: parameters become encoded ones, and what read them reads their decoded numbers.

    w: f32[576, 1536]                       -->   w: f32[576, 1536] as q4_0
    y = linear(x, $w)                             y = linear(x, decode($w, of=q4_0))

A block of the model that is called with weights of several encodings becomes several functions, one for each set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.ops.blocks import Decode, Encode
from treadle.ir.ops.call import Call
from treadle.ir.transforms.clone import clone_function, clone_graph

Encodings = Mapping[str, Encoding]


def encode_parameters(graph: Graph, encodings: Encodings) -> Graph:
    """A copy of a graph in which these parameters are encoded; what it means changes with their elements alone.

    Every function that reads one decodes it once, before all else. Raises GraphError for a parameter that is not
    there, is encoded already, or does not fit its encoding.
    """
    copy = clone_graph(graph)
    if unknown := [name for name in encodings if name not in copy.parameters]:
        raise GraphError(f"there is no parameter {unknown[0]!r} to encode")
    if not encodings:
        return copy
    for name in encodings:
        if copy.parameters[name].type.encoding is not None:
            raise GraphError(f"parameter {name} is encoded already", received=str(copy.parameters[name].type))
    work = _Encoding(copy)
    for entry in copy.entries:
        work.encode(entry, {n: e for n, e in encodings.items() if n in entry.parameters})
    copy.functions = work.functions
    return copy


def quantized_alike(graph: Graph, encoded: Graph) -> Graph:
    """A copy of a graph whose parameters are encoded as those of another one of the same names are."""
    held = graph.parameters
    found = {name: v.type.encoding for name, v in encoded.parameters.items() if name in held}
    return encode_parameters(
        graph, {name: e for name, e in found.items() if e is not None and held[name].type.encoding is None}
    )


def decode_parameters(graph: Graph) -> Graph:
    """The way back: a copy of a graph whose parameters, and constants, are the numbers that their blocks mean.

    What moved blocks moves numbers. Raises GraphError for a graph that encodes what it computes.
    """
    copy = clone_graph(graph)
    for function in copy.functions.values():  # callees first
        same: dict[Value, Value] = {}
        for value in function.arguments:
            value.type = value.type.decoded
        for node in function.nodes:
            if isinstance(node.op, Encode):
                raise GraphError("values that are computed are encoded, and have no numbers but those of their blocks")
            node.operands = tuple([None if v is None else _number(same.get(v, v)) for v in node.operands])
            if isinstance(node.op, Decode):
                same[node.result] = node.inputs[0]
            for value in node.results:
                value.type = value.type.decoded
            if (callee := copy.callee(node)) is not None:
                node.op = Call.of(callee)
        function.nodes = [node for node in function.nodes if not isinstance(node.op, Decode)]
        function.replace_results(lambda v, same=same: _number(same.get(v, v)))  # type: ignore[misc]
    return copy


def decode_weights(graph: Graph, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of weights of a graph: those that are held in blocks, decoded; the others as they are."""
    encodings = {name: value.type.encoding for name, value in graph.parameters.items()}
    return {
        name: array if (encoding := encodings.get(name)) is None else encoding.decode(np.asarray(array))
        for name, array in weights.items()
    }


def encode_weights(graph: Graph, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as a graph holds them: numbers of a parameter that is encoded, in blocks; all others as they are.

    Numbers of a form that is not written are left as well. Raises GraphError for a number that has no place in it.
    """
    return {name: _in_blocks(graph.parameters.get(name), array) for name, array in weights.items()}


def _in_blocks(value: Value | None, array: Any) -> Any:
    encoding = None if value is None else value.type.encoding
    held = np.asarray(array) if encoding is not None else None
    if value is None or encoding is None or held is None or held.shape != value.type.static_shape:
        return array  # a misfit is told by whoever takes it
    if held.dtype.kind != "f" or not encoding.block.encodes:
        return array
    try:
        return encoding.encode(held)
    except GraphError as error:
        error.within = error.within or f"weight {value.name}: {value.type}"
        raise


def _number(value: Value) -> Value:
    """A constant as the numbers of its blocks."""
    literal = value.literal
    if literal is None or literal.encoding is None:
        return value
    return Value.constant(Literal.of(literal.encoding.decode(literal.array), literal.dtype))


class _Encoding:
    """Functions of a graph as they are with some of their parameters encoded, each set of encodings once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.functions: dict[str, Function] = {}
        """Callees first."""
        self._made: dict[tuple[str, tuple[tuple[str, Encoding], ...]], Function] = {}

    def encode(self, function: Function, encodings: Encodings) -> None:
        """Encode parameters of a function, and of those that it calls with them."""
        for name, encoding in encodings.items():
            value = function.parameters[name]
            value.type = value.type.as_encoded(encoding)
        for node in function.nodes:
            callee = self.graph.callee(node)
            if callee is None:
                continue
            pairs = zip(callee.arguments, node.operands, strict=True)
            inner = {f.name: v.type.encoding for f, v in pairs if v is not None and f.kind == "parameter"}
            made = self._called(callee.name, {n: e for n, e in inner.items() if e is not None})
            node.op = Call.of(made)
        _decode_what_is_read(function, {function.parameters[name] for name in encodings})
        self.functions[function.name] = function

    def _called(self, name: str, encodings: Encodings) -> Function:
        """The function of that name with these encodings."""
        key = (name, tuple(encodings.items()))
        if key not in self._made:
            taken = {*self.graph.functions, *(made.name for made in self._made.values())}
            first = all(known != name for known, _ in self._made)
            made = clone_function(self.graph.functions[name], name if first else _free_name(name, taken))
            self._made[key] = made
            self.encode(made, encodings)
        return self._made[key]


def _decode_what_is_read(function: Function, encoded: set[Value]) -> None:
    """Decode the encoded parameters that nodes read by themselves, before all else; calls pass them on as they are."""
    decoded: dict[Value, Node] = {}

    def numbers(value: Value, reader: Node | None) -> Value:
        if value not in encoded:
            return value
        if value not in decoded:
            assert value.type.encoding is not None
            path, _, name = value.name.rpartition(".")
            source = None if reader is None else reader.source
            op = Decode(of=value.type.encoding)
            decoded[value] = Node(op, [value], [value.type.decoded], name, scope=path, source=source)
        return decoded[value].result

    for node in function.nodes:
        if node.op.callee is None:
            node.operands = tuple([None if v is None else numbers(v, node) for v in node.operands])
    function.replace_results(lambda v: numbers(v, None))
    function.nodes = [*decoded.values(), *function.nodes]


def _free_name(base: str, taken: set[str]) -> str:
    count = 2
    while f"{base}_{count}" in taken:
        count += 1
    return f"{base}_{count}"
