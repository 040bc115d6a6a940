"""Build a sharding plan: walk a graph once, and select for each node the split with the least cost.

The candidates are not listed by op. Operands that are already split, and requests for operands and results, suggest
factors of the node's axis rule. Each part of the mesh splits one of the suggested factors, or none, or lets partial
sums pass through. `transfer.requirement` derives the placements of operands and results. The cost in seconds is the
work of the node on one device, the steps that bring operands to their placements, and for partial values the all-reduce
that will be needed. So if two suggestions compete for one mesh axis, the cost decides, not the order of the
suggestions.

A value may be available in several placements: a placement that it was converted to before has no further cost. Partial
sums are combined before they are read, unless it costs less to pass them on. A function is planned once for each
combination of placements of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from treadle.ir.axes import Application, Role
from treadle.ir.composites import body_of
from treadle.ir.errors import PassError, SizeError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hardware import Hardware
from treadle.ir.operation import Composite, names_operand
from treadle.ir.placement.mesh import Mesh, SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement
from treadle.ir.types import Type
from treadle.passes.sharding.conversions import is_possible
from treadle.passes.sharding.costs import Costs, HeldArgument
from treadle.passes.sharding.factors import Share
from treadle.passes.sharding.placed_values import Conversion, PlacedValues
from treadle.passes.sharding.plan import Move, PlannedFunction, PlannedNode, ShardingPlan
from treadle.passes.sharding.reasons import origin_of
from treadle.passes.sharding.suggestions import Suggestion, choices, suggested
from treadle.passes.sharding.transfer import Requirement, may_split, requirement
from treadle.passes.sharding.wanted import Wanted

MOST_WAYS = 4096
"""Maximum number of splits of one node that are compared. Further splits are not considered."""


def plan_sharding(
    graph: Graph,
    mesh: Mesh,
    wanted: Wanted,
    machine: Hardware,
    sizes: Mapping[str, int],
    *,
    recipe: str = "",
    axes: Mapping[str, str] | None = None,
    stored: SubAxes = (),
) -> ShardingPlan:
    """Return the sharding plan of a graph whose only entry is `main`.

    wanted  the placements of weights, and requests for other values
    stored  parts of the mesh along which weights are stored in parts and gathered for use
    sizes   sizes of the symbols, at which costs are compared

    Raises PassError for a graph with states or several entries, SizeError for a symbol without a size.
    """
    if len(graph.entry_names) > 1 or graph.states:
        raise PassError("only a graph with one entry and no states can be sharded", received=repr(graph))
    missing = sorted(set(graph.symbols) - set(sizes))
    if missing:
        raise SizeError(f"cost estimates need sizes for {', '.join(missing)}", hint=f"{missing[0]}=128")
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


@dataclass(frozen=True)
class _Way:
    """One split of a node, with its cost in seconds."""

    seconds: float
    shares: dict[str, Share]
    needed: Requirement
    moves: list[Conversion]
    body: PlannedFunction | None = None
    ring: SubAxes = ()


class _Planner:
    """The planner of functions. Each function is planned once for each combination of placements of its arguments."""

    def __init__(self, graph: Graph, mesh: Mesh, wanted: Wanted, machine: Hardware, sizes: Mapping[str, int]) -> None:
        self.graph, self.mesh, self.wanted, self.sizes = graph, mesh, wanted, sizes
        self.costs = Costs(mesh, machine, sizes)
        self.made: dict[object, PlannedFunction] = {}
        self.notes: list[str] = []

    def function(self, function: Function, takes: tuple[HeldArgument, ...]) -> PlannedFunction:
        """Return the plan of a function of the graph for arguments with these placements."""
        key = (function.name, takes)
        if key not in self.made:
            name, number = function.name, 1
            while any(planned.name == name for planned in self.made.values()):
                number += 1
                name = f"{function.name}_{number}"
            made = _Body(self, function, takes, self.wanted).planned(name)
            self.made[key] = made
        return self.made[key]


class _Body(PlacedValues):
    """The state of a function during planning."""

    def __init__(self, planner: _Planner, function: Function, takes: tuple[HeldArgument, ...], wanted: Wanted) -> None:
        super().__init__(planner.costs, wanted)
        self.planner, self.function, self.takes = planner, function, takes

    def planned(self, name: str, *, terms_allowed: bool = False) -> PlannedFunction:
        """Plan all nodes, then the results, and return the planned function. Partial results are allowed only for a
        body.
        """
        for value, held in zip(self.function.arguments, self.takes, strict=True):
            self.had[value], self.held[value] = [held.placement], held
        nodes = [self._call(n) if n.op.callee is not None else self._node(n) for n in self.function.nodes]
        last = self.function.nodes[-1] if self.function.nodes else None
        moves: list[Move] = []
        gives: list[MeshPlacement] = []
        for value in self.function.results:
            placed = self.versions(value)[0]
            if placed.partial and not terms_allowed and last is not None:
                target = self.combined(value)
                moves += self.moved([self.conversion_to(value, target)], last)
                placed = target
            gives.append(placed)
        takes = tuple(held.placement for held in self.takes)
        return PlannedFunction(name, self.function, takes, tuple(nodes), tuple(moves), tuple(gives))

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
                target = self.combined(value)
                moves += self.moved([self.conversion_to(value, target)], node)
                whole = [target]
            takes.append(HeldArgument(max(whole, key=lambda p: ways(p.used))))
        before = dict(self.planner.made)
        planned = self.planner.function(callee, tuple(takes))
        for at, value in enumerate(node.inputs):
            if not takes[at].is_weight:
                planned, taken = self._gathered_before(node, at, takes, planned, before)
                moves += self.moved([self.conversion_to(value, taken.placement)], node)
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
        """Return the planned function and one argument of a call. The argument may be converted before the call to the
        placement that the function needs.

        Converting before the call is better if several calls read the value, such as an encoder's states, which every
        decoder layer needs whole.

        before  the functions that were planned before this call; only one of the functions planned for the call is kept
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
        least = calls * self.costs.of(planned)
        for target in dict.fromkeys(wanted):
            if target == takes[at].placement or target.partial:
                continue
            known, self.planner.made = self.planner.made, dict(before)
            trial = self.planner.function(callee, (*takes[:at], HeldArgument(target), *takes[at + 1 :]))
            cost = calls * self.costs.of(trial) + self.steps_cost(value, self.conversion_to(value, target)[3])
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
        assert best is not None  # an empty split is always possible
        if isinstance(node.op, Composite) and any(_needs_whole(node, application, s) for s in suggestions):
            opened = self._opened(node)
            if opened.seconds < best.seconds * (1 - 1e-9):
                best = opened
        moves = tuple(self.moved(best.moves, node))
        weight = self.weight_of(node)
        for value, placed in zip(node.results, best.needed.results, strict=True):
            self.had[value] = [placed]
            if weight is not None:
                stored = self.held[weight].stored if self.is_narrowing(node) else ()
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
        """Return the cheapest split with ring attention: queries and keys are split in the same way. Return None if
        ring attention is not possible.
        """
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
        """Yield suggestions of factors to split: from splits of operands, and from requests."""
        slots = [(v, d) for v, d in zip(node.operands, application.operands, strict=True) if v is not None]
        for value, dims in [*slots, *zip(node.results, application.results, strict=True)]:
            splits = [(wish.dim, wish.split) for wish in self.wanted.of(value)]
            if value.node is not node:
                held = self.held.get(value)
                placements = self.versions(value)
                if (
                    held is not None and held.is_weight
                ):  # requests include the split of a weight, without its split for storage
                    placements = [held.placement] if self.is_narrowing(node) else []
                splits += [(d, s) for p in placements for d, s in enumerate(p.dims) if s is not None]
            yield from suggested(application, dims, splits)

    def _ways(
        self, node: Node, suggestions: Sequence[Suggestion]
    ) -> Iterator[tuple[dict[str, Share], SubAxes, frozenset[str]]]:
        """Yield ways to split a node: see `choices`."""
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
            self.planner.notes.append(f"{where}: only the first {MOST_WAYS} ways to split it were compared")

    def _costed(self, node: Node, shares: dict[str, Share], needed: Requirement, ring: SubAxes = ()) -> _Way | None:
        moves: list[Conversion] = []
        seconds = self.costs.work(node) / ways({p for s in shares.values() for p in s.over})
        seconds += self.costs.ring(node, needed.operands, ring) if ring else 0.0
        counted: set[tuple[Value, MeshPlacement]] = set()
        for value, target in zip(node.operands, needed.operands, strict=True):
            if value is None or target is None or (value, target) in counted:
                continue
            counted.add((value, target))
            if target in self.versions(value):
                continue
            move = self.conversion_to(value, target)
            if not is_possible(value.type, move[3]):
                return None
            seconds += self.steps_cost(value, move[3])
            moves.append(move)
        for value, placed in zip(node.results, needed.results, strict=True):
            seconds += self.to_come(value, placed)
        return _Way(seconds, shares, needed, moves, ring=ring)

    def _opened(self, node: Node) -> _Way:
        """Return the split of a composite through its body. The body's nodes are planned one by one, starting from the
        placements of the operands.
        """
        assert isinstance(node.op, Composite)
        function = body_of(node.op, [None if v is None else v.type for v in node.operands])
        moves: list[Conversion] = []
        takes: list[HeldArgument] = []
        reads: list[MeshPlacement | None] = []
        for value in node.operands:
            if value is None:
                reads.append(None)
                continue
            held = self.held.get(value)
            whole = [p for p in self.versions(value) if not p.partial]
            placed = max(whole, key=lambda p: ways(p.used)) if whole else self.combined(value)
            if not whole:
                moves.append(self.conversion_to(value, placed))
            takes.append(
                HeldArgument(placed, held.stored, held.is_weight) if held is not None else HeldArgument(placed)
            )
            reads.append(placed)
        outer = [*zip(function.arguments, node.inputs, strict=True), *zip(function.results, node.results, strict=True)]
        planned = self._body(node, function, takes, outer)
        for at, (formal, value) in enumerate(zip(function.arguments, node.inputs, strict=True)):
            # If the body gathers a weight, the gathered weight is available to all later readers.
            gathered = [m.target for n in planned.nodes for m in n.moves if m.value is formal and takes[at].stored]
            if gathered:
                moves.append(self.conversion_to(value, gathered[0]))
                takes[at] = HeldArgument(gathered[0], is_weight=True)
                reads[node.operands.index(value)] = gathered[0]
                planned = self._body(node, function, takes, outer)
        seconds = self.costs.of(planned)
        seconds += sum(self.steps_cost(value, steps) for value, _, _, steps in moves)
        seconds += sum(self.to_come(v, p) for v, p in zip(node.results, planned.gives, strict=True))
        return _Way(seconds, {}, Requirement(tuple(reads), planned.gives), moves, planned)

    def _body(
        self, node: Node, function: Function, takes: Sequence[HeldArgument], outer: Sequence[tuple[Value, Value]]
    ) -> PlannedFunction:
        """Return a composite's body, planned. `outer` pairs its values with values of this function."""
        body = _Body(self.planner, function, tuple(takes), Wanted({inner: self.wanted.of(v) for inner, v in outer}))
        body.called = {inner: self.called.get(v, v.name) for inner, v in outer if v in self.held}
        return body.planned(node.op.name, terms_allowed=True)


def _needs_whole(node: Node, application: Application, suggestion: Suggestion) -> bool:
    """Return True if a composite needs this factor whole, although its body can be split along it.

    Factors in `op.pairs` are excluded, since parts of queries or keys need their offsets.
    """
    role = application.factors[suggestion.factor].role
    paired = node.op.pairs is not None and suggestion.factor in node.op.pairs
    return role in (Role.WHOLE, Role.INDEXED) and not paired
