"""`follow(graph, axis)`: all uses of one axis in a graph.

An axis starts at a symbol ("S"), a label ("heads"), at ops that imply it in a graph without the label
(`treadle.ir.analysis.structural_axes`), or at a dimension of an input or parameter ("wte.weight[0]"). The axis
rule of each op maps the axis to dimensions of other values, forwards and backwards, into the functions of repeated
blocks and out again. A use other than mapping the axis is an **encounter** (`treadle.ir.analysis.encounters`). The
encounters determine three answers, each with its reasons:

    step    may the axis be computed a chunk at a time, as in generation?
    pack    may rows of different lengths be concatenated along it?
    split   may each device hold a part of it, and where must partial results be combined?

An axis is more than its size: two axes of size S stay separate unless some op maps one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from treadle.ir.analysis.axis_places import Place, dims_held, places_of
from treadle.ir.analysis.axis_tracing import Tracer, named_axes, ordered_values
from treadle.ir.analysis.encounters import (
    Combination,
    Encounter,
    Generated,
    Indexed,
    Kind,
    Paired,
    Reduced,
    Reordered,
    Resized,
    Scanned,
    SelfAttention,
    Verdict,
    Whole,
)
from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError, UsageError
from treadle.ir.graph import Graph, Node
from treadle.ir.operation import Composite
from treadle.ir.sizing.sizes import ONE
from treadle.ir.wording.checked_calls import with_checked_call, with_checked_methods


@with_checked_methods()
@dataclass(frozen=True)
class Following:
    """The uses of one axis of a graph.

    places      the places of the axis in the values of `main`
    encounters  uses by ops, also in callees, in program order
    """

    axis: str
    graph: Graph
    places: tuple[Place, ...]
    encounters: tuple[Encounter, ...]

    @property
    def parameters(self) -> dict[str, int]:
        """Full names of the weights that hold the axis, with the dimension."""
        return {p.value.name: p.dim for p in self.places if p.value.kind == "parameter"}

    @property
    def outputs(self) -> dict[str, int]:
        """Names of the outputs that hold the axis, with the dimension."""
        found = {p.value: p.dim for p in self.places}
        return {name: found[v] for name, v in self.graph.main.outputs.items() if v in found}

    def step(self) -> Verdict:
        """Return a verdict: true if a chunk of the axis can be computed from that chunk and a state. Every op must map
        the axis, be causal self-attention along it, or scan or generate it with a declared step.
        """
        against = tuple(e for e in self.encounters if not e.steps)
        return Verdict("stepped", self.axis, against)

    def pack(self) -> Verdict:
        """Return a verdict: true if rows of different lengths may be stored end to end along the axis. Reductions,
        scans and indexing then cover the tokens of one row, and self-attention runs row by row. Other pairs of
        positions forbid it. An op that needs the whole axis, other than for a reduction, forbids it too.
        """
        against = []
        for e in self.encounters:
            if not isinstance(e.kind, SelfAttention) or not e.kind.aligned:
                opened = [e] if e.node.op.pairs is not None else list(_opened(e))
                against += [inner for inner in opened if not inner.packs]
        return Verdict("packed", self.axis, tuple(against))

    def split(self) -> Verdict:
        """Return a verdict: true if the axis may be split among devices. The partial results of a reduction are
        combined by its reduction, lookups in a split table by a sum, and a scan by an offset from the preceding parts.
        Composites that need the whole axis are opened. Self-attention along the axis needs every pair, and forbids
        the split.
        """
        against: list[Encounter] = []
        combine: list[Combination] = []
        for e in self.encounters:
            for opened in [e] if isinstance(e.kind, SelfAttention) else _opened(e):
                match opened.kind:
                    case Reduced(monoid=monoid):
                        combine.append(Combination(opened, monoid))
                    case Indexed(is_kept=False):
                        combine.append(Combination(opened, "sum"))
                    case Scanned():
                        combine.append(Combination(opened, "scan"))
                    case Indexed() | Reordered():
                        pass
                    case Generated() if opened.steps:
                        pass
                    case Whole() | Generated() | Resized() | Paired():
                        against.append(opened)
                    case _:
                        assert_never(opened.kind)
        return Verdict("split", self.axis, tuple(against), tuple(combine))

    def __repr__(self) -> str:
        places, met = len(self.places), len(self.encounters)
        return (
            f"<axis {self.axis} of {self.graph.name}: in {places} value{'s' * (places != 1)}, "
            f"{met} encounter{'s' * (met != 1)}; see .step(), .pack() and .split()>"
        )

    def __str__(self) -> str:
        held = ", ".join(f"{n}[{d}]" for n, d in {**self.parameters, **self.outputs}.items())
        return "\n".join([f"{self.axis}: in {held or 'no weight or output'}", *(f"  {e}" for e in self.encounters)])


@with_checked_call()
def follow(graph: Graph, axis: str) -> Following:
    """Return all uses of an axis in a graph.

    axis is a symbol (`"S"`), a label (`"heads"`), or a dimension of an input or parameter of `main` (`"tokens[1]"`,
    `"wte.weight[0]"`). A compiled model or a declaration may be passed instead of its graph. Raises GraphError if there
    is no such axis.
    """
    graph = getattr(graph, "graph", graph)
    graph = graph() if callable(graph) else graph
    if not isinstance(graph, Graph):
        raise UsageError("follow takes a graph", received=f"{graph!r}"[:80], hint=f"t.follow(exe.graph, {axis!r})")
    tracer = Tracer(graph, axis)
    seeds = set(tracer.seeds())
    closure = tracer.close(graph.main, frozenset(seeds))
    if not closure.places:
        known = sorted(graph.symbols) + sorted(named_axes(graph))
        one_of = f"one of {', '.join(known)}, or a" if known else "a"
        values = [value.name for value in graph.main.arguments if value.type.rank]
        example = f" such as {axis if axis in values else values[0]}[0]" if values else ""
        raise GraphError(f"there is no axis {axis!r}", hint=f"{one_of} dimension{example}")
    order = {v: i for i, v in enumerate(ordered_values(graph.main))}
    places = sorted(closure.places, key=lambda p: (order[p.value], p.dim, str(p.inner)))
    outputs = [v for v in graph.main.outputs.values() if v.node is not None and dims_held(v, places) > 1]
    finals = [Encounter(v.node, Paired(in_output=True), v.node.scope) for v in outputs if v.node]
    return Following(axis, graph, tuple(places), (*_counted(closure.encounters), *finals))


# -- encounters ------------------------------------------------------------------------------------------------


def _opened(e: Encounter) -> Iterator[Encounter]:
    """Yield the encounter, or the encounters in the body of a composite that needs the whole axis."""
    op, kind = e.node.op, e.kind
    if not isinstance(kind, Whole) or not isinstance(op, Composite):
        yield e
        return
    types = [None if v is None else v.type for v in e.node.operands]
    body = body_of(op, types)
    application = op.apply(types)
    seeds: set[Place] = set()
    formals = iter(body.inputs)
    for dims in application.operands:
        if dims is None:
            continue
        formal = next(formals)
        seeds.update(places_of(application, formal, dims, kind.factor, ONE, application.dims[kind.factor].size))
    inner = Tracer(Graph(op.name), "").close(body, frozenset(seeds))
    for found in _counted(inner.encounters):
        for deeper in _opened(found):
            yield replace(deeper, within=e.node, scope=e.scope, count=e.count)


def _counted(encounters: Sequence[Encounter]) -> tuple[Encounter, ...]:
    """Merge encounters: an op in a function that is called several times counts as one encounter."""
    groups: dict[tuple[Node, Kind, Node | None], list[Encounter]] = {}
    for e in encounters:
        groups.setdefault((e.node, e.kind, e.within), []).append(e)
    return tuple(replace(group[0], count=len({e.scope for e in group})) for group in groups.values())
