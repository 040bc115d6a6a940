"""Rotary positions that models spell out, as the one op."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.sizes import ONE
from treadle.passes.attention_core import PRODUCTS, Placed
from treadle.passes.axis_tracking import Axes, Layout, narrowed
from treadle.passes.canonicalize import IdentityRearrange, RearrangeOfRearrange
from treadle.passes.dead_code import drop_unread
from treadle.passes.manager import Pass
from treadle.passes.pass_log import PassRecord
from treadle.passes.rearrange_forms import form_of
from treadle.passes.rewrite import sweep

Array = np.ndarray[Any, Any]

_ROOTS = ("add", "sub", "concat", "rearrange")
_MOST_DIMENSIONS = 1024
_MOST_DEPTH = 24


@dataclass(frozen=True)
class FuseRotary(Pass):
    """x cos a + rotate(x) sin a   -->   rotary(x, positions, frequencies)        a = positions frequencies

     1. half-split pairs (i, i + f):  concat(-x2, x1);  concat(x1 cos - x2 sin, x2 cos + x1 sin)
     2. interleaved pairs (2i, 2i + 1), likewise
     3. only the first 2f dimensions turned, the others passed on
     4. x as a rearrange gives it that moves its leading axes: [b, s, h, d] -> [b, h, s, d]

    However it is spelled, the last axis is followed element by element: each must be x_i cos a_i -+ x_j sin a_i with
    the same positions throughout. Refuses: pairs, signs or angles in no such order; positions that are no integers;
    angles that are no product of positions and frequencies; an x that is none of one tensor's elements in order.
    """

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        ops = {node.op.name for node in function.nodes}
        if not {"cos", "sin", "mul"} <= ops:
            return 0
        return _Turns(self, function, graph, log).run()


@dataclass(frozen=True, eq=False)
class _Term:
    """coefficient * base[index], elementwise along the last axes."""

    coefficient: Array
    index: Array
    angle: Array

    def map(self, change: Any) -> _Term:
        return _Term(change(self.coefficient), change(self.index), change(self.angle))


@dataclass(frozen=True, eq=False)
class _View:
    """A value along its last axes, as terms in the elements of one base and the cosines and sines of one angle.

    shape   the sizes of these last axes
    terms   "x": base[index];  "cos", "sin": of angle[angle];  "x cos", "x sin": products
    base    what `index` is of, and `angles`, what `angle` is of
    lead    for each axis before the last ones, the axis of `angles` that it is, or where there are none yet, of `base`;
            None where it is of size 1, so that a table is the same along it
    moved   the base under leading axes in the order of `lead`, if a value is just that; the view is of it as well
    """

    shape: tuple[int, ...]
    terms: Mapping[str, _Term]
    base: Value | None = None
    angles: Value | None = None
    lead: tuple[int | None, ...] = ()
    moved: Value | None = None

    @property
    def is_table(self) -> bool:
        """Whether it is a cosine or a sine alone, and no x."""
        return self.base is None and self.angles is not None and len(self.terms) == 1

    def map(self, change: Any, shape: tuple[int, ...] | None = None) -> _View:
        terms = {kind: term.map(change) for kind, term in self.terms.items()}
        return replace(self, terms=terms, shape=next(iter(terms.values())).index.shape if shape is None else shape)


class _Turns:
    def __init__(self, rule: FuseRotary, function: Function, graph: Graph, log: PassRecord) -> None:
        self.rule, self.function, self.graph, self.log = rule, function, graph, log
        self.views: dict[Value, _View | None] = {}
        self.scratch = Function("scratch")
        self.builder = Builder(graph, self.scratch)

    def run(self) -> int:
        """Largest first: a turned part of the dimensions is within what joins it with the rest."""
        made: dict[Node, list[Node]] = {}
        replaced: dict[Value, Value] = {}
        done: set[Value] = set()
        for node in reversed(self.function.nodes):
            if node.op.name not in _ROOTS or node.results[0] in done:
                continue
            view = self.view(node.results[0], 0)
            if view is None or "x cos" not in view.terms or "x sin" not in view.terms:
                reason = self._why_no_turn(node)
                if reason is not None:
                    self._refuse(node, reason)
                continue
            layout = _layout_of(view)
            if layout is None:
                if self._is_whole(view):
                    self._refuse(node, "the pairs, signs or angles are in neither of rotary's orders")
                    self._mark(node.results[0], view.base, done)
                continue
            with self.builder.placed_as(node):
                result = self._rotary(node, view, layout)
            nodes, self.scratch.nodes = self.scratch.nodes, []
            if result is None:
                continue
            for each in nodes:
                each.source = node.source
            made[node] = nodes
            replaced[node.results[0]] = result.value
            if node.results[0].name != node.op.name:
                result.value.name = node.results[0].name
            taken = self._mark(node.results[0], view.base, done)
            self.log.match(self.rule.name, self.function, node, taken, nodes)
        if made:
            self._replace(made, replaced)
        return len(made)

    def _refuse(self, node: Node, reason: str) -> None:
        self.log.refuse(self.rule.name, self.function, node, reason)

    def _is_whole(self, view: _View) -> bool:
        """Whether a view is of whole pairs along one axis, and not of what is yet to be joined with the other half."""
        cos, sin = view.terms["x cos"], view.terms["x sin"]
        partners = np.intersect1d(cos.index, sin.index)
        return len(view.shape) == 1 and "x" not in view.terms and bool(partners.size)

    def _why_no_turn(self, node: Node) -> str | None:
        """Why a sum of something times a cosine and something times a sine is no view of both; None for other sums."""
        products = [v.node for v in node.inputs if v.node is not None and v.node.op.name == "mul"]
        if node.op.name not in ("add", "sub") or len(products) != 2:
            return None
        tables = [[v for v in map(self.views.get, p.inputs) if v is not None and v.is_table] for p in products]
        if sorted(kind for found in tables for v in found for kind in v.terms) != ["cos", "sin"]:
            return None
        for product, (table,) in zip(products, tables, strict=True):
            made = self.views.get(product.results[0])
            if made is None or made.angles is None:
                x = next((v for v in product.inputs if self.views.get(v) is not table), product.inputs[0])
                (kind,) = table.terms
                return f"what the {kind} multiplies, {x.type}, is repeated along the angles, or its last axis varies"
        one, other = (self.views[p.results[0]] for p in products)
        assert one is not None
        assert other is not None
        if one.base is not other.base:
            return "the cosine and the sine are not multiplied with elements of one tensor"
        if one.angles is not other.angles or one.lead != other.lead:
            return "the cosine and the sine are of different angles"
        return None

    def _mark(self, value: Value, base: Value | None, done: set[Value]) -> list[Node]:
        """What is within a turn is no root of its own; gives its nodes."""
        found: list[Node] = []
        pending = [value]
        while pending:
            inner = pending.pop()
            if inner is base or inner in done:
                continue
            done.add(inner)
            if inner.node is not None and self.views.get(inner) is not None:
                found.append(inner.node)
                pending += inner.node.inputs
        return found

    def _replace(self, made: dict[Node, list[Node]], replaced: dict[Value, Value]) -> None:
        function = self.function
        nodes: list[Node] = []
        for node in function.nodes:
            nodes += made.get(node, [node])
        for node in nodes:
            if any(v in replaced for v in node.inputs):
                node.operands = tuple(v if v is None else replaced.get(v, v) for v in node.operands)
        function.outputs = {name: replaced.get(v, v) for name, v in function.outputs.items()}
        function.nodes = nodes
        drop_unread(function)
        sweep((IdentityRearrange(), RearrangeOfRearrange()), function, self.graph, self.log)

    # -- views -------------------------------------------------------------------------------------------------

    def view(self, value: Value, depth: int) -> _View | None:
        """A value as terms, or None where its last axis is no constant; what is made otherwise is a base itself."""
        if value in self.views:
            return self.views[value]
        found: _View | None = None
        if depth < _MOST_DEPTH and value.node is not None:
            step = getattr(self, f"_{value.node.op.name}", None)
            found = step(value.node, depth + 1) if step is not None else None
        if found is None:
            found = _base(value)
        self.views[value] = found
        return found

    def _cos(self, node: Node, depth: int) -> _View | None:
        inner = self.view(node.inputs[0], depth)
        if inner is None or inner.angles is not None or inner.base is None or not _is_signed(inner.terms["x"]):
            return None
        term = inner.terms["x"]
        sign = np.ones_like(term.coefficient) if node.op.name == "cos" else term.coefficient
        angle = _Term(sign, np.zeros_like(term.index), term.index)
        sizes = inner.base.type.shape
        lead = tuple(None if at is None or sizes[at] == ONE else at for at in inner.lead)
        return _View(inner.shape, {node.op.name: angle}, None, inner.base, lead)

    _sin = _cos

    def _cast(self, node: Node, depth: int) -> _View | None:
        inner = self.view(node.inputs[0], depth)
        is_table = inner is not None and inner.base is None and node.results[0].type.dtype.is_float
        return inner if is_table else None

    def _neg(self, node: Node, depth: int) -> _View | None:
        inner = self.view(node.inputs[0], depth)
        return None if inner is None else _negated(inner)

    def _mul(self, node: Node, depth: int) -> _View | None:
        x, table = (self.view(v, depth) for v in node.inputs)
        if x is not None and x.base is None:
            x, table = table, x
        if x is not None and x.base is not None:
            x = _settled(x)
        if x is not None and x.base is not None and not _stands_still(x):  # what was moved is a base of its own
            x = _base(next(v for v in node.inputs if self.views[v] is x))
        if x is None or table is None or set(x.terms) != {"x"} or table.base is not None or len(table.terms) != 1:
            return None
        ((kind, factor),) = table.terms.items()
        if kind not in ("cos", "sin") or x.shape != table.shape or x.base is None:
            return None
        term = x.terms["x"]
        rank = node.results[0].type.rank
        if x.base.type.shape[:-1] != node.results[0].type.shape[: rank - len(x.shape)]:
            return None
        lead = (*[None] * (rank - len(x.shape) - len(table.lead)), *table.lead)
        product = _Term(term.coefficient * factor.coefficient, term.index, factor.angle)
        return _View(x.shape, {f"x {kind}": product}, x.base, table.angles, lead)

    def _add(self, node: Node, depth: int) -> _View | None:
        return self._summed(node, depth, 1)

    def _sub(self, node: Node, depth: int) -> _View | None:
        return self._summed(node, depth, -1)

    def _summed(self, node: Node, depth: int, sign: int) -> _View | None:
        x, y = (self.view(v, depth) for v in node.inputs)
        if x is None or y is None or x.shape != y.shape or not _go_together((x, y)) or x.base is None:
            return None
        if x.angles is None or y.angles is None or x.terms.keys() & y.terms.keys():
            return None
        return replace(x, terms={**x.terms, **(y if sign > 0 else _negated(y)).terms})

    def _slice(self, node: Node, depth: int) -> _View | None:
        op: Any = node.op
        inner = self.view(node.inputs[0], depth)
        if inner is None:
            return None
        rank = node.inputs[0].type.rank
        axis = op.axis % rank - (rank - len(inner.shape))
        start, stop = (s.constant for s in op.span(node.inputs[0].type.shape[op.axis % rank]))
        if axis < 0 or start is None or stop is None:
            return None
        part = (*[slice(None)] * axis, slice(start, stop, op.stride))
        return inner.map(lambda a: a[part])

    def _concat(self, node: Node, depth: int) -> _View | None:
        op: Any = node.op
        parts = [self.view(v, depth) for v in node.inputs]
        known = [p for p in parts if p is not None]
        if any(p.angles is not None and p.base is not None for p in known):
            known = [p if p.angles is not None else _settled(p) for p in known]
        if len(known) < len(parts) or not _go_together(known):
            return None
        rank = node.results[0].type.rank
        tracked = len(known[0].shape)
        axis = op.axis % rank - (rank - tracked)
        if axis < 0 or any(len(p.shape) != tracked for p in known):
            return None
        kinds = dict.fromkeys(kind for p in known for kind in p.terms)
        terms = {}
        for kind in kinds:
            each = [p.terms.get(kind) or _nothing(p.shape) for p in known]
            terms[kind] = _Term(
                *(np.concatenate([getattr(t, name) for t in each], axis) for name in ("coefficient", "index", "angle"))
            )
        whole = next((p for p in known if p.angles is not None), known[0])
        return replace(whole, terms=terms, shape=next(iter(terms.values())).index.shape)

    def _expand(self, node: Node, depth: int) -> _View | None:
        inner = self.view(node.inputs[0], depth)
        if inner is None or (inner.base is not None and inner.angles is not None):
            return None
        sizes = [s.constant for s in node.results[0].type.shape[-len(inner.shape) :]]
        if None in sizes:
            return None
        shape = tuple(s for s in sizes if s is not None)
        new = node.results[0].type.rank - node.inputs[0].type.rank
        moved = None if new else inner.moved
        return replace(inner.map(lambda a: np.broadcast_to(a, shape)), lead=(*[None] * new, *inner.lead), moved=moved)

    def _rearrange(self, node: Node, depth: int) -> _View | None:
        """Splits, joins and swaps among the last axes, and of a table also moves of those before."""
        inner = self.view(node.inputs[0], depth)
        if inner is None:
            return None
        operand = node.inputs[0].type
        form = form_of(node.op.pattern, operand)  # type: ignore[attr-defined]
        before, after = form.before, form.after
        cut = operand.rank - len(inner.shape)
        tracked = [atom for dim in before[cut:] for atom in dim]
        first = next((i for i, dim in enumerate(after) if set(dim) & set(tracked)), None)
        if first is None:
            return None
        # Axes of size 1 that come just before the last ones belong to them where the pattern puts them there.
        last = [atom for dim in after[first:] for atom in dim]
        if sorted(last) != sorted(tracked):
            return None
        outer = list(after[:first])
        places = {dim: at for dim, at in zip(before[:cut], inner.lead, strict=True) if dim}
        if any(dim and dim not in places for dim in outer):
            return None
        if inner.base is not None and inner.angles is not None and outer != list(before[:cut]):
            return None
        lead = tuple(places[dim] if dim else None for dim in outer)
        sizes = {atom: form.sizes[atom].constant for atom in tracked}
        if None in sizes.values():
            return None
        split = [sizes[atom] for atom in tracked]
        order = [tracked.index(atom) for atom in last]
        shape = tuple(math.prod(sizes[atom] or 1 for atom in dim) for dim in after[first:])
        made = replace(inner.map(lambda a: a.reshape(split).transpose(order).reshape(shape)), lead=lead)
        if _is_whole_base(made):
            return replace(made, moved=node.results[0])
        return made if outer == list(before[:cut]) else replace(made, moved=None)

    # -- the op ------------------------------------------------------------------------------------------------

    def _rotary(self, node: Node, view: _View, layout: tuple[str, int]) -> Expr | None:
        """The op in place of a root, or None, with the reason in the log, where its angles or axes are others."""
        assert view.base is not None
        assert view.angles is not None
        b, base = self.builder, view.base
        if base.type.rank != 4:
            self._refuse(node, f"x has rank {base.type.rank}, rotary takes rows, heads, positions and dimensions")
            return None
        axes = Axes()
        x_layout = axes.of(base)
        varying = [i for i, at in enumerate(view.lead) if at is not None]
        if not 1 <= len(varying) <= 2:
            self._refuse(
                node, f"the angles vary along {len(varying)} axes beside that of pairs, not by row and position"
            )
            return None
        s = varying[-1]
        others = [i for i in range(3) if i != s]
        row = varying[0] if len(varying) == 2 else others[0]
        head = next(i for i in others if i != row)
        angle_layout = list(axes.of(view.angles))
        for i in varying:
            at = view.lead[i]
            assert at is not None
            angle_layout[at] = x_layout[i]
        found = _positions_and_frequencies(axes, Placed(view.angles, tuple(angle_layout)))
        if found is None:
            self._refuse(node, "the angles are no product of whole positions and frequencies")
            return None
        positions, frequencies = found
        x = b.expr(base)
        cos = view.terms["x cos"]
        first, (count,) = int(cos.index[cos.coefficient != 0].min()), view.shape
        if (first, count) != (0, base.type.shape[-1].constant):
            x = b.slice(x, axis=3, start=first, stop=first + count)
        inner = axes.new(x.shape[-1])
        held: Layout = (*x_layout[:3], inner)
        order = (x_layout[row], x_layout[head], x_layout[s], inner)
        placed = axes.place(b, x, held, order)
        whole = axes.place(b, b.expr(positions.value), positions.layout, (x_layout[row], x_layout[s]))
        f = axes.place(b, b.expr(frequencies.value), frequencies.layout, (angle_layout[-1],))
        name, turned = layout
        if f.shape[0] != turned:
            f = b.slice(f, axis=0, start=0, stop=turned)
        made = axes.place(b, b.rotary(placed, whole, f, layout=name), order, held)
        if made.type != node.results[0].type:
            self._refuse(node, f"rotary would give {made.type} for {node.results[0].type}")
            return None
        return made


def _base(value: Value) -> _View | None:
    """A value as it is, along its last axis."""
    if not value.type.rank or not value.type.dtype.is_float:
        return None
    size = value.type.shape[-1].constant
    if size is None or not 1 <= size <= _MOST_DIMENSIONS:
        return None
    ones, index = np.ones(size, np.int64), np.arange(size)
    lead = tuple(range(value.type.rank - 1))
    return _View((size,), {"x": _Term(ones, index, np.zeros_like(index))}, value, None, lead)


def _is_signed(term: _Term) -> bool:
    return bool((np.abs(term.coefficient) == 1).all())


def _negated(view: _View) -> _View:
    terms = {k: _Term(-t.coefficient, t.index, t.angle) for k, t in view.terms.items()}
    return replace(view, terms=terms)


def _nothing(shape: tuple[int, ...]) -> _Term:
    zeros = np.zeros(shape, np.int64)
    return _Term(zeros, zeros, zeros)


def _go_together(views: Sequence[_View]) -> bool:
    """Whether they are of one base, and where they hold angles, of the same ones along the same axes."""
    angled = [v for v in views if v.angles is not None]
    plain = [v for v in views if v.angles is None]
    return (
        all(v.base is views[0].base for v in views)
        and all(v.angles is angled[0].angles and v.lead == angled[0].lead for v in angled)
        and all(v.lead == plain[0].lead for v in plain)
        and (not angled or all(map(_stands_still, plain)))
    )


def _is_whole_base(view: _View) -> bool:
    """Whether it is the elements of the base in their order along the last axis, all of them."""
    if view.base is None or view.angles is not None or view.shape != (view.base.type.shape[-1].constant,):
        return False
    term = view.terms["x"]
    return bool((term.coefficient == 1).all()) and np.array_equal(term.index, np.arange(view.shape[0]))


def _settled(view: _View) -> _View:
    """A view of x with the axes before the last ones as its base has them: where they were moved, of what was moved."""
    if view.base is None or view.moved is None or _stands_still(view):
        return view
    return replace(view, base=view.moved, lead=tuple(range(view.moved.type.rank - 1)))


def _stands_still(view: _View) -> bool:
    """Whether the axes before the last ones are the base's own, in order."""
    assert view.base is not None
    sizes = view.base.type.shape[:-1]
    still = zip(view.lead, sizes, strict=False)
    return len(view.lead) == len(sizes) and all(at == i or size == ONE for i, (at, size) in enumerate(still))


def _layout_of(view: _View) -> tuple[str, int] | None:
    """rotary's layout and the number of its pairs, where every element is what rotary gives."""
    if len(view.shape) != 1 or view.base is None or not set(view.terms) <= {"x", "x cos", "x sin"}:
        return None
    cos, sin = view.terms["x cos"], view.terms["x sin"]
    (size,) = view.shape
    turned = int(np.count_nonzero(cos.coefficient))
    f = turned // 2
    if turned % 2 or not f:
        return None
    passed = view.terms.get("x") or _nothing(view.shape)
    index = np.where(cos.coefficient != 0, cos.index, passed.index)
    offset = int(index.min())
    n = np.arange(size)
    inside = n < turned
    if not np.array_equal(index, n + offset):
        return None
    if not np.array_equal(cos.coefficient, inside) or not np.array_equal(passed.coefficient, ~inside):
        return None
    for name in ("half", "interleaved"):
        second = n >= f if name == "half" else n % 2 == 1
        partner = np.where(second, n - f, n + f) if name == "half" else n ^ 1
        pair = n % f if name == "half" else n // 2
        wanted = ((sin.index, partner + offset), (sin.coefficient, np.where(second, 1, -1)))
        angles = ((cos.angle, pair), (sin.angle, pair))
        if all(np.array_equal(got[inside], want[inside]) for got, want in (*wanted, *angles)):
            return (name, f) if not sin.coefficient[~inside].any() else None
    return None


def _positions_and_frequencies(axes: Axes, angles: Placed) -> tuple[Placed, Placed] | None:
    """The factors of an outer product: whole positions along all axes but the last, and frequencies along that."""
    last = set(axes.flat(angles.layout[-1]))
    value, layout = angles.value, angles.layout
    while (node := value.node) is not None and node.op.name in ("rearrange", "expand", "cast"):
        above = layout if node.op.name == "cast" else axes.above(node, layout)
        if above is None or not node.inputs[0].type.dtype.is_float:
            return None
        value, layout = node.inputs[0], above
    if node is None or len(node.inputs) != 2:
        return None
    if node.op.name in PRODUCTS:
        layouts, summed = axes.factors(node, layout)
        if any(summed.values()):
            return None
    elif node.op.name == "mul":
        layouts = [narrowed(v, layout) for v in node.inputs]
    else:
        return None
    sides = [Placed(v, made) for v, made in zip(node.inputs, layouts, strict=True)]
    for positions, frequencies in (sides, sides[::-1]):
        held = [{a for dim in axes.resolved(p.layout) for a in dim} for p in (positions, frequencies)]
        whole = _whole_numbers(axes, positions)
        if whole is not None and not held[0] & last and held[1] <= last:
            return whole, _uncast(axes, frequencies)
    return None


def _whole_numbers(axes: Axes, placed: Placed) -> Placed | None:
    """The integers beneath a cast to a float, and moves."""
    value, layout = placed.value, placed.layout
    while (node := value.node) is not None and node.op.name in ("rearrange", "expand", "cast"):
        above = layout if node.op.name == "cast" else axes.above(node, layout)
        if above is None:
            return None
        value, layout = node.inputs[0], above
        if value.type.dtype.is_int:
            return Placed(value, layout)
    return None


def _uncast(axes: Axes, placed: Placed) -> Placed:
    """Beneath moves that do not repeat."""
    value, layout = placed.value, placed.layout
    while (node := value.node) is not None and node.op.name in ("rearrange", "expand"):
        above = axes.above(node, layout)
        if above is None:
            break
        value, layout = node.inputs[0], above
    return Placed(value, layout)
