"""`shard_model`: plan a model over a mesh, check the plan, and derive the programs of its ranks.

In the planned graph, all composites are recognized, but not yet fused further (`treadle.passes.pipelines`). The
programs of ranks run through the rest of the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.ir.graph import Graph
from treadle.ir.placement.machines import Machine
from treadle.ir.placement.mesh import Mesh
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import MERGING, RECOGNITION
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.gather_ahead import GatherAhead
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import rank_program
from treadle.passes.sharding.recipes import shard
from treadle.program.budgets import choose_sizes
from treadle.program.options import CompileOptions
from treadle.program.precision import computing_in
from treadle.program.source import AnyModel


def shard_model(
    model: AnyModel,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    device: str | Machine = "h100",
    **options: Any,
) -> ShardingPlan:
    """Plan a model over a mesh, and check the plan. No weight is read or drawn.

    model            as in `treadle.compile`
    mesh             axes with their sizes, the axis with the most traffic first: "tp=8,dp=2"
    recipe           "megatron", "sequence", "context", "dp", "fsdp", "megatron-fsdp" or "gpipe"
    axes             axes of the model by name, with the mesh axes that split them: {"heads": "tp", "batch": "dp"}; "-"
                     replicates an axis that the recipe splits
    device           the device of each rank: "h100", "a100", "cpu", or a `Machine`
    options          as in `treadle.compile`; costs are compared at `sizes`

    Raises UsageError for an unknown mesh, recipe, axis or device, and as `resolve` does.
    """
    chosen = CompileOptions.of("shard", options)
    _, optimized = chosen.optimized(model, RECOGNITION, deferred=True)
    return plan_graph(optimized.graph, mesh, recipe=recipe, axes=axes, sizes=chosen.sizes, device=device)


def plan_graph(
    graph: Graph,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    device: str | Machine = "h100",
) -> ShardingPlan:
    """Plan a graph whose composites are all recognized, and check the plan: see `shard_model`."""
    choose_sizes(graph, sizes or {})  # refuses sizes that the graph does not allow
    plan = shard(graph, mesh, recipe=recipe, axes=axes, sizes=sizes, device=device)
    check_sharding(plan)
    return plan


def rank_graph(plan: ShardingPlan, rank: int, *, dtype: str | None = None) -> Graph:
    """Return the program of a rank after the rest of the pipeline.

    dtype  the dtype of products with weights, as in `treadle.compile`
    """
    passes, _ = computing_in(dtype, MERGING, ())
    return PassManager([*passes, GatherAhead()]).run(rank_program(plan, rank)).graph
