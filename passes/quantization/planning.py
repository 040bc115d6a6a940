"""Makes a quantization plan: reads off the graph which weights products multiply, and along which axis they sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from treadle.ir.axes import Role
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError, PassError, RuleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import MixedProduct
from treadle.ir.types import Type, f32
from treadle.passes.quantization.activation_planning import plan_activations
from treadle.passes.quantization.balance_planning import plan_balances
from treadle.passes.quantization.quantization_plan import QuantizationPlan, WeightPlan

_FOUR_BITS = 32


def _eight(axis: int, is_output: bool) -> Encoding:
    return Encoding("int8_rows", axis=axis)


def _four(axis: int, is_output: bool) -> Encoding:
    """Four bits; eight where the product is an output, whose rounding nothing evens out."""
    return _eight(axis, is_output) if is_output else Encoding("int4_groups", _FOUR_BITS, axis)


SCHEMES: Mapping[str, Callable[[int, bool], Encoding]] = {
    "int8-weights": _eight,
    "int8": _eight,
    "int4": _four,
    "int4-int8": _four,
}
"""By name: the encoding of a weight whose products sum along an axis, and whether one of them is an output."""

_ROUNDS_ACTIVATIONS = ("int8", "int4-int8")
"""Schemes in which the values that such weights multiply are rounded as well, at every call."""


@dataclass
class _Readers:
    """Who reads a parameter, in whatever function.

    axes      along which products sum
    others    what multiplies nothing, and does not move rows of it either
    moves     what picks rows of it, and the like
    products  what multiplies it
    output    whether a product of it is an output of the graph
    """

    axes: dict[int, None] = field(default_factory=dict)
    others: dict[str, None] = field(default_factory=dict)
    moves: dict[str, None] = field(default_factory=dict)
    products: dict[str, None] = field(default_factory=dict)
    output: bool = False


def plan_quantization(graph: Graph, scheme: str) -> QuantizationPlan:
    """What becomes of every weight of an optimized graph, in a scheme of `SCHEMES`. Raises PassError for another one.

    A matrix that only products multiply, all of which sum along one axis of it, is rounded to blocks along that axis;
    its rows may be picked as well, as a tied table's are. Everything else stays as it is, and the plan says why.
    """
    if scheme not in SCHEMES:
        raise PassError(f"there is no quantization {scheme[:40]!r}", hint="one of " + ", ".join(SCHEMES))
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
    """Note what a function and those that it calls do with parameters.

    held  for each of its values that are weights, or casts of such, the names of the parameters that they may be
    """
    function = graph.functions[name]
    held = dict(held)
    outputs = _given(function) if function in graph.entries else set()
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
            if isinstance(node.op, Cast):  # to a narrower dtype, of what is decoded then
                held[node.result] = held[value]
                continue
            for each in held[value]:
                _note(node, position, found[each], not outputs.isdisjoint(node.results))
    for value in function.outputs.values() if function in graph.entries else ():
        for each in held.get(value, ()):
            found[each].others["the caller"] = None
    for callee_name, passed in inside.items():
        _read(graph, callee_name, passed, found)


def _given(function: Function) -> set[Value]:
    """The outputs of an entry, and what these are elements of, cut or moved."""
    found = set(function.outputs.values())
    for node in reversed(function.nodes):
        if node.op.callee is None and node.op.only_moves and not found.isdisjoint(node.results):
            found.update(node.inputs)
    return found


def _note(node: Node, position: int, readers: _Readers, is_output: bool) -> None:
    """Note how one node reads a parameter."""
    op, types = node.op, [None if v is None else v.type for v in node.operands]
    found = op.apply(types)
    x, dims = found.operands[0], found.operands[position]
    if isinstance(op, MixedProduct) and position in op.multiplies(len(types)) and x and dims:
        readers.axes.update({axis: None for axis, dim in enumerate(dims) if dim == x[-1]})  # both have the factor k
        readers.products[op.name] = None
        readers.output |= is_output
    elif op.moves_blocks or any(found.factors[n].role is Role.INDEXED for d in dims or () for n in d.factors):
        readers.moves[op.name] = None
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
        return WeightPlan(name, type, None, error.what)
    why = f"multiplied by {', '.join(readers.products)}"
    why += ", an output" if readers.output else ""
    why += f"; {', '.join(readers.moves)} picks rows of it" if readers.moves else ""
    return WeightPlan(name, type, encoded, why)


def _why_not(type: Type, readers: _Readers) -> str:
    """What stands against rounding a weight, if anything does."""
    if type.encoding is not None:
        return f"held as {type.encoding} already"
    if type.rank != 2:
        return f"no matrix: it has rank {type.rank}"
    if type.dtype is not f32:
        return f"its numbers are {type.dtype}, and what is rounded is f32"
    if readers.others:
        return f"{', '.join(readers.others)} reads its numbers"
    if not readers.products:
        moves = ", ".join(readers.moves)
        return f"{moves} picks rows of it, and no product reads it whole" if moves else "nothing reads it"
    if len(readers.axes) != 1:
        return "products sum along both of its axes"
    if readers.moves and 0 in readers.axes:
        return f"{', '.join(readers.moves)} takes apart the axis along which products sum"
    return ""
