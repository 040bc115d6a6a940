"""`compare`: the differences between two builds, as values, as text and as JSON.

    found = compare(open_build("gpt2"), open_build("gpt2", quantize="int8-weights"))
    print(found)
    found.quantity("peak").b               # bytes

Everything is derived from the graphs, the pass log and the storage plan. No weight is read, and nothing is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from treadle.comparing.builds import Build
from treadle.comparing.changed_kernels import KernelCounts, SlowKernel, kernel_counts, slow_kernels
from treadle.comparing.changed_nodes import NodeChange, NodeGroup, node_changes, node_groups
from treadle.comparing.changed_weights import WeightChange, weight_bits, weight_changes
from treadle.comparing.fusion_losses import LostFusion, lost_fusions
from treadle.comparing.matching import Matching, match_builds
from treadle.comparing.run_nodes import RunNode
from treadle.explaining.fusion import count_within
from treadle.explaining.memory import Alive, MemoryReport
from treadle.files.shown_names import on_one_line, printable
from treadle.ir.analysis.cost import graph_cost, parameter_bytes
from treadle.ir.analysis.run_counts import count_run_ops
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import Type
from treadle.program.budgets import choose_sizes
from treadle.reporting.counts import counted, human, sizes_text

Number = int | Fraction

QUANTITIES: Mapping[str, str] = {
    "ops": "ops in a run",
    "added": "ops that only b has",
    "removed": "ops that only a has",
    "changed": "matched ops that differ",
    "lost": "fusions of a that b lacks",
    "peak": "bytes alive at the peak",
    "flops": "floating-point operations of a run",
    "bytes": "bytes that the ops of a run read and write",
    "weights": "bytes of all weights",
    "bits": "mean bits per weight",
    "widened": "weights that take more bits in b",
    "kernels": "kernel calls in a run, with backend tvm",
    "generic": "those that run element by element",
}
"""The quantities of a comparison, by name. A count of differences has no value in a."""

COUNTS = ("added", "removed", "changed", "lost", "widened")
"""The quantities that count differences."""

_UNITS = {"peak": "B", "flops": "FLOPs", "bytes": "B", "weights": "B"}
_ALIVE = 5
_LONGEST = 2_000


@dataclass(frozen=True)
class Quantity:
    """A quantity of both builds.

    name  a name of `QUANTITIES`
    a, b  its values: a number of ops, bytes, operations or bits. `a` is None for a count of differences; both are None
          if the backend does not determine the quantity
    """

    name: str
    a: Number | None
    b: Number | None

    @property
    def is_equal(self) -> bool:
        """True if both builds have the same value, or a count of differences is 0. Also True if a value is unknown."""
        if self.name in COUNTS:
            return not self.b
        return None in (self.a, self.b) or self.a == self.b

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON, and their ratio if there is one."""
        values = {"a": _plain(self.a), "b": _plain(self.b)}
        return {**values, "ratio": float(Fraction(self.b) / self.a)} if self.a and self.b is not None else values

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The cells of a table row: the name, both values, and the change."""
        change = ""
        if self.a is not None and self.b is not None and self.a != self.b:
            ratio = f"{float(Fraction(self.b) / self.a):.4g}x" if self.a else "1x"
            is_count = self.name not in _UNITS and self.name != "bits"
            change = f"{self.b - self.a:+,}" if is_count or ratio == "1x" else ratio
        return self.name, _text(self.name, self.a), _text(self.name, self.b), change


def _plain(value: Number | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return value.numerator if value.denominator == 1 else float(value)


def _text(name: str, value: Number | None) -> str:
    if value is None:
        return ""
    if name in _UNITS:
        return human(float(value), _UNITS[name])
    return f"{value:,}" if isinstance(value, int) else f"{float(value):.4g}"


@dataclass(frozen=True, eq=False)
class BuildComparison:
    """The differences between build a and build b.

    sizes       the sizes of symbolic axes at which quantities are evaluated
    quantities  each of `QUANTITIES`
    ops         for each op of a run, its number in a and in b; `within` counts ops that are part of larger fused ops
    kernels     for each kernel of a run, its number of calls in a and in b; empty if a library chooses them in one
    matching    the nodes of the compared graphs that correspond, and the nodes without a match
    added       the nodes that only b has, in groups; `removed`: the nodes that only a has
    changes     differences between matched nodes
    lost        fusions of a that b lacks, with the reasons; `gained`: fusions of b that a lacks
    weights     weights that differ
    slow        ops that run element by element in b only
    ports       the inputs and outputs of a that b lacks, and those of b that a lacks, with their types
    grown       storages that are alive at the peak of b, but not at the peak of a, the largest first
    """

    a: Build
    b: Build
    sizes: Mapping[str, int]
    quantities: Mapping[str, Quantity]
    ops: Mapping[str, tuple[int, int]]
    within: tuple[Mapping[str, int], Mapping[str, int]]
    kernels: Mapping[str, tuple[int, int]]
    matching: Matching
    added: tuple[NodeGroup, ...]
    removed: tuple[NodeGroup, ...]
    changes: tuple[NodeChange, ...]
    lost: tuple[LostFusion, ...]
    gained: tuple[LostFusion, ...]
    weights: tuple[WeightChange, ...]
    slow: tuple[SlowKernel, ...]
    ports: tuple[list[str], list[str]]
    grown: tuple[Alive, ...]

    @property
    def is_related(self) -> bool:
        """True if the builds have something in common: see `Matching.is_related`."""
        return self.matching.is_related

    @property
    def differs(self) -> bool:
        """True if anything differs."""
        parts = (self.added, self.removed, self.changes, self.lost, self.gained, self.weights, self.slow)
        return (
            any(parts)
            or self.ports != ([], [])
            or any(a != b for a, b in self.kernels.values())
            or not all(each.is_equal for each in self.quantities.values())
        )

    def quantity(self, name: str) -> Quantity:
        """Return a quantity by its name. For an op's name: the number of such ops in a run, including those that are
        part of larger fused ops.
        """
        if name in self.quantities:
            return self.quantities[name]
        counts = [self.ops.get(name, (0, 0))[side] + self.within[side].get(name, 0) for side in (0, 1)]
        return Quantity(name, *counts)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON. In `matches` and `unmatched`, a node is given by its function and its position
        there.
        """
        sides = {side: _side_facts(build) for side, build in (("a", self.a), ("b", self.b))}
        return {
            **sides,
            "sizes": dict(self.sizes),
            "related": self.is_related,
            "differs": self.differs,
            "quantities": {name: each.as_dict() for name, each in self.quantities.items()},
            "ops": {op: {"a": a, "b": b} for op, (a, b) in self.ops.items() if a != b},
            "ports": dict(zip(("a", "b"), self.ports, strict=True)),
            "kernels": {name: {"a": a, "b": b} for name, (a, b) in self.kernels.items() if a != b},
            "added": [each.as_dict() for each in self.added],
            "removed": [each.as_dict() for each in self.removed],
            "changes": [each.as_dict() for each in self.changes],
            "lost_fusions": [each.as_dict() for each in self.lost],
            "gained_fusions": [each.as_dict() for each in self.gained],
            "weights": [each.as_dict() for each in self.weights],
            "element_by_element": [each.as_dict() for each in self.slow],
            "alive_at_peak": [each.as_dict() for each in self.grown],
            "matches": list(self._match_facts()),
            "unmatched": {"a": _places(self.matching.removed), "b": _places(self.matching.added)},
        }

    def _match_facts(self) -> Iterator[dict[str, Any]]:
        """Yield every distinct match of nodes, with the number of times that it occurs in a run."""
        counts: dict[tuple[Any, ...], int] = {}
        for match in self.matching.matches:
            sides = [tuple([(e.function, e.index) for e in nodes]) for nodes in (match.a, match.b)]
            key = (*sides, match.by)
            counts[key] = counts.get(key, 0) + 1
        for (ours, theirs, by), count in counts.items():
            yield {"a": [list(each) for each in ours], "b": [list(each) for each in theirs], "by": by, "count": count}

    def __str__(self) -> str:
        return "\n".join(_shown(line) for line in self._lines())

    def _lines(self) -> Iterator[str]:
        at = f" at {sizes_text(self.sizes)}" if self.sizes else ""
        names = [printable(each.name) for each in (self.a, self.b)]
        if not self.is_related:
            yield f"{names[0]} and {names[1]} have nothing in common: no op of one corresponds to an op of the other"
            return
        if not self.differs:
            ops = counted(int(self.quantities["ops"].b or 0), "op")
            yield f"no difference between {names[0]} and {names[1]}: {ops}{at}"
            return
        yield f"a  {names[0]}, {self.a.backend}"
        yield f"b  {names[1]}, {self.b.backend}"
        yield ""
        rows = [("", "a", "b", ""), *(q.cells for q in self.quantities.values() if q.b is not None and q.a is not None)]
        widths = [max(len(row[at]) for row in rows) for at in range(3)]
        for row in rows:
            cells = f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}"
            about = f"   {QUANTITIES[row[0]]}" if row[0] else f"   {at.strip()}"
            yield f"  {cells:<{sum(widths) + 16}}{about}".rstrip()
        counts = {"ops": self.ops, "kernels": self.kernels}
        deltas = {what: [f"{b - a:+d} {n}" for n, (a, b) in of.items() if a != b] for what, of in counts.items()}
        if any(deltas.values()):
            yield from ("", *(f"{what} {', '.join(each)}" for what, each in deltas.items() if each))
        for title, groups in (("added", self.added), ("removed", self.removed)):
            layers = [each for each in groups if each.is_layer]
            if groups:
                rest = sum(sum(each.ops.values()) for each in groups if not each.is_layer)
                parts = [counted(len(layers), "layer")] * bool(layers) + [counted(rest, "op")] * bool(rest)
                yield from ("", f"{' and '.join(parts)} {title}", *(f"  {each}" for each in groups))
        for title, ports in zip(("a", "b"), self.ports, strict=True):
            yield from _section(f"inputs and outputs of {title} only", ports)
        yield from _section("changed", [str(each) for each in self.changes])
        for title, fusions in (("lost in b", self.lost), ("lacking in a, with the reason there", self.gained)):
            if fusions:
                count = sum(len(each.scopes) for each in fusions)
                yield from ("", f"{counted(count, 'fusion')} {title}")
                for each in fusions:
                    yield from each.text()
        yield from _section("weights", [str(each) for each in self.weights])
        yield from _section("element by element in b only", [str(each) for each in self.slow])
        alive = [
            f"{each.name} of {each.function}: {each.bytes:,} bytes, {each.why}  {each.line}" for each in self.grown
        ]
        yield from _section("alive at the peak of b only", alive)


def _shown(line: str) -> str:
    """Return a line that may quote names from a file: escaped, and truncated if it is very long."""
    text = on_one_line(line[:_LONGEST])
    return text if len(line) <= _LONGEST else f"{text}... ({len(line):,} characters)"


def _section(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield from ("", title, *(f"  {line}".rstrip() for line in lines))


def _places(nodes: Iterable[RunNode]) -> list[list[str | int]]:
    """Return the distinct nodes of a graph, each as its function and its position there."""
    return [list(place) for place in dict.fromkeys((each.function, each.index) for each in nodes)]


def _other_ports(a: Graph, b: Graph) -> tuple[list[str], list[str]]:
    """Return the inputs and outputs of each graph that the other one lacks, with their types. Equal ones in another
    order are all listed.
    """
    mine, theirs = [
        [_port("input", v.name, v.type) for v in graph.main.inputs]
        + [_port("output", name, v.type) for name, v in graph.main.outputs.items()]
        for graph in (a, b)
    ]
    if sorted(mine) == sorted(theirs):
        return (mine, theirs) if mine != theirs else ([], [])
    return [each for each in mine if each not in theirs], [each for each in theirs if each not in mine]


def _port(kind: str, name: str, type: Type) -> str:
    return f"{kind} {name}: {type.dtype}[{', '.join(map(str, type.shape))}]"


def _side_facts(build: Build) -> dict[str, Any]:
    return {
        "name": build.name,
        "model": build.graph.name,
        "backend": build.backend,
        "target": str(build.target),
        "pass": build.stage or None,
    }


def compare(a: Build, b: Build, *, sizes: Mapping[str, int] | None = None) -> BuildComparison:
    """Compare two builds at the given sizes of symbolic axes, by default 1 for a batch and 128 for others.

    Raises UsageError for an axis that neither build has, and for a size outside an axis's bounds.
    """
    chosen = _common_sizes(a.graph, b.graph, sizes or {})
    at = [{name: chosen[name] for name in each.graph.symbols} for each in (a, b)]
    declared, matching = match_builds(a, b)
    changes = node_changes(matching)
    lost = lost_fusions(a, b, declared, matching)
    gained = lost_fusions(b, a, declared.flipped(), matching.flipped())
    weights = weight_changes(a, b, declared.scopes)
    memory = [each.memory(known) for each, known in zip((a, b), at, strict=True)]
    kernels = [kernel_counts(each) for each in (a, b)]
    counts = [count_run_ops(each.graph) for each in (a, b)]
    costs = [graph_cost(each.graph, known) for each, known in zip((a, b), at, strict=True)]
    differences = {
        "added": len(matching.added),
        "removed": len(matching.removed),
        "changed": sum(len(each.scopes) for each in changes),
        "lost": sum(len(each.scopes) for each in lost),
        "widened": sum(len(each.names) for each in weights if each.is_wider),
    }
    pairs: dict[str, list[Number | None]] = {
        "ops": [each.total() for each in counts],
        "peak": [None if each is None else each.peak for each in memory],
        "flops": [each.flops for each in costs],
        "bytes": [each.bytes for each in costs],
        "weights": [parameter_bytes(each.graph) for each in (a, b)],
        "bits": [weight_bits(each) for each in (a, b)],
        "kernels": [None if each is None else sum(each.kernels.values()) for each in kernels],
        "generic": [None if each is None else each.element_by_element for each in kernels],
    }
    quantities = {
        name: Quantity(name, None, differences[name]) if name in differences else Quantity(name, *pairs[name])
        for name in QUANTITIES
    }
    return BuildComparison(
        a,
        b,
        chosen,
        quantities,
        {op: (counts[0][op], counts[1][op]) for op in {**counts[0], **counts[1]}},
        (_within(a.graph), _within(b.graph)),
        _kernel_pairs(*kernels),
        matching,
        node_groups(matching.added, matching.b.nodes, declared.scopes.in_a),
        node_groups(matching.removed, matching.a.nodes, declared.scopes.flipped().in_a),
        changes,
        lost,
        gained,
        weights,
        slow_kernels(a, b, declared.scopes),
        _other_ports(a.graph, b.graph),
        _grown(*memory),
    )


def _kernel_pairs(a: KernelCounts | None, b: KernelCounts | None) -> dict[str, tuple[int, int]]:
    if a is None or b is None:
        return {}
    return {n: (a.kernels.get(n, 0), b.kernels.get(n, 0)) for n in {**a.kernels, **b.kernels}}


def _within(graph: Graph) -> Mapping[str, int]:
    return {op: sum(held.values()) for op, held in count_within(graph).items()}


def _grown(before: MemoryReport | None, after: MemoryReport | None) -> tuple[Alive, ...]:
    """Return the largest storages that are alive at the later peak, but not at the earlier one with the same size.
    Empty if the peak did not grow.
    """
    if before is None or after is None or after.peak <= before.peak:
        return ()
    known = Counter((each.why, each.line, each.bytes) for each in before.alive)
    new = [each for each in after.alive if not known[each.why, each.line, each.bytes]]
    return tuple(new[:_ALIVE])


def _common_sizes(a: Graph, b: Graph, requested_sizes: Mapping[str, int]) -> dict[str, int]:
    """Return sizes for the symbols of both graphs. If a symbol is in both, its default is the smaller of the two
    defaults.
    """
    unknown = [name for name in requested_sizes if name not in a.symbols and name not in b.symbols]
    if unknown:
        known = ", ".join({**a.symbols, **b.symbols})
        raise UsageError(
            f"neither model has a symbolic axis {', '.join(map(printable, unknown))}",
            hint=f"one of {known}" if known else "no sizes: all axes have fixed sizes",
        )
    first, second = (choose_sizes(g, {n: s for n, s in requested_sizes.items() if n in g.symbols}) for g in (a, b))
    sizes = {n: min(first.get(n, second.get(n, 0)), second.get(n, first.get(n, 0))) for n in {**first, **second}}
    for graph in (a, b):
        choose_sizes(graph, {n: s for n, s in sizes.items() if n in graph.symbols})  # within the bounds of both
    return sizes
