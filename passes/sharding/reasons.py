"""Reasons for collectives in words, each with the node of the model that the reason is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.ir.axes import Application, Role
from treadle.ir.graph import Node, Value
from treadle.passes.sharding.conversions import PlacementStep, StepKind
from treadle.passes.sharding.factors import Shares
from treadle.passes.sharding.transfer import Requirement
from treadle.passes.sharding.wanted import Wanted


@dataclass(frozen=True)
class TermsOrigin:
    """The node that made a value partial, and the names of the axes over which the node summed."""

    node: Node
    axes: tuple[str, ...]


def origin_of(
    node: Node,
    application: Application,
    shares: Shares,
    needed: Requirement,
    by_body: bool,
    wanted: Wanted,
    origins: Mapping[Value, TermsOrigin],
) -> TermsOrigin:
    """Return the origin of partial results: the node itself, if it sums over a split factor, otherwise the origin of
    its operands.

    by_body  True if the node runs its body, whose factors the node does not list
    origins  origins of earlier values
    """
    names: list[str] = []
    for name in shares:
        if application.factors[name].role in (Role.REDUCED, Role.INDEXED):
            names += split_names(node, application, name, wanted)
    terms = {p for placed in needed.results for p in placed.partial}
    for value, placed in zip(node.operands, needed.operands, strict=True) if by_body else ():
        for d, split in enumerate(placed.dims if placed is not None else ()):
            if value is not None and split is not None and terms.intersection(split.over):
                names.append(dim_name(value, d, wanted))
    if names:
        return TermsOrigin(node, tuple(dict.fromkeys(names)))
    earlier = [origins[v] for v in node.inputs if v in origins]
    return earlier[0] if earlier else TermsOrigin(node, ("an axis",))


def reason_for(
    step: PlacementStep,
    value: Value,
    reader: Node,
    origin: TermsOrigin | None,
    wanted: Wanted,
    held: Mapping[Value, Any],
    called: Mapping[Value, str],
) -> tuple[str, Node]:
    """Return the reason for a step that communicates, and the node that the reason is about."""
    if step.kind in (StepKind.ALL_REDUCE, StepKind.REDUCE_SCATTER) and origin is not None:
        done = "summed" if step.before.monoid == "sum" else f"combined by {step.before.monoid}"
        summed = f"the split of {' and '.join(origin.axes)} is {done}"
        if step.kind is StepKind.REDUCE_SCATTER and step.dim is not None:
            return f"{summed}, then split by {dim_name(value, step.dim, wanted)}", origin.node
        return summed, origin.node
    assert step.dim is not None
    who = reader.op.callee or reader.op.name
    name = dim_name(value, step.dim, wanted)
    known = held.get(value)
    if known is not None and known.is_weight and set(step.over) <= set(known.stored):
        return f"{called.get(value, value.name)} is stored in parts and gathered for use", reader
    if step.kind is StepKind.ALL_TO_ALL and step.onto is not None:
        return f"{who} is split by {dim_name(value, step.onto, wanted)}, not by {name}", reader
    return f"{who} needs all of {name}", reader


def dim_name(value: Value, dim: int, wanted: Wanted) -> str:
    """Return the name of a dimension's axis: its name in the request, its label, its symbol, or its number."""
    wished = [wish.axis for wish in wanted.of(value) if wish.dim == dim]
    labels = [f.label for f in value.type.dims[dim].factors if f.label is not None]
    symbol = value.type.shape[dim].as_symbol
    return next(iter([*wished, *labels, *([symbol] if symbol else [])]), f"dimension {dim}")


def split_names(node: Node, application: Application, factor: str, wanted: Wanted) -> Iterable[str]:
    """Yield the names of a factor of a node's rule, taken from the dimensions that have the factor."""
    for value, dims in zip(node.operands, application.operands, strict=True):
        for d, dim in enumerate(dims or ()):
            if value is not None and factor in dim.factors:
                name = dim_name(value, d, wanted)
                if not name.startswith("dimension "):
                    return [name]
    return [f"axis {factor}"]
