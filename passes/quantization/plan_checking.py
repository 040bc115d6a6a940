"""Checks a quantization plan against its graph, by a way of its own: every call and every composite opened.

The planner follows calls and asks products where x meets a weight. Here all is in primitives, and the blocks of each
weight are followed to whatever reads them: a sum of products over the axis of the blocks, or what moves them whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.axes import Role
from treadle.ir.builder import describe_source
from treadle.ir.errors import PassError, RuleError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.elementwise import Cast
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import Type
from treadle.passes.lowering.legalize import legalized
from treadle.passes.quantization.quantization_plan import QuantizationPlan


def check_quantization(plan: QuantizationPlan, graph: Graph) -> None:
    """Raises PassError where a plan does not fit a graph, with the weight and what is wrong.

    Every parameter is planned once, with its own type and a reason; what is encoded is a matrix of numbers, whose
    readers all sum over the axis of its blocks, or move whole rows of them; and nothing is encoded twice.
    """
    flat = inline_calls(graph)
    parameters = flat.parameters
    names = [weight.name for weight in plan.weights]
    if sorted(names) != sorted(parameters):
        wrong = sorted(set(names) ^ set(parameters)) or [n for n in names if names.count(n) > 1]
        raise _wrong(f"{wrong[0]} must be planned once, as every parameter", plan)
    for weight in plan.weights:
        if weight.type != parameters[weight.name].type:
            raise _wrong(f"{weight.name} is {parameters[weight.name].type}, planned as {weight.type}", plan)
        if not weight.reason:
            raise _wrong(f"{weight.name} has no reason", plan)
        if weight.encoding is not None and (weight.type.encoding is not None or weight.type.rank != 2):
            raise _wrong(f"{weight.name} is {weight.type}, and no matrix of numbers", plan)
    encoded = {weight.name: weight for weight in plan.weights if weight.encoding is not None}
    for entry in legalized(flat, _opens_all).later_entries:
        held: dict[Value, Type] = {}
        for name, value in entry.parameters.items():
            if (planned := encoded.get(name)) is not None and planned.encoding is not None:
                held[value] = planned.type.as_encoded(planned.encoding)
        for value in entry.results:
            if value in held:
                raise _wrong(f"{value.name} is an output, and would be blocks", plan)
        for node in entry.nodes:
            if any(v in held for v in node.inputs):
                _follow(node, held, plan)


def _opens_all(op: Op, types: Sequence[Type | None]) -> bool:
    return False


def _follow(node: Node, held: dict[Value, Type], plan: QuantizationPlan) -> None:
    """Look at a node that reads blocks; what it hands on of weights alone is in `held` from then on, as encoded."""
    reader = f"{node.op.name}, {describe_source(node.source, node.scope) or 'of main'}"
    if isinstance(node.op, Cast):  # of what is decoded
        held[node.result] = held[node.inputs[0]]
    elif node.op.moves_blocks:
        try:
            (made,) = node.op.infer([None if v is None else held.get(v, v.type) for v in node.operands])
        except RuleError as error:
            raise _wrong(f"{error.what} ({reader})", plan) from None
        if all(v in held for v in node.inputs):
            held[node.result] = made
    else:
        found = node.op.apply([None if v is None else v.type for v in node.operands])
        for value, dims in zip(node.operands, found.operands, strict=True):
            encoding = held[value].encoding if value is not None and value in held else None
            if encoding is None or dims is None:
                continue
            roles = {found.factors[name].role for name in dims[encoding.axis].factors}
            if roles != {Role.REDUCED} or not node.is_contraction:
                raise _wrong(f"{reader} does not sum over the axis of the blocks that it reads", plan)


def _wrong(what: str, plan: QuantizationPlan) -> PassError:
    return PassError(f"the quantization plan is wrong: {what}", received=f"{plan.model}, {plan.scheme}")
