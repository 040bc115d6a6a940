"""Convert the outputs of a plan to other placements, for example whole on every rank, which generation needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from treadle.ir.errors import PassError
from treadle.ir.placement.placements import MeshPlacement
from treadle.passes.sharding.conversions import conversion
from treadle.passes.sharding.plan import Move, ShardingPlan, made_items


def with_whole_outputs(plan: ShardingPlan) -> ShardingPlan:
    """Return the plan with all-gathers at the end for each output of which ranks hold parts.

    Raises PassError for a weight in parts that is an output of a graph without nodes.
    """
    return with_outputs_in(plan, lambda placed: MeshPlacement.whole(len(placed.dims)), "is whole")


def with_outputs_in(plan: ShardingPlan, target: Callable[[MeshPlacement], MeshPlacement], because: str) -> ShardingPlan:
    """Return the plan with moves at the end that convert each output to the target of its placement.

    because  the reason for moves that send: "is whole" is printed as "output y is whole"

    Raises PassError for a weight to be moved that is an output of a graph without nodes.
    """
    main, moves = plan.main, list(plan.main.moves)
    had = set(made_items(main))
    for (name, value), placed in zip(main.function.outputs.items(), main.gives, strict=True):
        wanted = target(placed)
        steps = conversion(value.type.shape, placed, wanted)
        if not steps or (value, wanted) in had:
            continue
        at = value.node or next(reversed(main.function.nodes), None)  # a weight that is an output has no node
        if at is None:
            raise PassError(f"output {name} is a weight in parts, but there is no node at which to gather it")
        reasons = tuple([f"output {name} {because}" for step in steps if step.sends])
        moves.append(Move(value, placed, wanted, steps, reasons, at))
        had.add((value, wanted))
    gives = tuple(map(target, main.gives))
    return replace(plan, functions=(*plan.functions[:-1], replace(main, moves=tuple(moves), gives=gives)))
