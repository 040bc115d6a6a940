"""`explain_storage`: the storage, layout and lifetime of each value and each weight for a backend, and the reasons.

    print(explain_storage("gpt2", backend="tvm"))

The report describes the storage plan at the end of the backend's passes (`treadle.passes.memory.storage_plan`), and the
weights that `bind` derives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.backends.made_weights import Recipe, recipes_of
from treadle.explaining.layouts import lowered_for, passed_weights
from treadle.ir.analysis.run_counts import count_calls
from treadle.ir.builder import describe_source
from treadle.ir.errors import UsageError
from treadle.ir.graph import Function, Graph, Value
from treadle.passes.memory.storage_plan import BEFORE, FunctionPlan, StoragePlan, ValuePlace, aligned
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.reporting.counts import counted


@dataclass(frozen=True)
class Stored:
    """A value or a weight of a function.

    name     a name that is unique in the function
    kind     "input", "weight", "constant" or "value"
    type     its type, as text
    storage  the name of its storage; None: in registers
    form     "row-major", its layout or its strides; empty if a library chooses them
    bytes    the bytes of the storage, an expression of the symbols; empty if there is none
    first    the step that writes it; None if it exists before the first step
    last     the last step that reads it; the number of steps if it is returned
    why      why it has this storage
    line     the user's line, and the scope
    passed   True if the function only passes it to calls: then it is listed in the called function
    """

    name: str
    kind: str
    type: str
    storage: str | None
    form: str
    bytes: str
    first: int | None
    last: int
    why: str
    line: str
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        empty = {name: getattr(self, name) or None for name in ("form", "bytes", "line")}
        return {**self.__dict__, **empty}

    @property
    def cells(self) -> tuple[str, ...]:
        step = "" if self.first is None else str(self.first)
        return step, self.name, self.type, self.storage or "-", self.form, self.bytes, str(self.last), self.why


_HEAD = ("from", "value", "type", "storage", "form", "bytes", "to", "why")


@dataclass(frozen=True)
class StoredFunction:
    """A function: the number of times that a run calls it, the ops of its steps, and its values."""

    name: str
    calls: int
    steps: tuple[str, ...]
    values: tuple[Stored, ...]
    own: int
    """Number of storages that belong to the function."""
    workspaces: tuple[str, ...] = ()
    """Lines of text on the workspaces of library calls."""


@dataclass(frozen=True)
class StorageReport:
    """A backend's storage plan of a model."""

    model: str
    backend: str
    note: str
    strided: bool
    functions: tuple[StoredFunction, ...]
    copies: bool = False

    def as_dict(self) -> dict[str, Any]:
        functions = [
            {
                "function": each.name,
                "calls": each.calls,
                "steps": list(each.steps),
                "own_storages": each.own,
                "workspaces": list(each.workspaces),
                "values": [value.as_dict() for value in each.values],
            }
            for each in self.functions
        ]
        head = {"model": self.model, "backend": self.backend, "strided": self.strided}
        return {**head, "note": self.note, "functions": functions}

    def __str__(self) -> str:
        lines = [f"{self.model} for {self.backend}: {self.note}"]
        if not self.strided:
            copy = (
                "is a copy with a storage of its own" if self.copies else "may be a copy, which the plan does not count"
            )
            lines.append(f"{self.backend} chooses strides itself: a view that cannot be expressed by strides {copy}")
        for each in self.functions:
            times = "" if each.name == "main" else f", called {each.calls} time{'s' * (each.calls != 1)}"
            steps, own = counted(len(each.steps), "step"), counted(each.own, "storage")
            lines += ["", f"{each.name}{times}: {steps}, {own} of its own"]
            shown = [value for value in each.values if not (value.passed and value.kind == "weight")]
            rows = aligned([_HEAD, *(value.cells for value in shown)])
            sources = ["", *(value.line for value in shown)]
            lines += ["  " + "  ".join([*row, source]).rstrip() for row, source in zip(rows, sources, strict=True)]
            lines += [f"  {line}" for line in each.workspaces]
            if len(shown) < len(each.values):
                left = counted(len(each.values) - len(shown), "weight")
                lines.append(f"  {left} that it only passes on: listed in the functions that read them")
        return "\n".join(lines)


def explain_storage(model: AnyModel, **options: Any) -> StorageReport:
    """Describe the storage of every value and weight of the model that MODEL names. Options as in `treadle.compile`.

    Raises as `compile` does; UsageError for a backend that does not plan storage.
    """
    chosen = CompileOptions.of("explain storage", options)
    name, lowered = lowered_for(model, chosen)
    if lowered.plan is None:
        raise UsageError(f"backend {chosen.backend} does not plan storage", hint="numpy, torch or tvm")
    return storage_of(name, chosen.backend, lowered.graph, lowered.plan)


def storage_of(name: str, backend: str, graph: Graph, plan: StoragePlan) -> StorageReport:
    """Describe the storage of a lowered graph with a storage plan."""
    made, passed, calls = recipes_of(graph), passed_weights(graph), count_calls(graph)
    functions = []
    for each in plan.functions.values():
        passing = _only_passed(each.function)
        values = tuple(_stored(each, v, place, made, passed, passing) for v, place in each.rows())
        steps = tuple("+".join(node.op.name for node in step.nodes) for step in each.steps)
        count, beside = calls[each.function.name], tuple(each.beside())
        functions.append(StoredFunction(each.function.name, count, steps, values, each.own, beside))
    return StorageReport(name, backend, plan.note, plan.strided, tuple(functions), plan.copies)


def _only_passed(function: Function) -> set[Value]:
    """Return the values that a function passes to calls, but neither reads nor returns itself."""
    uses, outputs = function.uses(), set(function.outputs.values())
    return {v for v, readers in uses.items() if v not in outputs and all(n.op.callee is not None for n, _ in readers)}


def _stored(
    plan: FunctionPlan,
    value: Value,
    place: ValuePlace,
    made: Mapping[str, Recipe],
    passed: Mapping[Value, tuple[str, str]],
    passing: set[Value],
) -> Stored:
    names = plan.names
    why = _weight(value, made, passed) if value.kind == "parameter" else place.describe(names)
    node, storage = value.node, place.storage
    return Stored(
        names[value],
        {"parameter": "weight", "result": "value"}.get(value.kind, value.kind),
        str(value.type),
        None if storage is None else storage.name,
        place.form,
        "" if storage is None else str(storage.elements * storage.dtype.bytes),
        None if place.first == BEFORE else place.first,
        place.last,
        why,
        "" if node is None else describe_source(node.source, node.scope) or "",
        value in passing,
    )


def _weight(value: Value, made: Mapping[str, Recipe], passed: Mapping[Value, tuple[str, str]]) -> str:
    """Return text on the origin of a weight: "as provided", or the expression by which `bind` derives it."""
    name, scope = passed.get(value, ("", ""))
    recipe = made.get(name)
    if recipe is None:
        return "the weight as provided" if name else "given by the caller"
    if not recipe.nodes:
        (source,) = recipe.sources
        return f"laid out by bind: {source.removeprefix(f'{scope}.')}"
    return f"derived by bind: {recipe.expression(within=scope)}"
