"""Weights stored in blocks: parameters become encoded, and their consumers read decoded numbers.

    w: f32[576, 1536]                       -->   w: f32[576, 1536] as q4_0
    y = linear(x, $w)                             y = linear(x, decode($w, of=q4_0))

A block of the model that is called with weights of several encodings becomes several functions, one for each set. If
products are smoothed (`treadle.ir.transforms.balances`), blocks hold w s, and the vector 1 / s is a parameter next to
w: the `encode` of the other operand multiplies with it, and any other consumer reads decode(w) / s.

If blocks hold the columns of w in another order, as GPTQ's `desc_act` stores them, the order is a parameter i32[k] next
to w: column j of the blocks is column order[j] of w. Products with the same order share one gather of x:

    y = linear(x, $w)                      -->    y = linear(gather(x, $order, axis=-1), decode($w))

Any other consumer reads the columns in their own order: index_add(0, $order, decode($w), axis=-1).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.naming import free_name
from treadle.ir.ops.arithmetic import Mul
from treadle.ir.ops.blocks import Decode, Encode
from treadle.ir.ops.call import Call
from treadle.ir.ops.indexing import Gather, IndexAdd
from treadle.ir.ops.products import Linear, MixedProduct
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.ir.transforms.balances import Balance, balances_of, vector_name
from treadle.ir.transforms.clone import clone_function, clone_graph
from treadle.ir.types import DType, Type, i32

Encodings = Mapping[str, Encoding]
Orders = Mapping[str, Sequence[str]]
"""The names of weights whose columns are stored in one order, by the name of the parameter that holds the order."""


def encode_parameters(
    graph: Graph,
    encodings: Encodings,
    balances: Sequence[Balance] = (),
    copied: Callable[[Node, Node], None] = lambda node, copy: None,
    orders: Orders | None = None,
) -> Graph:
    """Return a copy of a graph in which these parameters are encoded; its results change only by the rounding of these
    parameters.

    balances  smoothed products, all of whose weights are encoded: their vectors become parameters
    copied    called with each node of the graph and its copy, with several copies if a function becomes several
    orders    encoded weights whose blocks hold columns in another order; each order becomes a parameter, i32[k]

    Every function that reads such a parameter decodes it once, at its start. Raises GraphError for a parameter that
    does not exist, is already encoded, or does not fit its encoding.
    """
    copy = clone_graph(graph)
    if unknown := [name for name in encodings if name not in copy.parameters]:
        raise GraphError(f"there is no parameter {unknown[0]!r} to encode")
    if not encodings:
        return copy
    for name in encodings:
        if copy.parameters[name].type.encoding is not None:
            raise GraphError(f"parameter {name} is encoded already", received=str(copy.parameters[name].type))
    origins = {new: old for (_, old), (_, new) in zip(graph.walk(), copy.walk(), strict=True)}
    work = _Encoding(copy, lambda node, again: copied(origins[node], again))
    for entry in copy.entries:
        beside: dict[str, Value] = {}
        for balance in balances:
            read = [entry.parameters[n] for n in balance.weights if n in entry.parameters and n in encodings]
            if read:
                vector = _vector(entry, balance.vector, read, encodings[read[0].name])
                beside |= dict.fromkeys([v.name for v in read], vector)
        for name, weights in (orders or {}).items():
            read = [entry.parameters[n] for n in weights if n in entry.parameters]
            if read:
                vector = _vector(entry, name, read, encodings[read[0].name], i32)
                beside |= dict.fromkeys([v.name for v in read], vector)
        for node in entry.nodes:
            copied(origins[node], node)
        work.encode(entry, {n: e for n, e in encodings.items() if n in entry.parameters}, beside)
    copy.functions = work.functions
    return copy


def quantized_alike(graph: Graph, encoded: Graph) -> Graph:
    """Return a copy of a graph whose parameters are encoded and smoothed like the parameters of the same names in
    another graph.
    """
    held = graph.parameters
    found = {name: v.type.encoding for name, v in encoded.parameters.items() if name in held}
    encodings = {name: e for name, e in found.items() if e is not None and held[name].type.encoding is None}
    return encode_parameters(graph, encodings, balances_of(encoded))


def decode_parameters(graph: Graph, encoded: Container[str] = ()) -> Graph:
    """Return a copy of a graph whose encoded parameters and constants are replaced by their decoded numbers: the
    inverse.

    encoded  parameters of a graph without calls that stay encoded; only `decode` reads them

    Nodes that moved blocks then move numbers. Raises GraphError for a graph that encodes computed values.
    """
    copy = clone_graph(graph)
    for function in copy.functions.values():  # callees first
        same: dict[Value, Value] = {}
        for value in function.arguments:
            if value.name not in encoded:
                value.type = value.type.decoded
        for node in function.nodes:
            if node.op.decodes and node.inputs[0].name in encoded:
                continue
            if isinstance(node.op, Encode):
                raise GraphError("the graph encodes computed values, whose numbers exist only as blocks")
            node.operands = tuple([None if v is None else _number(same.get(v, v)) for v in node.operands])
            if isinstance(node.op, Decode):
                same[node.result] = node.inputs[0]
            for value in node.results:
                value.type = value.type.decoded
            if (callee := copy.callee(node)) is not None:
                node.op = Call.of(callee)
        function.nodes = [n for n in function.nodes if not isinstance(n.op, Decode) or n.inputs[0].name in encoded]
        function.replace_results(lambda v, same=same: _number(same.get(v, v)))  # type: ignore[misc]
    return copy


def decode_weights(graph: Graph, weights: Mapping[str, Any], encoded: Container[str] = ()) -> dict[str, Any]:
    """Return the numbers of a graph's weights: decoded if they are held in blocks, else unchanged.

    encoded  weights that stay in blocks
    """
    encodings = {name: value.type.encoding for name, value in graph.parameters.items() if name not in encoded}
    return {
        name: array if (encoding := encodings.get(name)) is None else encoding.decode(np.asarray(array))
        for name, array in weights.items()
    }


def encode_weights(
    graph: Graph, weights: Mapping[str, Any], balances: Sequence[Balance] | None = None
) -> dict[str, Any]:
    """Return weights as a graph stores them: numbers of encoded parameters as blocks, all others unchanged.

    balances  of the graph; None: the balances in the graph (`balances_of`). A vector is computed if the weights are
              numbers

    Numbers are also unchanged if the form cannot be written. Weights are read one at a time, so a mapping that computes
    an array when it is read needs memory for the numbers of one weight, or of the weights of one balance.

    Raises GraphError for a number out of the form's range.
    """
    vectors, factors = _balancing(graph, weights, balances)
    parameters = graph.parameters
    return {
        name: _in_blocks(parameters.get(name), vectors[name] if name in vectors else weights[name], factors.get(name))
        for name in dict.fromkeys([*weights, *vectors])
    }


def encoding_errors(graph: Graph, weights: Mapping[str, Any]) -> dict[str, float]:
    """Return the relative RMS error of each encoded weight: |decode(encode(w)) - w| / |w|.

    weights  the numbers, before they are encoded; a weight that is in blocks already, or zero, has no error

    The error of a weight that is smoothed by s is the error of w s, the numbers that are encoded.

    Raises GraphError as `encode_weights` does.
    """
    _, factors = _balancing(graph, weights, None)
    found = {}
    for name, value in graph.parameters.items():
        encoding, array = value.type.encoding, weights.get(name)
        if encoding is None or array is None:
            continue
        held = _blocks_of(value, array, factors.get(name))
        if held is None:
            continue
        numbers = _balanced(value, array, factors.get(name)).astype(np.float64)
        norm = float(np.linalg.norm(numbers))
        if norm:
            found[name] = float(np.linalg.norm(encoding.decode(held) - numbers)) / norm
    return found


def _balancing(
    graph: Graph, weights: Mapping[str, Any], balances: Sequence[Balance] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the vectors of balances by name, and the factors s of the weights that they smooth."""
    vectors, factors = dict[str, Any](), dict[str, Any]()
    for balance in balances_of(graph) if balances is None else balances:
        s = balance.factors(graph, weights)
        if s is not None:
            vectors[balance.vector] = 1 / s
            factors |= dict.fromkeys(balance.weights, s)
    return vectors, factors


def given_parameters(graph: Graph) -> list[str]:
    """Return the names of a graph's parameters without the vectors of balances, which `encode_weights` computes."""
    vectors = {balance.vector for balance in balances_of(graph)}
    return [name for name in graph.parameters if name not in vectors]


def _in_blocks(value: Value | None, array: Any, factors: Any = None) -> Any:
    held = None if value is None else _blocks_of(value, array, factors)
    return array if held is None else held


def _blocks_of(value: Value, array: Any, factors: Any) -> Any | None:
    """Return the numbers of a weight as blocks; None for a plain weight, and for an array that is blocks already, or
    has another shape, which the consumer of the array reports.
    """
    encoding = value.type.encoding
    if encoding is None:
        return None
    if np.shape(array) != value.type.static_shape or not encoding.block.encodes:
        return None
    held = np.asarray(array)
    if held.dtype.kind != "f":
        return None
    try:
        return encoding.encode(_balanced(value, held, factors))
    except GraphError as error:
        error.within = error.within or f"weight {value.name}: {value.type}"
        raise


def _balanced(value: Value, array: Any, factors: Any) -> Any:
    """Return the numbers of a weight, multiplied by the factors of its balance, if it has one."""
    held, encoding = np.asarray(array), value.type.encoding
    if factors is None or encoding is None:
        return held
    return held * np.expand_dims(factors, 1 if encoding.axis == 0 else 0)


def _number(value: Value) -> Value:
    """Return a constant as the decoded numbers of its blocks."""
    literal = value.literal
    if literal is None or literal.encoding is None:
        return value
    return Value.constant(Literal.of(literal.encoding.decode(literal.array), literal.dtype))


class _Encoding:
    """Functions of a graph with some of their parameters encoded, one for each set of encodings."""

    def __init__(self, graph: Graph, copied: Callable[[Node, Node], None]) -> None:
        self.graph, self.copied = graph, copied
        self.functions: dict[str, Function] = {}
        """Callees first."""
        self._made: dict[tuple[object, ...], Function] = {}

    def encode(self, function: Function, encodings: Encodings, beside: Mapping[str, Value]) -> None:
        """Encode parameters of a function, and of the functions that it calls with them.

        beside  for each parameter that is smoothed or in another order, the function's parameter with the vector
        """
        for name, encoding in encodings.items():
            value = function.parameters[name]
            value.type = value.type.as_encoded(encoding)
        vectors = {function.parameters[name]: vector for name, vector in beside.items()}
        for node in function.nodes:
            callee = self.graph.callee(node)
            if callee is None:
                continue
            pairs = zip(callee.arguments, node.operands, strict=True)
            passed = [(f, v) for f, v in pairs if v is not None and f.kind == "parameter"]
            together: dict[Value, list[str]] = {}
            for formal, value in passed:
                if value in vectors:
                    together.setdefault(vectors[value], []).append(formal.name)
            inner = {f.name: v.type.encoding for f, v in passed if f.type.encoding is None}  # others are decoded there
            made = self._called(
                callee.name,
                {n: e for n, e in inner.items() if e is not None},
                tuple([(vector.type.dtype, tuple(names)) for vector, names in together.items()]),
            )
            states = len(node.operands) - len(made.states)
            node.operands = (*node.operands[:states], *together, *node.operands[states:])
            node.op = Call.of(made)
        _decode_what_is_read(function, {function.parameters[name] for name in encodings}, vectors)
        self.functions[function.name] = function

    def _called(self, name: str, encodings: Encodings, vectors: tuple[tuple[DType, tuple[str, ...]], ...]) -> Function:
        """Return the function of that name with these encodings, and one more vector for each tuple of weights."""
        key = (name, tuple(encodings.items()), vectors)
        if key not in self._made:
            taken = {*self.graph.functions, *(made.name for made in self._made.values())}
            first = all(known != name for known, *_ in self._made)
            whole = self.graph.functions[name]
            made = clone_function(whole, name if first else free_name(name, taken))
            for node, copy in zip(whole.nodes, made.nodes, strict=True):
                self.copied(node, copy)
            self._made[key] = made
            beside: dict[str, Value] = {}
            for dtype, names in vectors:
                vector = vector_name(names, made.parameters.__contains__, "order" if dtype is i32 else "balance")
                read = [made.parameters[n] for n in names]
                beside |= dict.fromkeys(names, _vector(made, vector, read, encodings[names[0]], dtype))
            self.encode(made, encodings, beside)
        return self._made[key]


def _vector(
    function: Function, name: str, weights: Sequence[Value], encoding: Encoding, dtype: DType | None = None
) -> Value:
    """Return a new parameter of a function: a vector over the blocked axis of these weights. dtype None: of theirs."""
    if name in function.parameters:
        raise GraphError(f"{function.name} already has a parameter {name}, so a vector cannot have that name")
    type = weights[0].type
    made = Value("parameter", Type(dtype or type.dtype, (type.dims[encoding.axis],)), name)
    function.parameters[name] = made
    return made


def _decode_what_is_read(function: Function, encoded: set[Value], vectors: Mapping[Value, Value]) -> None:
    """Insert a `decode` at the start of a function for each encoded parameter that a node reads. Calls receive
    parameters in encoded form.

    If a parameter is smoothed, the product's other operand is multiplied by the smoothing vector before this operand is
    quantized. If its columns are permuted, the other operand is gathered in the same order, once for all products.
    """
    decoded: dict[Value, Node] = {}
    divided: dict[Value, list[Node]] = {}
    gathered: dict[tuple[Value, Value], Value] = {}
    nodes: list[Node] = []

    def numbers(value: Value, reader: Node | None) -> Value:
        if value not in encoded:
            return value
        if value not in decoded:
            assert value.type.encoding is not None
            path, _, name = value.name.rpartition(".")
            source = None if reader is None else reader.source
            op = Decode(of=value.type.encoding)
            decoded[value] = Node(op, [value], [value.type.decoded], name, scope=path, source=source)
        made, vector = decoded[value], vectors.get(value)
        if vector is None or (reader is not None and applied(reader, value, vector)):
            return made.result
        if value not in divided:
            divided[value] = (_in_order if vector.type.dtype is i32 else _times)(made, vector)
        return divided[value][-1].result

    def applied(reader: Node, weight: Value, vector: Value) -> bool:
        if vector.type.dtype is not i32:
            return _divides(reader, weight, vector)
        x = reader.operands[0] if _multiplies_columns(reader, weight) else None
        if x is None or x in encoded:
            return False
        if (x, vector) not in gathered:
            op = Gather(axis=-1)
            name = f"{x.name.rpartition('.')[2]}_ordered"
            nodes.append(Node(op, [x, vector], op.infer([x.type, vector.type]), name, reader.scope, reader.source))
            gathered[x, vector] = nodes[-1].result
        reader.operands = (gathered[x, vector], *reader.operands[1:])
        return True

    for node in function.nodes:
        if node.op.callee is None:
            read = {at: numbers(v, node) for at, v in enumerate(node.operands) if v in encoded}
            node.operands = tuple([read.get(at, v) for at, v in enumerate(node.operands)])
        nodes.append(node)
    function.replace_results(lambda v: numbers(v, None))
    first = [each for value, node in decoded.items() for each in (node, *divided.get(value, ()))]
    function.nodes = [*first, *nodes]


def _multiplies_columns(reader: Node, weight: Value) -> bool:
    """Return True if a node sums products over the columns of a weight, which no other of its operands has."""
    return (
        isinstance(reader.op, Linear)
        and weight.type.encoding is not None
        and weight.type.encoding.axis == -1
        and [at for at, v in enumerate(reader.operands) if v is weight] == [1]
    )


def _in_order(decode: Node, order: Value) -> list[Node]:
    """Return the nodes that put the columns of a decoded matrix, stored in another order, in their own order."""
    columns = decode.result
    zero = Value.constant(Literal.of(np.zeros((), np.float32), columns.type.dtype))
    fill, add = Expand(shape=columns.type.shape), IndexAdd(axis=decode.op.attributes["of"].axis)
    empty = Node(fill, [zero], fill.infer([zero.type]), scope=decode.scope, source=decode.source)
    operands = [empty.result, order, columns]
    types = add.infer([v.type for v in operands])
    return [empty, Node(add, operands, types, columns.name, scope=decode.scope, source=decode.source)]


def _divides(reader: Node, weight: Value, vector: Value) -> bool:
    """Return True if a node multiplies a weight with a value that is rounded at every call. The `encode` of this value
    then gets the vector as an operand.

    Raises GraphError if it already has another vector.
    """
    x = reader.operands[0] if isinstance(reader.op, MixedProduct) and reader.operands else None
    blocks = x.node.inputs[0] if x is not None and x.node is not None and x.node.op.decodes else None
    if x is weight or blocks is None or blocks.node is None or not isinstance(blocks.node.op, Encode):
        return False
    made = blocks.node
    if made.operands[1] not in (None, vector):
        raise GraphError(f"{blocks.name} is multiplied by two vectors before it is rounded", received=vector.name)
    made.operands = (made.operands[0], vector, *made.operands[2:])
    return True


def _times(decode: Node, vector: Value) -> list[Node]:
    """Return the nodes that multiply decoded numbers with a vector over their blocked axis."""
    made, factor = [], vector
    if decode.op.attributes["of"].axis == 0:
        turn = Rearrange(pattern="k -> k 1")
        made.append(Node(turn, [vector], turn.infer([vector.type]), scope=decode.scope, source=decode.source))
        factor = made[0].result
    op, operands = Mul(), [decode.result, factor]
    types = op.infer([v.type for v in operands])
    return [*made, Node(op, operands, types, decode.result.name, scope=decode.scope, source=decode.source)]
