"""`shard_model`: a model split over a mesh, planned and checked; and tried in the lab, without any device.

    plan = shard_model("gpt2", "tp=2,dp=2", recipe="megatron")
    print(plan)                                     # where everything lies, where ranks meet, and why
    plan = shard_model(model, "tp=4", axes={"heads": "tp", "vocab": "tp"})

What is split is the graph in which everything is recognized and nothing is merged (`treadle.passes.pipelines`); the
programs of ranks go through the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.compiling import initial_weights
from treadle.computing import computing_in
from treadle.files.errors import Hint
from treadle.frontends.declarations import Model
from treadle.ir.analysis.cost import parameter_bytes
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.placement.machines import Machine
from treadle.ir.placement.mesh import Mesh
from treadle.ir.target import Target
from treadle.ir.transforms.encoded_weights import encode_weights
from treadle.option_values import choose_sizes
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.memory.frames import frames_of, live_at
from treadle.passes.pipelines import MERGING, RECOGNITION
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import rank_program
from treadle.passes.sharding.recipes import shard
from treadle.passes.sharding.timetable import Timetable, timetable_of
from treadle.reports import human
from treadle.resolving import Resolved, resolve
from treadle.runtime.sharding_lab import refuse_many_ranks, run_lab

Array = np.ndarray[Any, Any]

NEAR = 1e-11
"""How far the lab's outputs may be from the whole model's, beside the greatest: sums of float64 in another order."""


def shard_model(
    model: Model | Graph | str | Path,
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

    model            as `treadle.compile` takes it
    mesh             axes with their sizes, the one with the most traffic first: "tp=8,dp=2"
    recipe           "megatron", "sequence", "context", "dp", "fsdp" or "megatron-fsdp"
    axes             axes of the model by name, with the mesh axes that split them: {"heads": "tp", "batch": "dp"}; "-"
                     leaves one whole that the recipe splits
    sizes            of symbols, for which costs are compared
    device           what each rank is: "h100", "a100", "cpu", or a `Machine`
    dtype, quantize  in what the model computes, and in how many bits its weights are, as `treadle.compile` takes them
    config           of the declaration

    Raises UsageError for a mesh, recipe, axis or device that there is not, and what `resolve` does.
    """
    _, optimized = recognized(model, inputs, dtype, quantize, widen, limits, config, deferred=True)
    return plan_graph(optimized.graph, mesh, recipe=recipe, axes=axes, sizes=sizes, device=device)


def recognized(
    model: Model | Graph | str | Path,
    inputs: Sequence[str] | None,
    dtype: str | None,
    quantize: str | None,
    widen: str | Iterable[str],
    limits: Mapping[str, int] | None,
    config: Mapping[str, Any],
    *,
    deferred: bool = False,
) -> tuple[Resolved, Optimized]:
    """What MODEL names, and its graph in which everything is recognized, computes in `dtype` and is held in blocks.

    deferred   weights of a checkpoint are read when parts of them are taken (`treadle.frontends.deferred_arrays`)
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
    """Plan a graph in which everything is recognized, and check the plan: see `shard_model`."""
    choose_sizes(graph, sizes or {})  # which refuses what no size of the graph can be
    plan = shard(graph, mesh, recipe=recipe, axes=axes, sizes=sizes, device=device)
    check_sharding(plan)
    return plan


def rank_graph(plan: ShardingPlan, rank: int, *, dtype: str | None = None) -> Graph:
    """The program of a rank after the rest of the pipeline.

    dtype  in which products with weights compute, as `treadle.compile` takes it
    """
    passes, _ = computing_in(dtype, MERGING, ())
    return PassManager(passes).run(rank_program(plan, rank)).graph


@dataclass(frozen=True)
class DeviceNeeds:
    """What the last rank needs, of which no part is smaller than another rank's, at the plan's sizes.

    weights  bytes of its parts of the weights
    values   bytes of values that live at once at the peak, by the storage plan of its program for the NumPy backend
    ports    bytes of the inputs, which come whole, and of its parts of the outputs
    memory   bytes that the device has
    times    when it works, and when it meets others
    """

    weights: int
    values: int
    ports: int
    memory: float
    times: Timetable

    @property
    def held(self) -> int:
        """Bytes of all that it holds."""
        return self.weights + self.values + self.ports

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.held <= self.memory

    @property
    def limit(self) -> str:
        """What limits a run: "memory" where it does not fit, else what most of its time is spent on, one of LIMITS."""
        times = self.times.by_limit()
        return max(times, key=lambda name: times[name]) if self.fits else "memory"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "weights": self.weights,
            "values": self.values,
            "ports": self.ports,
            "memory": self.memory,
            "fits": self.fits,
            "limit": self.limit,
            "seconds": self.times.seconds,
            "work_seconds": self.times.work,
            "collective_seconds": self.times.collectives,
            "seconds_by_limit": self.times.by_limit(),
        }

    def __str__(self) -> str:
        held = f"{human(self.weights, 'B')} of weights, {human(self.values, 'B')} of values at the peak"
        ports = f"{human(self.ports, 'B')} of inputs and outputs"
        room = f"{human(int(self.memory), 'B')}{'' if self.fits else ': it does NOT fit'}"
        lines = [f"a device holds {held}, {ports}, and has {room}", self.run_line()]
        for each in self.times.causes()[:1]:
            took = milliseconds(each.seconds)
            lines.append(f"the longest: {each.times} x {each.op} over {each.over}, {each.because}, {took}")
        return "\n".join([*lines, self.limit_line()])

    def run_line(self) -> str:
        """How long a run takes at least, and of what."""
        times = self.times
        if not times.collectives:
            return f"a run takes at least {milliseconds(times.seconds)} of work, and no collectives"
        return (
            f"a run takes at least {milliseconds(times.seconds)}: {milliseconds(times.work)} of work, "
            f"{milliseconds(times.collectives)} of collectives{self._hidden()}"
        )

    def _hidden(self) -> str:
        """How much of that runs beside the rest."""
        hidden = self.times.work + self.times.collectives - self.times.seconds
        return f",\n  {milliseconds(hidden)} of these beside others" if hidden > 0.01 * self.times.seconds else ""

    def limit_line(self) -> str:
        """What limits it."""
        if not self.fits:
            over = human(int(self.held - self.memory), "B")
            return f"memory limits: {over} too much, {self.weights / self.held:.0%} of it weights"
        share = self.times.by_limit()[self.limit] / max(sum(self.times.by_limit().values()), 1e-30)
        return f"{self.limit} limits, {share:.0%} of all times"


def milliseconds(seconds: float) -> str:
    """A time in three digits: `0.0826 ms`, `4,170 ms`."""
    count = seconds * 1e3
    return f"{count:,.0f} ms" if count >= 1000 else f"{count:.3g} ms"


def device_needs(plan: ShardingPlan) -> DeviceNeeds:
    """What one device of the mesh needs. No weight is read or drawn."""
    program = rank_graph(plan, plan.mesh.ranks - 1)
    sizes = choose_sizes(program, plan.sizes)
    ports = [*program.main.inputs, *program.main.outputs.values()]
    return DeviceNeeds(
        parameter_bytes(program),
        _peak(program, sizes),
        sum(v.type.bytes_at(sizes) for v in ports),
        plan.machine.memory,
        timetable_of(program, plan.mesh, plan.machine, sizes),
    )


def _peak(program: Graph, sizes: Mapping[str, int]) -> int:
    """Bytes of values that live at once at the peak, by the storage plan that the NumPy backend makes.

    The backend itself is not asked whether it could run the program: it has no bf16, and plans it all the same.
    """
    numpy, target = find_backend("numpy"), Target("cpu")
    assert isinstance(numpy, StagedBackend)
    lowered = PassManager(numpy.pipeline(target), target=target).run(program)
    assert lowered.plan is not None
    return max((n for _, n in live_at(frames_of(lowered.plan), lowered.graph.main.name, sizes)), default=0)


@dataclass(frozen=True)
class LabTrial:
    """How near the ranks together came to the whole model.

    differences  by output: the greatest difference, beside the greatest element
    sizes        of the symbols
    meetings     how many times a group of ranks met
    """

    differences: Mapping[str, float]
    sizes: Mapping[str, int]
    meetings: int
    ranks: int

    @property
    def passed(self) -> bool:
        """Whether every output is as near as float64 lets it be."""
        return all(difference <= NEAR for difference in self.differences.values())

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        told = {"differences": dict(self.differences), "sizes": dict(self.sizes), "meetings": self.meetings}
        return {"passed": self.passed, "ranks": self.ranks, **told}

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={n}" for name, n in self.sizes.items())
        head = (
            f"lab: {self.ranks} ranks in float64{f' at {sizes}' if sizes else ''}, {self.meetings} meetings of groups"
        )
        lines = [f"  {name}: {difference:.1e} from the whole model" for name, difference in self.differences.items()]
        return "\n".join([head, *lines, "  equal" if self.passed else "  NOT equal"])


def try_in_lab(
    plan: ShardingPlan,
    *,
    weights: Mapping[str, Array] | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> LabTrial:
    """Run the programs of all ranks in lockstep, and the whole model, in float64 on drawn inputs.

    weights  by name; without, initial values, and a little of noise in each, so that no bias is zero
    sizes    of the symbols; by default such that they are uneven over the mesh

    Raises GraphError where ranks do not meet as they should, and for more ranks than the lab runs; UsageError for
    weights in blocks that are not written.
    """
    refuse_many_ranks(plan.mesh)
    graph = plan.graph
    uneven = {s: plan.mesh.ranks + 3 for s, bounds in graph.symbols.items() if plan.mesh.ranks + 3 in bounds}
    chosen = choose_sizes(graph, {**uneven, **dict(sizes or {})})
    if weights is None:
        rng = np.random.default_rng(seed)
        drawn = initial_weights(graph, seed)
        noisy = {name: array + 0.02 * rng.standard_normal(array.shape) for name, array in drawn.items()}
        weights = encode_weights(graph, noisy)
        for name, value in graph.parameters.items():
            if value.type.encoding is not None and weights[name] is noisy[name]:
                hint = Hint('weights=, or widen="blocks" when the model is planned', "--widen blocks")
                raise UsageError(f"the lab draws no blocks of {value.type.encoding}", received=name, hint=hint)
    given = draw_inputs(graph, chosen, [seed])
    whole = interpret(graph, given, weights, float64=True)
    programs = [rank_graph(plan, rank) for rank in range(plan.mesh.ranks)]
    found = run_lab(plan, given, weights, programs=programs)
    differences = {name: _difference(found.outputs[name], wanted) for name, wanted in whole.items()}
    return LabTrial(differences, chosen, len(found.meetings), plan.mesh.ranks)


def _difference(found: Array, wanted: Array) -> float:
    """The greatest difference beside the greatest element, or beside 1."""
    if not wanted.size:
        return 0.0
    apart = np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64))
    return float(np.max(apart) / max(1.0, float(np.max(np.abs(wanted)))))
