"""`explain_fusion`: every candidate site of a fused op, its outcome and the reason.

    explanation = explain_fusion("model.py:classifier")
    print(explanation)
    explanation.counts["attention"]            # number of attention ops in a run of the optimized graph

The sites are found in the graph as declared or imported (`treadle.passes.sites.fusion_sites`). The outcome of each site
is read from the pass log (`treadle.explaining.fusion_verdicts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.artifacts.reading import is_artifact
from treadle.explaining.fusion_verdicts import STATUSES, UNFUSED, FusionVerdict, filled, grouped, judge
from treadle.files.shown_names import printable
from treadle.ir.analysis.run_counts import count_calls, count_run_ops
from treadle.ir.composites import body_of
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.op_registry import find_op
from treadle.ir.operation import Composite
from treadle.passes.framework.manager import Optimized
from treadle.passes.sites.fusion_sites import KINDS
from treadle.program.flag_values import parse_assignments
from treadle.program.program import Program
from treadle.program.source import AnyModel


@dataclass(frozen=True)
class Block:
    """The verdicts on the sites of one function, and the number of times that a run calls the function."""

    function: str
    calls: int
    verdicts: tuple[FusionVerdict, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"function": self.function, "calls": self.calls, "sites": [v.as_dict() for v in self.verdicts]}


@dataclass(frozen=True)
class Explanation:
    """The outcome of every site of a model.

    counts    number of ops of each name in a run of the optimized graph, with calls expanded
    within    number of ops that are part of a larger fused op, by that op: {"gelu": {"activated_linear": 12}}
    expected  the counts of `--expect`, which are compared with the sum of `counts` and `within`
    """

    model: str
    blocks: tuple[Block, ...]
    counts: Mapping[str, int]
    within: Mapping[str, Mapping[str, int]]
    expected: Mapping[str, int]
    optimized: Optimized = field(repr=False)

    @property
    def met(self) -> bool:
        """True if every expected count equals the actual count."""
        return all(self.found(op) == wanted for op, wanted in self.expected.items())

    @property
    def sites(self) -> dict[str, int]:
        """Number of sites of each status in a run, with calls expanded. Each site is counted once."""
        found = dict.fromkeys(STATUSES, 0)
        for block in self.blocks:
            for verdict in block.verdicts:
                found[verdict.status] += len(verdict.places) * block.calls
        return found

    def found(self, op: str) -> int:
        """Return the number of ops of this name, alone or within a larger fused op."""
        return self.counts.get(op, 0) + sum(self.within.get(op, {}).values())

    def as_dict(self) -> dict[str, Any]:
        expected = [{"op": o, "expected": n, "found": self.found(o)} for o, n in self.expected.items()]
        fused = {op: self.counts[op] for op in _fused_ops() if self.counts.get(op)}
        return {
            "model": self.model,
            "met": self.met,
            "expected": expected,
            "sites": self.sites,
            "fused_ops": fused,
            "blocks": [block.as_dict() for block in self.blocks],
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """Return the report in lines of up to `width` characters. Paths and words are not broken. None: no limit."""
        sites = self.sites
        run, open_ = sum(sites.values()), sum(sites[status] for status in UNFUSED)
        lines = [f"{self.model}: {run} candidate site{'s' * (run != 1)} in a run, {open_} not fused"]
        for block in self.blocks:
            if block.verdicts:
                times = "once" if block.calls == 1 else f"{block.calls} times"
                called = f", called {times}" if block.function != "main" else ""
                lines += ["", f"{block.function}{called}", *(line for v in block.verdicts for line in v.lines(width))]
        fused = [f"{self.counts[op]} {op}" for op in _fused_ops() if self.counts.get(op)] or ["no fused op"]
        lines += ["", *filled("a run has ", [*(f"{each}," for each in fused[:-1]), fused[-1]], " ", width)]
        for op, wanted in self.expected.items():
            found = self.found(op)
            inside = "".join(f", {count} within {outer}" for outer, count in self.within.get(op, {}).items())
            said = "met" if found == wanted else f"NOT MET, there are {found}"
            lines.append(f"expected {op}={wanted}: {said}{inside}")
        return "\n".join(lines)


def _fused_ops() -> Iterator[str]:
    """Yield the name of each fused op once, in the position of the last kind that lists it."""
    ops = [op for _, made in KINDS.values() for op in made]
    return reversed(dict.fromkeys(reversed(ops)))


def explain_fusion(model: AnyModel, *, expect: Mapping[str, int] | None = None, **options: Any) -> Explanation:
    """Optimize the model that MODEL names, and report the outcome of every candidate site.

    model    as in `treadle.compile`
    expect   number of ops of a name that a run of the optimized graph should have, alone or within a larger fused op
    options  as in `treadle.compile`; if a rewrite fails its certification, its site counts as refused

    Raises as `compile` does for a model that cannot be read, UsageError for an artifact or a negative count, GraphError
    for an expected op that does not exist.
    """
    for op, count in (expect or {}).items():
        find_op(op)
        if count < 0:
            raise UsageError(f"a count is 0 or more, not {count}", received=f"{op}={count}")
    if is_artifact(model):
        raise UsageError(
            "an artifact does not record how it was compiled",
            received=str(model),
            hint="explain the model that it was compiled from",
        )
    program = Program.of(model, "explain fusion", **options).optimize()
    resolved, optimized = program.resolved, program.optimized
    return fusion_of(resolved.name, optimized, dict(expect or {}))


def fusion_of(name: str, optimized: Optimized, expect: Mapping[str, int]) -> Explanation:
    """Report the outcome of every candidate site of a graph that passes have optimized."""
    calls = count_calls(optimized.source)
    verdicts: dict[str, list[FusionVerdict]] = {each: [] for each in optimized.source.functions}
    for site, verdict in judge(optimized):
        verdicts[site.function].append(verdict)
    blocks = tuple(Block(function, calls[function], grouped(found)) for function, found in verdicts.items())
    counts, within = count_run_ops(optimized.graph), count_within(optimized.graph)
    return Explanation(name, blocks, counts, within, expect, optimized)


def count_within(graph: Graph) -> dict[str, dict[str, int]]:
    """Return the number of fused ops in a run that are part of larger ones, by their name and the larger op's name."""
    ops, calls = set(_fused_ops()), count_calls(graph)
    found: dict[str, dict[str, int]] = {}
    for function, node in graph.walk():
        if node.op.name not in ops or not isinstance(node.op, Composite):
            continue
        for inner in body_of(node.op, [None if v is None else v.type for v in node.operands]).nodes:
            if inner.op.name in ops:
                held = found.setdefault(inner.op.name, {})
                held[node.op.name] = held.get(node.op.name, 0) + calls[function.name]
    return found


def parse_expected(texts: Sequence[str]) -> dict[str, int]:
    """Parse texts such as `attention=12` into expected counts by op. Raises UsageError for any other form, and for an
    op with two counts.
    """
    for text in texts:
        name, _, count = text.partition("=")
        if not name.strip() or not (count.strip().isascii() and count.strip().isdigit()) or len(count) > 12:
            hint = f"--expect {printable(name.strip())}=12" if name.strip() else "--expect attention=12"
            raise UsageError("an expected count must be OP=NUMBER", received=repr(text), hint=hint)
    return {op: int(count) for op, count in parse_assignments(texts, "--expect 1", "an op").items()}
