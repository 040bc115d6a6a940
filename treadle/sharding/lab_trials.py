"""`try_in_lab`: simulate the programs of all ranks of a plan without any device, and compare with the unsplit model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.files.errors import Hint
from treadle.ir.analysis.drawn_inputs import draw_inputs, filled_sizes
from treadle.ir.errors import UsageError
from treadle.ir.interpreter import interpret
from treadle.ir.transforms.encoded_weights import encode_weights
from treadle.passes.sharding.plan import ShardingPlan
from treadle.program.budgets import choose_sizes
from treadle.program.weights import initial_weights
from treadle.runtime.sharding_lab import refuse_many_ranks, run_lab
from treadle.sharding.plans import rank_graph

Array = np.ndarray[Any, Any]

NEAR = 1e-11
"""Tolerance of the lab: the error of an output relative to its largest element. float64 sums differ by their order."""


@dataclass(frozen=True)
class LabTrial:
    """The errors of the ranks' results compared with the unsplit model.

    differences  for each output, the largest difference relative to the largest element
    sizes        sizes of the symbols
    collectives  number of collectives, counted once for each group of ranks
    """

    differences: Mapping[str, float]
    sizes: Mapping[str, int]
    collectives: int
    ranks: int

    @property
    def passed(self) -> bool:
        """True if the error of every output is within the tolerance of float64."""
        return all(difference <= NEAR for difference in self.differences.values())

    def facts(self) -> dict[str, Any]:
        """Return the result as a JSON-serializable dict."""
        facts = {"differences": dict(self.differences), "sizes": dict(self.sizes), "collectives": self.collectives}
        return {"passed": self.passed, "ranks": self.ranks, **facts}

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={n}" for name, n in self.sizes.items())
        head = f"lab: {self.ranks} ranks in float64{f' at {sizes}' if sizes else ''}, {self.collectives} collectives"
        lines = [f"  {name}: {difference:.1e} from the whole model" for name, difference in self.differences.items()]
        return "\n".join([head, *lines, "  equal" if self.passed else "  NOT equal"])


def try_in_lab(
    plan: ShardingPlan,
    *,
    weights: Mapping[str, Array] | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> LabTrial:
    """Run the programs of all ranks in lockstep, and the unsplit model, in float64 on random inputs.

    weights  by name; default: initial values plus a little noise, so that no bias is zero
    sizes    sizes of the symbols; default: sizes that are not divisible by the mesh

    Raises GraphError if the collectives of ranks do not match, or if there are more ranks than the lab supports;
    UsageError for quantized weights whose values cannot be drawn.
    """
    refuse_many_ranks(plan.devices)
    graph = plan.graph
    stages = 1 if plan.pipeline is None else len(plan.pipeline.stages)
    least = max(plan.devices.ranks, plan.mesh.ranks // stages) + 3
    chosen = choose_sizes(graph, {**filled_sizes(graph, least), **dict(sizes or {})})
    if weights is None:
        rng = np.random.default_rng(seed)
        drawn = initial_weights(graph, seed)
        noisy = {name: array + 0.02 * rng.standard_normal(array.shape) for name, array in drawn.items()}
        weights = encode_weights(graph, noisy)
        for name, value in graph.parameters.items():
            if value.type.encoding is not None and weights[name] is noisy[name]:
                hint = Hint('weights=, or widen="blocks" when the model is planned', "--widen blocks")
                raise UsageError(
                    f"the lab cannot draw random weights in {value.type.encoding}", received=name, hint=hint
                )
    given = draw_inputs(graph, chosen, [seed])
    whole = interpret(graph, given, weights, float64=True)
    programs = [rank_graph(plan, rank) for rank in range(plan.devices.ranks)]
    found = run_lab(plan, given, weights, programs=programs)
    differences = {name: _difference(found.outputs[name], wanted) for name, wanted in whole.items()}
    return LabTrial(differences, chosen, len(found.collectives), plan.devices.ranks)


def _difference(found: Array, wanted: Array) -> float:
    """Return the largest difference relative to the largest element, or relative to 1 if that element is smaller.
    Elements that are NaN in both, or the same infinity, do not differ; but an output of NaN alone compares nothing, so
    that it counts as different.
    """
    if not wanted.size:
        return 0.0
    ours, theirs = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if np.isnan(theirs).all():
        return math.inf
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    scale = float(np.max(np.abs(theirs), initial=1.0, where=np.isfinite(theirs)))
    apart = np.subtract(ours, theirs, where=~same, out=np.zeros_like(ours))
    return float(np.max(np.abs(apart))) / scale
