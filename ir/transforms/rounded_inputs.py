"""Rounding of the inputs of products at every call, as a checkpoint asks for it.

    y = linear(x, $w)   -->   y = linear(decode(encode(x)), $w)                  int8, a scale per token or per 32
                              y = linear(round_scaled(x, format=f8e4m3fn), $w)   narrow floats

Products of one value with the same rounding share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import GROUPS, ROWS, STEPS, Decode, Encode
from treadle.ir.ops.products import MixedProduct
from treadle.ir.ops.rounding import FORMATS, RoundScaled
from treadle.ir.transforms.clone import clone_graph

AS_STORED = "as-stored"
"""The scheme that rounds inputs as the checkpoint asks for it."""


@dataclass(frozen=True)
class InputRounding:
    """The rounding of a layer's inputs.

    number     "int8", or a float format: "f8e4m3fn", "f4e2m1"
    group      number of neighbors that share a scale; 0: all inputs of a token; -1: all tokens
    symmetric  False if integers have a zero point
    static     True if scales are in the checkpoint; False if they are computed at every call
    outliers   True if large inputs are not rounded
    """

    number: str
    group: int = 0
    symmetric: bool = True
    static: bool = False
    outliers: bool = False

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of integers; None for other roundings, and for integers that no encoding has."""
        if self.number != "int8" or self.why_not:
            return None
        return GROUPS if self.group else ROWS if self.symmetric else STEPS

    @property
    def why_not(self) -> str:
        """The reason why the rounding is not supported; empty if it is."""
        if self.static:
            return "scales in the file are not supported"
        if self.outliers:
            return "a threshold of inputs is not supported"
        if self.group < 0:
            return "a scale for all tokens would let a row's result depend on other rows"
        if self.number == "int8":
            allowed = (0, GROUPS.group) if self.symmetric else (0,)
            return "" if self.group in allowed else f"integers in groups of {self.group} are not supported"
        return "" if self.number in FORMATS and self.symmetric else f"numbers {self.number} are not supported"

    def __str__(self) -> str:
        shared = "per token" if not self.group else "per tensor" if self.group < 0 else f"in groups of {self.group}"
        kind = "" if self.symmetric else ", with a zero point"
        more = ", without outliers" if self.outliers else ""
        return f"{self.number}, {'static' if self.static else 'dynamic'} {shared}{kind}{more}"


def round_inputs(graph: Graph, roundings: Mapping[str, InputRounding]) -> Graph:
    """Return a copy of a graph in which products with these parameters round their other operand.

    Raises GraphError for a rounding that is not supported, and if two calls of a function ask for different roundings.
    """
    copy = clone_graph(graph)
    products: dict[str, dict[Node, InputRounding | None]] = {}
    for entry in copy.entries:
        _find(copy, entry, {value: roundings.get(name) for name, value in entry.parameters.items()}, products)
    for name, each in products.items():
        _round(copy.functions[name], each)
    return copy


def _find(
    graph: Graph,
    function: Function,
    by_weight: Mapping[Value, InputRounding | None],
    products: dict[str, dict[Node, InputRounding | None]],
) -> None:
    """Record the products with these parameters, in a function and in the functions that it calls."""
    for node in function.nodes:
        if (callee := graph.callee(node)) is not None:
            pairs = zip(callee.arguments, node.operands, strict=True)
            inside = {formal: by_weight[v] for formal, v in pairs if v is not None and v in by_weight}
            _find(graph, callee, inside, products)
            continue
        positions = node.op.multiplies(len(node.operands)) if isinstance(node.op, MixedProduct) else ()
        weights = [None if (v := node.operands[at]) is None else v.weight for at in positions]
        for rounding in dict.fromkeys(by_weight[w] for w in weights if w is not None and w in by_weight):
            if rounding is not None and rounding.why_not:
                raise GraphError(f"inputs cannot be rounded to {rounding}: {rounding.why_not}", within=function.name)
            if (other := products.setdefault(function.name, {}).setdefault(node, rounding)) != rounding:
                received = f"{rounding or 'no rounding'}, and {other or 'no rounding'}"
                raise GraphError(
                    "calls of one function round inputs differently", received=received, within=function.name
                )


def _round(function: Function, products: Mapping[Node, InputRounding | None]) -> None:
    """Round the first operands of products. Each value is rounded once for each kind of rounding."""
    rounded: dict[tuple[Value, InputRounding], Value] = {}
    nodes: list[Node] = []
    for node in function.nodes:
        rounding, x = products.get(node), node.operands[0] if node.operands else None
        if rounding is not None and x is not None:
            if (x, rounding) not in rounded:
                made = _nodes(x, rounding, node)
                nodes += made
                rounded[x, rounding] = made[-1].result
            node.operands = (rounded[x, rounding], *node.operands[1:])
        nodes.append(node)
    function.nodes = nodes


def _nodes(x: Value, rounding: InputRounding, reader: Node) -> list[Node]:
    ops: list[Op] = [RoundScaled(format=rounding.number, group=rounding.group)]
    if (encoding := rounding.encoding) is not None:
        ops = [Encode(to=encoding), Decode(of=encoding)]
    short, made = x.name.rpartition(".")[2], list[Node]()
    for op in ops:
        operands = [made[-1].result if made else x, *([None] * 3 if isinstance(op, Encode) else [])]
        types = op.infer([None if v is None else v.type for v in operands])
        made.append(Node(op, operands, types, f"{short}_rounded", reader.scope, reader.source))
    return made
