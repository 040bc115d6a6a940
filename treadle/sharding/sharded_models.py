"""A sharded model with its weights in one `.treadle` file. The plan is saved; the programs of ranks are derived from
it.

    made = sharded("gpt2", "tp=2", recipe="megatron")
    made.save("gpt2.treadle")
    again = load_sharded("gpt2.treadle")
    again.program(1), again.parts(1)    # the program of rank 1, and its parts of the weights: views of the mapped file
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from treadle.artifacts.reading import SUFFIX, ArtifactLimits, open_artifact
from treadle.artifacts.writing import write_artifact
from treadle.exporting.file_formats import refuse_other_format
from treadle.files.contained_files import PathLike
from treadle.files.shown_names import shown_path
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.hardware import Hardware
from treadle.ir.placement.mesh import Mesh
from treadle.passes.framework.manager import Optimized
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import rank_weights
from treadle.program.backend_choice import AUTO
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.sharding.plans import plan_graph, program_to_shard, rank_graph

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ShardedModel:
    """A model and its sharding plan.

    name       the model's name
    plan       the plan of the graph with all composites recognized
    optimized  the graph as declared, the planned graph, and the pass log between them
    weights    the unsplit weights, by name
    options    the options that were set, as in `treadle.compiled.Compiled`
    seed       the seed of drawn weights; None if they were not drawn
    """

    name: str
    plan: ShardingPlan
    optimized: Optimized = field(repr=False)
    weights: Mapping[str, Array] = field(repr=False)
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def program(self, rank: int) -> Graph:
        """Return a rank's program, after the rest of the pipeline. Raises PassError for a rank outside the mesh."""
        return rank_graph(self.plan, rank)

    def parts(self, rank: int) -> dict[str, Array]:
        """Return the parts of the weights that a rank's program uses, as views of the unsplit weights."""
        return rank_weights(self.plan, rank, self.weights)

    def save(self, path: PathLike) -> str:
        """Write plan, graph and weights to one `.treadle` file, and return the file's seal. Equal models give equal
        bytes.

        `treadle.load` reads such a file as the unsplit model. Raises UsageError if the name does not end in .treadle,
        or if the file cannot be written.
        """
        refuse_other_format(path, "an artifact", SUFFIX, instead=str(Path(path).with_suffix(SUFFIX)))
        what = self.name, AUTO, "cpu", self.optimized, self.weights, self.seed, self.plan
        return write_artifact(path, *what, options=self.options)


def sharded(
    model: AnyModel,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    device: str | Hardware = "h100",
    **options: Any,
) -> ShardedModel:
    """Split a model as `treadle.sharding.shard_model` does, with the weights that `treadle.compile` would use.

    Raises as these two do.
    """
    chosen = CompileOptions.of("shard", options)
    program = program_to_shard(Program(model, chosen), recipe)
    resolved, optimized = program.resolved, program.optimized
    plan = plan_graph(optimized.graph, mesh, recipe=recipe, axes=axes, sizes=chosen.sizes, device=device)
    bound, drawn = program.weights()
    for name, value in optimized.graph.parameters.items():
        if np.shape(bound[name]) != value.type.storage_type.static_shape:
            raise UsageError(
                f"weight {name} must be {value.type.storage_type}", received=str(list(np.shape(bound[name])))
            )
    return ShardedModel(resolved.name, plan, optimized, bound, drawn, chosen.record())


def load_sharded(
    path: PathLike, *, limits: ArtifactLimits | Mapping[str, int] | None = None, check: bool = True
) -> ShardedModel:
    """Load a file of `ShardedModel.save`. Weights are mapped, and read when they are used.

    check  compare every weight with its hash, which reads the whole file once

    The plan is always checked. Raises as `treadle.artifacts.reading.open_artifact` does, PassError for a plan that is
    wrong, and UsageError for a file without a plan.
    """
    held = open_artifact(path, limits=limits, check=check)
    if held.sharding is None:
        hint = Hint(
            'sharded(model, "tp=2", recipe="megatron").save(path)',
            "treadle shard MODEL --mesh tp=2 --recipe megatron -o FILE",
        )
        raise UsageError("the file contains a model that is not sharded", received=shown_path(path), hint=hint)
    return ShardedModel(held.name, held.sharding, held.optimized, held.weights, held.seed, held.options)
