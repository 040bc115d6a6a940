"""Chains: the groups of elementwise nodes that one kernel computes, and the program of each chain."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.backends.tvm.kernels.arithmetic.vector_math import is_pointwise
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction
from treadle.ir.graph import Node, Value
from treadle.ir.ops.blocks import EncodedLinear
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import Einsum, Linear, MatMul
from treadle.ir.storage.views import View
from treadle.ir.types import f32
from treadle.passes.lowering.grouping import Chains, is_number
from treadle.passes.memory.storage_plan import Step

_PRODUCTS = (Linear, MatMul, Einsum, EncodedLinear)


def _is_finished(node: Node) -> bool:
    """Return True if a node's kernel has an epilogue: a product of two or more operands in float32."""
    return isinstance(node.op, _PRODUCTS) and len(node.inputs) > 1 and node.result.type.dtype is f32


CHAINS = Chains(
    lambda node: is_pointwise(node.op.name),
    _is_finished,
    most_inputs=8,  # each input takes a register in the loop
    most_nodes=48,  # the time to compile a chain grows with the square of its length, or faster
)


def writes_part(step: Step, view: View) -> bool:
    """Return True if a step can write its result directly into a part of another value. For a product, rows must be
    equally spaced.
    """
    product = isinstance(step.root.op, _PRODUCTS) or step.product is not None
    return not product or view.merged(0, view.rank - 1) is not None


def written_over(step: Step) -> list[Value]:
    """Return the operands of the result's type, which a chain may overwrite. The list is empty if the chain is the
    epilogue of a product.
    """
    is_chain = step.product is None and is_pointwise(step.root.op.name)
    return [v for v in inputs_of(step) if is_chain and v.type == step.root.result.type]


def inputs_of(step: Step) -> list[Value]:
    """Return the inputs of a step's chain: the product, and values from outside the step, except scalar constants."""
    return [v for v in Step(step.chain).inputs if not is_number(v)]


def chain_of(step: Step, inputs: Sequence[Value]) -> Chain:
    """Return the chain of a step over these inputs."""
    places: dict[Value, int] = {v: i for i, v in enumerate(inputs)}
    made: list[Instruction] = []

    def place(value: Value) -> int:
        if value not in places:
            assert value.literal is not None
            made.append(Instruction("constant", (), value.type.dtype.name, (("value", value.literal.scalar),)))
            places[value] = len(inputs) + len(made) - 1
        return places[value]

    for node in step.chain:
        operands = tuple([place(v) for v in node.inputs])
        attributes = () if isinstance(node.op, Cast) else tuple(node.op.attributes.items())
        made.append(Instruction(node.op.name, operands, node.result.type.dtype.name, attributes))
        places[node.result] = len(inputs) + len(made) - 1
    return Chain(tuple(v.type.dtype.name for v in inputs), tuple(made))
