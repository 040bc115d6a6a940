"""Fusion of rotary position embeddings written in primitives into one op."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Add, Mul, Sub
from treadle.ir.ops.elementwise import Cast, Cos, Sin
from treadle.ir.ops.parts import Concat
from treadle.ir.ops.products import Einsum
from treadle.ir.ops.rotary import LAYOUTS
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.passes.cleanup.canonicalize import TidyLayout
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite
from treadle.passes.fusion.attention.core import Placed
from treadle.passes.fusion.axis_tracking import Axes, Layout, narrowed
from treadle.passes.fusion.rotary_views import RotaryView, Views, no_term

_ROOTS = (Add, Sub, Concat, Rearrange)


@dataclass(frozen=True)
class FuseRotary(SiteRewrite["_Turned"]):
    """x cos a + rotate(x) sin a   -->   rotary(x, positions, frequencies)        a = positions frequencies

     1. half-split pairs (i, i + f):  concat(-x2, x1);  concat(x1 cos - x2 sin, x2 cos + x1 sin)
     2. interleaved pairs (2i, 2i + 1), likewise
     3. only the first 2f dimensions are rotated, the others are passed through
     4. x as the result of a rearrange that moves its leading axes: [b, s, h, d] -> [b, h, s, d]
     5. x as the result of a product, whose last axis a rearrange splits into heads: [b, s, (h d)], or a part of
        [b, s, (h 3 d)]
     6. pairs that are joined in the same rearrange as later moves: [b, s, h, f, 2] -> [b, h, s, (f 2)]

    The last axis is tracked element by element, so the form does not matter: each element must be x_i cos a_i -+ x_j
    sin a_i with the same positions throughout. Refuses: pairs, signs or angles in another order; positions that are not
    integers; angles that are not a product of positions and frequencies; an x whose elements are not the elements of
    one tensor in order.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    tidying = TidyLayout()

    def sites(self, work: Rewriting) -> Iterator[_Turned]:
        turns = {Cos, Sin, Mul} <= {type(node.op) for node in work.function.nodes}
        return _Turns(self.name, work).sites() if turns else iter(())

    def build(self, b: Builder, site: _Turned) -> Expr | Refusal:
        return _rotary(b, site)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Turned(Site):
    """The root that computes the rotated pairs, its view in terms of x, cos and sin, and the rotation of x."""

    view: RotaryView
    turn: _Turn


class _Turns:
    def __init__(self, rule: str, work: Rewriting) -> None:
        self.rule, self.work = rule, work
        self.views = Views()

    def sites(self) -> Iterator[_Turned]:
        """Yield the sites, the largest first. If only a part of the dimensions is rotated, that part is inside the
        value that joins it with the rest.
        """
        done: set[Value] = set()
        for node in reversed(self.work.function.nodes):
            if not isinstance(node.op, _ROOTS) or node.results[0] in done:
                continue
            view = self.views.of(node.results[0])
            if view is None or "x cos" not in view.terms or "x sin" not in view.terms:
                reason = self._why_no_turn(node)
                if reason is not None:
                    self.work.refuse(self.rule, Refusal(reason, node))
                continue
            inner = self._within(node.results[0], view.base, done)
            turn = _turn_of(view)
            if turn is not None:
                taken = tuple(v.node for v in inner if v.node is not None and self.views.known(v) is not None)
                yield _Turned(root=node, nodes=taken, view=view, turn=turn)
                if self.work.is_replaced(node.results[0]):
                    done |= inner.keys()
            elif self._is_whole(view):
                self.work.refuse(
                    self.rule, Refusal("the pairs, signs or angles are in neither of rotary's layouts", node)
                )
                done |= inner.keys()

    def _is_whole(self, view: RotaryView) -> bool:
        """Return True if a view consists of whole pairs. Return False for one half, which is joined with the other
        later.
        """
        cos, sin = view.terms["x cos"], view.terms["x sin"]
        partners = np.intersect1d(cos.index, sin.index)
        return "x" not in view.terms and bool(partners.size)

    def _why_no_turn(self, node: Node) -> str | None:
        """Return the reason why x times a cosine plus y times a sine is not a rotation; None for other sums."""
        products = [v.node for v in node.inputs if v.node is not None and isinstance(v.node.op, Mul)]
        if not isinstance(node.op, (Add, Sub)) or len(products) != 2:
            return None
        tables = [[v for v in map(self.views.known, p.inputs) if v is not None and v.is_table] for p in products]
        if sorted(kind for found in tables for v in found for kind in v.terms) != ["cos", "sin"]:
            return None
        for product, (table,) in zip(products, tables, strict=True):
            made = self.views.known(product.results[0])
            if made is None or made.angles is None:
                x = next((v for v in product.inputs if self.views.known(v) is not table), product.inputs[0])
                (kind,) = table.terms
                return f"the factor of the {kind}, {x.type}, is repeated along the angles, or its last axis varies"
        one, other = (self.views.known(p.results[0]) for p in products)
        assert one is not None
        assert other is not None
        if one.base is not other.base:
            return "the cosine and the sine are not multiplied with elements of one tensor"
        if one.angles is not other.angles or one.lead != other.lead:
            return "the cosine and the sine have different angles"
        return None

    def _within(self, value: Value, base: Value | None, done: set[Value]) -> dict[Value, None]:
        """Return the values within a rotation, which are not roots themselves."""
        found: dict[Value, None] = {}
        pending = [value]
        while pending:
            inner = pending.pop()
            if inner is base or inner in done or inner in found:
                continue
            found[inner] = None
            if inner.node is not None and self.views.known(inner) is not None:
                pending += inner.node.inputs
        return found


def _rotary(b: Builder, site: _Turned) -> Expr | Refusal:
    """Build the op that replaces a root. Return a refusal if the angles or axes do not fit the op."""
    view, turn = site.view, site.turn
    assert view.base is not None
    assert view.angles is not None
    x, lead = turn.heads_of(b.expr(view.base)), view.lead
    if x.rank != 4:
        return Refusal(f"x has rank {x.rank}, but rotary takes rows, heads, positions and dimensions")
    lead = (*lead, *[None] * (3 - len(lead)))
    axes = Axes()
    x_layout = axes.of(x.value)
    varying = [i for i, at in enumerate(lead) if at is not None]
    if not 1 <= len(varying) <= 2:
        return Refusal(
            f"the angles vary along {len(varying)} axes other than the axis of pairs, not by row and position"
        )
    s = varying[-1]
    others = [i for i in range(3) if i != s]
    row = varying[0] if len(varying) == 2 else others[0]
    head = next(i for i in others if i != row)
    angle_layout = list(axes.of(view.angles))
    for i in varying:
        at = lead[i]
        assert at is not None
        angle_layout[at] = x_layout[i]
    found = _positions_and_frequencies(axes, Placed(view.angles, tuple(angle_layout)))
    if found is None:
        return Refusal("the angles are not a product of integer positions and frequencies")
    positions, frequencies = found
    inner = axes.new(x.shape[-1])
    held: Layout = (*x_layout[:3], inner)
    order = (x_layout[row], x_layout[head], x_layout[s], inner)
    placed = axes.place(b, x, held, order)
    whole = axes.place(b, b.expr(positions.value), positions.layout, (x_layout[row], x_layout[s]))
    f = axes.place(b, b.expr(frequencies.value), frequencies.layout, (angle_layout[-1],))
    if f.shape[0] != turn.pairs:
        f = b.slice(f, axis=0, start=0, stop=turn.pairs)
    made = turn.shaped(axes.place(b, b.rotary(placed, whole, f, layout=turn.layout), order, held), view)
    if made.type != site.root.results[0].type:
        return Refusal(f"rotary would return {made.type} for {site.root.results[0].type}")
    return made


@dataclass(frozen=True)
class _Turn:
    """The rotation of a base's last axis.

    layout  the layout of the rotary op, and its number of `pairs`
    heads   the number of heads along that axis; 1 if heads have an axis of their own
    size    the number of dimensions of a head; heads begin at offset `first`, at intervals of `stride`
    whole   the size of the base's last axis, which is split into blocks of `stride`
    """

    layout: str
    pairs: int
    heads: int
    size: int
    first: int
    stride: int
    whole: int

    def heads_of(self, x: Expr) -> Expr:
        """Return the rotated heads of a base [..., d] or [b, s, (h d)]. Return x itself if it consists of just these
        heads.
        """
        b, first = x.builder, self.first
        if x.rank == 3:
            begin, count = self.first // self.stride * self.stride, self.stride * self.heads
            if count != self.whole:
                x, first = b.slice(x, axis=2, start=begin, stop=begin + count), first - begin
            x = b.rearrange(x, pattern=f"b s (h={self.heads} d) -> b s h d")
        if (first, self.size) != (0, x.shape[-1].constant):
            x = b.slice(x, axis=x.rank - 1, start=first, stop=first + self.size)
        return x

    def shaped(self, y: Expr, view: RotaryView) -> Expr:
        """Reshape [..., d] or [b, s, h, d] to the last axes of a view: joined, or with an axis of pairs."""
        assert view.base is not None
        b, joined = y.builder, view.base.type.rank == 3
        if view.shape == ((self.heads, self.size) if joined else (self.size,)):
            return y
        if joined:
            y = b.rearrange(y, pattern="... h d -> ... (h d)")
        if len(view.shape) > 1:
            names = [f"d{i}" for i in range(len(view.shape))]
            cut = " ".join(f"{name}={size}" for name, size in zip(names, view.shape, strict=True))
            y = b.rearrange(y, pattern=f"... ({cut}) -> ... {' '.join(names)}")
        return y


def _turn_of(view: RotaryView) -> _Turn | None:
    """Return the rotation that computes every element of a view, or None if there is none."""
    if view.base is None or not set(view.terms) <= {"x", "x cos", "x sin"}:
        return None
    size, rank = math.prod(view.shape), view.base.type.rank
    turns = (_turn_in(view, heads) for heads in (_divisors(size) if rank == 3 else (1,)))
    return next((turn for turn in turns if turn is not None), None)


def _divisors(size: int) -> Iterator[int]:
    return (n for n in range(1, size // 2 + 1) if size % n == 0)


def _turn_in(view: RotaryView, heads: int) -> _Turn | None:
    """Return the rotation that computes a view of this number of adjacent heads, all in one order. Return None if
    there is none.
    """
    terms = [view.terms.get(kind) or no_term(view.shape) for kind in ("x cos", "x sin", "x")]
    cos, sin, passed = (term.map(lambda a: a.reshape(heads, -1)) for term in terms)
    whole = None if view.base is None else view.base.type.shape[-1].constant
    assert whole is not None
    size = cos.index.shape[1]
    turned = int(np.count_nonzero(cos.coefficient[0]))
    f = turned // 2
    if turned % 2 or not f:
        return None
    index = np.where(cos.coefficient != 0, cos.index, passed.index)
    first = int(index[0, 0])
    stride = int(index[1, 0]) - first if heads > 1 else whole
    n, offset = np.arange(size), first + stride * np.arange(heads)[:, None]
    inside = np.broadcast_to(n < turned, index.shape)
    if stride < size or first % stride + size > stride or first // stride * stride + stride * heads > whole:
        return None
    if not np.array_equal(index, n + offset):
        return None
    if not np.array_equal(cos.coefficient, inside) or not np.array_equal(passed.coefficient, ~inside):
        return None
    if sin.coefficient[~inside].any():
        return None
    for layout in LAYOUTS:
        half = layout == "half"
        second = n >= f if half else n % 2 == 1
        partner = np.where(second, n - f, n + f) if half else n ^ 1
        pair = n % f if half else n // 2
        signed = ((sin.index, partner + offset), (sin.coefficient, np.where(second, 1, -1)))
        wanted = (*signed, (cos.angle, pair), (sin.angle, pair))
        if all(np.array_equal(got[inside], np.broadcast_to(want, got.shape)[inside]) for got, want in wanted):
            return _Turn(layout, f, heads, size, first, stride, whole)
    return None


def _positions_and_frequencies(axes: Axes, angles: Placed) -> tuple[Placed, Placed] | None:
    """Return the factors of an outer product: integer positions along all axes but the last, and frequencies along the
    last axis. Return None for any other value.
    """
    last = set(axes.flat(angles.layout[-1]))
    value, layout = angles.value, angles.layout
    while (node := value.node) is not None and isinstance(node.op, (Rearrange, Expand, Cast)):
        above = layout if isinstance(node.op, Cast) else axes.above(node, layout)
        if above is None or not node.inputs[0].type.dtype.is_float:
            return None
        value, layout = node.inputs[0], above
    if node is None or len(node.inputs) != 2:
        return None
    if node.is_contraction or isinstance(node.op, Einsum):  # an outer product sums over nothing
        layouts, summed = axes.factors(node, layout)
        if any(summed.values()):
            return None
    elif isinstance(node.op, Mul):
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
    """Return the integers from which a value is cast and moved, or None if it is not cast from integers."""
    value, layout = placed.value, placed.layout
    while (node := value.node) is not None and isinstance(node.op, (Rearrange, Expand, Cast)):
        above = layout if isinstance(node.op, Cast) else axes.above(node, layout)
        if above is None:
            return None
        value, layout = node.inputs[0], above
        if value.type.dtype.is_int:
            return Placed(value, layout)
    return None


def _uncast(axes: Axes, placed: Placed) -> Placed:
    """Return the value before its elements were rearranged."""
    value, layout = placed.value, placed.layout
    while (node := value.node) is not None and isinstance(node.op, (Rearrange, Expand)):
        above = axes.above(node, layout)
        if above is None:
            break
        value, layout = node.inputs[0], above
    return Placed(value, layout)
