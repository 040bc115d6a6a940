"""Views of values as elements of a tensor times cosines and sines of angles, tracked along their last axes.

A rotary rotation can be written in slices, joins, negations and tables of many kinds. A view does not depend on the
form: for each element along the last axes, it holds the tensor and the index of its element, a sign, and the angle
whose cosine or sine multiplies them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treadle.ir.graph import Node, Value
from treadle.ir.ops.elementwise import Cos
from treadle.ir.sizing.sizes import ONE
from treadle.passes.cleanup.rearrange_forms import form_of

Array = np.ndarray[Any, Any]

_MOST_DIMENSIONS = 1024
_MOST_DEPTH = 24


@dataclass(frozen=True, eq=False)
class RotaryTerm:
    """A term coefficient * base[index], elementwise along the last axes."""

    coefficient: Array
    index: Array
    angle: Array

    def map(self, change: Any) -> RotaryTerm:
        return RotaryTerm(change(self.coefficient), change(self.index), change(self.angle))


@dataclass(frozen=True, eq=False)
class RotaryView:
    """A value along its last axes, as terms in the elements of one base and the cosines and sines of one angle.

    shape   the sizes of these last axes
    terms   "x": base[index];  "cos", "sin": of angle[angle];  "x cos", "x sin": products
    base    the value to whose elements `index` refers; `angles` is the value to whose elements `angle` refers
    lead    for each axis before the last ones, the corresponding axis of `angles`, or of `base` if there are no angles
            yet; None for size 1, along which a table is constant
    moved   the base with its leading axes in the order of `lead`, if that is a value; the view also applies to it
    """

    shape: tuple[int, ...]
    terms: Mapping[str, RotaryTerm]
    base: Value | None = None
    angles: Value | None = None
    lead: tuple[int | None, ...] = ()
    moved: Value | None = None

    @property
    def is_table(self) -> bool:
        """True if the view is only a cosine or a sine, without x."""
        return self.base is None and self.angles is not None and len(self.terms) == 1

    def map(self, change: Any, shape: tuple[int, ...] | None = None) -> RotaryView:
        terms = {kind: term.map(change) for kind, term in self.terms.items()}
        return replace(self, terms=terms, shape=next(iter(terms.values())).index.shape if shape is None else shape)


class Views:
    """The views of one function's values, each computed once."""

    def __init__(self) -> None:
        self._views: dict[Value, RotaryView | None] = {}

    def known(self, value: Value) -> RotaryView | None:
        """Return the view of a value if it was computed already."""
        return self._views.get(value)

    def of(self, value: Value) -> RotaryView | None:
        """Return the view of a value. If the value is computed in another way, it is a base itself. Return None if the
        size of its last axis varies.
        """
        return self.view(value, 0)

    def view(self, value: Value, depth: int) -> RotaryView | None:
        """Return the view of a value. If the value is computed in another way, it is a base itself. Return None if the
        size of its last axis varies.
        """
        if value in self._views:
            return self._views[value]
        found: RotaryView | None = None
        if depth < _MOST_DEPTH and value.node is not None:
            step = getattr(self, f"_{value.node.op.name}", None)
            found = step(value.node, depth + 1) if step is not None else None
        if found is None:
            found = _base(value)
        self._views[value] = found
        return found

    def _cos(self, node: Node, depth: int) -> RotaryView | None:
        inner = self.view(node.inputs[0], depth)
        if inner is None or inner.angles is not None or inner.base is None or not _is_signed(inner.terms["x"]):
            return None
        term = inner.terms["x"]
        sign = np.ones_like(term.coefficient) if isinstance(node.op, Cos) else term.coefficient
        angle = RotaryTerm(sign, np.zeros_like(term.index), term.index)
        sizes = inner.base.type.shape
        lead = tuple(None if at is None or sizes[at] == ONE else at for at in inner.lead)
        return RotaryView(inner.shape, {node.op.name: angle}, None, inner.base, lead)

    _sin = _cos

    def _cast(self, node: Node, depth: int) -> RotaryView | None:
        inner = self.view(node.inputs[0], depth)
        is_table = inner is not None and inner.base is None and node.results[0].type.dtype.is_float
        return inner if is_table else None

    def _neg(self, node: Node, depth: int) -> RotaryView | None:
        inner = self.view(node.inputs[0], depth)
        return None if inner is None else _negated(inner)

    def _mul(self, node: Node, depth: int) -> RotaryView | None:
        x, table = (self.view(v, depth) for v in node.inputs)
        if x is not None and x.base is None:
            x, table = table, x
        if x is not None and x.base is not None:
            x = _settled(x)
        if x is not None and x.base is not None and not _stands_still(x):  # a moved value becomes a base itself
            x = _base(next(v for v in node.inputs if self._views[v] is x))
        if x is None or table is None or set(x.terms) != {"x"} or table.base is not None or len(table.terms) != 1:
            return None
        (kind,) = table.terms
        table = _spread(table, x.shape)
        if kind not in ("cos", "sin") or table is None or x.base is None:
            return None
        term, factor = x.terms["x"], table.terms[kind]
        rank = node.results[0].type.rank
        if x.base.type.shape[:-1] != node.results[0].type.shape[: rank - len(x.shape)]:
            return None
        lead = (*[None] * (rank - len(x.shape) - len(table.lead)), *table.lead)
        product = RotaryTerm(term.coefficient * factor.coefficient, term.index, factor.angle)
        return RotaryView(x.shape, {f"x {kind}": product}, x.base, table.angles, lead)

    def _add(self, node: Node, depth: int) -> RotaryView | None:
        return self._summed(node, depth, 1)

    def _sub(self, node: Node, depth: int) -> RotaryView | None:
        return self._summed(node, depth, -1)

    def _summed(self, node: Node, depth: int, sign: int) -> RotaryView | None:
        x, y = (self.view(v, depth) for v in node.inputs)
        if x is None or y is None or x.shape != y.shape or not _go_together((x, y)) or x.base is None:
            return None
        if x.angles is None or y.angles is None or x.terms.keys() & y.terms.keys():
            return None
        return replace(x, terms={**x.terms, **(y if sign > 0 else _negated(y)).terms})

    def _slice(self, node: Node, depth: int) -> RotaryView | None:
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

    def _concat(self, node: Node, depth: int) -> RotaryView | None:
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
            each = [p.terms.get(kind) or no_term(p.shape) for p in known]
            terms[kind] = RotaryTerm(
                *(np.concatenate([getattr(t, name) for t in each], axis) for name in ("coefficient", "index", "angle"))
            )
        whole = next((p for p in known if p.angles is not None), known[0])
        return replace(whole, terms=terms, shape=next(iter(terms.values())).index.shape)

    def _expand(self, node: Node, depth: int) -> RotaryView | None:
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

    def _rearrange(self, node: Node, depth: int) -> RotaryView | None:
        """Return the view after splits, joins and swaps among the last axes; for a table also after moves of the axes
        before.
        """
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
        # Axes of size 1 just before the last axes count among them if the pattern moves them there.
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


def _base(value: Value) -> RotaryView | None:
    """Return the view of a value as its own base, along its last axis."""
    if not value.type.rank or not value.type.dtype.is_float:
        return None
    size = value.type.shape[-1].constant
    if size is None or not 1 <= size <= _MOST_DIMENSIONS:
        return None
    ones, index = np.ones(size, np.int64), np.arange(size)
    lead = tuple(range(value.type.rank - 1))
    return RotaryView((size,), {"x": RotaryTerm(ones, index, np.zeros_like(index))}, value, None, lead)


def _spread(table: RotaryView, shape: tuple[int, ...]) -> RotaryView | None:
    """Return a table broadcast along more of the last axes; None if it varies along these axes."""
    more = len(shape) - len(table.shape)
    if more < 0 or table.shape != shape[more:]:
        return None
    kept = max(len(table.lead) - more, 0)
    if any(at is not None for at in table.lead[kept:]):
        return None
    return replace(table.map(lambda a: np.broadcast_to(a, shape)), lead=table.lead[:kept])


def _is_signed(term: RotaryTerm) -> bool:
    return bool((np.abs(term.coefficient) == 1).all())


def _negated(view: RotaryView) -> RotaryView:
    terms = {k: RotaryTerm(-t.coefficient, t.index, t.angle) for k, t in view.terms.items()}
    return replace(view, terms=terms)


def no_term(shape: tuple[int, ...]) -> RotaryTerm:
    zeros = np.zeros(shape, np.int64)
    return RotaryTerm(zeros, zeros, zeros)


def _go_together(views: Sequence[RotaryView]) -> bool:
    """Return True if the views have the same base, and the same angles along the same axes, if they have angles."""
    angled = [v for v in views if v.angles is not None]
    plain = [v for v in views if v.angles is None]
    return (
        all(v.base is views[0].base for v in views)
        and all(v.angles is angled[0].angles and v.lead == angled[0].lead for v in angled)
        and all(v.lead == plain[0].lead for v in plain)
        and (not angled or all(map(_stands_still, plain)))
    )


def _is_whole_base(view: RotaryView) -> bool:
    """Return True if the view consists of all elements of the base in order along the last axis."""
    if view.base is None or view.angles is not None or view.shape != (view.base.type.shape[-1].constant,):
        return False
    term = view.terms["x"]
    return bool((term.coefficient == 1).all()) and np.array_equal(term.index, np.arange(view.shape[0]))


def _settled(view: RotaryView) -> RotaryView:
    """Return a view of x with its leading axes in the base's order. If they were moved, the moved value becomes the
    base.
    """
    if view.base is None or view.moved is None or _stands_still(view):
        return view
    return replace(view, base=view.moved, lead=tuple(range(view.moved.type.rank - 1)))


def _stands_still(view: RotaryView) -> bool:
    """Return True if the axes before the last ones are the axes of the base, in the same order."""
    assert view.base is not None
    sizes = view.base.type.shape[:-1]
    still = zip(view.lead, sizes, strict=False)
    return len(view.lead) == len(sizes) and all(at == i or size == ONE for i, (at, size) in enumerate(still))
