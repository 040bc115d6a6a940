"""The table of lowering rules: op names, and the rules that add their kernels. Rules of similar ops share a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.backends.tvm.kernels.arithmetic.vector_math import is_pointwise
from treadle.backends.tvm.lowering import (
    attention_rules,
    cache_rules,
    collective_rules,
    encoded_rules,
    indexing_rules,
    normalization_rules,
    product_rules,
    product_sides,
    reduction_rules,
    shape_rules,
)
from treadle.backends.tvm.lowering.chains import chain_of, inputs_of
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node
from treadle.ir.operation import Composite, Op
from treadle.ir.types import Type

_MODULES = (
    shape_rules,
    product_rules,
    encoded_rules,
    attention_rules,
    normalization_rules,
    reduction_rules,
    indexing_rules,
    cache_rules,
    collective_rules,
)


def _pointwise(w: RoutineWriter, node: Node) -> None:
    part = w.groups[node]
    if part.nodes == (node,) and (product_rules.rounds_left_side(w, node) or product_sides.rounds_sides(w, node)):
        return
    inputs, over = inputs_of(part), w.over(node)
    place = None if over is None else inputs.index(over)
    w.pointwise(chain_of(part, inputs), [w.view(v) for v in inputs], w.view(node.result), node, place)


RULES: Mapping[str, Rule] = {
    "pointwise": _pointwise,
    **{name: rule for module in _MODULES for name, rule in module.RULES.items()},
}
"""The rule `pointwise` lowers every group of elementwise ops."""

KEEPS: Mapping[str, Keeps] = {name: keeps for module in _MODULES for name, keeps in module.KEEPS.items()}
"""Functions that return True if the rule of a composite supports these operands. A composite that has a rule but is not
listed is always supported.
"""


def keeps(op: Op, types: Sequence[Type | None]) -> bool:
    """Return True if a composite is lowered by its rule instead of by its body."""
    if is_pointwise(op.name):
        return True
    return op.name in RULES and (op.name not in KEEPS or KEEPS[op.name](op, types))


def supported(op: Op, types: Sequence[Type | None]) -> str | None:
    """Return None if a kernel computes a primitive or kept composite on operands of these types, else the reason."""
    if isinstance(op, Composite) or keeps(op, types):
        return None
    types_text = [f"{t.dtype}{'' if t.encoding is None else f' as {t.encoding}'}" for t in types if t is not None]
    return f"{op.name} has no kernel for {', '.join(types_text)}"
