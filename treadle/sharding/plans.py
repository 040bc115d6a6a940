"""`shard_model`: plan a model over a mesh, check the plan, and derive the programs of its ranks.

The planned graph has all composites recognized and is not yet fused further (`treadle.passes.pipelines`); the programs
of ranks pass through the rest of the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from treadle.computing import computing_in
from treadle.ir.graph import Graph
from treadle.ir.placement.machines import Machine
from treadle.ir.placement.mesh import Mesh
from treadle.option_values import choose_sizes
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.pipelines import MERGING, RECOGNITION
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.gather_ahead import GatherAhead
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import rank_program
from treadle.passes.sharding.recipes import shard
from treadle.program.resolved import Resolved
from treadle.program.source import AnyModel
from treadle.resolving import resolve


def shard_model(
    model: AnyModel,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    device: str | Machine = "h100",
    inputs: Sequence[str] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    widen: str | Iterable[str] = (),
    limits: Mapping[str, int] | None = None,
    **config: Any,
) -> ShardingPlan:
    """Plan a model over a mesh, and check the plan. No weight is read or drawn.

    model            as in `treadle.compile`
    mesh             axes with their sizes, the one with the most traffic first: "tp=8,dp=2"
    recipe           "megatron", "sequence", "context", "dp", "fsdp", "megatron-fsdp" or "gpipe"
    axes             axes of the model by name, with the mesh axes that split them: {"heads": "tp", "batch": "dp"}; "-"
                     replicates an axis that the recipe splits
    sizes            sizes of symbols, for which costs are compared
    device           the device of each rank: "h100", "a100", "cpu", or a `Machine`
    dtype, quantize  as in `treadle.compile`
    config           of the declaration

    Raises UsageError for an unknown mesh, recipe, axis or device, and as `resolve` does.
    """
    _, optimized = recognized(model, inputs, dtype, quantize, widen, limits, config, deferred=True)
    return plan_graph(optimized.graph, mesh, recipe=recipe, axes=axes, sizes=sizes, device=device)


def recognized(
    model: AnyModel,
    inputs: Sequence[str] | None,
    dtype: str | None,
    quantize: str | None,
    widen: str | Iterable[str],
    limits: Mapping[str, int] | None,
    config: Mapping[str, Any],
    *,
    deferred: bool = False,
) -> tuple[Resolved, Optimized]:
    """Return the model that MODEL names, and its graph with all composites recognized, in `dtype` and quantized.

    deferred   weights of a checkpoint are read when parts of them are used (`treadle.frontends.deferred_arrays`)
    """
    passes, widen = computing_in(dtype, RECOGNITION, widen, quantize)
    resolved = resolve(model, inputs=inputs, widen=widen, limits=limits, deferred=deferred, **config)
    return resolved, PassManager(passes).run(resolved.graph)


def plan_graph(
    graph: Graph,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    device: str | Machine = "h100",
) -> ShardingPlan:
    """Plan a graph with all composites recognized, and check the plan: see `shard_model`."""
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
