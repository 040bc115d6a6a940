"""Check the pipeline of a sharding plan independently of the planner.

`checking` has verified the placements of values; micro-batches are parts along one more axis. This module checks

- that the axis of micro-batches is the last of the mesh, and that the mesh has one position per stage
- that no collective runs and no value is split along the two axes, except that values are split into micro-batches
- that each stage has the items that its steps read: arguments, items of the previous stage, its own results
- that every rank holds the weights that its stage reads, and no others
- that each output is computed once, by a stage that has it, and that its micro-batches are in order
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.errors import PassError
from treadle.passes.sharding.plan import (
    Item,
    Move,
    PlannedFunction,
    PlannedNode,
    PlannedPipeline,
    ShardingPlan,
    Stage,
    is_everywhere,
)


def check_stages(plan: ShardingPlan, pipeline: PlannedPipeline) -> None:
    """Raise PassError if the pipeline is wrong."""
    sizes = dict(plan.mesh.axes)
    if [pipeline.turns] != [name for name, _ in plan.mesh.axes[-1:]] or pipeline.over == pipeline.turns:
        raise _wrong(f"micro-batches are along {pipeline.turns}, which is not the last axis of {plan.mesh}")
    if sizes.get(pipeline.over) != len(pipeline.stages):
        raise _wrong(f"{len(pipeline.stages)} stages, over {pipeline.over} of {plan.mesh}")
    for planned in plan.functions:
        _check_axes(planned, plan, pipeline)
    _check_outputs(plan, pipeline)
    before: set[Item] = set()
    for number, stage in enumerate(pipeline.stages):
        before = _check_stage(plan, stage, number, before)


def _wrong(what: str, received: str | None = None) -> PassError:
    return PassError(f"sharding plan: {what}", received=received, within="its pipeline")


def _check_axes(planned: PlannedFunction, plan: ShardingPlan, pipeline: PlannedPipeline) -> None:
    line = {part for part in plan.mesh.parts if part.axis == pipeline.over}
    turns = {part for part in plan.mesh.parts if part.axis == pipeline.turns}
    for step in planned.steps:
        if any(line.intersection(placed.used) for _, placed in (*step.needs, *step.makes)):
            raise _wrong(f"values of {planned.name} are split over {pipeline.over}, the axis of stages")
        if any(turns.intersection(placed.partial) for _, placed in (*step.needs, *step.makes)):
            raise _wrong(f"values of {planned.name} are partial over {pipeline.turns}")
        meets = [each.over for each in step.steps if each.sends] if isinstance(step, Move) else [step.ring]
        if any((line | turns).intersection(over) for over in meets):
            raise _wrong(f"a collective of {planned.name} runs over stages or micro-batches")
        if isinstance(step, PlannedNode) and step.body is not None:
            _check_axes(step.body, plan, pipeline)


def _check_stage(plan: ShardingPlan, stage: Stage, number: int, before: set[Item]) -> set[Item]:
    """Check a stage. Return the items that it has, except the arguments of the main function.

    before  the items of the previous stage
    """
    main = plan.main
    steps, inputs = main.steps, set(main.function.inputs)
    arguments = dict(zip(main.function.arguments, main.takes, strict=True))
    read: set[str] = set()
    has: set[Item] = set()
    for value, placed in stage.receives:
        if (value, placed) not in before:
            raise _wrong(
                f"stage {number} receives {value.name}, which the stage before does not have in this placement",
                placed.text(plan.mesh),
            )
        has.add((value, placed))
    if len(set(stage.receives)) != len(stage.receives) or list(stage.steps) != sorted(set(stage.steps)):
        raise _wrong(f"stage {number} runs a step or receives an item twice, or in another order")
    if stage.steps and not 0 <= stage.steps[0] <= stage.steps[-1] < len(steps):
        raise _wrong(f"stage {number} has steps that do not exist")
    given = [
        (value, placed)
        for (name, value), placed in zip(main.function.outputs.items(), main.gives, strict=True)
        if name in stage.outputs
    ]
    for items, makes in [*((steps[at].needs, steps[at].makes) for at in stage.steps), (given, ())]:
        for value, placed in items:
            if arguments.get(value) == placed:
                read |= set() if value in inputs else {value.name}
            elif (value, placed) not in has and not is_everywhere((value, placed)):
                raise _wrong(f"stage {number} has no copy of {value.name} with placement {placed.text(plan.mesh)}")
        has.update(makes)
    if set(stage.weights) != read or len(set(stage.weights)) != len(stage.weights):
        other = sorted(read.symmetric_difference(stage.weights)) or sorted(stage.weights)
        raise _wrong(f"stage {number} holds other weights than it reads", ", ".join(other[:4]))
    return has


def _check_outputs(plan: ShardingPlan, pipeline: PlannedPipeline) -> None:
    named: Sequence[str] = [name for stage in pipeline.stages for name in stage.outputs]
    if sorted(named) != sorted(plan.main.function.outputs):
        raise _wrong("outputs do not each belong to one stage", ", ".join(named[:8]))
    turns = tuple(part for part in plan.mesh.parts if part.axis == pipeline.turns)
    for (name, _), placed in zip(plan.main.function.outputs.items(), plan.main.gives, strict=True):
        held = [split.over for split in placed.dims if split is not None and set(turns).intersection(split.over)]
        if held and turns and any(over[-len(turns) :] != turns for over in held):
            raise _wrong(f"micro-batches are not consecutive in output {name}", placed.text(plan.mesh))
