"""Fusions that one build has and another lacks, each with the reason why it was not applied.

The sites of fused ops and their verdicts are the same as in `treadle explain MODEL fusion`
(`treadle.explaining.fusion_verdicts`). A site of a corresponds to the site of b of the same kind with a corresponding
anchor. If there is none, it corresponds to a site of the same kind in the corresponding scope.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from treadle.comparing.builds import Build
from treadle.comparing.folded_names import few_names
from treadle.comparing.matching import Matching, NodeMatch
from treadle.comparing.run_nodes import RunNode
from treadle.explaining.fusion_verdicts import ALREADY, FUSED, MISSED, UNFUSED, FusionVerdict, judge
from treadle.ir.composites import body_of
from treadle.ir.operation import Composite
from treadle.passes.sites.fusion_sites import KINDS

_UNRECORDED = "an artifact does not record why"


@dataclass(frozen=True)
class LostFusion:
    """Equal sites that are fused in a, but not in b.

    kind     attention, normalization, ...: see `treadle.passes.sites.fusion_sites`
    op       the fused op in a
    verdict  the verdict in b: the rule, the matched ops, the reason and the hint
    scopes   the scopes of the sites in b, and `lines`, the distinct lines of user code
    """

    kind: str
    op: str
    verdict: FusionVerdict
    scopes: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The reason why the sites are not fused in b."""
        return self.verdict.reason

    def as_dict(self) -> dict[str, Any]:
        """Return the fusion as JSON."""
        verdict = {k: v for k, v in self.verdict.as_dict().items() if k not in ("kind", "places", "sites", "at")}
        return {"kind": self.kind, "op": self.op, "scopes": list(self.scopes), "lines": list(self.lines), **verdict}

    def text(self) -> list[str]:
        """Return lines of text: the sites, then the rule, the reason and the hint."""
        places = "  ".join([", ".join(self.lines), few_names(self.scopes)]).strip()
        lines = [f"  {len(self.scopes)} {self.op}  {places}"]
        facts = {"rule": ", ".join(self.verdict.rules), "matched": ", ".join(self.verdict.matched)}
        facts |= {"edge": self.verdict.edge, "why": self.reason, "try": self.verdict.hint}
        return lines + [f"    {label:<7}  {text}" for label, text in facts.items() if text]


def lost_fusions(a: Build, b: Build, declared: Matching, matching: Matching) -> tuple[LostFusion, ...]:
    """Return the fusions of a that b lacks, the most frequent first. Equal fusions of several layers share an entry.

    declared  the matching of the declared graphs, a first
    matching  the matching of the compared graphs, a first
    """
    ours, theirs = _sites(a, declared.a.nodes), _sites(b, declared.b.nodes)
    in_a = {node: match.a for match in declared.matches for node in match.b}
    open_sites: dict[tuple[str, object], list[tuple[RunNode, FusionVerdict]]] = {}
    settled: set[tuple[str, object]] = set()
    for node, verdict in theirs:
        keys: list[tuple[str, object]] = [(verdict.kind, each) for each in in_a.get(node, ())]
        if verdict.status not in UNFUSED:
            settled.update(keys)
            continue
        for key in (*keys, (verdict.kind, declared.scopes.in_a(node.scope))):
            open_sites.setdefault(key, []).append((node, verdict))
    groups: dict[tuple[object, ...], list[RunNode]] = {}
    ops = {each.op for each in matching.a.nodes}  # an artifact does not record which ops a pass created
    counted: set[tuple[RunNode, str]] = set()
    for node, verdict in ours:
        if verdict.status not in (FUSED, ALREADY) or (verdict.kind, node) in settled:
            continue
        found = open_sites.get((verdict.kind, node)) or open_sites.get((verdict.kind, node.scope), [])
        at = next((site for site in found if (site[0], verdict.kind) not in counted), None)
        if at is None:
            continue
        counted.add((at[0], verdict.kind))
        why = at[1]
        if why.status == MISSED and not b.recorded:
            why = replace(why, reason=_UNRECORDED)
        op = verdict.op if a.recorded else next((op for op in KINDS[verdict.kind][1] if op in ops), verdict.op)
        groups.setdefault((verdict.kind, op, replace(why, places=(), at="")), []).append(at[0])
    kinds = {kind for kind, *_ in groups}
    for match in () if b.is_backend_stage else matching.matches:  # a backend replaces fused ops that it lacks
        for kind, op in _fused_only_in_a(match):
            if kind not in kinds:  # b has no such site
                why = FusionVerdict(kind, MISSED, reason=_broken_form(match, matching))
                groups.setdefault((kind, op, why), []).append(match.b[0])
    lost = [_fusion(key, nodes) for key, nodes in groups.items()]
    return tuple(sorted(lost, key=lambda each: -len(each.scopes)))


def _fused_only_in_a(match: NodeMatch) -> Iterator[tuple[str, str]]:
    """Yield the kind and the fused op of each node of a whose match in b has no op of that kind, neither alone nor
    inside a larger fused op.
    """
    theirs = {each.op for each in match.b}
    for each in match.b:
        if isinstance(each.node.op, Composite):
            types = [None if v is None else v.type for v in each.node.operands]
            theirs.update(inner.op.name for inner in body_of(each.node.op, types).nodes)
    kinds = {op: (kind, ops) for kind, (_, ops) in KINDS.items() for op in ops}
    for each in match.a:
        kind, ops = kinds.get(each.op, ("", ()))
        if kind and theirs.isdisjoint(ops) and len(match.b) >= len(match.a):
            yield kind, each.op


def _broken_form(match: NodeMatch, matching: Matching) -> str:
    """Describe the nodes of b that replace a fused op of a, and the nodes next to them that only b has."""
    ops = ", ".join(each.op for each in match.b)
    own = {each.number for each in match.b}
    read = {int(name) for each in match.b for kind, name, _ in each.reads if kind == "result"}
    near = [
        each.op
        for each in matching.added
        if each.number in read or any(kind == "result" and name in own for kind, name, _ in each.reads)
    ]
    beside = f"; {', '.join(dict.fromkeys(near))} is next to them in one build only" if near else ""
    return f"the ops in its place have none of the fusable forms: {ops}{beside}"


def _fusion(key: tuple[Any, ...], nodes: Iterable[RunNode]) -> LostFusion:
    kind, op, verdict = key
    found = list(nodes)
    lines = tuple(dict.fromkeys(each.line for each in found if each.line))
    return LostFusion(kind, op, verdict, tuple([each.scope for each in found]), lines)


def _sites(build: Build, nodes: Iterable[RunNode]) -> list[tuple[RunNode, FusionVerdict]]:
    """Return the anchor and the verdict of every fusion site in a run of the declared graph."""
    places: dict[object, list[RunNode]] = {}
    for each in nodes:
        places.setdefault(each.node, []).append(each)
    found = [(node, verdict) for site, verdict in judge(build.optimized) for node in places.get(site.anchor, ())]
    return sorted(found, key=lambda each: each[0].number)
