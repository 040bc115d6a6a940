"""Makes a sharding plan: walks a graph once, and takes for each node the way of splitting it that costs least.

The ways are not listed by op. Operands that are split already, and wishes for operands and results, suggest factors of
the node's axis rule; each part of the mesh takes one of those suggested, or none, or passes terms of a sum through.
What that needs and gives is `transfer.requirement`. Its cost in seconds is the work of the node on one device, the
steps that bring operands to their placements, and for terms of a sum the all-reduce to come. So where two suggestions
contend for one mesh axis, bytes decide and not the order.

A value may be had in several placements: whatever it was brought to before costs nothing the next time. Terms of a sum
are combined before they are read, unless it costs less to pass them on. A function is planned once for each way in
which its arguments lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from treadle.ir.axes import Application, Role
from treadle.ir.composites import body_of
from treadle.ir.errors import PassError, SizeError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite, names_operand
from treadle.ir.placement.machines import Machine
from treadle.ir.placement.mesh import Mesh, SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement
from treadle.ir.types import Type
from treadle.passes.sharding.conversions import PlacementStep, conversion, is_possible
from treadle.passes.sharding.costs import Costs, HeldArgument
from treadle.passes.sharding.factors import Share
from treadle.passes.sharding.plan import Move, PlannedFunction, PlannedNode, ShardingPlan
from treadle.passes.sharding.reasons import TermsOrigin, origin_of, reason_for
from treadle.passes.sharding.suggestions import Suggestion, choices, suggested
from treadle.passes.sharding.transfer import Requirement, may_split, requirement
from treadle.passes.sharding.wanted import Wanted

GATHERED_WEIGHT = 1e6
"""Seconds that it counts to gather a weight that was asked to be split: no other cost outweighs it."""
MOST_WAYS = 4096
"""How many ways of splitting one node are compared; the rest are not looked at."""


def plan_sharding(
    graph: Graph,
    mesh: Mesh,
    wanted: Wanted,
    machine: Machine,
    sizes: Mapping[str, int],
    *,
    recipe: str = "",
    axes: Mapping[str, str] | None = None,
    stored: SubAxes = (),
) -> ShardingPlan:
    """Plan a graph whose only entry is `main`.

    wanted  the placements of weights, and wishes for other values
    stored  parts of the mesh along which weights are stored in parts and gathered for use
    sizes   of the symbols, for which costs are compared

    Raises PassError for a graph with states or several entries, SizeError for a symbol without a size.
    """
    if len(graph.entry_names) > 1 or graph.states:
        raise PassError("what is sharded is a graph with one entry and no states", received=repr(graph))
    missing = sorted(set(graph.symbols) - set(sizes))
    if missing:
        raise SizeError(f"costs need a size for {', '.join(missing)}", hint=f"{missing[0]}=128")
    planner = _Planner(graph, mesh, wanted, machine, sizes)
    takes = [HeldArgument(MeshPlacement.whole(v.type.rank)) for v in graph.main.inputs]
    takes += [HeldArgument(wanted.weights[name], stored, is_weight=True) for name in graph.main.parameters]
    planner.function(graph.main, tuple(takes))
    return ShardingPlan(
        graph,
        mesh,
        recipe,
        dict(axes or {}),
        mesh.text_of(stored),
        dict(wanted.weights),
        tuple(planner.made.values()),
        (*wanted.notes, *dict.fromkeys(planner.notes)),
        dict(sizes),
        machine,
    )


_Conversion = tuple[Value, MeshPlacement, MeshPlacement, tuple[PlacementStep, ...]]
"""A value, where it lies, where it is to lie, and the steps between."""


@dataclass(frozen=True)
class _Way:
    """One way to compute a node, and what it costs in seconds."""

    seconds: float
    shares: dict[str, Share]
    needed: Requirement
    moves: list[_Conversion]
    body: PlannedFunction | None = None
    ring: SubAxes = ()


class _Planner:
    """Plans functions, each once for a way of calling it."""

    def __init__(self, graph: Graph, mesh: Mesh, wanted: Wanted, machine: Machine, sizes: Mapping[str, int]) -> None:
        self.graph, self.mesh, self.wanted, self.sizes = graph, mesh, wanted, sizes
        self.costs = Costs(mesh, machine, sizes)
        self.made: dict[object, PlannedFunction] = {}
        self.notes: list[str] = []

    def function(self, function: Function, takes: tuple[HeldArgument, ...]) -> PlannedFunction:
        """The plan of a function of the graph whose arguments come so."""
        key = (function.name, takes)
        if key not in self.made:
            name, number = function.name, 1
            while any(planned.name == name for planned in self.made.values()):
                number += 1
                name = f"{function.name}_{number}"
            made = _Body(self, function, takes, self.wanted).planned(name)
            self.made[key] = made
        return self.made[key]


class _Body:
    """A function while it is planned.

    had      the placements in which each value can be had, in the order in which it got there
    held     how arguments come, and what is made of one weight alone, which is held as it is
    called   of what is made of a weight, and of a body's weights: what the weight is called
    origins  of values that are terms of a sum: who made them so
    """

    def __init__(self, planner: _Planner, function: Function, takes: tuple[HeldArgument, ...], wanted: Wanted) -> None:
        self.planner, self.function, self.takes, self.wanted = planner, function, takes, wanted
        self.had: dict[Value, list[MeshPlacement]] = {}
        self.held: dict[Value, HeldArgument] = {}
        self.called: dict[Value, str] = {}
        self.origins: dict[Value, TermsOrigin] = {}

    def planned(self, name: str, *, terms_allowed: bool = False) -> PlannedFunction:
        """Plan all nodes, then the results: no caller takes terms of a sum but that of a body."""
        for value, held in zip(self.function.arguments, self.takes, strict=True):
            self.had[value], self.held[value] = [held.placement], held
        nodes = [self._call(n) if n.op.callee is not None else self._node(n) for n in self.function.nodes]
        last = self.function.nodes[-1] if self.function.nodes else None
        moves: list[Move] = []
        gives: list[MeshPlacement] = []
        for value in self.function.results:
            placed = self.versions(value)[0]
            if placed.partial and not terms_allowed and last is not None:
                target = self._combined(value)
                moves += self._moves([self._conversion(value, target)], last)
                placed = target
            gives.append(placed)
        takes = tuple(held.placement for held in self.takes)
        return PlannedFunction(name, self.function, takes, tuple(nodes), tuple(moves), tuple(gives))

    # -- values ------------------------------------------------------------------------------------------------

    def versions(self, value: Value) -> list[MeshPlacement]:
        """The placements in which a value can be had; a constant is everywhere whole."""
        return self.had.setdefault(value, [MeshPlacement.whole(value.type.rank)])

    def _conversion(self, value: Value, target: MeshPlacement) -> _Conversion:
        """The cheapest way to a placement."""
        found: list[tuple[float, int, MeshPlacement, tuple[PlacementStep, ...]]] = []
        for source in self.versions(value):
            steps = conversion(value.type.shape, source, target)
            cost = self._steps_cost(value, steps) if is_possible(value.type, steps) else float("inf")
            found.append((cost, len(found), source, steps))
        _, _, source, steps = min(found, key=lambda f: f[:2])
        return value, source, target, steps

    def _steps_cost(self, value: Value, steps: Sequence[PlacementStep]) -> float:
        cost = self.planner.costs.seconds(value.type, steps)
        held = self.held.get(value)
        if held is not None and held.is_weight:
            gathered = [s for s in steps if s.sends and not set(s.over) <= set(held.stored)]
            cost += GATHERED_WEIGHT * len(gathered)
        return cost

    def _combined(self, value: Value) -> MeshPlacement:
        """Where terms of a sum go when they must be combined: split as wished, or whole."""
        now = self.versions(value)[0]
        targets = [MeshPlacement(now.dims)]
        for wish in self.wanted.of(value):
            if now.dims[wish.dim] is None and not set(wish.split.over).intersection(MeshPlacement(now.dims).used):
                targets.append(MeshPlacement((*now.dims[: wish.dim], wish.split, *now.dims[wish.dim + 1 :])))
        costs = [self._steps_cost(value, self._conversion(value, t)[3]) for t in targets]
        return targets[costs.index(min(costs))]

    def _moves(self, wanted: Sequence[_Conversion], reader: Node) -> Iterator[Move]:
        """Do conversions: each is said once, and what it gives can be had from then on."""
        for value, source, target, steps in wanted:
            if target in self.versions(value):
                continue
            self.versions(value).append(target)
            reasons, at = [], reader
            for step in steps:
                if step.sends:
                    origin = self.origins.get(value)
                    because, at = reason_for(step, value, reader, origin, self.wanted, self.held, self.called)
                    reasons.append(because)
            yield Move(value, source, target, steps, tuple(reasons), at)

    # -- calls -------------------------------------------------------------------------------------------------

    def _call(self, node: Node) -> PlannedNode:
        callee = self.planner.graph.callee(node)
        assert callee is not None
        takes: list[HeldArgument] = []
        moves: list[Move] = []
        for value in node.inputs:
            held = self.held.get(value)
            if held is not None and held.is_weight:
                takes.append(held)
                continue
            whole = [p for p in self.versions(value) if not p.partial]
            if not whole:
                target = self._combined(value)
                moves += self._moves([self._conversion(value, target)], node)
                whole = [target]
            takes.append(HeldArgument(max(whole, key=lambda p: ways(p.used))))
        before = dict(self.planner.made)
        planned = self.planner.function(callee, tuple(takes))
        for at, value in enumerate(node.inputs):
            if not takes[at].is_weight:
                planned, taken = self._gathered_before(node, at, takes, planned, before)
                moves += self._moves([self._conversion(value, taken.placement)], node)
                takes[at] = taken
        for value, placed in zip(node.results, planned.gives, strict=True):
            self.had[value] = [placed]
        reads = tuple(h.placement for h in takes)
        return PlannedNode(node, {}, tuple(moves), reads, planned.gives, callee=planned)

    def _gathered_before(
        self,
        node: Node,
        at: int,
        takes: Sequence[HeldArgument],
        planned: PlannedFunction,
        before: Mapping[object, PlannedFunction],
    ) -> tuple[PlannedFunction, HeldArgument]:
        """The function and one argument of a call: as it comes, or brought before to where the function needs it.

        That is better where several calls read the value: an encoder's states, which every decoder layer needs whole.

        before  the functions that were planned before this call was; of those planned for it, one is kept
        """
        value, formal, callee = node.inputs[at], planned.function.arguments[at], planned.function
        calls = sum(value in other.inputs for other in self.function.nodes if other.op.callee == node.op.callee)
        found = planned, takes[at]
        if calls < 2:
            return found
        wanted = [
            m.target for n in planned.nodes for m in n.moves if m.value is formal and any(s.sends for s in m.steps)
        ]
        wanted += [placed for placed in self.versions(value) if not placed.partial]
        least = calls * self.planner.costs.of(planned)
        for target in dict.fromkeys(wanted):
            if target == takes[at].placement or target.partial:
                continue
            known, self.planner.made = self.planner.made, dict(before)
            trial = self.planner.function(callee, (*takes[:at], HeldArgument(target), *takes[at + 1 :]))
            cost = calls * self.planner.costs.of(trial) + self._steps_cost(value, self._conversion(value, target)[3])
            if cost < least * (1 - 1e-9):
                least, found = cost, (trial, HeldArgument(target))
            else:
                self.planner.made = known
        return found

    # -- nodes -------------------------------------------------------------------------------------------------

    def _node(self, node: Node) -> PlannedNode:
        types = [None if v is None else v.type for v in node.operands]
        application = node.op.apply(types)
        suggestions = list(dict.fromkeys(self._suggested(node, application)))
        usable = [s for s in suggestions if may_split(node.op, application, s.factor, types)]
        best = self._around(node, application, types, suggestions, usable)
        for shares, carried, through in self._ways(node, usable):
            needed = requirement(node.op, application, types, shares, carried, through)
            way = None if needed is None else self._costed(node, shares, needed)
            if way is not None and (best is None or way.seconds < best.seconds * (1 - 1e-9)):
                best = way
        assert best is not None  # nothing split is always a way
        if isinstance(node.op, Composite) and any(_needs_whole(node, application, s) for s in suggestions):
            opened = self._opened(node)
            if opened.seconds < best.seconds * (1 - 1e-9):
                best = opened
        moves = tuple(self._moves(best.moves, node))
        weight = self._weight_of(node)
        for value, placed in zip(node.results, best.needed.results, strict=True):
            self.had[value] = [placed]
            if weight is not None:
                stored = self.held[weight].stored if self._is_narrowing(node) else ()
                self.held[value] = HeldArgument(placed, stored, is_weight=True)
                self.called[value] = self.called.get(weight, weight.name)
            if placed.partial:
                by_body = best.body is not None
                self.origins[value] = origin_of(
                    node, application, best.shares, best.needed, by_body, self.wanted, self.origins
                )
        needed = best.needed
        return PlannedNode(node, best.shares, moves, needed.operands, needed.results, best.body, ring=best.ring)

    def _around(
        self,
        node: Node,
        application: Application,
        types: Sequence[Type | None],
        suggestions: Sequence[Suggestion],
        usable: Sequence[Suggestion],
    ) -> _Way | None:
        """The best way in which queries and keys are split alike, and keys pass around; None where there is none."""
        best: _Way | None = None
        for suggestion in suggestions if node.op.keys_in_parts is not None else ():
            queries, keys = node.op.keys_in_parts or ("", "")
            if suggestion.factor != queries or not suggestion.share.over:
                continue
            over = suggestion.share.over
            others = [s for s in usable if s.factor not in (queries, keys) and not set(s.share.over) & set(over)]
            for shares, carried, through in self._ways(node, others):
                split = {**shares, queries: suggestion.share, keys: suggestion.share}
                needed = requirement(node.op, application, types, split, carried, through, over)
                way = None if needed is None else self._costed(node, split, needed, over)
                if way is not None and (best is None or way.seconds < best.seconds * (1 - 1e-9)):
                    best = way
        return best

    def _suggested(self, node: Node, application: Application) -> Iterator[Suggestion]:
        """Factors to split: those that split operands are split in, and those that wishes are for."""
        slots = [(v, d) for v, d in zip(node.operands, application.operands, strict=True) if v is not None]
        for value, dims in [*slots, *zip(node.results, application.results, strict=True)]:
            splits = [(wish.dim, wish.split) for wish in self.wanted.of(value)]
            if value.node is not node:
                held = self.held.get(value)
                placements = self.versions(value)
                if held is not None and held.is_weight:
                    placements = [held.placement if self._is_narrowing(node) else held.used]
                splits += [(d, s) for p in placements for d, s in enumerate(p.dims) if s is not None]
            yield from suggested(application, dims, splits)

    def _weight_of(self, node: Node) -> Value | None:
        """The weight that a node reads and nothing else."""
        held = self.held.get(node.inputs[0]) if len(node.inputs) == 1 else None
        return node.inputs[0] if held is not None and held.is_weight else None

    def _is_narrowing(self, node: Node) -> bool:
        """Whether a node makes fewer bytes of one weight, so that it does that with parts before they are gathered."""
        weight = self._weight_of(node)
        made = sum(v.type.bytes_at(self.planner.sizes) for v in node.results)
        return weight is not None and made < weight.type.bytes_at(self.planner.sizes)

    def _ways(
        self, node: Node, suggestions: Sequence[Suggestion]
    ) -> Iterator[tuple[dict[str, Share], SubAxes, frozenset[str]]]:
        """Ways to split a node: see `choices`."""
        names = node.op.operand_names(len(node.operands))
        carried: list[tuple[SubAxes, frozenset[str]]] = []
        for name, value in zip(names, node.operands, strict=True):
            for placed in self.versions(value) if value is not None else ():
                if placed.partial and placed.monoid == "sum":
                    carried += [(placed.partial, group) for group in node.op.linear if names_operand(group, name)]
        found = choices(self.planner.mesh, suggestions, list(dict.fromkeys(carried)))
        yield from islice(found, MOST_WAYS)
        if next(found, None) is not None:
            where = f"{node.op.name} {node.scope}".strip()
            self.planner.notes.append(f"{where}: of more than {MOST_WAYS} ways to split it the first were compared")

    def _costed(self, node: Node, shares: dict[str, Share], needed: Requirement, ring: SubAxes = ()) -> _Way | None:
        moves: list[_Conversion] = []
        seconds = self.planner.costs.work(node) / ways({p for s in shares.values() for p in s.over})
        seconds += self.planner.costs.ring(node, needed.operands, ring) if ring else 0.0
        counted: set[tuple[Value, MeshPlacement]] = set()
        for value, target in zip(node.operands, needed.operands, strict=True):
            if value is None or target is None or (value, target) in counted:
                continue
            counted.add((value, target))
            if target in self.versions(value):
                continue
            move = self._conversion(value, target)
            if not is_possible(value.type, move[3]):
                return None
            seconds += self._steps_cost(value, move[3])
            moves.append(move)
        for value, placed in zip(node.results, needed.results, strict=True):
            seconds += self._to_come(value, placed)
        return _Way(seconds, shares, needed, moves, ring=ring)

    def _to_come(self, value: Value, placed: MeshPlacement) -> float:
        """What it will cost to combine terms."""
        if not placed.partial:
            return 0.0
        steps = conversion(value.type.shape, placed, MeshPlacement(placed.dims))
        return self.planner.costs.seconds(value.type, steps)

    def _opened(self, node: Node) -> _Way:
        """A composite by its body, whose nodes are planned one by one from where operands lie."""
        assert isinstance(node.op, Composite)
        function = body_of(node.op, [None if v is None else v.type for v in node.operands])
        moves: list[_Conversion] = []
        takes: list[HeldArgument] = []
        reads: list[MeshPlacement | None] = []
        for value in node.operands:
            if value is None:
                reads.append(None)
                continue
            held = self.held.get(value)
            whole = [p for p in self.versions(value) if not p.partial]
            placed = max(whole, key=lambda p: ways(p.used)) if whole else self._combined(value)
            if not whole:
                moves.append(self._conversion(value, placed))
            takes.append(
                HeldArgument(placed, held.stored, held.is_weight) if held is not None else HeldArgument(placed)
            )
            reads.append(placed)
        outer = [*zip(function.arguments, node.inputs, strict=True), *zip(function.results, node.results, strict=True)]
        planned = self._body(node, function, takes, outer)
        for at, (formal, value) in enumerate(zip(function.arguments, node.inputs, strict=True)):
            # what the body gathers of a weight is had by all who read it afterwards
            gathered = [m.target for n in planned.nodes for m in n.moves if m.value is formal and takes[at].stored]
            if gathered:
                moves.append(self._conversion(value, gathered[0]))
                takes[at] = HeldArgument(gathered[0], is_weight=True)
                reads[node.operands.index(value)] = gathered[0]
                planned = self._body(node, function, takes, outer)
        seconds = self.planner.costs.of(planned)
        seconds += sum(self._steps_cost(value, steps) for value, _, _, steps in moves)
        seconds += sum(self._to_come(v, p) for v, p in zip(node.results, planned.gives, strict=True))
        return _Way(seconds, {}, Requirement(tuple(reads), planned.gives), moves, planned)

    def _body(
        self, node: Node, function: Function, takes: Sequence[HeldArgument], outer: Sequence[tuple[Value, Value]]
    ) -> PlannedFunction:
        """A composite's body, planned; `outer` says which of its values are which of ours."""
        body = _Body(self.planner, function, tuple(takes), Wanted({inner: self.wanted.of(v) for inner, v in outer}))
        body.called = {inner: self.called.get(v, v.name) for inner, v in outer if v in self.held}
        return body.planned(node.op.name, terms_allowed=True)


def _needs_whole(node: Node, application: Application, suggestion: Suggestion) -> bool:
    """Whether a composite's body may be split in a factor that the composite itself needs whole.

    Not where pairs of positions are along it: parts of queries or keys need to know where they stand.
    """
    role = application.factors[suggestion.factor].role
    paired = node.op.pairs is not None and suggestion.factor in node.op.pairs
    return role in (Role.WHOLE, Role.INDEXED) and not paired
