"""`explain_sharding`: time and memory of a model split over a mesh, its collectives, its limits, and what to change.

    print(explain_sharding("gpt2", mesh="tp=2,dp=2", recipe="megatron", sizes={"B": 8, "S": 512}))

The report follows from the plan and the program of the last rank. No weight is read, and no device is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.explaining.sharding_changes import Change, changes_of
from treadle.ir.hardware import Hardware
from treadle.ir.placement.mesh import Mesh
from treadle.passes.memory.storage_plan import aligned
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.timetable import Cause, PipelineTimes
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.reporting.counts import counted, human, sizes_text
from treadle.sharding.needs import DeviceNeeds, device_needs, milliseconds
from treadle.sharding.plans import shard_model

SHOWN = 3
"""Maximum number of changes that are listed."""


@dataclass(frozen=True, eq=False)
class ShardingReport:
    """The time and memory of a run of a sharded model.

    needs    the needs of the last rank
    weights  bytes of that rank's parts of the weights, by the mesh axes that split them: "tp dp"; "": unsplit weights
    changes  plans that differ in one choice, the best first
    """

    plan: ShardingPlan
    needs: DeviceNeeds
    weights: Mapping[str, float]
    changes: tuple[Change, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.plan.graph.name

    @property
    def device(self) -> str:
        """The device of each rank."""
        return self.plan.machine.name

    @property
    def title(self) -> str:
        """The title of the report, one line."""
        where = f", at {sizes_text(self.plan.sizes)}" if self.plan.sizes else ""
        ranks = f"{self.plan.devices.ranks} ranks of {self.device}"
        return f"{self.name} over {self.plan.mesh}: {self.plan.recipe}, {ranks}{where}"

    @property
    def best(self) -> Change | None:
        """The change that saves the most. If the plan does not fit: a change that does. Else the fastest change, if it
        is faster than the plan. None if there is none.
        """
        return next((each for each in self.changes[:1] if self._helps(each)), None)

    def _helps(self, change: Change) -> bool:
        if change.fits != self.needs.fits:
            return change.fits
        return change.seconds < self.needs.times.seconds * 0.995

    def as_dict(self) -> dict[str, Any]:
        best = self.best
        return {
            "model": self.name,
            "mesh": str(self.plan.mesh),
            "ranks": self.plan.devices.ranks,
            "device_name": self.device,
            "recipe": self.plan.recipe,
            "axes": dict(self.plan.axes),
            "stored": self.plan.stored,
            "sizes": dict(self.plan.sizes),
            "notes": list(self.plan.notes),
            "device": self.needs.facts(),
            "weights": dict(self.weights),
            "collectives": [dict(cause.__dict__) for cause in self.needs.causes()],
            "changes": [change.as_dict() for change in self.changes],
            "best": None if best is None else best.description,
        }

    def __str__(self) -> str:
        blocks = [self._head(), self._times(), self._collectives(), self._memory(), self._changes()]
        return "\n\n".join("\n".join(lines) for lines in blocks)

    def _head(self) -> list[str]:
        asked = ", ".join(f"{name} over {over}" for name, over in self.plan.axes.items()) or "nothing"
        stored = f"weights are stored in parts over {self.plan.stored}, and gathered for use"
        notes = [f"note: {note}" for note in self.plan.notes]
        return [self.title, f"splits {asked}", *([stored] if self.plan.stored else []), *notes]

    def _times(self) -> list[str]:
        limits = self.needs.times.by_limit()
        total = max(sum(limits.values()), 1e-30)
        rows = [(name, milliseconds(took), f"{took / total:.0%}") for name, took in limits.items()]
        lines = [self.needs.run_line(), self.needs.limit_line(), *_table(rows)]
        return lines if self.needs.stages is None else [*lines, *self._stages(self.needs.stages)]

    def _stages(self, stages: PipelineTimes) -> list[str]:
        """Return lines of text on the times at which each stage of a pipeline works."""
        assert self.plan.pipeline is not None
        rows: list[tuple[str, ...]] = [("stage", "weights", "a micro-batch", "works from", "to", "waits")]
        for number, stage in enumerate(self.plan.pipeline.stages):
            own = [each for each in stages.turns if each.stage == number]
            worked, count = sum(each.end - each.start for each in own), max(len(own), 1)
            ends = [milliseconds(at) for at in (own[0].start, own[-1].end)] if own else ["", ""]
            held = human(int(sum(map(self.plan.weight_part, stage.weights))), "B")
            waits = f"{1 - worked / max(stages.seconds, 1e-30):.0%}"
            rows.append((str(number), held, milliseconds(worked / count), *ends, waits))
        return [str(stages), *_table(rows)]

    def _collectives(self) -> list[str]:
        causes = self.needs.causes()
        if not causes:
            return ["ranks do not communicate"]
        total = sum(cause.seconds for cause in causes)
        rows = [("collectives", "over", "sent", "time", "share")]
        rows += [
            (f"{c.times} x {c.op}", c.over, human(c.sent, "B"), milliseconds(c.seconds), f"{c.seconds / total:.0%}")
            for c in causes
        ]
        head, *lines = _table(rows, indent="")
        return [head, *[line for row, cause in zip(lines, causes, strict=True) for line in (row, *_because(cause))]]

    def _memory(self) -> list[str]:
        needs = self.needs
        room = human(needs.memory, "B")
        lines = [f"a device holds {human(needs.held, 'B')} of {room}{'' if needs.fits else ': it does NOT fit'}"]
        rows = [
            (human(count, "B"), "weights split over " + over if over else "weights that every rank stores whole")
            for over, count in sorted(self.weights.items(), key=lambda each: -each[1])
        ]
        rows.append((human(needs.values, "B"), "values at the peak, by the storage plan"))
        rows.append((human(needs.ports, "B"), "inputs, and parts of the outputs"))
        return [*lines, *_table(rows)]

    def _changes(self) -> list[str]:
        if not self.changes:
            return ["no other recipe, axis or mesh can be planned at these sizes"]
        best = self.best
        if best is None:
            summary = f"none of {counted(len(self.changes), 'change')} of recipe, axis or mesh saves time"
            head = summary if self.needs.fits else summary.replace("saves time", "makes it fit")
        else:
            head = f"the change that saves the most, of {counted(len(self.changes), 'change')}: {best.description}"
        rows: list[tuple[str, ...]] = [("change", "time", "", "memory", "")]
        rows += [self._row(change) for change in self.changes[:SHOWN]]
        return [head, *_table(rows)]

    def _row(self, change: Change) -> tuple[str, ...]:
        now, held = self.needs.times.seconds, self.needs.held
        less = f"{change.seconds / max(now, 1e-30) - 1:+.0%}"
        fits = "" if change.fits else "does NOT fit"
        return (
            change.description,
            milliseconds(change.seconds),
            less,
            human(change.held, "B"),
            fits or _percent(change, held),
        )


def _percent(change: Change, held: int) -> str:
    return f"{change.held / max(held, 1) - 1:+.0%}"


def _because(cause: Cause) -> list[str]:
    """Return lines of text on the reason of a collective and its place, to be printed below the row with its count."""
    place = ", ".join(part for part in (cause.line, cause.scope) if part)
    return [f"    {cause.because}", *([f"    {place}"] if place else [])]


def _table(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> list[str]:
    return [f"{indent}{'  '.join(row)}".rstrip() for row in aligned(rows)]


def explain_sharding(
    model: AnyModel,
    *,
    mesh: Mesh | str,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    device: str | Hardware = "h100",
    **options: Any,
) -> ShardingReport:
    """Describe the time and memory of a model that is split as by `shard_model`, and the savings of single changes.

    Raises as `shard_model` does.
    """
    CompileOptions.of("explain sharding", options)
    plan = shard_model(model, mesh, recipe=recipe, axes=axes, device=device, **options)
    return report_of(plan, dict(axes or {}))


def report_of(plan: ShardingPlan, axes: Mapping[str, str]) -> ShardingReport:
    """Return the report on a plan. `axes` are the axes that the caller split by name, in addition to the recipe."""
    needs = device_needs(plan)
    return ShardingReport(plan, needs, _weights_by_split(plan, needs.stage), tuple(changes_of(plan, axes)))


def _weights_by_split(plan: ShardingPlan, stage: int) -> dict[str, float]:
    """Return the average bytes of the weights' parts in one stage, by the mesh axes that split them."""
    found: dict[str, float] = {}
    for name in plan.weights if plan.pipeline is None else plan.pipeline.stages[stage].weights:
        used = {part.axis for part in plan.weights[name].used}
        over = " ".join(axis for axis, _ in plan.mesh.axes if axis in used)
        found[over] = found.get(over, 0.0) + plan.weight_part(name)
    return found
