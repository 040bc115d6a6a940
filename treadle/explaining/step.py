"""`explain_step`: the step that is derived from a model: states with their bytes, and the form of each op at a step.

print(explain_step("gpt2"))
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.explaining.layouts import optimized_for
from treadle.ir.analysis.following import follow
from treadle.ir.analysis.run_counts import count_run_ops
from treadle.ir.graph import Graph, Value
from treadle.ir.sizing.sizes import product
from treadle.ir.types import Type
from treadle.passes.stages import DeriveStep, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.reporting.counts import counted, human


@dataclass(frozen=True)
class StateFacts:
    """States of one kind in repeated blocks: one line of the table.

    name    with the block's number as {0..11}
    type    the type of each state
    count   the number of states
    role    "cache" and "ring" grow with the tokens; "sum" is a running sum; "kept" is a result of the prologue, and
            "length" its valid length
    bytes   the total bytes of all of them
    unit    the unit of these bytes: "token", "position" of a ring or of an input that rows pass once, or "slot"
    """

    name: str
    type: str
    count: int
    role: str
    bytes: int
    unit: str

    @property
    def token(self) -> int:
        """Bytes per token and row."""
        return self.bytes if self.unit == "token" else 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "count": self.count,
            "role": self.role,
            "bytes": self.bytes,
            "unit": self.unit,
        }


@dataclass(frozen=True)
class Became:
    """An op that does more than map the tokens one by one, and its form at a step.

    op      its name
    why     its dependence on the axis, and its place in the model
    became  its form at a step
    """

    op: str
    why: str
    became: str


@dataclass(frozen=True)
class StepExplained:
    """A description of the derived step of a model."""

    model: str
    derived: DerivedStep
    states: tuple[StateFacts, ...]
    changed: tuple[Became, ...]
    ops: Mapping[str, int]
    """Number of ops that a run of each entry computes, with calls expanded."""

    def as_dict(self) -> dict[str, Any]:
        derived = self.derived
        return {
            "model": self.model,
            "axis": derived.axis,
            "context": derived.context,
            "inputs": {"step": list(derived.tokens), "prologue": list(derived.prologue)},
            "entries": [{"name": name, "ops": count} for name, count in self.ops.items()],
            "bytes_per_token": sum(s.token for s in self.states),
            "states": [s.as_dict() for s in self.states],
            "changed": [{"op": c.op, "why": c.why, "became": c.became} for c in self.changed],
        }

    def __str__(self) -> str:
        derived = self.derived
        token = sum(s.token for s in self.states)
        entries = ", ".join(f"{name} ({counted(count, 'op')})" for name, count in self.ops.items())
        lines = [
            f"{self.model} steps along {derived.axis}: {counted(token, 'byte')} per token and row",
            f"entries: {entries}",
            f"at every step it reads {', '.join(derived.tokens)}"
            + (f"; once per row, {', '.join(derived.prologue)}" if derived.prologue else ""),
            "",
            "states",
        ]
        table = [(s.name, s.type, s.role, _grows(s)) for s in self.states]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)] if table else []
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        lines += ["", f"ops that do more with {derived.axis} than map it"]
        for change in self.changed:
            lines += [f"  {change.why}", f"    {change.became}"]
        lines += [f"  every other op of {self.model} is unchanged, and computes only the new tokens"]
        return "\n".join(lines)


def _grows(state: StateFacts) -> str:
    each = f"{human(state.bytes / state.count, 'B')} a {state.unit}"
    return f"{each}, {human(state.bytes, 'B')} of all {state.count}" if state.count > 1 else each


def explain_step(model: AnyModel, **options: Any) -> StepExplained:
    """Derive the step of the model that MODEL names, and describe it. Options as in `treadle.compile`, and `cache`.

    Raises as `compile` does; PassError if the model cannot be stepped.
    """
    chosen = CompileOptions.of("explain step", options)
    name, graph = optimized_for(model, chosen)
    return step_of(name, run(graph, [DeriveStep(chosen.cache)]).products[DerivedStep], graph)


def step_of(name: str, derived: DerivedStep, graph: Graph | None = None) -> StepExplained:
    """Describe a derived step. The changes of ops are included if `graph`, the graph that it was derived from, is
    passed.
    """
    encounters = [] if graph is None else follow(graph, derived.axis).encounters
    changed = [Became(e.node.op.name, str(e), e.node.op.step or "reads them") for e in encounters]
    ops = {entry: count_run_ops(entry_alone(derived.graph, entry)).total() for entry in derived.graph.entry_names}
    return StepExplained(name, derived, _states(derived), tuple(changed), ops)


def entry_alone(graph: Graph, name: str) -> Graph:
    """Return a graph that has only this entry, and the functions that it calls."""
    entry = graph.functions[name]
    alone = Graph(graph.name)
    alone.functions = {f.name: f for f in graph.needed_by(entry)}
    alone.entry_names = (name,)
    alone.initial = {n: init for n, init in graph.initial.items() if n in entry.parameters}
    used = {s for f in alone.functions.values() for v in _values(f) for s in v.type.symbols}
    alone.symbols = {s: bounds for s, bounds in graph.symbols.items() if s in used}
    return alone


def _values(function: Any) -> list[Value]:
    return [*function.arguments, *(v for node in function.nodes for v in node.results)]


def _states(derived: DerivedStep) -> tuple[StateFacts, ...]:
    groups: dict[tuple[str, str], list[tuple[str, Value]]] = {}
    for name, value in derived.graph.states.items():
        pattern = re.sub(r"(?<![^.])\d+(?=\.)", "{}", name, count=1)
        groups.setdefault((pattern, value.type.text), []).append((name, value))
    return tuple(_facts(derived, pattern, members) for (pattern, _), members in groups.items())


def _facts(derived: DerivedStep, pattern: str, members: Sequence[tuple[str, Value]]) -> StateFacts:
    type = members[0][1].type
    numbers = [int(found[0]) for name, _ in members if (found := re.findall(r"(?<![^.])\d+(?=\.)", name))]
    whole = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if whole:
        shown = pattern.replace("{}", f"{{{numbers[0]}..{numbers[-1]}}}", 1)
    else:
        shown = members[0][0] if len(members) == 1 else ", ".join(name for name, _ in members)
    role = _role(derived, members[0][0], type)
    symbols = (derived.capacity, *derived.windows, *derived.memories)
    growing = [linear for s in type.shape if (linear := s.as_linear) is not None and linear[0] in symbols]
    fixed = [s for s in type.storage_type.shape if s.constant is not None]
    elements = product([*fixed, *(factor for _, factor, _ in growing)])
    unit = "slot" if not growing else "token" if role == "cache" else "position"
    sizes = [s for s in type.storage_type.shape if s.as_symbol != derived.slots]
    assert len(sizes) == len(fixed) + len(growing), "states have no sizes but slots, capacities and constants"
    assert elements.constant is not None
    return StateFacts(
        shown, type.text, len(members), role, elements.constant * type.storage_type.dtype.bytes * len(members), unit
    )


def _role(derived: DerivedStep, name: str, type: Type) -> str:
    prologue = derived.graph.functions["prologue"].updated if derived.has_prologue else {}
    if name in prologue:
        return "length" if name.endswith("_length") else "kept"
    return "cache" if derived.capacity in type.symbols else "ring" if type.symbols & derived.windows.keys() else "sum"
