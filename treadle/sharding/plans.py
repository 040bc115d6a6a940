"""`shard_model`: plan a model over a mesh, check the plan, and derive the programs of its ranks.

The planned graph has passed through the stages before `shard` (`treadle.passes.stages`); the programs of ranks pass
through the stages after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.ir.graph import Graph
from treadle.ir.hardware import Hardware
from treadle.ir.placement.mesh import Mesh
from treadle.passes.framework.facts import RECOGNIZED, initial_facts
from treadle.passes.framework.manager import Optimized
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.recipes import shard
from treadle.passes.stages import Overlap, Shard, rows_before, run
from treadle.program.budgets import choose_sizes
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel

WHOLE_PRODUCTS = ("dp", "fsdp")
"""The recipes that split no product: each rank computes whole products for its rows."""


def shard_model(
    model: AnyModel,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    device: str | Hardware = "h100",
    **options: Any,
) -> ShardingPlan:
    """Plan a model over a mesh, and check the plan. No weight is read or drawn.

    model            as in `treadle.compile`
    mesh             axes with their sizes, the axis with the most traffic first: "tp=8,dp=2"
    recipe           "megatron", "sequence", "context", "dp", "fsdp", "megatron-fsdp" or "gpipe"
    axes             axes of the model by name, with the mesh axes that split them: {"heads": "tp", "batch": "dp"}; "-"
                     replicates an axis that the recipe splits
    device           the device of each rank: "h100", "a100", "cpu", or a `Hardware`
    options          as in `treadle.compile`; costs are compared at `sizes`

    Raises UsageError for an unknown mesh, recipe, axis or device, and as `resolve` does.
    """
    chosen = CompileOptions.of("shard", options)
    graph = program_to_shard(Program(model, chosen), recipe, deferred=True).graph
    return plan_graph(graph, mesh, recipe=recipe, axes=axes, sizes=chosen.sizes, device=device)


def program_to_shard(program: Program, recipe: str | None, *, deferred: bool = False) -> Program:
    """Return a program after the stages before `shard`. Products that are sliced are divided, unless the recipe splits
    no products.

    deferred  as in `Program.declared`

    Raises as `Program.optimize` does.
    """
    read = program.declared(deferred=deferred)
    read = read if recipe in WHOLE_PRODUCTS else read.for_ranks()
    return read.through(*rows_before(Shard, program.options.stages()))


def plan_graph(
    graph: Graph,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    device: str | Hardware = "h100",
) -> ShardingPlan:
    """Plan a graph whose composites are all recognized, and check the plan: see `shard_model`."""
    choose_sizes(graph, sizes or {})  # refuses sizes that the graph does not allow
    plan = shard(graph, mesh, recipe=recipe, axes=axes, sizes=sizes, device=device)
    check_sharding(plan)
    return plan


def rank_graph(plan: ShardingPlan, rank: int, options: CompileOptions | None = None) -> Graph:
    """Return the program of a rank after the stages that follow `shard`.

    options  the model's options, for `dtype` and `without`
    """
    return rank_optimized(plan, rank, options).graph


def rank_optimized(plan: ShardingPlan, rank: int, options: CompileOptions | None = None) -> Optimized:
    """Return the program of a rank, and the log of the stages that follow `shard`."""
    stages = (options or CompileOptions()).stages(Shard(plan, rank), Overlap())
    rest = stages[len(rows_before(Shard, stages)) :]
    return run(plan.graph, rest, facts=initial_facts(plan.graph) | {RECOGNIZED})
