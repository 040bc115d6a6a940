"""`explain_fusion`: every place where a fused op could stand, and what became of it, and why.

    explanation = explain_fusion("model.py:classifier")
    print(explanation)
    explanation.counts["attention"]            # ops of the optimized graph, calls multiplied

The sites are those of the graph as it was declared or imported (`treadle.passes.fusion_sites`); what became of each is
read off the pass log by scope and source line, which a rewrite hands on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from treadle.artifacts import is_artifact
from treadle.compiling import checked_passes
from treadle.frontends.dsl import Model
from treadle.ir.composites import body_of
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph, Node
from treadle.ir.operation import Composite, find_op
from treadle.ir.ops.activated_products import ACTIVATIONS
from treadle.passes.fusion_sites import KINDS, Site, find_sites
from treadle.passes.manager import Optimized, Pass, PassManager
from treadle.passes.pass_log import Event, PassRecord
from treadle.passes.pipelines import DEFAULT
from treadle.reports import count_calls, count_run_ops
from treadle.resolving import resolve

FUSED, ALREADY, REFUSED, NEARLY, MISSED = "fused", "already", "refused", "nearly", "missed"
_TOLD = {
    ALREADY: "is one op already",
    REFUSED: "not fused",
    NEARLY: "not fused",
    MISSED: "not fused",
}
_NEAR_MISS = re.compile(r"(?P<matched>\d+ ops) matched; (?P<edge>(?:operand|attribute) \S+ of \S+): (?P<reason>.*)")
_NAMED_MATCH = re.compile(r"(?P<reason>.*); matched: (?P<matched>.*)", re.DOTALL)
_PLACES = 4
_ACTIVATIONS = f"{', '.join(ACTIVATIONS[:-1])} or {ACTIVATIONS[-1]}"
_FORMS = {
    "gate": f"act(x g) * (x u), both of one width, with {_ACTIVATIONS} for act",
    "epilogue": f"{_ACTIVATIONS} of the product, or of its sum with a bias",
    "scale": "the number times a product without a bias, or times a norm",
}
"""What the rules of a kind take, for who wrote something else."""


@dataclass(frozen=True)
class Verdict:
    """What became of one site, or of several alike in one block.

    kind      attention, normalization, ...: see `treadle.passes.fusion_sites`
    status    fused, already, refused (by a rule that recognised it), nearly (a pattern stopped half way) or missed
    op        what it is in the optimized graph, if it was fused or is one already
    rules     what fused it, or came nearest
    matched   the longest prefix that matched: ops by name, or how many
    edge      where the match stopped
    reason    why it is not fused
    hint      the smallest change that would let it be, where the rule can tell
    notes     what a rule said of a site that it did fuse
    places    "gpt2.py:41  h.0.attn", or the ONNX node's name; one for each site
    """

    kind: str
    status: str
    op: str = ""
    rules: tuple[str, ...] = ()
    matched: str = ""
    edge: str = ""
    reason: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        lists = {"rules": list(self.rules), "notes": list(self.notes), "places": list(self.places)}
        told = {k: v for k, v in {**vars(self), **lists}.items() if v}
        return {**told, "sites": len(self.places)}

    def lines(self) -> Iterator[str]:
        """A line for the verdict and its place, and one for each thing more that is known."""
        how = f"fused into {self.op} by {', '.join(self.rules)}" if self.status == FUSED else _TOLD[self.status]
        if self.status == ALREADY:
            how = f"{self.op} {how}"
        many = f"{len(self.places)} x " if len(self.places) > 1 else ""
        yield f"  {many}{self.kind:<13}  {how}    {self.places[0]}".rstrip()
        if self.places[1:]:
            more = f" and {len(self.places) - _PLACES} more" if len(self.places) > _PLACES else ""
            yield "    also at   " + "; ".join(self.places[1:_PLACES]) + more
        told = {"rule": ", ".join(self.rules) if self.status != FUSED else "", "matched": self.matched}
        told |= {"edge": self.edge, "why": self.reason, "try": self.hint}
        yield from (f"    {label:<8}  {text}" for label, text in told.items() if text)
        yield from (f"    note      {text}" for text in self.notes)


@dataclass(frozen=True)
class Block:
    """The verdicts on one distinct function's sites, and how often a run enters it."""

    function: str
    calls: int
    verdicts: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"function": self.function, "calls": self.calls, "sites": [v.as_dict() for v in self.verdicts]}


@dataclass(frozen=True)
class Explanation:
    """What became of every site of a model.

    counts    how many ops of each name a run of the optimized graph has, calls multiplied
    within    and how many that a larger fused op has taken in, by that op: {"gelu": {"activated_linear": 12}}
    expected  what was asked for with `--expect`: of these, both together
    """

    model: str
    blocks: tuple[Block, ...]
    counts: Mapping[str, int]
    within: Mapping[str, Mapping[str, int]]
    expected: Mapping[str, int]
    optimized: Optimized = field(repr=False)

    @property
    def met(self) -> bool:
        """Whether every expected count is what there is."""
        return all(self.found(op) == wanted for op, wanted in self.expected.items())

    def found(self, op: str) -> int:
        """How many ops of a name there are, on their own or within a larger fused op."""
        return self.counts.get(op, 0) + sum(self.within.get(op, {}).values())

    def as_dict(self) -> dict[str, Any]:
        expected = [{"op": o, "expected": n, "found": self.found(o)} for o, n in self.expected.items()]
        fused = {op: self.counts[op] for op in _fused_ops() if self.counts.get(op)}
        return {
            "model": self.model,
            "met": self.met,
            "expected": expected,
            "fused_ops": fused,
            "blocks": [block.as_dict() for block in self.blocks],
        }

    def __str__(self) -> str:
        sites = [(len(v.places), block.calls, v) for block in self.blocks for v in block.verdicts]
        run = sum(count * calls for count, calls, _ in sites)
        open_ = sum(count * calls for count, calls, v in sites if v.status not in (FUSED, ALREADY))
        lines = [f"{self.model}: {run} candidate site{'s' * (run != 1)} in a run, {open_} not fused"]
        for block in self.blocks:
            if block.verdicts:
                times = "once" if block.calls == 1 else f"{block.calls} times"
                called = f", called {times}" if block.function != "main" else ""
                lines += ["", f"{block.function}{called}", *(line for v in block.verdicts for line in v.lines())]
        fused = ", ".join(f"{self.counts[op]} {op}" for op in _fused_ops() if self.counts.get(op))
        lines += ["", f"a run has {fused or 'no fused op'}"]
        for op, wanted in self.expected.items():
            found = self.found(op)
            inside = "".join(f", {count} within {outer}" for outer, count in self.within.get(op, {}).items())
            said = "met" if found == wanted else f"NOT MET, there are {found}"
            lines.append(f"expected {op}={wanted}: {said}{inside}")
        return "\n".join(lines)


def _fused_ops() -> Iterator[str]:
    """Each once, with the last kind that has it."""
    ops = [op for _, made in KINDS.values() for op in made]
    return reversed(dict.fromkeys(reversed(ops)))


def explain_fusion(
    model: Model | Graph | str | Path,
    *,
    passes: Sequence[Pass] = DEFAULT,
    inputs: Sequence[str] | None = None,
    expect: Mapping[str, int] | None = None,
    certify: bool | None = None,
    **config: Any,
) -> Explanation:
    """Optimize what MODEL names, and say of every candidate site what became of it.

    model    as `treadle.compile` takes it
    expect   how many ops of a name a run of the optimized graph should have, those within a larger fused op included
    certify  try every rewrite on drawn values; one that fails is a refused site

    Raises what `compile` does for a model that cannot be read, UsageError for an artifact or a negative count,
    GraphError for an expected op that does not exist.
    """
    for op, count in (expect or {}).items():
        find_op(op)
        if count < 0:
            raise UsageError(f"a count is 0 or more, not {count}", received=f"{op}={count}")
    if is_artifact(model):
        raise UsageError(
            "an artifact holds what was compiled, not how", received=str(model), hint="explain the model it is made of"
        )
    pipeline = checked_passes(passes)
    resolved = resolve(model, inputs=inputs, **config)
    optimized = PassManager(pipeline, certify=certify).run(resolved.graph)
    calls = count_calls(optimized.source)
    verdicts: dict[str, list[Verdict]] = {name: [] for name in optimized.source.functions}
    for site, verdict in _judge(optimized):
        verdicts[site.function].append(verdict)
    blocks = tuple(Block(name, calls[name], _grouped(found)) for name, found in verdicts.items())
    counts, within = count_run_ops(optimized.graph), _count_within(optimized.graph)
    return Explanation(resolved.name, blocks, counts, within, dict(expect or {}), optimized)


def _count_within(graph: Graph) -> dict[str, dict[str, int]]:
    """How many fused ops a run computes as parts of larger ones, by their name and the larger one's."""
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
    """`attention=12`, ... as counts by op. Raises UsageError."""
    found = {}
    for text in texts:
        name, _, count = text.partition("=")
        if not name.strip() or not (count.strip().isascii() and count.strip().isdigit()) or len(count) > 12:
            raise UsageError("an expected count is OP=NUMBER", received=repr(text), hint="--expect attention=12")
        found[name.strip()] = int(count)
    return found


# -- from the log to verdicts ----------------------------------------------------------------------------------------

_Key = tuple[str, str, str]


def _key(event: Event) -> _Key:
    return event.function, event.scope, event.source


def _keys(site: Site) -> dict[_Key, set[str]]:
    """The places of a site's nodes, each with the ops there."""
    found: dict[_Key, set[str]] = {}
    for node in site.nodes:
        found.setdefault((site.function, node.scope, str(node.source or "")), set()).add(node.op.name)
    return found


def _judge(optimized: Optimized) -> list[tuple[Site, Verdict]]:
    """A verdict on every site; products of a gate or an epilogue that was not fused may be sites of another kind."""
    unfused: set[Node] = set()
    while True:
        judged = list(_judged(optimized, unfused))
        more = {s.anchor for s, v in judged if s.kind in ("gate", "epilogue") and v.status not in (FUSED, ALREADY)}
        if more <= unfused:
            return judged
        unfused |= more


def _judged(optimized: Optimized, unfused: Collection[Node]) -> Iterator[tuple[Site, Verdict]]:
    sites = find_sites(optimized.source, unfused)
    records = {kind: [r for r in optimized.log if r.name == name] for kind, (name, _) in KINDS.items()}
    told = {kind: _Told(kind, [s for s in sites if s.kind == kind], records[kind]) for kind in KINDS}
    there = {(f.name, n.scope, str(n.source or "")) for f, n in optimized.graph.walk()}
    for site in sites:
        verdict = told[site.kind].verdict(site)
        if verdict.status == MISSED:
            reason, hint = _why_missed(site, optimized, there)
            verdict = replace(verdict, reason=reason, hint=hint)
        yield site, verdict


class _Told:
    """What the pass of one kind said, each event given to one of the sites at its place."""

    def __init__(self, kind: str, sites: Sequence[Site], records: Sequence[PassRecord]) -> None:
        self.kind = kind
        self.keys = {site: _keys(site) for site in sites if site.op is None}
        self.at: dict[_Key, list[Site]] = {}
        for site, keys in self.keys.items():
            for key in keys:
                self.at.setdefault(key, []).append(site)
        self.matches = self._given([e for r in records for e in r.matches])
        self.refusals = self._given([e for r in records for e in r.refusals])
        self.near_misses = self._given([e for r in records for e in r.near_misses])

    def _given(self, events: Sequence[Event]) -> dict[Site, list[Event]]:
        found: dict[Site, list[Event]] = {}
        for event in events:
            near = self.at.get(_key(event), [])
            exact = [s for s in near if event.op in self.keys[s][_key(event)]]
            free = [s for s in exact or near if event.rule not in (e.rule for e in found.get(s, ()))]
            for site in free[:1]:
                found.setdefault(site, []).append(event)
        return found

    def verdict(self, site: Site) -> Verdict:
        places = (_place(site),)
        if site.op is not None:
            return Verdict(self.kind, ALREADY, site.op, places=places)
        matches = self.matches.get(site, [])
        refusals = self.refusals.get(site, [])
        rules = tuple(dict.fromkeys(e.rule for e in matches if not _is_tidying(e.rule)))
        if rules:
            notes = tuple(e.reason for e in refusals if e.rule not in rules or "rolled back" not in e.reason)
            return Verdict(self.kind, FUSED, _made(self.kind, rules), rules, notes=notes, places=places)
        if refusals:
            event = refusals[0]
            named = _NAMED_MATCH.fullmatch(event.reason)
            reason, matched = (named["reason"], named["matched"]) if named else (event.reason, "all of it")
            edge = f"{event.op} at {event.place}" if event.place != places[0] else event.op
            return Verdict(self.kind, REFUSED, "", (event.rule,), matched, edge, reason, event.hint, (), places)
        near = self.near_misses.get(site, [])
        if near:
            event = near[0]
            parts = _NEAR_MISS.fullmatch(event.reason)
            matched, edge, reason = (
                (parts["matched"], parts["edge"], parts["reason"]) if parts else ("", "", event.reason)
            )
            return Verdict(self.kind, NEARLY, "", (event.rule,), matched, edge, reason, event.hint, (), places)
        return Verdict(self.kind, MISSED, places=places)


def _is_tidying(rule: str) -> bool:
    return rule in ("identity-rearrange", "rearrange-of-rearrange")


def _made(kind: str, rules: Sequence[str]) -> str:
    """The op that a rule of this kind makes: the one whose name its own begins with, or the kind's only one."""
    ops = KINDS[kind][1]
    spelled = {op: op.replace("_", "-") for op in ops}
    named = [op for op in ops if any(rule == spelled[op] or rule.startswith(spelled[op] + "-") for rule in rules)]
    return max(named, key=len) if named else ops[0]


def _why_missed(site: Site, optimized: Optimized, there: set[_Key]) -> tuple[str, str]:
    """Why nothing was said of a site, and what would help."""
    name = KINDS[site.kind][0]
    if all(record.name != name for record in optimized.log):
        return f"the pipeline has no {name}", ""
    if not there.intersection(_keys(site)):
        return "other passes left nothing of it", ""
    around = f"what stands around the {site.anchor.op.name} is none of their forms"
    return f"no rule of {name} came near: {around}", _FORMS.get(site.kind, "")


def _place(site: Site) -> str:
    node = site.anchor
    return "  ".join(part for part in (str(node.source or ""), node.scope) if part) or site.function


def _grouped(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """Verdicts that differ in their places alone, as one; those that are not fused go first."""
    groups: dict[Verdict, list[str]] = {}
    for verdict in verdicts:
        edge = verdict.edge.partition(" at ")[0]
        groups.setdefault(replace(verdict, places=(), edge=edge), []).extend(verdict.places)
    ordered = sorted(groups, key=lambda v: v.status in (FUSED, ALREADY))
    return tuple(replace(verdict, places=tuple(groups[verdict])) for verdict in ordered)
