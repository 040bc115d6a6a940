"""Check a sharding plan independently of the planner.

At concrete sizes of the symbols, a placement means a range of positions that each rank holds of every dimension. Given
these ranges, the axis rule of an op determines if the values that ranks compute from their positions are their parts of
the result:

- along a mapped factor, all operands and results of a rank have the same positions; along a factor that the op needs
  whole, or whose positions it reads, each rank has all positions
- if an op works on blocks of a factor that it needs whole, each rank has whole blocks
- in ring attention, the ranks together have all keys, each key once and in order
- along a reduced factor, ranks may have different positions; together they have all positions, none of them twice, and
  the result is partial, by the factor's reduction, along the mesh axes in which the positions differ
- partial sums are read only by operands in which the op is linear, by all operands of that group and no others, and
  the results are partial sums
- a step between two placements gives each rank positions that its group had before; partial values are combined by
  their own reduction
- no partial value leaves a function
- `stage_checking` checks pipeline stages
- the factors that a node splits, and the placements in which weights are stored, agree with the placements of values
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from treadle.ir.analysis.drawn_inputs import filled_sizes
from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.composites import body_of
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Value
from treadle.ir.hashing import function_key
from treadle.ir.operation import Composite, names_operand
from treadle.ir.placement.mesh import Mesh, SubAxis
from treadle.ir.placement.placements import MeshPlacement, Split
from treadle.ir.sizing.sizes import Size
from treadle.passes.sharding.conversions import PlacementStep, StepKind
from treadle.passes.sharding.plan import Move, PlannedFunction, PlannedNode, ShardingPlan
from treadle.passes.sharding.rank_groups import Interval, covers, group_of, holds_factor, index_of, ranks_along
from treadle.passes.sharding.stage_checking import check_stages

Terms = frozenset[SubAxis]
_Held = tuple[Value, AxisDim, Size, Split | None]
"""A dimension that has a factor: the value, the dimension in the rule, its size, and its split."""
_SPLITTING = (StepKind.TAKE, StepKind.REDUCE_SCATTER, StepKind.ALL_TO_ALL)


def check_sharding(plan: ShardingPlan) -> None:
    """Raise PassError, with the function and the node, if a plan is wrong."""
    for extra in (1, 6):
        check = _Check(plan, filled_sizes(plan.graph, 2 * plan.mesh.ranks + extra))
        seen: dict[str, PlannedFunction] = {}
        for planned in plan.functions:
            check.function(planned, seen)
            seen[planned.name] = planned
        if plan.main.function is not plan.graph.main:
            raise PassError("the plan belongs to another graph", received=plan.main.function.name)
        check.weights()
    if plan.pipeline is not None:
        check_stages(plan, plan.pipeline)


class _Check:
    """The check at one set of sizes."""

    def __init__(self, plan: ShardingPlan, sizes: Mapping[str, int]) -> None:
        self.plan, self.mesh, self.sizes = plan, plan.mesh, sizes
        self.where = ""
        self.bounds: dict[tuple[Size, Split | None], list[Interval]] = {}

    def fail(self, what: str, received: str | None = None) -> PassError:
        return PassError(f"sharding plan: {what}", received=received, within=self.where)

    # -- functions ---------------------------------------------------------------------------------------------

    def weights(self) -> None:
        """Check that weights are stored in the placements in which `main` reads them."""
        self.where, main = self.plan.main.name, self.plan.main
        taken = dict(zip(main.function.arguments, main.takes, strict=True))
        names = main.function.parameters
        wrong = [
            n for n in {**names, **self.plan.weights} if n not in names or self.plan.weights.get(n) != taken[names[n]]
        ]
        if wrong:
            raise self.fail(f"weight {wrong[0]} is not stored in the placement in which main reads it")

    def function(self, planned: PlannedFunction, seen: Mapping[str, PlannedFunction], *, is_body: bool = False) -> None:
        self.where = planned.name
        if not is_body and self.plan.graph.functions.get(planned.function.name) is not planned.function:
            raise self.fail("the graph does not have this function", planned.name)
        have: dict[Value, set[MeshPlacement]] = {}
        for value, placed in zip(planned.function.arguments, planned.takes, strict=True):
            self.holds(value, placed)
            if placed.partial and not is_body:
                raise self.fail(f"argument {value.name} is partial", placed.text(self.mesh))
            have[value] = {placed}
        if [n.node for n in planned.nodes] != planned.function.nodes:
            raise self.fail("its nodes differ from the nodes of the function")
        for node in planned.nodes:
            self.where = f"{planned.name}, {node.node.op.name} {node.node.scope}"
            for move in node.moves:
                self.move(move, have)
            self.node(node, have, seen)
        self.where = planned.name
        for move in planned.moves:
            self.move(move, have)
        for value, placed in zip(planned.function.results, planned.gives, strict=True):
            if placed not in self.had(value, have):
                raise self.fail(f"{value.name} has no copy with placement {placed.text(self.mesh)}")
            if placed.partial and not is_body:
                raise self.fail(f"result {value.name} is partial", placed.text(self.mesh))

    def had(self, value: Value, have: Mapping[Value, set[MeshPlacement]]) -> set[MeshPlacement]:
        whole = {MeshPlacement((None,) * value.type.rank)} if value.literal is not None else set()
        return have.get(value, set()) | whole

    def holds(self, value: Value, placed: MeshPlacement) -> None:
        """Raise PassError for a placement that is malformed or impossible for a value."""
        used = [p for d in placed.dims if d is not None for p in d.over] + list(placed.partial)
        if len(placed.dims) != value.type.rank or len(set(used)) != len(used):
            raise self.fail(f"{value.name}: {value.type} cannot have this placement", placed.text(self.mesh))
        if not set(used) <= set(self.mesh.parts):
            raise self.fail(f"{value.name} is split over an axis that is not in the mesh")
        for size, split in zip(value.type.shape, placed.dims, strict=True):
            if split is not None and self.units(size, split) < prod(part.size for part in split.over):
                raise self.fail(f"{value.name}: a rank has no part of {size}", placed.text(self.mesh))
        encoding = value.type.encoding
        split = None if encoding is None else placed.dims[encoding.axis]
        if encoding is not None and split is not None:
            block = encoding.block.elements
            bounds = [n for part in self.intervals(value.type.shape[encoding.axis], split) for n in part]
            if block is None or any(bound % block for bound in bounds):
                raise self.fail(f"{value.name}: a part cuts through a block of {encoding}", placed.text(self.mesh))

    def interval(self, size: Size, split: Split | None, rank: int) -> Interval:
        """Return the positions of a dimension that a rank holds."""
        known = self.bounds.get((size, split))
        if known is None:
            known = self.bounds[size, split] = self.intervals(size, split)
        return known[0 if split is None else index_of(self.mesh, rank, split.over)]

    def intervals(self, size: Size, split: Split | None) -> list[Interval]:
        """Return the positions of each part of a split."""
        if split is None:
            return [(0, size.evaluate(self.sizes))]
        units, grain = self.units(size, split), split.grain.evaluate(self.sizes)
        ways = prod(part.size for part in split.over)
        return [(at * units // ways * grain, (at + 1) * units // ways * grain) for at in range(ways)]

    def units(self, size: Size, split: Split) -> int:
        """Return the number of units of a split dimension."""
        units, rest = divmod(size.evaluate(self.sizes), split.grain.evaluate(self.sizes))
        if rest:
            raise self.fail(f"{size} is not a multiple of {split.grain}")
        return units

    # -- moves -------------------------------------------------------------------------------------------------

    def move(self, move: Move, have: dict[Value, set[MeshPlacement]]) -> None:
        if move.source not in self.had(move.value, have):
            raise self.fail(f"{move.value.name} has no copy with placement {move.source.text(self.mesh)}")
        now = move.source
        for step in move.steps:
            if step.before != now:
                raise self.fail(
                    f"a step of {move.value.name} does not start where the step before it ends",
                    step.before.text(self.mesh),
                )
            self.holds(move.value, step.after)
            self.step(move.value, step)
            now = step.after
        if now != move.target:
            raise self.fail(f"the steps of {move.value.name} do not end at its target", now.text(self.mesh))
        if len(move.because) != sum(step.sends for step in move.steps):
            raise self.fail(f"{move.value.name}: not every step that sends has a reason")
        have.setdefault(move.value, set()).add(move.target)

    def step(self, value: Value, step: PlacementStep) -> None:
        before, after, over = step.before, step.after, frozenset(step.over)
        none: Terms = frozenset()
        had, has = frozenset(before.partial), frozenset(after.partial)
        expected = {
            StepKind.ALL_REDUCE: (over, none),
            StepKind.REDUCE_SCATTER: (over, none),
            StepKind.KEEP_FIRST: (none, over),
        }.get(step.kind, (none, none))
        if not over or (had - has, has - had) != expected:
            raise self.fail(
                f"{step.kind.word} of {value.name} does not change its partial axes as it must",
                _step_text(step, self.mesh),
            )
        if step.kind is StepKind.REDUCE_SCATTER and before.monoid != "sum":
            raise self.fail(f"{step.kind.word} cannot combine partial values ({before.monoid})")
        if before.partial and after.partial and before.monoid != after.monoid:
            raise self.fail(f"partial values change from {before.monoid} to {after.monoid}")
        if step.kind is StepKind.KEEP_FIRST and over & frozenset(p for d in before.dims if d for p in d.over):
            raise self.fail(f"{value.name} is split along an axis over which it becomes partial")
        for d, size in enumerate(value.type.shape):
            self.dimension(value, step, d, size)

    def dimension(self, value: Value, step: PlacementStep, d: int, size: Size) -> None:
        """Check that each rank gets the positions of a dimension that a step of this kind produces."""
        splits = step.before.dims[d], step.after.dims[d]
        along = {p for split in splits if split is not None for p in split.over}
        if d not in (step.dim, step.onto) and splits[0] == splits[1] and not along.intersection(step.over):
            return  # unchanged, and all ranks of a group hold the same positions
        for rank in ranks_along(self.mesh, frozenset(along - set(step.over))):
            group = group_of(self.mesh, rank, step.over)
            had = [self.interval(size, step.before.dims[d], other) for other in group]
            gets = [self.interval(size, step.after.dims[d], other) for other in group]
            if d == (step.onto if step.kind is StepKind.ALL_TO_ALL else step.dim) and step.kind in _SPLITTING:
                fits = covers(gets, had[0]) and len(set(had)) == 1
            elif d == step.dim and step.kind in (StepKind.ALL_GATHER, StepKind.ALL_TO_ALL):
                fits = covers(had, gets[0]) and len(set(gets)) == 1
            else:
                fits = had == gets and len(set(had)) == 1
            if not fits:
                raise self.fail(
                    f"{step.kind.word} does not give each of ranks {group[0]} to {group[-1]} its part of {value.name}",
                    _step_text(step, self.mesh),
                )

    # -- nodes -------------------------------------------------------------------------------------------------

    def node(
        self, planned: PlannedNode, have: dict[Value, set[MeshPlacement]], seen: Mapping[str, PlannedFunction]
    ) -> None:
        node = planned.node
        present = [v for v in node.operands if v is not None] if planned.callee is not None else node.operands
        for value, placed in zip(present, planned.reads, strict=True):
            if value is not None and (placed is None or placed not in self.had(value, have)):
                placement = "nowhere" if placed is None else placed.text(self.mesh)
                raise self.fail(f"{value.name} has no copy with the placement in which it is read", placement)
        for value, placed in zip(node.results, planned.gives, strict=True):
            self.holds(value, placed)
        reads = [p for p in planned.reads if p is not None]
        inner = planned.callee or planned.body
        if inner is not None and planned.shares:
            raise self.fail("a node with a body or a callee must not split factors itself", ", ".join(planned.shares))
        if planned.callee is not None:
            if seen.get(planned.callee.name) is not planned.callee or node.op.callee != planned.callee.function.name:
                raise self.fail("it calls another function", planned.callee.name)
        elif planned.body is not None:
            if not isinstance(node.op, Composite) or not _is_body(planned.body.function, node.op, node.operands):
                raise self.fail("its body is not the body of the op")
            where = self.where
            self.function(planned.body, seen, is_body=True)
            self.where = where
        else:
            self.rule(planned)
        if inner is not None and (inner.takes, inner.gives) != (tuple(reads), planned.gives):
            raise self.fail("arguments or results do not have the placements that the function takes and returns")
        for value, placed in zip(node.results, planned.gives, strict=True):
            have.setdefault(value, set()).add(placed)

    def rule(self, planned: PlannedNode) -> None:
        """Check, by the op's axis rule, that ranks compute their parts of the results."""
        node = planned.node
        types = [None if v is None else v.type for v in node.operands]
        application = node.op.apply(types)
        slots = [
            (v, dims, placed)
            for v, dims, placed in zip(node.operands, application.operands, planned.reads, strict=True)
            if v is not None and dims is not None and placed is not None
        ]
        slots += [*zip(node.results, application.results, planned.gives, strict=True)]
        held: dict[str, list[_Held]] = {name: [] for name in planned.shares}
        for value, dims, placed in slots:
            for dim, size, split in zip(dims, value.type.shape, placed.dims, strict=True):
                for name in dim.factors:
                    held.setdefault(name, []).append((value, dim, size, split))
        if unknown := [name for name, own in held.items() if not own]:
            raise self.fail("it splits a factor that none of its operands and results has", ", ".join(sorted(unknown)))
        parts: dict[str, dict[int, Interval]] = {}
        for name, own in held.items():
            if not self.is_alike(planned, application, name, own):
                parts[name] = self.parts_of(planned, application, name, own)
        if planned.ring:
            self.ring(planned, application, parts)
        combined = self.combined(planned, application, parts)
        self.terms(planned, application, combined)

    def is_alike(self, planned: PlannedNode, application: Application, name: str, held: Sequence[_Held]) -> bool:
        """Return True if a factor is mapped, is the whole of every dimension that has it, and is split there as the
        node specifies.

        Ranks then have the same positions of the factor in every operand and result, whatever these positions are.
        """
        share = planned.shares.get(name)
        split = None if share is None else Split(share.over, share.grain)
        alike = all(dim.factors == (name,) and size == held[0][2] and own == split for _, dim, size, own in held)
        return alike and application.factors[name].role is Role.MAPPED and name not in planned.node.op.positional

    def parts_of(
        self, planned: PlannedNode, application: Application, name: str, held: Sequence[_Held]
    ) -> dict[int, Interval]:
        """Return the positions of a factor that each rank has. Raises PassError if dimensions with the factor, or the
        node, do not agree on them.
        """
        share, size = planned.shares.get(name), application.dims[name].size
        expected = None if share is None else Split(share.over, share.grain)
        splits = [expected, *[split for _, _, _, split in held]]
        found: dict[int, Interval] = {}
        for rank in ranks_along(
            self.mesh, frozenset(part for split in splits if split is not None for part in split.over)
        ):
            for value, dim, whole, split in held:
                own = self.factor_parts(application, dim, self.interval(whole, split, rank))[name]
                if found.setdefault(rank, own) != own:
                    raise self.fail(f"rank {rank} has different parts of {name} in {value.name}", str(own))
            if self.interval(size, expected, rank) != found[rank]:
                wanted = "all" if expected is None else str(self.interval(size, expected, rank))
                raise self.fail(f"rank {rank} works on {wanted} of {name}, but has {found[rank]}")
        return found

    def factor_parts(self, application: Application, dim: AxisDim, own: Interval) -> dict[str, Interval]:
        """Return the positions of each factor of a dimension, derived from a rank's positions in the dimension."""
        first, last = own
        sizes = [application.dims[name].size.evaluate(self.sizes) for name in dim.factors]
        found: dict[str, Interval] = {}
        for i, name in enumerate(dim.factors):
            inner = 1
            for size in sizes[i + 1 :]:
                inner *= size
            if first % inner == 0 and last % inner == 0:
                found[name] = first // inner, last // inner
                first, last = 0, inner
            elif (last - 1) // inner == first // inner:
                at = first // inner
                found[name] = at, at + 1
                first, last = first - at * inner, last - at * inner
            else:
                raise self.fail(f"a part cuts through factor {name}", f"{own} of {sizes}")
        return found

    def ring(self, planned: PlannedNode, application: Application, parts: Mapping[str, Mapping[int, Interval]]) -> None:
        """Check that each rank receives every key exactly once in ring attention."""
        op, over = planned.node.op, planned.ring
        if op.keys_in_parts is None or len(set(over)) != len(over) or not set(over) <= set(self.mesh.parts):
            raise self.fail(f"{op.name} does not support ring attention over {self.mesh.text_of(over)}")
        full, own = (0, application.dims[op.keys_in_parts[1]].size.evaluate(self.sizes)), parts[op.keys_in_parts[1]]
        for rank in own:
            if not covers([own.get(other, own[rank]) for other in group_of(self.mesh, rank, over)], full):
                raise self.fail(
                    f"the keys of ring attention do not cover {op.keys_in_parts[1]} exactly once", str(own[rank])
                )

    def combined(
        self, planned: PlannedNode, application: Application, parts: Mapping[str, Mapping[int, Interval]]
    ) -> dict[str, Terms]:
        """Return the reduced and indexed factors of which ranks have different parts, with the mesh axes along which
        parts differ.
        """
        op, found = planned.node.op, {}
        for name, own in parts.items():
            full = (0, application.dims[name].size.evaluate(self.sizes))
            if all(each == full for each in own.values()):
                continue
            role = application.factors[name].role
            if planned.ring and op.keys_in_parts is not None and name in op.keys_in_parts:
                continue
            if role is Role.MAPPED and name not in op.positional:
                continue
            block = op.multiples([None if v is None else v.type for v in planned.node.operands], application).get(name)
            if block is not None and all(first % block == last % block == 0 for first, last in own.values()):
                continue
            kept = any(name in d.factors for dims in application.results for d in dims)
            looked_up = role is Role.INDEXED and not kept and not isinstance(op, Composite)
            if role is not Role.REDUCED and not looked_up:
                raise self.fail(
                    f"it needs all of {name}, but ranks have only parts",
                    f"{role.value}, {next(iter(own.values()))} of {full}",
                )
            differ = frozenset(
                part
                for part in self.mesh.parts
                if any(own[r] != own.get(s, own[r]) for r in own for s in group_of(self.mesh, r, (part,)))
            )
            over = tuple(part for part in self.mesh.parts if part in differ)
            for group in {group_of(self.mesh, rank, over) for rank in own}:
                if not covers(sorted(own[other] for other in group), full):
                    raise self.fail(f"ranks have some parts of {name} twice, or lack some")
            found[name] = differ
        return found

    def terms(self, planned: PlannedNode, application: Application, combined: Mapping[str, Terms]) -> None:
        """Check that partial values come from split factors, or pass through operands in which the op is linear."""
        op = planned.node.op
        names = op.operand_names(len(planned.reads))
        reads = {i: p for i, p in enumerate(planned.reads) if p is not None}
        summed = {part: name for name, along in combined.items() for part in along}
        given = {part for p in planned.gives for part in p.partial}
        for part in {*summed, *given, *[q for p in reads.values() for q in p.partial]}:
            if any(part not in p.partial for p in planned.gives):
                raise self.fail(f"a partial result along {part.axis} is marked as whole")
            have = {i for i, p in reads.items() if part in p.partial}
            if any(reads[i].monoid != "sum" for i in have):
                raise self.fail("an op reads partial values that are not partial sums")
            groups = [{i for i in reads if names_operand(group, names[i])} for group in op.linear]
            name = summed.get(part)
            if name is None:
                if have not in groups:
                    raise self.fail(
                        f"partial sums along {part.axis} pass through operands in which the op is not linear"
                    )
                monoid = "sum"
            else:
                factor = application.factors[name]
                monoid = (factor.monoid or "sum") if factor.role is Role.REDUCED else "sum"
                holding = {i for i in reads if holds_factor(application.operands[i], name)}
                beside = {i for group in groups if group & holding for i in group - holding}
                if factor.role is Role.REDUCED and monoid == "sum" and have != beside:
                    raise self.fail(f"the value that is added to the sum over {name} is not added exactly once")
                if (monoid != "sum" or factor.role is Role.INDEXED) and have:
                    raise self.fail(f"partial values are read by an op that combines {name}")
            if any(p.monoid != monoid for p in planned.gives):
                raise self.fail(f"partial values ({monoid}) are marked as {planned.gives[0].monoid}")


def _step_text(step: PlacementStep, mesh: Mesh) -> str:
    return f"{step.before.text(mesh)} -> {step.after.text(mesh)} over {mesh.text_of(step.over)}"


def _is_body(function: Function, op: Composite, operands: Sequence[Value | None]) -> bool:
    """Return True if a function is a composite's body on these operands: the cached body, or a function equal to it."""
    body = body_of(op, [None if v is None else v.type for v in operands])
    return function is body or function_key(function) == function_key(body)
