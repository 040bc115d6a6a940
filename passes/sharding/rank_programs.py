"""Apply a sharding plan: build the program of one rank, which is an ordinary graph.

    out = linear(merged, $w, $bias)   -->   out = linear(merged, $w, $bias)              # of the rank's parts
                                            out_2 = all_reduce(out, over="tp", ways=2, because="the split of ...")

Every op is applied again, by its own rule, to parts of its operands. Inputs are whole, and a rank takes its part of
them. So symbols mean the same as in the model, and sizes of parts are expressions of symbols (`B//2`). Weights are
passed as parts: see `rank_weights`. A function that is called in several ways becomes several functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from treadle.ir.errors import Hint, PassError
from treadle.ir.graph import Function, Graph
from treadle.ir.placement.mesh import ways
from treadle.ir.placement.placements import held_placement, taken_part
from treadle.ir.verifier import verify
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_building import RankProgram
from treadle.passes.sharding.stage_programs import StageProgram

Array = np.ndarray[Any, Any]


def rank_program(plan: ShardingPlan, rank: int) -> Graph:
    """Return the program of a rank. Raises PassError for a rank that is not in the mesh, or a plan that does not match
    its graph.
    """
    if not 0 <= rank < plan.devices.ranks:
        raise PassError(f"the mesh {plan.devices} has no rank {rank}", hint=f"0 to {plan.devices.ranks - 1}")
    made = Graph(plan.graph.name)
    made.symbols, made.initial = dict(plan.graph.symbols), dict(plan.graph.initial)
    if plan.pipeline is not None:
        StageProgram(plan, rank, made).build(plan.main)
        made.initial = {name: how for name, how in made.initial.items() if name in made.parameters}
        _copy_generated(plan.graph, made)
        verify(made)
        return made
    functions: dict[str, Function] = {}
    for planned in plan.functions:
        is_main = planned is plan.main
        function = made.main if is_main else Function(planned.name)
        RankProgram(plan, rank, made, function, functions).build(planned)
        functions[planned.name] = function
        if not is_main:
            made.add_function(function)
    _copy_generated(plan.graph, made)
    verify(made)
    return made


def _copy_generated(graph: Graph, program: Graph) -> None:
    """Copy the values for generated tokens of the inputs that a rank's program has."""
    names = {v.name for v in program.main.inputs}
    program.generated = {name: value for name, value in graph.generated.items() if name in names}


def rank_weights(plan: ShardingPlan, rank: int, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return the parts of the weights that a rank's program takes, as views. Other parts of the weights are not
    read.
    """
    found = {}
    for name in plan.weights_at(rank):
        type = plan.graph.parameters[name].type
        placed = held_placement(type, plan.weights[name])
        found[name] = taken_part(weights[name], type.storage_type.shape, placed, plan.mesh, rank, {})
    return found


def refuse_small_sizes(plan: ShardingPlan, sizes: Mapping[str, int]) -> None:
    """Raise PassError if some rank would have no part of a value at these sizes of symbols."""
    error: PassError | None = None
    turns = set(plan.turns)
    most = ways(plan.turns)
    for planned in plan.functions:
        for each in planned.nodes:
            for value, placed in zip(each.node.results, each.gives, strict=True):
                for size, split in zip(value.type.shape, placed.dims, strict=True):
                    if split is None or not size.symbols <= sizes.keys():
                        continue
                    units = size.evaluate(sizes) // split.grain.evaluate(sizes)
                    if units >= ways(split.over):
                        continue
                    ranks = ways(part for part in split.over if part not in turns)
                    most = min(most, units // ranks if turns.intersection(split.over) else 0)
                    who = "ranks" if plan.pipeline is None else "micro-batches or ranks"
                    error = error or PassError(
                        f"{value.name}: {units} along {size} do not give each of {ways(split.over)} {who} a part",
                        received=", ".join(f"{name}={n}" for name, n in sizes.items()),
                        source=str(each.node.source or "") or None,
                        hint=f"{size} of {ways(split.over)} or more, or a smaller mesh",
                    )
    if error is None:
        return
    if plan.pipeline is not None and most > 0:
        mesh = ",".join(f"{name}={n}" for name, n in (*plan.devices.axes, (plan.pipeline.turns, most)))
        error.hint = Hint(f"mesh={mesh!r}", f"--mesh {mesh}")
    raise error
