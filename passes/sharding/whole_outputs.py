"""A plan whose outputs are whole on every rank: what every rank goes on from, such as the logits of a step."""

from __future__ import annotations

from dataclasses import replace

from treadle.ir.errors import PassError
from treadle.ir.placement.placements import MeshPlacement
from treadle.passes.sharding.conversions import conversion
from treadle.passes.sharding.plan import Move, ShardingPlan, made_items


def with_whole_outputs(plan: ShardingPlan) -> ShardingPlan:
    """The same plan, with what gathers at the end each output that ranks have in parts.

    Raises PassError for a weight in parts that is an output of a graph without nodes.
    """
    main, moves = plan.main, list(plan.main.moves)
    had = set(made_items(main))
    for (name, value), placed in zip(main.function.outputs.items(), main.gives, strict=True):
        whole = MeshPlacement.whole(value.type.rank)
        steps = conversion(value.type.shape, placed, whole)
        if not steps or (value, whole) in had:
            continue
        at = value.node or next(reversed(main.function.nodes), None)  # a weight that is an output has no node
        if at is None:
            raise PassError(f"output {name} is a weight in parts, and no node is there to gather it at")
        because = tuple([f"output {name} is whole" for step in steps if step.sends])
        moves.append(Move(value, placed, whole, steps, because, at))
        had.add((value, whole))
    gives = tuple([MeshPlacement.whole(value.type.rank) for value in main.function.outputs.values()])
    return replace(plan, functions=(*plan.functions[:-1], replace(main, moves=tuple(moves), gives=gives)))
