"""Rounding of the inputs of products at every call, as a checkpoint asks for it.

    y = linear(x, $w)   -->   y = linear(decode(encode(x)), $w)                  int8, a scale per token or per 32
                              y = linear(round_scaled(x, format=f8e4m3fn), $w)   narrow floats
                              y = linear(fake_quantize(x, $scale, $zero), $w)    int8, a scale in the checkpoint
                              y = linear(round_to(x / $scale) $scale, $w)        narrow floats, the same

Products of one value with the same rounding share it. Scales and zeros of a checkpoint are parameters, f32[].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.ops.arithmetic import Div, Mul
from treadle.ir.ops.blocks import GROUPS, ROWS, STEPS, Decode, Encode
from treadle.ir.ops.call import Call
from treadle.ir.ops.products import MixedProduct
from treadle.ir.ops.rounding import FORMATS, FakeQuantize, RoundScaled, RoundTo
from treadle.ir.transforms.balances import vector_name
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.types import f32

Array = np.ndarray[Any, Any]

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
        if self.number != "int8" or self.static or self.why_not:
            return None
        return GROUPS if self.group else ROWS if self.symmetric else STEPS

    @property
    def why_not(self) -> str:
        """The reason why the rounding is not supported; empty if it is."""
        if self.outliers:
            return "a threshold of inputs is not supported"
        if self.static and self.group >= 0:
            return "scales of tokens or groups in the file are not supported"
        if self.static and self.number == "int8":
            return ""
        if self.group < 0 and not self.static:
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


@dataclass(frozen=True)
class InputSteps:
    """The scale of a static rounding, and the integer that stands for 0."""

    scale: float
    zero: float = 0.0


def round_inputs(
    graph: Graph, roundings: Mapping[str, InputRounding], steps: Mapping[str, InputSteps] | None = None
) -> tuple[Graph, dict[str, Array]]:
    """Return a copy of a graph in which products with these parameters round their other operand, and the new
    parameters that hold scales and zeros, by name.

    steps  the steps of static roundings, by the names of weights

    Raises GraphError for a rounding that is not supported, and if two calls of a function ask for different roundings.
    """
    copy = clone_graph(graph)
    products: dict[str, dict[Node, InputRounding | None]] = {}
    visits: dict[str, list[dict[str, InputSteps]]] = {}
    for entry in copy.entries:
        asked = {value: roundings.get(name) for name, value in entry.parameters.items()}
        held = {value: (steps or {})[name] for name, value in entry.parameters.items() if name in (steps or {})}
        _find(copy, entry, asked, held, products, visits)
    added: dict[str, Array] = {}
    read: dict[str, list[_Steps]] = {}
    for name, function in copy.functions.items():  # callees first
        here = _StepsOf(function, visits.get(name, []))
        for node in function.nodes:
            callee = copy.callee(node)
            if callee is not None and read[callee.name]:
                _pass_steps(node, callee, read[callee.name], here)
        _round(function, products.get(name, {}), here)
        read[name] = [*here.groups.values()]
        if function in copy.entries:
            added |= {
                value.name: np.asarray(number, np.float32) for each in read[name] for value, number in each.numbers()
            }
    return copy, added


@dataclass(frozen=True, eq=False)
class _Steps:
    """The parameters of a function that hold the steps of static roundings.

    weights  the names of the weights whose products round with them
    zero     None if the integer that stands for 0 is 0
    steps    their values at the first call
    """

    weights: tuple[str, ...]
    scale: Value
    zero: Value | None
    steps: InputSteps

    @property
    def parameters(self) -> tuple[Value, ...]:
        """The parameters."""
        return (self.scale,) if self.zero is None else (self.scale, self.zero)

    def numbers(self) -> Iterator[tuple[Value, float]]:
        """Yield each parameter with its value at the first call."""
        yield from zip(self.parameters, (self.steps.scale, self.steps.zero), strict=False)


class _StepsOf:
    """The steps of a function's weights. Weights whose steps are equal at every call share parameters.

    groups  the parameters that products read so far, by their values at each call
    """

    def __init__(self, function: Function, visits: Sequence[Mapping[str, InputSteps]]) -> None:
        self.function, self.visits = function, visits
        self.groups: dict[tuple[InputSteps, ...], _Steps] = {}

    def of(self, weight: Value) -> _Steps:
        """Return the steps of a weight, as parameters of the function. Raises GraphError if a call lacks them."""
        if not self.visits or any(weight.name not in visit for visit in self.visits):
            raise GraphError(f"the scale of the inputs of {weight.name} is missing", within=self.function.name)
        key = tuple([visit[weight.name] for visit in self.visits])
        if key not in self.groups:
            names = [n for n in self.visits[0] if key == tuple([visit.get(n) for visit in self.visits])]
            moved = any(steps.zero for steps in key)
            words = ("input_scale", "input_zero")[: 1 + moved]
            scale, zero = ([self._parameter(names, word) for word in words] + [None])[:2]
            assert scale is not None
            self.groups[key] = _Steps(tuple(names), scale, zero, key[0])
        return self.groups[key]

    def _parameter(self, weights: Sequence[str], word: str) -> Value:
        parameters = self.function.parameters
        made = Value("parameter", f32[()], vector_name(weights, parameters.__contains__, word))
        parameters[made.name] = made
        return made


def _pass_steps(call: Node, callee: Function, steps: Sequence[_Steps], here: _StepsOf) -> None:
    """Pass the steps that a callee now reads: the steps of the weights that the call passes."""
    new = [v for each in steps for v in each.parameters]
    formals = [v for v in callee.arguments if v not in new]
    passed = {formal.name: v for formal, v in zip(formals, call.operands, strict=True)}
    operands: list[Value | None] = []
    for each in steps:
        weight = passed[each.weights[0]]
        assert weight is not None
        held = here.of(weight)
        zero = Value.constant(Literal.of(np.zeros((), np.float32), f32)) if held.zero is None else held.zero
        operands += (held.scale, zero)[: len(each.parameters)]
    states = len(call.operands) - len(callee.states)
    call.operands = (*call.operands[:states], *operands, *call.operands[states:])
    call.op = Call.of(callee)


def _find(
    graph: Graph,
    function: Function,
    by_weight: Mapping[Value, InputRounding | None],
    steps: Mapping[Value, InputSteps],
    products: dict[str, dict[Node, InputRounding | None]],
    visits: dict[str, list[dict[str, InputSteps]]],
) -> None:
    """Record the products with these parameters, and the steps of these, in a function and in the functions that it
    calls.
    """
    visits.setdefault(function.name, []).append({value.name: each for value, each in steps.items()})
    for node in function.nodes:
        if (callee := graph.callee(node)) is not None:
            pairs = [(f, v) for f, v in zip(callee.arguments, node.operands, strict=True) if v is not None]
            inside = {formal: by_weight[v] for formal, v in pairs if v in by_weight}
            _find(graph, callee, inside, {formal: steps[v] for formal, v in pairs if v in steps}, products, visits)
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


def _round(function: Function, products: Mapping[Node, InputRounding | None], steps: _StepsOf) -> None:
    """Round the first operands of products. Each value is rounded once for each kind of rounding, with each scale."""
    rounded: dict[tuple[Value, InputRounding, _Steps | None], Value] = {}
    nodes: list[Node] = []
    for node in function.nodes:
        rounding, x = products.get(node), node.operands[0] if node.operands else None
        if rounding is not None and x is not None:
            held = _steps_at(node, steps) if rounding.static else None
            if (x, rounding, held) not in rounded:
                made = _nodes(x, rounding, held, node)
                nodes += made
                rounded[x, rounding, held] = made[-1].result
            node.operands = (rounded[x, rounding, held], *node.operands[1:])
        nodes.append(node)
    function.nodes = nodes


def _steps_at(product: Node, steps: _StepsOf) -> _Steps:
    """Return the steps of a product's weights. Raises GraphError if these have different ones."""
    assert isinstance(product.op, MixedProduct)
    read = [product.operands[at] for at in product.op.multiplies(len(product.operands))]
    found = {steps.of(v.weight) for v in read if v is not None and v.weight is not None}
    if len(found) != 1:
        what = "the weights of one product have different scales of its input"
        raise GraphError(what, received=product.op.name, within=steps.function.name)
    return found.pop()


def _nodes(x: Value, rounding: InputRounding, steps: _Steps | None, reader: Node) -> list[Node]:
    """Return the nodes that round a value; the last has the result."""
    none: list[Value | None] = []
    ops: list[tuple[Op, list[Value | None]]] = [(RoundScaled(format=rounding.number, group=rounding.group), none)]
    if (encoding := rounding.encoding) is not None:
        ops = [(Encode(to=encoding), [None] * 3), (Decode(of=encoding), none)]
    elif steps is not None and rounding.number == "int8":
        zero = Value.constant(Literal.of(np.zeros((), np.float32), f32)) if steps.zero is None else steps.zero
        ops = [(FakeQuantize(), [steps.scale, zero])]
    elif steps is not None:
        ops = [(Div(), [steps.scale]), (RoundTo(format=rounding.number, saturate=True), none), (Mul(), [steps.scale])]
    short, made = x.name.rpartition(".")[2], list[Node]()
    for op, more in ops:
        operands = [made[-1].result if made else x, *more]
        types = op.infer([None if v is None else v.type for v in operands])
        made.append(Node(op, operands, types, f"{short}_rounded", reader.scope, reader.source))
    return made
