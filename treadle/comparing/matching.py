"""The nodes of two runs that correspond to each other.

Nodes are matched by the first of these criteria that applies:

    lineage   both compute corresponding nodes of their declared graphs
    exact     equal scope, op, attributes and operands
    hash      equal op, attributes and types, and the same for all nodes that they depend on
    scope     equal scope and op, in order
    layer     equal op in the same layer of a stack, in order, if both sides have the same number of unmatched ones
    group     one node on one side, and all unmatched nodes in the same scope on the other, with results of one type

A match may have several nodes on a side: a fusion, or a decomposition. Scopes are compared after
`treadle.comparing.scope_alignment`. If one side lacks a layer, the nodes of that layer have no match.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from treadle.comparing.builds import Build
from treadle.comparing.run_nodes import GraphRun, RunNode, parts_of, run_of
from treadle.comparing.scope_alignment import ScopeAlignment
from treadle.ir.hashing import op_key, type_key

Side = Sequence[RunNode]
_Ids = Sequence[frozenset[int]]


@dataclass(frozen=True, eq=False)
class NodeMatch:
    """Nodes of a and nodes of b that correspond, and the criterion: lineage, exact, hash, scope, layer or group."""

    a: tuple[RunNode, ...]
    b: tuple[RunNode, ...]
    by: str


@dataclass(frozen=True, eq=False)
class Matching:
    """All matches of two runs, in the order of b.

    removed  nodes of a without a match
    added    nodes of b without a match
    scopes   the alignment of their scopes
    """

    a: GraphRun
    b: GraphRun
    matches: tuple[NodeMatch, ...]
    removed: tuple[RunNode, ...]
    added: tuple[RunNode, ...]
    scopes: ScopeAlignment

    def flipped(self) -> Matching:
        """Return the same matching with b as the first side."""
        matches = tuple([NodeMatch(m.b, m.a, m.by) for m in self.matches])
        return Matching(self.b, self.a, matches, self.added, self.removed, self.scopes.flipped())

    @property
    def is_related(self) -> bool:
        """True if the runs have something in common: a node that reads a weight or a result is matched by lineage,
        exact or hash, or at least a quarter of the smaller run's nodes are matched.
        """
        strong = [m for m in self.matches if m.by in ("lineage", "exact", "hash")]
        if any(read[0] in ("result", "parameter") for m in strong for node in m.b for read in node.reads):
            return True
        return 4 * sum(len(m.b) for m in self.matches) >= max(1, min(len(self.a.nodes), len(self.b.nodes)))


def match_builds(a: Build, b: Build) -> tuple[Matching, Matching]:
    """Match the declared graphs of two builds. Then match the compared graphs, with their lineage. Return both
    matchings.
    """
    sources = run_of(a.source), run_of(b.source)
    scopes = ScopeAlignment.of(sources[0].nodes, sources[1].nodes)
    declared = match_runs(*sources, scopes)
    identities: list[dict[RunNode, int]] = [{}, {}]
    for number, match in enumerate(declared.matches):
        for known, nodes in zip(identities, (match.a, match.b), strict=True):
            known.update(dict.fromkeys(nodes, number))
    runs = run_of(a.graph), run_of(b.graph)
    ids = [
        _origins(build, run, source, known)
        for build, run, source, known in zip((a, b), runs, sources, identities, strict=True)
    ]
    return declared, match_runs(*runs, scopes, (ids[0], ids[1]))


def _origins(build: Build, run: GraphRun, source: GraphRun, numbers: Mapping[RunNode, int]) -> _Ids:
    """Return for each node of a run the numbers of the declared nodes that it computes."""
    places = source.by_place()
    found = []
    for each in run.nodes:
        origins = [places.get((each.path, node)) for node in build.origins(each.node)]
        found.append(frozenset(numbers[node] for node in origins if node is not None and node in numbers))
    return found


def match_runs(a: GraphRun, b: GraphRun, scopes: ScopeAlignment, ids: tuple[_Ids, _Ids] | None = None) -> Matching:
    """Match the nodes of two runs.

    ids  for each node of both runs, the numbers of the declared nodes that it computes; nodes that share a number
         correspond
    """
    matches: list[NodeMatch] = []
    left = [dict.fromkeys(a.nodes), dict.fromkeys(b.nodes)]

    def add(ours: Iterable[RunNode], theirs: Iterable[RunNode], by: str) -> None:
        match = NodeMatch(tuple(ours), tuple(theirs), by)
        matches.append(match)
        for each in match.a:
            del left[0][each]
        for each in match.b:
            del left[1][each]

    if ids is not None:
        for group in _by_lineage(a, b, *ids):
            add(*group, "lineage")
    back = scopes.flipped()
    alone = {each for each in a.nodes if back.in_a(each.scope) is None}
    in_a = {each: scopes.in_a(each.scope) for each in b.nodes} | {each: each.scope for each in a.nodes}
    alone.update(each for each in b.nodes if in_a[each] is None)
    hashes = _Hashes()
    keys: dict[str, Callable[[RunNode, GraphRun], Hashable]] = {
        "exact": lambda each, run: (in_a[each], op_key(each.node.op), _operands(each, run, in_a, scopes)),
        "hash": hashes.of,
        "scope": lambda each, run: (in_a[each], each.op),
    }
    for by, key in keys.items():
        held = _grouped([each for each in left[0] if each not in alone], a, key)
        for same, theirs in _grouped([each for each in left[1] if each not in alone], b, key).items():
            for one, other in zip(held.get(same, ()), theirs, strict=False):
                add((one,), (other,), by)
    ours_by_layer = _grouped([each for each in left[0] if each not in alone], a, lambda e, _: _layer(e, in_a))
    for layer, theirs in _grouped([e for e in left[1] if e not in alone], b, lambda e, _: _layer(e, in_a)).items():
        ours = ours_by_layer.get(layer, [])
        if layer is not None and len(ours) == len(theirs):
            for one, other in zip(ours, theirs, strict=True):
                add((one,), (other,), "layer")
    ours_by_scope = _grouped(left[0], a, lambda each, _: in_a[each])
    for scope, theirs in _grouped(left[1], b, lambda each, _: in_a[each]).items():
        ours = ours_by_scope.get(scope, [])
        if (
            scope not in ("", None)
            and ours
            and 1 in (len(ours), len(theirs))
            and _types(ours[-1]) == _types(theirs[-1])
        ):
            add(ours, theirs, "group")
    ordered = sorted(matches, key=lambda match: match.b[0].number)
    return Matching(a, b, tuple(ordered), tuple(left[0]), tuple(left[1]), scopes)


def _grouped(
    nodes: Iterable[RunNode], run: GraphRun, key: Callable[[RunNode, GraphRun], Hashable]
) -> dict[Hashable, list[RunNode]]:
    found: dict[Hashable, list[RunNode]] = {}
    for each in nodes:
        found.setdefault(key(each, run), []).append(each)
    return found


def _layer(each: RunNode, in_a: Mapping[RunNode, str | None]) -> tuple[tuple[str, ...], str] | None:
    """Return the scope of a node's layer, by its name in build `a`, and the node's op; None outside of layers."""
    parts = parts_of(in_a[each] or "")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else (parts[: at + 1], each.op)


def _types(each: RunNode) -> tuple[str, ...]:
    return tuple([type_key(v.type) for v in each.node.results])


def _operands(
    each: RunNode, run: GraphRun, in_a: Mapping[RunNode, str | None], scopes: ScopeAlignment
) -> tuple[Hashable, ...]:
    """Describe a node's operands: for a result, the producer's scope and op; for a weight or an input, its name."""
    found: list[Hashable] = []
    for kind, name, index in each.reads:
        if kind == "result":
            producer = run.nodes[int(name)]
            found.append((in_a[producer], producer.op, index))
        elif kind in ("parameter", "state"):
            # a weight of b is compared under its name in a
            found.append((kind, str(name) if in_a[each] == each.scope else scopes.in_a(str(name)), index))
        else:
            found.append((kind, name, index))
    return tuple(found)


class _Hashes:
    """Structural hashes of nodes: op, attributes, types, and the hashes of all operands. Of a weight, only the type
    counts.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[RunNode, int] = {}

    def of(self, each: RunNode, run: GraphRun) -> int:
        """Return a number that is equal for nodes of equal structure, even in different runs."""
        if each not in self._known:
            for node in run.nodes:  # producers come first
                self._known[node] = self._number(node, run)
        return self._known[each]

    def _number(self, each: RunNode, run: GraphRun) -> int:
        reads: list[Hashable] = []
        for (kind, name, index), value in zip(each.reads, each.node.operands, strict=True):
            if kind == "result":
                reads.append((self._known[run.nodes[int(name)]], index))
            elif kind in ("parameter", "state") and value is not None:
                reads.append((kind, type_key(value.type)))
            else:
                reads.append((kind, name))
        key = (op_key(each.node.op), tuple(reads), _types(each))
        return self._numbers.setdefault(key, len(self._numbers))


_Groups = list[tuple[tuple[RunNode, ...], tuple[RunNode, ...]]]


def _by_lineage(a: GraphRun, b: GraphRun, ours: _Ids, theirs: _Ids) -> _Groups:
    """Return groups of nodes that compute common declared nodes. Equal ops that compute exactly the same declared nodes
    are matched in pairs; every other node joins the node of the other side with which it shares most.
    """
    alike: list[dict[Hashable, list[RunNode]]] = [{}, {}]
    for side, (run, ids) in enumerate(((a, ours), (b, theirs))):
        for each, work in zip(run.nodes, ids, strict=True):
            if work:
                alike[side].setdefault((work, each.op), []).append(each)
    pairs: _Groups = []
    for key, nodes in alike[1].items():
        found = alike[0].get(key, [])
        if len(found) == len(nodes):
            pairs += [((one,), (other,)) for one, other in zip(found, nodes, strict=True)]
    done = [{one.number for (one,), _ in pairs}, {other.number for _, (other,) in pairs}]
    left = [
        {number: work for number, work in enumerate(ids) if work and number not in done[side]}
        for side, ids in enumerate((ours, theirs))
    ]
    groups: dict[tuple[int, int], tuple[list[RunNode], list[RunNode]]] = {}
    roots = _joined(*left)
    for side, run in enumerate((a, b)):
        for number in left[side]:
            groups.setdefault(roots[side, number], ([], []))[side].append(run.nodes[number])
    return pairs + [(tuple(one), tuple(other)) for one, other in groups.values() if one and other]


def _joined(
    ours: Mapping[int, frozenset[int]], theirs: Mapping[int, frozenset[int]]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Join every node with the nearest node of the other side. Return for each node, as (side, number), the
    representative of its group.

    A declared node that many nodes share, such as a mask that all layers read, counts little.
    """
    sides = ours, theirs
    holders: list[dict[int, list[int]]] = [{}, {}]
    for side, works in enumerate(sides):
        for number, work in works.items():
            for identity in work:
                holders[side].setdefault(identity, []).append(number)

    def nearest(side: int, number: int) -> int | None:
        shared: dict[int, float] = {}
        for identity in sorted(sides[side][number]):
            others = holders[1 - side].get(identity, [])
            for other in others:
                shared[other] = shared.get(other, 0.0) + 1 / (len(others) * len(holders[side][identity]))
        sizes = {other: len(sides[1 - side][other] | sides[side][number]) for other in shared}
        return max(shared, key=lambda other: (shared[other], -sizes[other], -other)) if shared else None

    parents: dict[tuple[int, int], tuple[int, int]] = {}

    def root(of: tuple[int, int]) -> tuple[int, int]:
        while of in parents:
            of = parents[of]
        return of

    chosen: set[int] = set()
    for side in (1, 0):
        for number in sides[side]:
            found = None if side == 0 and number in chosen else nearest(side, number)
            if found is not None:
                chosen.update([found] * side)
                one, other = root((side, number)), root((1 - side, found))
                if one != other:
                    parents[one] = other
    return {(side, number): root((side, number)) for side in (0, 1) for number in sides[side]}
