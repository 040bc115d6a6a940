"""`explain_layouts`: the layout of each weight for a backend, the derived weights, and the reasons.

    print(explain_layouts("gpt2", backend="tvm"))

The report describes the graph after the backend's passes. A block's weights are listed once, for its first call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.artifacts.reading import is_artifact, open_artifact
from treadle.backends.made_weights import Recipe, recipes_of
from treadle.backends.staged import StagedBackend
from treadle.ir.analysis.run_counts import count_calls
from treadle.ir.builder import describe_source
from treadle.ir.errors import UsageError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.transforms.fixing import bounded
from treadle.passes.framework.manager import Optimized
from treadle.program.backend_choice import check_backend, choose_backend
from treadle.program.budgets import budget_of
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.reporting.counts import human


@dataclass(frozen=True)
class WeightLayout:
    """A weight as a function reads it.

    name     the function's name for the weight
    type     its type, as text
    layout   the name of its layout, such as "row-major"
    bytes    its bytes in that layout; None if its size is known only at a call
    made     the expression by which `bind` derives it; empty for a weight that is read as provided
    readers  the ops that read it, each with line and scope
    """

    name: str
    type: str
    layout: str
    bytes: int | None
    made: str
    readers: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "layout": self.layout,
            "bytes": self.bytes,
            "made": self.made or None,
            "readers": list(self.readers),
        }


@dataclass(frozen=True)
class Layouts:
    """The weights of each function of a graph, as a backend reads them."""

    model: str
    backend: str
    blocks: Mapping[str, tuple[int, tuple[WeightLayout, ...]]]
    """For each function, the number of times that a run calls it, and its weights."""
    as_they_came: int
    """Bytes of the weights that are read as provided."""
    made: int
    """Bytes of the weights that `bind` derives."""

    def as_dict(self) -> dict[str, Any]:
        blocks = [
            {"function": name, "calls": calls, "weights": [w.as_dict() for w in weights]}
            for name, (calls, weights) in self.blocks.items()
        ]
        return {
            "model": self.model,
            "backend": self.backend,
            "bytes": {"as_they_came": self.as_they_came, "made": self.made},
            "blocks": blocks,
        }

    def __str__(self) -> str:
        came, made = human(self.as_they_came, "B"), human(self.made, "B")
        lines = [f"{self.model} for {self.backend}: {came} of weights are read as provided, {made} are derived by bind"]
        for name, (calls, weights) in self.blocks.items():
            if not weights:
                continue
            lines += ["", name if name == "main" else f"{name}, called {calls} times"]
            widths = [max(len(row) for row in column) for column in zip(*map(_cells, weights), strict=True)]
            for weight in weights:
                cells = [cell.ljust(width) for cell, width in zip(_cells(weight), widths, strict=True)]
                lines.append(f"  {'  '.join(cells)}  {weight.readers[0] if weight.readers else 'unused'}")
                lines += [f"    = {weight.made}"] if weight.made else []
                lines += [f"    {reader}" for reader in weight.readers[1:]]
        return "\n".join(line.rstrip() for line in lines)


def _cells(weight: WeightLayout) -> tuple[str, ...]:
    return weight.name, weight.type, weight.layout, "" if weight.bytes is None else human(weight.bytes, "B")


def explain_layouts(model: AnyModel, **options: Any) -> Layouts:
    """Describe how a backend reads every weight of the model that MODEL names; options as in `treadle.compile`.

    Raises as `compile` does; UsageError for a backend without passes of its own.
    """
    chosen = CompileOptions.of("explain layouts", options)
    backend, name, lowered = lowered_for(model, chosen)
    return layouts_of(name, backend.name, lowered.graph)


def lowered_for(model: AnyModel, options: CompileOptions) -> tuple[StagedBackend, str, Optimized]:
    """Return the backend, the model's name, and the graph after all passes, including passes for a memory budget.

    Raises as `compile` does; UsageError for a backend without passes of its own.
    """
    check_backend(options.backend)
    name, optimized = optimized_for(model, options)
    backend = choose_backend(options.backend, optimized, options.where).backend
    if not isinstance(backend, StagedBackend):
        raise UsageError(f"backend {options.backend} has no passes of its own to explain", hint="numpy, torch or tvm")
    budget = budget_of(options.memory, options.sizes, optimized)
    if budget is not None:
        optimized = bounded(optimized, budget.sizes)
    return backend, name, backend.lower(optimized, options.where, budget=budget, donate=options.donate)


def optimized_for(model: AnyModel, options: CompileOptions) -> tuple[str, Graph]:
    """Return the name and the optimized graph of a model, or of an artifact, which has been optimized when it was
    compiled.

    Raises as `compile` does; UsageError for options that would change an artifact's graph.
    """
    if not is_artifact(model):
        program = Program(model, options).optimize()
        resolved, optimized = program.resolved, program.optimized
        return resolved.name, optimized.graph
    options.refuse_for_artifact(model, also=("cache",))
    held = open_artifact(str(model), limits=options.limits)
    return held.name, held.optimized.graph


def layouts_of(name: str, backend: str, graph: Graph) -> Layouts:
    """Describe the layouts of the weights of a lowered graph."""
    made, calls, passed = recipes_of(graph), count_calls(graph), passed_weights(graph)
    blocks = {}
    for function in graph.needed_by(graph.main):
        uses = function.uses()
        outputs = set(function.outputs.values())
        weights = tuple(_lying(v, uses, outputs, made, passed) for v in _weights(function, uses, outputs))
        blocks[function.name] = calls[function.name], weights
    main = graph.main.parameters
    return Layouts(
        name,
        backend,
        blocks,
        sum(_bytes(v) or 0 for n, v in main.items() if n not in made),
        sum(_bytes(v) or 0 for n, v in main.items() if n in made),
    )


_Uses = Mapping[Value, Sequence[tuple[Node, int]]]


def _weights(function: Function, uses: _Uses, outputs: set[Value]) -> list[Value]:
    """Return the weights that a function reads itself. A weight that it passes to a call is listed in the called
    function.
    """

    def is_read(value: Value) -> bool:
        return value in outputs or any(node.op.callee is None for node, _ in uses.get(value, ()))

    return [value for value in function.parameters.values() if is_read(value)]


def passed_weights(graph: Graph) -> dict[Value, tuple[str, str]]:
    """Map each weight of a block to the parameter of `main` that the block's first call passes, and the scope of that
    call.
    """
    found = {v: (name, "") for name, v in graph.main.parameters.items()}
    for function in reversed(graph.needed_by(graph.main)):
        for node in function.nodes:
            callee = graph.callee(node)
            if callee is None:
                continue
            for formal, actual in zip(callee.arguments, node.operands, strict=True):
                if actual in found and formal not in found and actual is not None:
                    name, scope = found[actual]
                    found[formal] = name, ".".join(filter(None, (scope, node.scope)))
    return found


def _lying(
    value: Value,
    uses: _Uses,
    outputs: set[Value],
    made: Mapping[str, Recipe],
    passed: Mapping[Value, tuple[str, str]],
) -> WeightLayout:
    name, scope = passed.get(value, ("", ""))
    recipe = made.get(name)
    recipe_text = recipe.expression(within=scope) if recipe is not None and recipe.nodes else ""
    readers = []
    decoded = [(node, uses.get(node.result, ())) for node, _ in uses.get(value, ()) if node.op.decodes]
    blocks = {reader for _, readers in decoded for reader, _ in readers}  # these nodes unpack the blocks
    for node, _ in [use for use in uses.get(value, ()) if not use[0].op.decodes] + [u for _, us in decoded for u in us]:
        reader = node.op.name if node.op.callee is None else f"call of {node.op.callee}"
        reader += " in blocks" * (node in blocks)
        readers.append(f"{reader}  {describe_source(node.source, node.scope) or ''}".rstrip())
    if value in outputs:
        readers.append("an output")
    layout = str(value.layout) if value.layout is not None else "row-major"
    return WeightLayout(value.name, str(value.type), layout, _bytes(value), recipe_text, tuple(dict.fromkeys(readers)))


def _bytes(value: Value) -> int | None:
    held = value.type.storage_type
    elements = held.elements if value.layout is None else value.layout.elements(held.shape)
    return None if elements.symbols else elements.evaluate({}) * held.dtype.bytes
