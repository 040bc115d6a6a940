"""Verdicts on candidate sites of fused ops, from the events in the pass log.

An event names the nodes of the original graph that a rule replaced or examined (`treadle.passes.framework.lineage`). A
site belongs to the rule that replaced its anchor, even if the rule's own root is another node. If a pass does not
record which nodes it replaced, its event is assigned to a site with the same scope and source line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from treadle.ir.graph import Node, Value
from treadle.ir.ops.activated_products import ACTIVATIONS
from treadle.ir.ops.normalization import Softmax
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import Event, PassRecord
from treadle.passes.framework.pattern_search import Edge
from treadle.passes.pipelines import DEFAULT
from treadle.passes.sites.fusion_sites import KINDS, FusionSite, find_sites
from treadle.passes.sites.nearest_patterns import nearest_miss

FUSED, ALREADY, REFUSED, NEARLY, MISSED = STATUSES = ("fused", "already", "refused", "nearly", "missed")
UNFUSED = (REFUSED, NEARLY, MISSED)
_PLACES = 4
_ACTIVATIONS = f"{', '.join(ACTIVATIONS[:-1])} or {ACTIVATIONS[-1]}"
_FORMS = {
    "fuse-attention": "softmax(q k^T * scale + masks and biases) v; only moves and casts after the softmax",
    "fuse-normalization": "x / sqrt(mean(x^2) + eps), or the same of x - mean(x); eps is inside the root",
    "fuse-rotary": "x cos a + turned(x) sin a, where turned swaps the halves or the pairs of x and negates one of them",
    "fuse-residual-norm": "a norm of x + residual, both of one shape",
    "fuse-embedding-sum": "a sum of embeddings alone",
    "merge-projections": "linear or matmul of one value with several weights, all with or all without a bias",
    "fuse-gated-linear": f"act(x g) * (x u), both of one width, with {_ACTIVATIONS} for act",
    "fuse-activated-linear": f"{_ACTIVATIONS} of the product, or of its sum with a bias",
    "fold-scale": "the number times (`* (1 / n)` for a division) a product without a bias, or a norm",
}
"""The forms that the rules of each pass accept: a hint for sites written in another form."""


@dataclass(frozen=True)
class FusionVerdict:
    """The outcome of one site, or of several equal sites in one block.

    kind      attention, normalization, ...: see `treadle.passes.sites.fusion_sites`
    status    fused, already, refused (by a rule that recognized it), nearly (at least half of a pattern matched) or
              missed; then the rule is the nearest one
    op        the site's op in the optimized graph, if it was fused or was one op already
    rules     the rules that fused it, or came nearest
    matched   the ops that matched, by name, in the order in which the rule visited them; empty for a refused site that
              matched completely
    edge      where the match stopped: the op, for a product with its axes, or the op's operand or attribute
    at        the place of the edge, if it is not the site's own
    reason    why it is not fused
    hint      the smallest change that would allow the fusion, if the rule knows one; else the form that the pass
              accepts
    notes     remarks of a rule on a site that it fused
    places    "gpt2.py:41  h.0.attn", or the ONNX node's name; one for each site
    stop      the node of the original graph at which the match stopped, if it is known
    """

    kind: str
    status: str
    op: str = ""
    rules: tuple[str, ...] = ()
    matched: tuple[str, ...] = ()
    edge: str = ""
    at: str = ""
    reason: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    stop: Node | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        facts = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if v and k != "stop"}
        return {**facts, "sites": len(self.places)}

    def lines(self, width: int | None = None) -> Iterator[str]:
        """Yield a line for the verdict and its place, and a line for each further fact.

        Lines longer than `width` are wrapped between words and places. A place that does not fit after its verdict
        starts the next line.
        """
        how = {FUSED: f"fused into {self.op} by {', '.join(self.rules)}", ALREADY: f"{self.op} is one op already"}
        many = f"{len(self.places)} x " if len(self.places) > 1 else ""
        head, place = f"  {many}{self.kind:<13}  ", self.places[0]
        first = f"{head}{how.get(self.status, 'not fused')}    {place}".rstrip()
        if width is None or len(first) <= width:
            yield first
        else:
            yield from filled(head, how.get(self.status, "not fused").split(), " ", width)
            yield from filled(_label("from"), [place], "", width)
        if self.places[1:]:
            more = f" and {len(self.places) - _PLACES} more" if len(self.places) > _PLACES else ""
            *others, last = self.places[1:_PLACES]
            yield from filled(_label("also at"), [*(f"{other};" for other in others), last + more], " ", width)
        if self.status in UNFUSED:
            fields = {"rule": ", ".join(self.rules), "matched": self._matched(), "edge": self.edge}
            fields |= {"why": self.reason, "try": self.hint}
            for label, text in fields.items():
                if text:
                    yield from filled(_label(label), text.split(" "), " ", width)
                if label == "edge" and self.at:
                    yield from filled(_label("at"), [self.at], "", width)
        for note in self.notes:
            yield from filled(_label("note"), note.split(" "), " ", width)

    def _matched(self) -> str:
        return ", ".join(self.matched) or ("all of it" if self.status == REFUSED else "")


def _label(label: str) -> str:
    return f"    {label:<8}  "


def filled(start: str, parts: Sequence[str], between: str, width: int | None) -> Iterator[str]:
    """Yield `parts` after `start`, in as many lines as needed. Further lines are indented to the first part."""
    line = start + parts[0]
    for part in parts[1:]:
        if width is not None and len(line) + len(between) + len(part) > width:
            yield line.rstrip()
            line = " " * len(start) + part
        else:
            line += between + part
    yield line.rstrip()


def judge(optimized: Optimized) -> list[tuple[FusionSite, FusionVerdict]]:
    """Return a verdict on every site. If a gate or an epilogue was not fused, its products are judged as sites of other
    kinds.
    """
    unfused: set[Node] = set()
    while True:
        judged = list(_judged(optimized, unfused))
        more = {s.anchor for s, v in judged if s.kind in ("gate", "epilogue") and v.status in UNFUSED}
        if more <= unfused:
            return judged
        unfused |= more


def _judged(optimized: Optimized, unfused: Collection[Node]) -> Iterator[tuple[FusionSite, FusionVerdict]]:
    sites = find_sites(optimized.source, unfused)
    records = {kind: [r for r in optimized.log if r.name == name] for kind, (name, _) in KINDS.items()}
    nodes = [node for _, node in optimized.graph.walk()]
    after: dict[Node, list[int]] = {}  # for each original node, the positions of the nodes that it became
    for at, node in enumerate(nodes):
        for original in optimized.lineage.of((node,)):
            after.setdefault(original, []).append(at)
    by_kind = {kind: _KindEvents(kind, [s for s in sites if s.kind == kind], records[kind]) for kind in KINDS}
    for site in sites:
        verdict = by_kind[site.kind].verdict(site)
        if verdict.status == MISSED:
            became = sorted({at for original in site.nodes for at in after.get(original, ())})
            verdict = _why_missed(verdict, site, optimized, [nodes[at] for at in became])
        yield site, verdict


_Key = tuple[str, str, str]


class _KindEvents:
    """The events of the pass for one kind of site, by site."""

    def __init__(self, kind: str, sites: Sequence[FusionSite], records: Sequence[PassRecord]) -> None:
        self.kind = kind
        self.sites = [site for site in sites if site.op is None]
        self.anchored: dict[Node, list[FusionSite]] = {}
        self.at: dict[_Key, dict[FusionSite, set[str]]] = {}
        for site in self.sites:
            for node in site.anchors:
                self.anchored.setdefault(node, []).append(site)
            for node in site.nodes:
                key = (site.function, node.scope, str(node.source or ""))
                self.at.setdefault(key, {}).setdefault(site, set()).add(node.op.name)
        self.matches = self._given([e for r in records for e in r.matches], taken=True)
        self.refusals = self._given([e for r in records for e in r.refusals], taken=False)
        self.near_misses = self._given([e for r in records for e in r.near_misses], taken=False)

    def _given(self, events: Sequence[Event], *, taken: bool) -> dict[FusionSite, list[Event]]:
        """Assign events to sites. An event belongs to the sites whose anchor it contains, else to the site that shares
        most nodes.

        taken   True if the rule replaced the nodes: then an event belongs to a site only if it contains the anchor
        """
        found: dict[FusionSite, list[Event]] = {}
        beside: list[Event] = []
        for event in events:
            held = dict.fromkeys(site for node in event.original_nodes for site in self.anchored.get(node, ()))
            if event.original_nodes and not held and not taken:
                beside.append(event)
            for site in held if event.original_nodes else self._at_its_place(event, found):
                found.setdefault(site, []).append(event)
        for event in beside:
            for site in self._nearest(event):
                found.setdefault(site, []).append(event)
        return found

    def _at_its_place(self, event: Event, found: Mapping[FusionSite, Sequence[Event]]) -> list[FusionSite]:
        """Return the first site at an event's scope and line that has no event of the same rule yet; first among those
        that contain the event's op.
        """
        near = self.at.get((event.function, event.scope, event.source), {})
        exact = [site for site, ops in near.items() if event.op in ops]
        return [s for s in exact or near if event.rule not in (e.rule for e in found.get(s, ()))][:1]

    def _nearest(self, event: Event) -> list[FusionSite]:
        """Return the site that shares the most nodes with an event; the first of several."""
        held = max(self.sites, key=lambda site: len(event.original_nodes.intersection(site.nodes)), default=None)
        return [held] if held is not None and event.original_nodes.intersection(held.nodes) else []

    def verdict(self, site: FusionSite) -> FusionVerdict:
        places = (_place(site),)
        if site.op is not None:
            return FusionVerdict(self.kind, ALREADY, site.op, places=places)
        matches = self.matches.get(site, [])
        refusals = self.refusals.get(site, [])
        fused = [e for e in matches if not _is_tidying(e.rule)]
        if fused:
            rules = tuple(dict.fromkeys(e.rule for e in fused))
            notes = tuple(e.description for e in refusals if e.rule not in rules or "rolled back" not in e.reason)
            return FusionVerdict(self.kind, FUSED, _made(self.kind, fused), rules, notes=notes, places=places)
        for status, events in ((REFUSED, refusals), (NEARLY, self.near_misses.get(site, []))):
            if events:
                event = events[0]
                at = event.place if event.place != places[0] else ""
                stop = _stop(event, site)
                edge = event.edge or (event.op if stop is None else _shown_axes(stop, site.anchor))
                hint = event.hint or _FORMS.get(KINDS[self.kind][0], "")
                details = (event.matched, edge, at, event.reason, hint)
                return FusionVerdict(self.kind, status, "", (event.rule,), *details, places=places, stop=stop)
        return FusionVerdict(self.kind, MISSED, places=places)


def _stop(event: Event, site: FusionSite) -> Node | None:
    """Return the only node of an event or of its site with the op and the place of the event, or None."""
    place = event.op, event.scope, event.source
    nodes = event.original_nodes.union(site.nodes)
    found = [node for node in nodes if (node.op.name, node.scope, str(node.source or "")) == place]
    return found[0] if len(found) == 1 else None


def _shown_axes(node: Node, anchor: Node) -> str:
    """Return the name of an op; for a product also its axis rule and the axes over which it sums.

    If the product reads the softmax of the site, the text also says whether it sums over the axis of the softmax.
    """
    if not node.is_contraction:
        return node.op.name
    rule = node.op.axis_rule([None if value is None else value.type.rank for value in node.operands])
    operands, _, result = rule.partition("->")
    axes = [part.split() for part in operands.split(",")]
    sums = [n for n in dict.fromkeys(chain(*axes)) if sum(n in part for part in axes) > 1 and n not in result.split()]
    said = f"{node.op.name} {rule}, which sums over {', '.join(sums)}"
    for value, names in zip(node.operands, axes, strict=False):
        if value is not None and value.node is anchor and isinstance(anchor.op, Softmax):
            rank = value.type.rank
            from_end = anchor.op.axis % rank - rank  # an ellipsis stands for axes at the front
            axis = names[from_end] if -from_end <= len(names) else "..."
            if axis != "..." and axis not in sums:
                said += f", not over {axis}, the axis of the softmax"
    return said


def _is_tidying(rule: str) -> bool:
    return rule in ("identity-rearrange", "rearrange-of-rearrange")


def _made(kind: str, fused: Sequence[Event]) -> str:
    """Return the last op of this kind that these events produced. If there is none, return the last op, such as the
    matmul of a scaled product.
    """
    ops = KINDS[kind][1]
    of_kind = [op for event in fused for op in event.created_ops if op in ops]
    made = [op for event in fused for op in event.created_ops]
    return (of_kind or made or list(ops))[-1]


def _why_missed(verdict: FusionVerdict, site: FusionSite, optimized: Optimized, nodes: Sequence[Node]) -> FusionVerdict:
    """Return the verdict on a site without an event, with the nearest pattern and the edge at which it fails.

    nodes   the nodes of the result that do the work of the site
    """
    name = KINDS[site.kind][0]
    if all(record.name != name for record in optimized.log):
        return replace(verdict, reason=f"the pipeline has no {name}")
    if not optimized.covered.intersection(site.anchors):
        return replace(verdict, reason="other passes removed it")
    form = _FORMS.get(name, "")
    nearest = nearest_miss(name, nodes)
    if nearest is None or _is_merged_later(nearest[1].edge, name):
        nearest = nearest_miss(name, site.nodes) or nearest
    if nearest is None:
        around = f"no pattern of {name} begins with an op of the site around the {site.anchor.op.name}"
        return replace(verdict, reason=around, hint=form)
    rule, miss = nearest
    place = _place_of(miss.edge.node)
    return replace(
        verdict,
        rules=(rule.name,),
        matched=tuple([node.op.name for node in miss.nodes]),
        edge=str(miss.edge),
        at=place if place != _place(site) else "",
        reason=miss.reason,
        hint=form,
        stop=miss.edge.node if miss.edge.node in site.nodes else None,
    )


def _is_merged_later(edge: Edge, name: str) -> bool:
    """Return True if the value at an edge is computed by an op that a pass after `name` built."""
    found = edge.found
    node = found.node if isinstance(found, Value) else None
    order = [each.name for each in DEFAULT]
    later = order[order.index(name) + 1 :] if name in order else []
    return node is not None and any(made in later and node.op.name in ops for made, ops in KINDS.values())


def _place(site: FusionSite) -> str:
    return _place_of(site.anchor) or site.function


def _place_of(node: Node) -> str:
    return "  ".join(part for part in (str(node.source or ""), node.scope) if part)


def grouped(verdicts: Sequence[FusionVerdict]) -> tuple[FusionVerdict, ...]:
    """Join verdicts that differ only in their places. Sites that are not fused come first."""
    groups: dict[FusionVerdict, list[FusionVerdict]] = {}
    for verdict in verdicts:
        groups.setdefault(replace(verdict, places=(), at=""), []).append(verdict)
    made = []
    for alike, each in groups.items():
        edges = {verdict.at for verdict in each}
        at = edges.pop() if len(edges) == 1 else ""
        made.append(replace(alike, places=tuple([place for v in each for place in v.places]), at=at))
    return tuple(sorted(made, key=lambda verdict: verdict.status not in UNFUSED))
