"""A plan whose outputs are whole on every rank: what every rank goes on from, such as the logits of a step."""

from __future__ import annotations

from dataclasses import replace

from treadle.ir.placement.placements import MeshPlacement
from treadle.passes.sharding.conversions import conversion
from treadle.passes.sharding.plan import Move, ShardingPlan


def with_whole_outputs(plan: ShardingPlan) -> ShardingPlan:
    """The same plan, with what gathers at the end each output that ranks have in parts."""
    main, moves = plan.main, list(plan.main.moves)
    for (name, value), placed in zip(main.function.outputs.items(), main.gives, strict=True):
        whole = MeshPlacement.whole(value.type.rank)
        steps = conversion(value.type.shape, placed, whole)
        known = any(move.value is value and move.target == whole for move in moves)
        if steps and not known and value.node is not None:
            because = tuple([f"output {name} is whole" for step in steps if step.sends])
            moves.append(Move(value, placed, whole, steps, because, value.node))
    gives = tuple([MeshPlacement.whole(value.type.rank) for value in main.function.outputs.values()])
    return replace(plan, functions=(*plan.functions[:-1], replace(main, moves=tuple(moves), gives=gives)))
