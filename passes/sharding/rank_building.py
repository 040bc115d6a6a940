"""`RankProgram`: build a function of a rank's program, step by step of the sharding plan.

Every op is applied again, by its own rule, to parts of its operands; a move becomes collectives and slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from treadle.ir.axes import Application, Role
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.collectives import PassOn, StartPass
from treadle.ir.ops.shapes import zeros
from treadle.ir.placement.mesh import ways
from treadle.ir.placement.placements import IDEMPOTENT, MeshPlacement, Split, local_type, span
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type
from treadle.passes.sharding.conversions import COLLECTIVES, PlacementStep, StepKind
from treadle.passes.sharding.plan import Move, PlannedFunction, PlannedNode, ShardingPlan, is_everywhere, ring_reason
from treadle.passes.sharding.transfer import looked_up_by


class RankProgram:
    """A builder of one function of a rank's program.

    functions  the program's functions, by the names of the planned functions
    """

    def __init__(
        self, plan: ShardingPlan, rank: int, graph: Graph, function: Function, functions: Mapping[str, Function]
    ) -> None:
        self.plan, self.rank, self.mesh, self.functions = plan, rank, plan.mesh, functions
        self.b = Builder(graph, function)
        self.exprs: dict[tuple[Value, MeshPlacement], Expr] = {}
        self.inside = 0
        """The number of enclosing composites whose bodies are inlined."""

    def build(self, planned: PlannedFunction) -> None:
        """Build the whole function."""
        inputs = set(planned.function.inputs)
        for value, placed in zip(planned.function.arguments, planned.takes, strict=True):
            declare = self.b.input if value in inputs else self.b.parameter
            self.exprs[value, placed] = declare(value.name, self.local(value.type, placed))
        self.steps(planned)
        self.b.function.outputs = {
            name: self.read(value, placed).value
            for (name, value), placed in zip(planned.function.outputs.items(), planned.gives, strict=True)
        }

    def steps(self, planned: PlannedFunction) -> None:
        """Apply all steps of a function."""
        for step in planned.steps:
            self.step(step)

    def step(self, step: Move | PlannedNode) -> None:
        """Apply a move, or a node."""
        if isinstance(step, Move):
            self.move(step)
        else:
            self.node(step)

    def callee(self, planned: PlannedFunction) -> Function:
        """Return the program's function for a planned function."""
        return self.functions[planned.name]

    def local(self, type: Type, placed: MeshPlacement) -> Type:
        return local_type(type, placed, self.mesh, self.rank)

    def read(self, value: Value, placed: MeshPlacement) -> Expr:
        """Return a value in one of its planned placements. Raises PassError if the plan lacks this placement."""
        found = self.exprs.get((value, placed))
        if found is None and value.literal is not None and is_everywhere((value, placed)):
            return self.b.expr(Value.constant(value.literal))
        if found is None:
            raise PassError(
                f"the plan has no copy of {value.name} with placement {placed.text(self.mesh)}",
                within=self.b.function.name,
            )
        return found

    # -- nodes -------------------------------------------------------------------------------------------------

    def node(self, each: PlannedNode) -> None:
        node = each.node
        with self.placed_as(node):
            operands = [
                None if v is None or p is None else self.read(v, p)
                for v, p in zip(node.operands, self._reads(each), strict=True)
            ]
            if each.callee is not None:
                made = list(self.b.call(self.callee(each.callee), [x for x in operands if x is not None]))
            elif each.body is not None:
                made = self.opened(each.body, operands)
            elif each.ring:
                made = [self.around(each, operands)]
            else:
                made = self.applied(each, operands)
        for value, placed, expr in zip(node.results, each.gives, made, strict=True):
            if expr.type != self.local(value.type, placed):
                raise PassError(
                    f"{node.op.name}: {value.name} does not have its planned type",
                    received=f"{expr.type}; planned: {self.local(value.type, placed)} for {placed.text(self.mesh)}",
                )
            if each.body is None:
                expr.value.name = value.name
            self.exprs[value, placed] = expr

    def _reads(self, each: PlannedNode) -> Sequence[MeshPlacement | None]:
        """Return the placement of each operand; a call lists only the placements of present operands."""
        given = iter(each.reads)
        return [None if v is None else next(given) for v in each.node.operands] if each.callee else each.reads

    def opened(self, body: PlannedFunction, operands: Sequence[Expr | None]) -> list[Expr]:
        """Inline a composite's body, and return its results."""
        outer, self.exprs = self.exprs, {}
        try:
            given = [x for x in operands if x is not None]
            self.exprs.update(zip(zip(body.function.arguments, body.takes, strict=True), given, strict=True))
            self.inside += 1
            self.steps(body)
            return [self.read(v, p) for v, p in zip(body.function.results, body.gives, strict=True)]
        finally:
            self.exprs = outer
            self.inside -= 1

    def applied(self, each: PlannedNode, operands: list[Expr | None]) -> list[Expr]:
        """Apply the op to parts of its operands, and return its results."""
        node, types = each.node, [None if v is None else v.type for v in each.node.operands]
        application = node.op.apply(types)
        sizes = {name: self.part(application, each, name)[1] for name in each.shares}
        op = node.op.resized(sizes, types) if sizes else node.op
        if op is None:
            raise PassError(f"{node.op.name} cannot be applied to a part of {', '.join(sizes)}")
        looked_up = [n for n in each.shares if application.factors[n].role is Role.INDEXED]
        if looked_up:
            return [self.lookup(op, application, each, looked_up[0], operands)]
        made = self.b.emit(op, [None if x is None else x.value for x in operands])
        return [self.b.expr(v) for v in made.results]

    def around(self, each: PlannedNode, operands: list[Expr | None]) -> Expr:
        """Build ring attention: first on the rank's own keys, then on the keys of the preceding ranks.

        Each rank starts to pass on its keys before it computes on them. If no query of the rank sees some keys, because
        all of them come later, the rank only passes these keys on.
        """
        b, op, n, mesh = self.b, each.node.op, ways(each.ring), self.mesh
        assert isinstance(op, Attention)
        q, k, v, *given = [x for x in operands if x is not None]
        query, key = each.node.operands[:2]
        split = [None if placed is None else placed.dims[2] for placed in each.reads[:2]]
        assert query is not None
        assert key is not None
        first, _ = span(query.type.shape[2], split[0], mesh, self.rank)
        me, group = mesh.index(self.rank, each.ring), mesh.group(self.rank, each.ring)
        in_order = not op.sees_ahead and split[0] == split[1] and query.type.shape[2] == key.type.shape[2]
        met: dict[str, Any] = {"over": mesh.text_of(each.ring), "ways": n, "because": ring_reason(each.node), "axis": 2}
        made: list[Expr] = []
        spans = [span(key.type.shape[2], split[1], mesh, group[(me - step) % n]) for step in range(n)]
        for step, (start, size) in enumerate(spans):
            owner = (me - step) % n
            if step:
                k, v = (b.apply(PassOn.name, x, **met, size=size, ahead=True) for x in (k, v))
            if step + 1 < n:
                for x in (k, v):
                    b.apply(StartPass.name, x, **met, size=spans[step + 1][1])
            if in_order and owner > me:
                continue
            part = op.on_keys(b, [q, k, v, *given], start - first)
            if made:
                stacked = [
                    [b.rearrange(x, pattern="... -> 1 ...") for x in pair] for pair in zip(made, part, strict=True)
                ]
                part = list(b.merge_parts(*[b.concat(*pair, axis=0) for pair in stacked]))
            made = part
        return made[0]

    def part(self, application: Application, each: PlannedNode, name: str) -> tuple[Size, Size]:
        """Return the start of this rank's part of a factor, and its size."""
        share = each.shares[name]
        return span(application.dims[name].size, Split(share.over, share.grain), self.mesh, self.rank)

    def lookup(
        self, op: Op, application: Application, each: PlannedNode, name: str, operands: list[Expr | None]
    ) -> Expr:
        """Build y = where(the index is in this part, op(table, index - start), 0)"""
        b = self.b
        at = looked_up_by(op, application, name, [None if v is None else v.type for v in each.node.operands])
        assert at is not None
        indices: Any = operands[at]
        start, size = self.part(application, each, name)
        inside = indices - start
        kept = b.logical_and(inside >= 0, inside < size)
        operands[at] = b.where(kept, inside, b.constant(0, indices.dtype))
        y = b.expr(b.emit(op, [None if x is None else x.value for x in operands]).result)
        index_dims = [dim.factors for dim in application.operands[at] or ()]
        letters = [f"x{n}" for n in range(len(index_dims))]
        right = [
            letters[index_dims.index(d.factors)] if d.factors in index_dims else "1" for d in application.results[0]
        ]
        kept = b.rearrange(kept, pattern=f"{' '.join(letters)} -> {' '.join(right)}")
        found: Expr = b.where(kept, y, b.constant(0, y.dtype))
        return found

    # -- moves -------------------------------------------------------------------------------------------------

    def move(self, move: Move) -> None:
        """Convert a value to another placement."""
        made = self.read(move.value, move.source)
        reasons = iter(move.because)
        with self.placed_as(move.at):
            for step in move.steps:
                made = self.moved(step, made, move.value, next(reasons) if step.sends else "")
        self.exprs[move.value, move.target] = made

    def placed_as(self, node: Node) -> AbstractContextManager[None]:
        """Return a context in which new nodes get a node's scope, or in a composite's body, the composite's scope."""
        return nullcontext() if self.inside else self.b.placed_as(node)

    def moved(self, step: PlacementStep, x: Expr, value: Value, because: str) -> Expr:
        b = self.b
        met = {"over": self.mesh.text_of(step.over), "ways": ways(step.over), "because": because}
        made: Expr
        if step.kind is StepKind.KEEP_FIRST:
            if step.after.monoid in IDEMPOTENT or self.mesh.index(self.rank, step.over) == 0:
                return x
            return zeros(b, x.type)
        if step.kind is StepKind.ALL_REDUCE:
            made = b.apply(COLLECTIVES[step.kind], x, **met, monoid=step.before.monoid, name=value.name)
            return made
        dim = step.dim
        assert dim is not None
        size = value.type.shape[dim]
        start, length = span(size, step.after.dims[dim], self.mesh, self.rank)
        if step.kind is StepKind.TAKE:
            before, _ = span(size, step.before.dims[dim], self.mesh, self.rank)
            made = b.slice(x, axis=dim, start=start - before, stop=start - before + length, name=value.name)
        elif step.kind is StepKind.ALL_TO_ALL:
            onto = step.onto
            assert onto is not None
            _, part = span(value.type.shape[onto], step.after.dims[onto], self.mesh, self.rank)
            made = b.apply(
                COLLECTIVES[step.kind], x, **met, axis=onto, size=part, onto=dim, whole=length, name=value.name
            )
        else:
            made = b.apply(COLLECTIVES[step.kind], x, **met, axis=dim, size=length, name=value.name)
        return made
