"""`device_needs`: memory of one device of a sharded model, its timetable of work and collectives, its bottleneck."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.ir.analysis.cost import parameter_bytes
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.memory.frames import frames_of, live_at
from treadle.passes.sharding.gather_ahead import bytes_ahead
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.timetable import Cause, PipelineTimes, Timetable, timetable_of
from treadle.passes.stages import Lower, run
from treadle.program.budgets import choose_sizes
from treadle.reporting.counts import human
from treadle.sharding.plans import rank_graph


@dataclass(frozen=True)
class DeviceNeeds:
    """The needs of the last rank at the plan's sizes. No other rank has larger parts.

    weights  bytes of the rank's parts of the weights
    values   bytes of values alive at the peak, by the storage plan of the rank's program for the NumPy backend, with
             weights that are gathered ahead for the next call
    ports    bytes of the inputs, which every rank gets whole, and of the rank's parts of the outputs
    memory   bytes of memory of the device
    times    the timetable of work and collectives
    stages   the timetables of a pipeline's stages. Then `times` is the timetable of the last stage
    stage    the pipeline stage that needs the most memory; all bytes refer to this stage
    """

    weights: int
    values: int
    ports: int
    memory: float
    times: Timetable
    stages: PipelineTimes | None = None
    stage: int = 0

    def causes(self) -> list[Cause]:
        """Return the reasons of collectives, the longest collective first; for a pipeline, over one rank of each
        stage.
        """
        if self.stages is None:
            return self.times.causes()
        return Timetable(tuple([each for times in self.stages.stages for each in times.busy]), ()).causes()

    @property
    def held(self) -> int:
        """Total bytes that the device holds."""
        return self.weights + self.values + self.ports

    @property
    def fits(self) -> bool:
        """True if the device has enough memory."""
        return self.held <= self.memory

    @property
    def limit(self) -> str:
        """The bottleneck of a run: "memory" if the model does not fit, else the largest share of the time, one of
        LIMITS.
        """
        times = self.times.by_limit()
        return max(times, key=lambda name: times[name]) if self.fits else "memory"

    def facts(self) -> dict[str, Any]:
        """Return the needs as JSON."""
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
            **({} if self.stages is None else self._stage_facts(self.stages)),
        }

    def _stage_facts(self, stages: PipelineTimes) -> dict[str, Any]:
        turns = [{"stage": e.stage, "micro_batch": e.turn, "start": e.start, "end": e.end} for e in stages.turns]
        return {"waits": stages.waits, "stage": self.stage, "turns": turns}

    def __str__(self) -> str:
        held = f"{human(self.weights, 'B')} of weights, {human(self.values, 'B')} of values at the peak"
        ports = f"{human(self.ports, 'B')} of inputs and outputs"
        room = f"{human(int(self.memory), 'B')}{'' if self.fits else ': it does NOT fit'}"
        lines = [f"a device holds {held}, {ports}, and has {room}", self.run_line()]
        if self.stages is not None:
            lines[0] = lines[0].replace("a device", f"a device of stage {self.stage}", 1)
            lines.append(str(self.stages))
        for each in self.causes()[:1]:
            took = milliseconds(each.seconds)
            lines.append(f"the longest: {each.times} x {each.op} over {each.over}, {each.because}, {took}")
        return "\n".join([*lines, self.limit_line()])

    def run_line(self) -> str:
        """Return a line of text with the minimum time of a run, split into work and collectives."""
        times = self.times
        if not times.collectives:
            return f"a run takes at least {milliseconds(times.seconds)} of work, and no collectives"
        return (
            f"a run takes at least {milliseconds(times.seconds)}: {milliseconds(times.work)} of work, "
            f"{milliseconds(times.collectives)} of collectives{self._hidden()}"
        )

    def _hidden(self) -> str:
        """Return the part of `run_line` on collectives that overlap with other work; "" if hardly any do."""
        hidden = self.times.work + self.times.collectives - self.times.seconds
        return f",\n  {milliseconds(hidden)} of these overlapped" if hidden > 0.01 * self.times.seconds else ""

    def limit_line(self) -> str:
        """Return a line of text on the bottleneck."""
        if not self.fits:
            over = human(int(self.held - self.memory), "B")
            return f"memory limits: {over} too much, {self.weights / self.held:.0%} of it weights"
        share = self.times.by_limit()[self.limit] / max(sum(self.times.by_limit().values()), 1e-30)
        return f"{self.limit} limits, {share:.0%} of all times"


def milliseconds(seconds: float) -> str:
    """Return a time in three digits: `0.0826 ms`, `4,170 ms`."""
    count = seconds * 1e3
    return f"{count:,.0f} ms" if count >= 999.5 else f"{count:.3g} ms"


def device_needs(plan: ShardingPlan) -> DeviceNeeds:
    """Return the needs of one device of the mesh. No weight is read or drawn."""
    if plan.pipeline is None:
        program = rank_graph(plan, plan.mesh.ranks - 1)
        sizes = choose_sizes(program, plan.sizes)
        times = timetable_of(program, plan.mesh, plan.machine, sizes)
        return DeviceNeeds(*_held(program, sizes), plan.machine.memory, times)
    lasts = {plan.stage_at(rank): rank for rank in range(plan.devices.ranks)}
    programs = [rank_graph(plan, lasts[number]) for number in range(len(plan.pipeline.stages))]
    sizes = choose_sizes(programs[0], plan.sizes)
    held = [_held(program, sizes) for program in programs]
    most = max(range(len(held)), key=lambda number: sum(held[number]))
    stages: list[Timetable] = []
    for number, program in enumerate(programs):
        before = stages[-1].handed if stages else ()
        stages.append(timetable_of(program, plan.mesh, plan.machine, sizes, stage=number, handed=before))
    staged = PipelineTimes.of(stages, plan.pipeline.turns)
    return DeviceNeeds(*held[most], plan.machine.memory, stages[-1], staged, most)


def _held(program: Graph, sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Return the bytes of weights, the bytes of values at the peak, and the bytes of inputs and outputs."""
    ports = [*program.main.inputs, *program.main.outputs.values()]
    values = _peak(program, sizes) + bytes_ahead(program, sizes)
    return parameter_bytes(program), values, sum(v.type.bytes_at(sizes) for v in ports)


def _peak(program: Graph, sizes: Mapping[str, int]) -> int:
    """Return the bytes of values alive at the peak, by the storage plan of the NumPy backend.

    That backend cannot run programs in bf16, but its storage plan is valid for them. So its check is skipped.
    """
    numpy, target = find_backend("numpy"), Target("cpu")
    assert isinstance(numpy, StagedBackend)
    lowered = run(program, [Lower(tuple(numpy.pipeline(target)))], target=target)
    assert lowered.plan is not None
    return max((n for _, n in live_at(frames_of(lowered.plan), lowered.graph.main.name, sizes)), default=0)
