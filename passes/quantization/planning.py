"""Build a quantization plan from the graph: the weights that products multiply, and the axes along which they sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from treadle.ir.axes import Role
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError, PassError, RuleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import MixedProduct
from treadle.ir.transforms.rounded_inputs import AS_STORED
from treadle.ir.types import Type, f32
from treadle.passes.quantization.activation_planning import plan_activations
from treadle.passes.quantization.balance_planning import plan_balances
from treadle.passes.quantization.quantization_plan import QuantizationPlan, WeightPlan

_FOUR_BITS = 32


def _eight(axis: int, is_output: bool) -> Encoding:
    return Encoding("int8_rows", axis=axis)


def _four(axis: int, is_output: bool) -> Encoding:
    """Return a 4-bit encoding, or an 8-bit encoding if the product is an output, because no later sum averages its
    rounding errors.
    """
    return _eight(axis, is_output) if is_output else Encoding("int4_groups", _FOUR_BITS, axis)


SCHEMES: Mapping[str, Callable[[int, bool], Encoding]] = {
    "int8-weights": _eight,
    "int8": _eight,
    "int4": _four,
    "int4-int8": _four,
}
"""Schemes by name. Each is a function that returns the encoding of a weight. Its arguments are the axis along which
products sum, and True if a product is an output.
"""

_ROUNDS_ACTIVATIONS = ("int8", "int4-int8")
"""Schemes that also quantize the operands with which weights are multiplied, at every call."""


@dataclass
class _Readers:
    """The readers of a parameter, in any function.

    axes      the axes along which products sum
    others    readers that neither multiply the parameter nor move its rows
    moves     readers that move its rows, such as lookups, each with what it does
    products  readers that multiply it
    output    True if one of its products is an output of the graph
    """

    axes: dict[int, None] = field(default_factory=dict)
    others: dict[str, None] = field(default_factory=dict)
    moves: dict[str, str] = field(default_factory=dict)
    products: dict[str, None] = field(default_factory=dict)
    output: bool = False

    @property
    def moving(self) -> str:
        """The readers that move its rows, as a clause of a reason; empty if there are none."""
        actions = dict.fromkeys(self.moves.values())
        return ", ".join(f"{', '.join(n for n, each in self.moves.items() if each == what)} {what}" for what in actions)


def plan_quantization(graph: Graph, scheme: str) -> QuantizationPlan:
    """Return the plan of an optimized graph in a scheme of `SCHEMES`, or in "as-stored", which changes no weight.
    Raises PassError for an unknown scheme.

    A matrix is quantized to blocks along an axis if it is only used in products, and all of them sum along that axis.
    Its rows may be looked up as well, as in a tied table. Every other weight is unchanged, and the plan contains the
    reason.
    """
    if scheme == AS_STORED:
        reason = "its file has numbers"
        kept = [
            (n, v.type, f"stored as {v.type.encoding} already" if v.type.encoding else reason)
            for n, v in graph.parameters.items()
        ]
        return QuantizationPlan(graph.name, scheme, tuple(WeightPlan(n, type, None, why) for n, type, why in kept))
    if scheme not in SCHEMES:
        raise PassError(f"unknown quantization {scheme[:40]!r}", hint="one of " + ", ".join((*SCHEMES, AS_STORED)))
    found = {name: _Readers() for name in graph.parameters}
    for entry in graph.later_entries:
        held = {value: (name,) for name, value in entry.parameters.items() if name in found}
        _read(graph, entry.name, held, found)
    weights = [_planned(name, v.type, found[name], SCHEMES[scheme]) for name, v in graph.parameters.items()]
    plan = QuantizationPlan(graph.name, scheme, tuple(weights))
    if scheme not in _ROUNDS_ACTIVATIONS:
        return plan
    picked = {name for name, readers in found.items() if readers.moves}
    activations, balances = plan_balances(graph, plan_activations(graph, {w.name: w for w in weights}), picked)
    return replace(plan, activations=activations, balances=balances)


def _read(graph: Graph, name: str, held: Mapping[Value, tuple[str, ...]], found: Mapping[str, _Readers]) -> None:
    """Record the readers of parameters in a function and in the functions that it calls.

    held  for each value of the function that is a weight, or a cast of one, the names of the possible parameters
    """
    function = graph.functions[name]
    held = dict(held)
    outputs = _output_values(function) if function in graph.entries else set()
    inside: dict[str, dict[Value, tuple[str, ...]]] = {}
    for node in function.nodes:
        if (callee := graph.callee(node)) is not None:
            passed = inside.setdefault(callee.name, {})
            for formal, value in zip(callee.arguments, node.operands, strict=True):
                if value in held:
                    passed[formal] = tuple(dict.fromkeys([*passed.get(formal, ()), *held[value]]))
            continue
        for position, value in enumerate(node.operands):
            if value not in held:
                continue
            if isinstance(node.op, Cast):  # the cast of a decoded value to a narrower dtype
                held[node.result] = held[value]
                continue
            for each in held[value]:
                _note(node, position, found[each], not outputs.isdisjoint(node.results))
    for value in function.outputs.values() if function in graph.entries else ():
        for each in held.get(value, ()):
            found[each].others["the caller"] = None
    for callee_name, passed in inside.items():
        _read(graph, callee_name, passed, found)


def _output_values(function: Function) -> set[Value]:
    """Return the outputs of an entry, and the values from which they are sliced, moved or computed element by element,
    as capped logits are.
    """
    found = set(function.outputs.values())
    for node in reversed(function.nodes):
        if node.op.callee is not None or found.isdisjoint(node.results):
            continue
        ranks = [None if value is None else value.type.rank for value in node.operands]
        tensors = [value for value in node.inputs if value.type.rank]
        if node.op.only_moves or (len(tensors) == 1 and node.op.is_elementwise(ranks)):
            found.update(tensors)
    return found


def _note(node: Node, position: int, readers: _Readers, is_output: bool) -> None:
    """Record the way in which one node reads a parameter."""
    op, types = node.op, [None if v is None else v.type for v in node.operands]
    found = op.apply(types)
    x, dims = found.operands[0], found.operands[position]
    if isinstance(op, MixedProduct) and position in op.multiplies(len(types)) and x and dims:
        readers.axes.update({axis: None for axis, dim in enumerate(dims) if dim == x[-1]})  # both have the factor k
        readers.products[op.name] = None
        readers.output |= is_output
    elif any(found.factors[n].role is Role.INDEXED for d in dims or () for n in d.factors):
        readers.moves[op.name] = "looks up rows of it"
    elif op.moves_blocks:
        readers.moves[op.name] = "copies its elements"
    else:
        readers.others[op.name] = None


def _planned(name: str, type: Type, readers: _Readers, scheme: Callable[[int, bool], Encoding]) -> WeightPlan:
    reason = _why_not(type, readers)
    if reason:
        return WeightPlan(name, type, None, reason)
    (axis,) = readers.axes
    encoding = scheme(axis, readers.output)
    try:
        encoded = type.as_encoded(encoding).encoding
    except (GraphError, RuleError) as error:
        return WeightPlan(name, type, None, error.what, misfit=True)
    why = f"multiplied by {', '.join(readers.products)}"
    why += ", an output" if readers.output else ""
    why += f"; {readers.moving}" if readers.moves else ""
    return WeightPlan(name, type, encoded, why)


def _why_not(type: Type, readers: _Readers) -> str:
    """Return the reason why a weight is not quantized, or an empty string."""
    if type.encoding is not None:
        return f"stored as {type.encoding} already"
    if type.rank != 2:
        return f"not a matrix: it has rank {type.rank}"
    if type.dtype is not f32:
        return f"its elements are {type.dtype}, but only f32 is quantized"
    if readers.others:
        return f"{', '.join(readers.others)} reads its elements"
    if not readers.products:
        return f"{readers.moving}, but no product reads it whole" if readers.moves else "nothing reads it"
    if len(readers.axes) != 1:
        return "products sum along both of its axes"
    if readers.moves and 0 in readers.axes:
        return f"{', '.join(readers.moves)} splits the axis along which products sum"
    return ""
