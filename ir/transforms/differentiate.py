"""Reverse-mode differentiation: walk nodes backwards and apply each op's gradient rule."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

from treadle.ir.builder import Builder, Expr
from treadle.ir.composites import as_results
from treadle.ir.errors import GraphError
from treadle.ir.graph import Node, Value
from treadle.ir.operation import Composite, Grads

Through = Callable[[Builder, Node, Grads], Grads]
"""A function that returns the gradients of a call's operands, from the gradients of the call's results."""


def backward(
    b: Builder,
    nodes: Sequence[Node],
    grads: Mapping[Value, Expr],
    *,
    counting: Container[Value] | None = None,
    through: Through | None = None,
) -> dict[Value, Expr]:
    """Return the gradients of all values of the nodes, from the gradients of some of the nodes' results.

    counting  the values whose gradients are wanted; None: all
    through   the gradient rule of calls

    The nodes' values must be visible in the builder's function, to which gradient nodes are added. Raises GraphError
    for a call if `through` is None: use `treadle.ir.transforms.gradients`, or inline the call first.
    """
    found: dict[Value, Expr] = dict(grads)
    for node in reversed(nodes):
        given = [found.get(v) for v in node.results]
        if all(g is None for g in given):
            continue
        if counting is not None and not any(v in counting for v in node.inputs):
            continue
        if node.op.callee is not None and through is None:
            raise GraphError(
                f"cannot differentiate a call of {node.op.callee}",
                hint="treadle.ir.transforms.inline.inline_calls(graph), whose result has no calls",
            )
        inputs = [None if v is None else b.expr(v) for v in node.operands]
        with b.placed_as(node):
            if node.op.callee is not None and through is not None:
                made = through(b, node, given)
            else:
                made = node.op.gradient(b, given, inputs, [b.expr(v) for v in node.results])
            for value, grad in zip(node.operands, made, strict=True):
                if grad is None or value is None or value.literal is not None:
                    continue
                if counting is not None and value not in counting:
                    continue
                if grad.type != value.type:
                    raise GraphError(
                        f"{node.op.name}: the gradient of an operand has another type than the operand",
                        received=f"{grad.type} for {value.type}",
                    )
                known = found.get(value)
                found[value] = grad if known is None else known + grad
    return found


def body_gradient(op: Composite, b: Builder, grads: Grads, inputs: Grads) -> list[Expr | None]:
    """Return a composite's gradient through its body, which is recomputed."""
    start = len(b.function.nodes)
    results = as_results(op.body(b, *inputs))
    nodes = b.function.nodes[start:]
    counting = {x.value for x in inputs if x is not None and x.dtype.is_float}
    for node in nodes:
        if not counting.isdisjoint(node.inputs):
            counting.update(v for v in node.results if v.type.dtype.is_float)
    given: dict[Value, Expr] = {}
    for result, grad in zip(results, grads, strict=True):
        if grad is not None:
            given[result.value] = given[result.value] + grad if result.value in given else grad
    found = backward(b, nodes, given, counting=counting)
    return operand_gradients(found, inputs)


def operand_gradients(found: Mapping[Value, Expr], inputs: Grads) -> list[Expr | None]:
    """Return each operand's gradient, taken from the gradients of all values.

    If a value is several operands at once, its whole gradient is returned for the first of them: only the sum of these
    gradients matters.
    """
    values = [None if x is None else x.value for x in inputs]
    return [
        None if value is None or value in values[:position] else found.get(value)
        for position, value in enumerate(values)
    ]
