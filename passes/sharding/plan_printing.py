"""A sharding plan as text for people, and as JSON for programs.

block h(x [dp, -, -]) -> (x [dp, -, -])
  out = linear: k over tp                                   [dp, -, -] sum(tp)
    all_reduce of out over tp: the split of heads is summed, 0.79 MB  (gpt2.py:39, attn.out)
  x_2 = add                                                 [dp, -, -]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from treadle.ir.graph import Function, Node, Value
from treadle.ir.placement.placements import MeshPlacement, Split
from treadle.ir.text.printer import value_names
from treadle.passes.sharding.conversions import bytes_of, payload_of
from treadle.passes.sharding.plan import (
    Move,
    PlannedCollective,
    PlannedFunction,
    PlannedNode,
    PlannedPipeline,
    ShardingPlan,
    Stage,
    made_items,
)

_COLUMN = 58
_TURNS_SHOWN = 16


def plan_text(plan: ShardingPlan) -> str:
    """Return the whole plan as text: the request, placements of weights, every function, and the collectives by
    reason.
    """
    asked = ", ".join(f"{name} over {over}" for name, over in plan.axes.items()) or "nothing"
    lines = [f"sharding of {plan.graph.name} over {plan.mesh}, {plan.devices.ranks} ranks, {plan.recipe}: {asked}"]
    if plan.stored:
        lines.append(f"weights are stored in parts over {plan.stored}, and gathered for use")
    lines += [f"note: {note}" for note in plan.notes]
    lines += ["", "weights", *_weight_lines(plan)]
    for planned in plan.functions:
        lines += ["", *_function_lines(plan, planned)]
    if plan.pipeline is not None:
        lines += ["", *pipeline_lines(plan, plan.pipeline)]
    return "\n".join([*lines, "", *collective_lines(plan), ""])


def collective_lines(plan: ShardingPlan) -> list[str]:
    """Return lines that list the collectives of one run, grouped by reason."""
    found = grouped_collectives(plan)
    sizes = ", ".join(f"{s}={n}" for s, n in sorted(plan.sizes.items()))
    if not found:
        return [f"no collectives at {sizes}" if sizes else "no collectives"]
    lines = [f"collectives of one run{f' at {sizes}' if sizes else ''}, bytes that a rank sends"]
    for each in found:
        place = ", ".join(part for part in (each.line, each.scope) if part)
        lines.append(
            f"  {each.times:3} x {each.op} over {each.over}: {each.because}, {_megabytes(each.sent)}  ({place})"
        )
    if plan.pipeline is not None:  # a rank sends only the values of its stage
        sent = sum(c.times * c.sent * c.ranks for c in found)
        return [*lines, f"  total: {_megabytes(sent)} sent by all ranks"]
    sent, seconds = (sum(n) for n in zip(*((c.times * c.sent, c.times * c.seconds) for c in found), strict=True))
    return [*lines, f"  total: {_megabytes(sent)} sent per rank, at least {seconds * 1e3:.3f} ms"]


def pipeline_lines(plan: ShardingPlan, pipeline: PlannedPipeline) -> list[str]:
    """Return lines that list the stages, the schedule of micro-batches, and the fraction of time in which ranks
    wait.
    """
    count, turns = len(pipeline.stages), plan.times_of(made_items(plan.main))
    lines = [f"stages over {pipeline.over}; {turns} micro-batches pass through them in order"]
    for number, stage in enumerate(pipeline.stages):
        held = sum(map(plan.weight_part, stage.weights))
        lines.append(f"  stage {number}: {stage_places(plan, stage)}, {_megabytes(held)} of weights per rank")
        if stage.receives:
            handed = ", ".join(value.name for value, _ in stage.receives)
            bytes = sum(bytes_of(value.type, placed, plan.sizes) for value, placed in stage.receives)
            lines.append(f"    receives {handed}: {_megabytes(bytes)} per micro-batch")
    shown = min(turns, _TURNS_SHOWN)
    wide = len(str(shown - 1)) + 1
    lines.append(
        f"  timeline of micro-batches, if stages take equal times{'' if shown == turns else f', the first {shown}'}"
    )
    for number in range(count):
        row = [""] * number + [str(turn) for turn in range(shown)] + [""] * (count - 1 - number)
        lines.append(f"    stage {number}".ljust(14) + "".join((cell or ".").rjust(wide) for cell in row))
    waits = (count - 1) / (turns + count - 1)
    return [*lines, f"  ranks wait {waits:.0%} of the time, if stages take equal times"]


def stage_places(plan: ShardingPlan, stage: Stage) -> str:
    """Return the calls of a stage as text, `h.0 to h.5`. If it has no calls, return its first and last node."""
    steps = plan.main.steps
    nodes = [step.node for step in (steps[at] for at in stage.steps) if isinstance(step, PlannedNode)]
    named = list(dict.fromkeys(node.scope or node.op.name for node in nodes if not node.op.is_view)) or ["nothing"]
    return named[0] if len(named) == 1 else f"{named[0]} to {named[-1]}"


def grouped_collectives(plan: ShardingPlan) -> list[PlannedCollective]:
    """Return collectives grouped by reason and source line. In scopes, `*` replaces the numbers of repeated blocks."""
    groups: dict[PlannedCollective, int] = {}
    for each in plan.collectives():
        alike = replace(each, scope=re.sub(r"\.\d+(?=\.|$)", ".*", each.scope))
        groups[alike] = groups.get(alike, 0) + 1
    return [replace(each, times=count) for each, count in groups.items()]


def plan_json(plan: ShardingPlan) -> dict[str, Any]:
    """Return the plan as data for JSON: its record, and values derived from it."""
    return {
        **plan_record(plan),
        "collectives": [
            {
                "op": c.op,
                "over": c.over,
                "ways": c.ways,
                "because": c.because,
                "scope": c.scope,
                "line": c.line,
                "times": c.times,
                "payload": c.payload,
                "sent": c.sent,
                "seconds": c.seconds,
                "ranks": c.ranks,
            }
            for c in grouped_collectives(plan)
        ],
        "weight_bytes": plan.weight_bytes(),
    }


def plan_record(plan: ShardingPlan) -> dict[str, Any]:
    """Return the record of a plan, which `plan_reading` reads. Placements are in the form of `parse_placement`.

    Values have their names in the graph's text. A value that moves is also identified as an operand of the node that it
    moves for, or as a result of the function. `at` is a node of the function, by its index.
    """
    return {
        "graph": plan.graph.name,
        "mesh": str(plan.mesh),
        "recipe": plan.recipe,
        "axes": dict(plan.axes),
        "stored": plan.stored,
        "notes": list(plan.notes),
        "sizes": dict(plan.sizes),
        "machine": {**vars(plan.machine), "rates": dict(plan.machine.rates)},
        "weights": {name: placed.text(plan.mesh) for name, placed in plan.weights.items()},
        "functions": [_function_json(plan, planned) for planned in plan.functions],
        **({} if plan.pipeline is None else {"pipeline": _pipeline_json(plan, plan.pipeline)}),
    }


def _pipeline_json(plan: ShardingPlan, pipeline: PlannedPipeline) -> dict[str, Any]:
    """Return the stages as indices of steps of `main`, and of the items that the steps produce."""
    numbers = {item: number for number, item in enumerate(made_items(plan.main))}
    return {
        "over": pipeline.over,
        "turns": pipeline.turns,
        "stages": [
            {
                "steps": list(stage.steps),
                "receives": [numbers[item] for item in stage.receives],
                "weights": list(stage.weights),
                "outputs": list(stage.outputs),
            }
            for stage in pipeline.stages
        ],
    }


def plan_hash(plan: ShardingPlan) -> str:
    """Return a hash of `plan_json`. Ranks compare the hash to verify that they have the same plan."""
    return sha256(json.dumps(plan_json(plan), sort_keys=True).encode()).hexdigest()


# -- text ------------------------------------------------------------------------------------------------------------


def _megabytes(bytes: float) -> str:
    return f"{bytes / 1e6:.3g} MB"


def _weight_lines(plan: ShardingPlan) -> list[str]:
    counts: dict[str, int] = {}
    for name, placed in plan.weights.items():
        folded = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        text = f"{folded}: {plan.graph.parameters[name].type}".ljust(_COLUMN) + f"  {placed.text(plan.mesh)}"
        counts[text] = counts.get(text, 0) + 1
    return [f"  {text}" + (f"  x {count}" if count > 1 else "") for text, count in counts.items()]


def _function_lines(plan: ShardingPlan, planned: PlannedFunction) -> Iterator[str]:
    names = dict(value_names(plan.graph, planned.function))
    function = planned.function
    taken = dict(zip(function.arguments, planned.takes, strict=True))
    inputs = ", ".join(f"{v.name} {taken[v].text(plan.mesh)}" for v in function.inputs)
    outputs = ", ".join(
        f"{n} {p.text(plan.mesh)}"
        for n, p in zip(function.outputs, planned.gives[: len(function.outputs)], strict=True)
    )
    kind = "" if planned is plan.main else "block "
    yield f"{kind}{planned.name}({inputs}) -> ({outputs})"
    for node in planned.nodes:
        yield from _node_lines(plan, node, names, "  ")
    yield from _move_lines(plan, planned.moves, names, "  ")


def _node_lines(
    plan: ShardingPlan, planned: PlannedNode, names: Mapping[Value, str], indent: str, within: Node | None = None
) -> Iterator[str]:
    yield from _move_lines(plan, planned.moves, names, indent, within)
    node, mesh = planned.node, plan.mesh
    split = ", ".join(f"{name} over {mesh.text_of(share.over)}" for name, share in planned.shares.items())
    operation = planned.callee.name if planned.callee is not None else node.op.name
    if planned.body is not None:
        operation += ", by its body"
    if planned.ring:
        operation += ", as ring attention"
    left = f"{', '.join(_name(v, names) for v in node.results)} = {operation}" + (f": {split}" if split else "")
    yield f"{indent}{left}".ljust(_COLUMN + 2) + "  " + ", ".join(p.text(mesh) for p in planned.gives)
    if planned.body is not None:
        for inner in planned.body.nodes:
            yield from _node_lines(plan, inner, names, indent + "  ", within or node)
        yield from _move_lines(plan, planned.body.moves, names, indent + "  ", within or node)


def _move_lines(
    plan: ShardingPlan, moves: Sequence[Move], names: Mapping[Value, str], indent: str, within: Node | None = None
) -> Iterator[str]:
    """Yield the printed lines of moves. A move in a composite's body has the composite's source line and scope."""
    for move in moves:
        at = within or move.at
        reasons = iter(move.because)
        for step in move.steps:
            if step.sends:
                place = ", ".join(str(part) for part in (at.source, at.scope) if part)
                yield (
                    f"{indent}  {step.kind.word} of {_name(move.value, names)} over {plan.mesh.text_of(step.over)}: "
                    f"{next(reasons)}, {_megabytes(payload_of(move.value.type, step, plan.sizes))}  ({place})"
                )
            else:
                yield f"{indent}  {_name(move.value, names)}: {step.kind.word}, {step.after.text(plan.mesh)}"


def _name(value: Value, names: Mapping[Value, str]) -> str:
    return names.get(value, value.name)


# -- JSON ------------------------------------------------------------------------------------------------------------


def _function_json(plan: ShardingPlan, planned: PlannedFunction) -> dict[str, Any]:
    writer = _FactsOf(plan, value_names(plan.graph, planned.function), planned.function)
    return {
        "name": planned.name,
        "of": planned.function.name,
        "takes": writer.texts(planned.takes),
        **writer.content(planned),
        "gives": writer.texts(planned.gives),
    }


class _FactsOf:
    """A writer of the JSON of one function, or of a composite's body."""

    def __init__(self, plan: ShardingPlan, names: Mapping[Value, str], function: Function) -> None:
        self.plan, self.names = plan, names
        self.numbers = {node: number for number, node in enumerate(function.nodes)}

    def texts(self, placements: Sequence[MeshPlacement | None]) -> list[str | None]:
        return [None if p is None else p.text(self.plan.mesh) for p in placements]

    def content(self, planned: PlannedFunction) -> dict[str, Any]:
        """Return a JSON-serializable dict of a function's nodes and of the redistributions of its results."""
        return {
            "nodes": [self.node(each) for each in planned.nodes],
            "moves": self.moves(planned.moves, planned.function.results),
        }

    def moves(self, made: Sequence[Move], among: Sequence[Value | None]) -> list[dict[str, Any]]:
        mesh = self.plan.mesh
        return [
            {
                "value": _name(move.value, self.names),
                "operand": among.index(move.value),
                "source": move.source.text(mesh),
                "target": move.target.text(mesh),
                "steps": [
                    {"kind": s.kind.word, "over": mesh.text_of(s.over), "dim": s.dim, "onto": s.onto}
                    for s in move.steps
                ],
                "because": list(move.because),
                "at": self.numbers[move.at],
            }
            for move in made
        ]

    def node(self, each: PlannedNode) -> dict[str, Any]:
        node, mesh = each.node, self.plan.mesh
        found: dict[str, Any] = {
            "op": node.op.name,
            "scope": node.scope,
            "results": [_name(v, self.names) for v in node.results],
            "shares": {n: Split(s.over, s.grain).text(mesh) for n, s in each.shares.items()},
            "moves": self.moves(each.moves, node.operands),
            "reads": self.texts(each.reads),
            "gives": self.texts(each.gives),
        }
        if each.ring:
            found["ring"] = mesh.text_of(each.ring)
        if each.callee is not None:
            found["callee"] = each.callee.name
        if each.body is not None:
            found["body"] = _FactsOf(self.plan, self.names, each.body.function).content(each.body)
        return found
