"""From a softmax between two products to attention: which axes are which, what q, k, v and the terms are.

A row in which every key is masked is what decides the terms. Spelled out, it is NaN (-inf and a plain softmax), zeros
(-inf, guarded) or an average (a large negative number in place of scores, or added to them); attention gives zeros.
Each is kept: see `Plan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.attention_terms import BooleanMask, TensorBias
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.sizes import Bounds
from treadle.ir.types import DType, f32, i32
from treadle.passes.attention_biases import (
    ABSORBING,
    Table,
    addends_of,
    as_mask,
    hazards_of,
    read_bias,
    table_mask,
    table_terms,
)
from treadle.passes.attention_core import (
    LEAST_FILL,
    Added,
    Chosen,
    Mismatch,
    Origin,
    Placed,
    Scores,
    Values,
    Weighting,
    is_weight,
    origin_of,
)
from treadle.passes.attention_masks import read_condition
from treadle.passes.attention_roles import Fused, Note, Operand, Reading, Roles, never_empty
from treadle.passes.axis_tracking import Axes, Layout
from treadle.passes.canonicalize import is_lossless


class Plan:
    """What one site becomes. Raises Mismatch where it can be no attention.

    1. A mask by -inf is a mask. Where it may take every key of a row and the softmax is not guarded, NaN is put back.
    2. A mask by a large negative number is a mask if every row is sure to keep a key, beside all other masks. Else
       it is added: as it was, if it was added; in place of being filled in, if scores vanish beside the number; or if
       they do not, with the queries of empty rows set to zero, where nothing else masks or shifts those rows.

    With `zero_empty_rows` every mask is a mask.
    """

    def __init__(
        self,
        axes: Axes,
        layout: Layout,
        symbols: dict[str, Bounds],
        weighting: Weighting,
        values: Values,
        scores: Scores,
        zero_empty_rows: bool,
        by_offset: dict[Value, np.ndarray[Any, Any] | None],
    ) -> None:
        self.axes, self.layout, self.weighting, self.values, self.scores = axes, layout, weighting, values, scores
        self.zeros = zero_empty_rows
        self.guarded = values.guarded or zero_empty_rows
        self.nodes = scores.nodes
        self.notes: list[Note] = []
        self._find_origins()
        self.roles = Roles(axes, self._groups(), symbols, by_offset)
        self.masks: list[Fused] = []
        self.biases: list[Fused] = []
        self.kept_nan: list[_Seen] = []
        self.averaged: Chosen | None = None
        self._read_terms()
        self.dtype = self._widest()
        greatest = float(np.finfo(self.dtype.numpy).max) if self.dtype.numpy is not None else 3e38
        if not 1 / greatest <= abs(self.scale) <= greatest:
            self._fail(f"the scale is {self.scale:g}, which {self.dtype} does not hold")
        for placed in values.returned:
            if not is_lossless(placed.value.type.dtype, self.dtype):
                what = f"the probabilities are returned in {placed.value.type.dtype}, and attention is in {self.dtype}"
                raise Mismatch(what, weighting.anchor, self.nodes, f"return them in {self.dtype}")

    def _atoms(self, layout: Layout) -> set[int]:
        return {atom for dim in self.axes.resolved(layout) for atom in dim}

    # -- which is which ----------------------------------------------------------------------------------------

    def _find_origins(self) -> None:
        """Tell q from k by the axis of the softmax, which is the keys', and look beneath their moves and scales."""
        scores, values = self.scores, self.values
        keys = set(self.axes.flat(self.layout[self.weighting.axis]))
        if not keys:
            raise Mismatch("there is one key, and the softmax of one score is 1", self.weighting.anchor, self.nodes)
        sides = [scores.left, scores.right]
        held = [keys & self._atoms(p.layout) for p in sides]
        if all(held):
            self._fail("the softmax is over an axis that both factors of the scores have")
        if not any(held):
            self._fail("the softmax is over an axis that neither factor of the scores has")
        q, k = (sides[1], sides[0]) if held[0] else (sides[0], sides[1])
        if held[0] != keys and held[1] != keys:
            self._fail("the softmax is over an axis of queries and keys together")
        if scores.summed is None:
            self._fail("the scores are no sum over an axis of queries and keys")
        everything, result = self._atoms(self.layout), self._atoms(values.result)
        if result & keys or not keys <= self._atoms(values.values.layout):
            self._fail("the product with the values does not sum over the axis of the softmax", values=True)
        if everything - result != keys:
            self._fail("the product with the values sums over another axis than the softmax's as well", values=True)

        def is_batch(atom: int) -> bool:  # asked while atoms are still being split
            axis = self.axes.flat(self.layout[self.weighting.axis])
            return atom in self._atoms(self.layout) and atom not in axis

        self.q, self.k, self.v = (origin_of(self.axes, x, is_batch) for x in (q, k, values.values))
        if self.v.factor != 1.0:
            self.v = Origin(((values.values, 1.0),))
        if is_weight(self.k.placed.value):
            self._fail("the keys are weights: a layer with a softmax, no attention")
        self.scale = scores.scale * self.q.factor * self.k.factor

    def _fail(self, reason: str, values: bool = False) -> None:
        raise Mismatch(reason, self.values.product if values else self.scores.product, self.nodes)

    def _groups(self) -> dict[str, tuple[int, ...]]:
        """The atoms of b, h = (g r), s and t; those of g, d and e are kept beside."""
        axes = self.axes
        dims = list(axes.resolved(self.layout))
        t = dims.pop(self.weighting.axis)
        shared = self._atoms(self.k.placed.layout) | self._atoms(self.v.placed.layout)
        s = dims.pop() if dims and not shared.intersection(dims[-1]) else ()
        rest = [atom for dim in dims for atom in dim]
        r = tuple(atom for atom in rest if atom not in shared)
        first = dims[0] if dims else ()
        if len(dims) == 1 and len(first) > 1:
            first = first[:1]  # rows and heads, in one dimension
        b = tuple(atom for atom in first if atom not in r)
        g = tuple(atom for atom in rest if atom not in r and atom not in b)
        d = axes.flat(self.scores.summed or ())
        inner = {*b, *g, *r, *s, *t}
        e = tuple(a for dim in axes.resolved(self.values.result) for a in dim if a not in inner)
        self.g, self.d, self.e = g, d, e
        for origin, allowed, what in (
            (self.q, {*b, *g, *r, *s, *d}, "queries"),
            (self.k, {*b, *g, *t, *d}, "keys"),
            (self.v, {*b, *g, *t, *e}, "values"),
        ):
            if not self._atoms(origin.placed.layout) <= allowed:
                self._fail(f"the {what} have an axis that attention's have not")
        return {"b": b, "h": (*g, *r), "s": s, "t": t}

    # -- masks and biases --------------------------------------------------------------------------------------

    def _read_terms(self) -> None:
        read: list[_Read] = []
        plain: list[Added] = []
        for term in self.scores.terms:
            if isinstance(term, Chosen):
                read.append(self._read(term, None, added=False))
                continue
            for part in addends_of(self.axes, term):
                if isinstance(part, Chosen):
                    read.append(self._read(part, None, added=True))
                elif (mask := as_mask(self.axes, part)) is not None:
                    read.append(self._read(mask, part, added=True))
                else:
                    plain.append(part)
        tables = [(addend, table_mask(self.roles, addend)) for addend in plain]
        known = [f for each in read for f in each.reading.terms]
        known += [f for _, table in tables if table is not None for f in table_terms(self.roles, table)]
        hazards = {addend: hazards_of(addend.placed.value) for addend, table in tables if table is None}
        for addend, found in hazards.items():
            if "infinite" in found and (addend.factor < 0 or "rising" in found):
                raise Mismatch("what is added to the scores may be inf", addend.node, self.nodes)
        settled = not any(hazards.values())
        whole = self.zeros or (settled and never_empty(known, self.roles))
        for each in read:
            self._expect_low(each.chosen)
            self.notes += each.reading.notes
            if each.chosen.fill == -math.inf or (whole and (not each.added or each.reading.structural or self.zeros)):
                self.masks += each.reading.terms
            else:
                alone = settled and len(read) == 1 and not any(table for _, table in tables)
                self._average(each, alone)
                if not whole and each.reading.terms:
                    self._note_addend(each.chosen.fill, each.chosen.node, settled)
        for addend, table in tables:
            terms = table_terms(self.roles, table) if table is not None else []
            by_position = bool(terms) and not any(isinstance(f.term, BooleanMask) for f in terms)
            if table is not None and by_position and (whole or table.fill == -math.inf):
                self.masks += terms
            else:
                self.biases += read_bias(self.roles, addend)
                if table is not None and by_position:
                    self._note_addend(table.fill, addend.node, settled)
        if not self.guarded:
            self._keep_nan(read, tables, hazards)

    def _read(self, chosen: Chosen, addend: Added | None, added: bool) -> _Read:
        return _Read(chosen, addend, added, read_condition(self.roles, chosen.placed, chosen.keep))

    def _keep_nan(self, read: Sequence[_Read], tables: Sequence[tuple[Added, Table | None]], hazards: _Hazards) -> None:
        """Note what may set every score of a row to -inf, where spelled out the row would be NaN."""
        infinite = [each for each in read if each.chosen.fill == -math.inf]
        constant = [(a, table) for a, table in tables if table is not None and table.fill == -math.inf]
        unknown = [a for a, found in hazards.items() if "infinite" in found]
        lost = [f for each in infinite for f in each.reading.terms]
        lost += [f for _, table in constant for f in table_terms(self.roles, table)]
        if unknown or not never_empty(lost, self.roles):
            self.kept_nan = [_Seen(each.chosen.placed, each.chosen.keep) for each in infinite]
            self.kept_nan += [_Seen(a.placed, factor=a.factor) for a in (*(a for a, _ in constant), *unknown)]

    def _expect_low(self, chosen: Chosen) -> None:
        """Raise Mismatch for a mask whose number is not low beside scores of this scale."""
        if chosen.fill > -LEAST_FILL * max(1.0, abs(self.scale)):
            reason = f"scores times {self.scale:g} may be as low as {chosen.fill:g}, by which they are masked"
            raise Mismatch(reason, chosen.node, self.nodes, "-inf in its place")

    def _average(self, each: _Read, alone: bool) -> None:
        """A mask by a large negative number, where a row may be without keys: as what is added."""
        chosen, terms = each.chosen, each.reading.terms
        if not terms:
            return
        if not each.added and abs(chosen.fill) < ABSORBING:
            if not alone or self.scores.terms[0] is not chosen:
                reason = f"a row in which every key is masked by {chosen.fill:g} depends on more than that mask"
                raise Mismatch(reason, chosen.node, self.nodes)
            self.averaged = chosen
        if len(terms) == 1 and isinstance(terms[0].term, BooleanMask):
            (operand,) = terms[0].operands  # which may have fewer axes than the condition as a whole
        else:
            axes = self.roles.held(chosen.placed.layout) or "t"
            operand = Operand(chosen.placed, axes, negated=not chosen.keep)
        filled = Operand(operand.placed, operand.axes, operand.negated, to=operand.to, fill=chosen.fill)
        same = each.addend is not None and self._held(each.addend.placed) == operand.axes
        if each.addend is not None and same:
            self.biases += read_bias(self.roles, each.addend)
        else:
            self.biases.append(Fused(TensorBias(operand.axes), (filled,)))

    def _note_addend(self, fill: float, node: Node, settled: bool) -> None:
        """Tell of a mask by a large negative number that is added, where with -inf it would have been a term."""
        why = "a row in which every key is masked is an average" if settled else "another addend may outweigh it"
        hint = "-inf in its place, or FuseAttention(zero_empty_rows=True)"
        self.notes.append(Note(f"stays an addend: it is {fill:g}, and {why}", node, hint))

    def _held(self, placed: Placed) -> str:
        return self.roles.held(placed.layout)

    def _widest(self) -> DType:
        """The dtype to attend in: that of q, k, v, of the scores and of biases that holds all of the others."""
        values = [x.placed.value for x in (self.q, self.k, self.v)] + [self.scores.product.results[0]]
        values += [operand.placed.value for f in self.biases for operand in f.operands if operand.fill is None]
        dtypes = list(dict.fromkeys(v.type.dtype for v in values if v.type.dtype.is_float))
        for wide in (*dtypes, f32):
            if all(is_lossless(dtype, wide) for dtype in dtypes):
                return wide
        self._fail(f"no dtype holds all of {', '.join(map(str, dtypes))}")
        return f32

    # -- building ----------------------------------------------------------------------------------------------

    def build(self, b: Builder) -> list[tuple[Value, Expr]]:
        """Attention: what it replaces, the product with the values first, and what stands in the place of each."""
        roles, axes = self.roles, self.axes
        groups = roles.groups
        q = self._laid_out(b, self.q, (groups["b"], groups["h"], groups["s"], self.d))
        k = self._laid_out(b, self.k, (groups["b"], self.g, groups["t"], self.d))
        v = self._laid_out(b, self.v, (groups["b"], self.g, groups["t"], self.e))
        if self.averaged is not None:
            q = b.where(self._sees(b, [_Seen(self.averaged.placed, self.averaged.keep)]), q, b.constant(0, q.dtype))
        fused = (*self.masks, *self.biases)
        operands = [operand.build(b, roles, self.dtype) for f in fused for operand in f.operands]
        attributes: dict[str, Any] = {
            "terms": tuple(f.term for f in fused),
            "scale": self._scale_attribute(q),
            "softcap": None if self.scores.softcap is None else _shortest(self.scores.softcap, self.dtype),
        }
        returned = self.values.returned
        made: list[Expr]
        if returned:
            made = list(b.attention_with_probabilities(*(q, k, v, *operands), **attributes, name="attention"))
            made[1].value.name = "probabilities"
        else:
            made = [b.attention(*(q, k, v, *operands), **attributes)]
        if self.kept_nan:
            seen = self._sees(b, self.kept_nan)
            made = [b.where(seen, x, b.constant(math.nan, x.dtype)) for x in made]
        by_row = (groups["b"], groups["h"], groups["s"])
        wanted = [(Placed(self.values.product.results[0], self.values.result), made[0], self.e)]
        wanted += [(placed, made[1], groups["t"]) for placed in returned]
        return [
            (p.value, axes.place(b, x.cast(p.value.type.dtype), (*by_row, last), p.layout)) for p, x, last in wanted
        ]

    def _laid_out(self, b: Builder, origin: Origin, wanted: Sequence[Sequence[int]]) -> Expr:
        placed = origin.as_laid_out(self.axes, wanted)
        return self.axes.place(b, b.expr(placed.value).cast(self.dtype), placed.layout, wanted)

    def _scale_attribute(self, q: Expr) -> float | None:
        """The scale, or None if it is the default: 1/sqrt(d), as two constants of the dtype may say it."""
        d = q.shape[-1].constant
        eps = float(np.finfo(self.dtype.numpy).eps) if self.dtype.numpy is not None else 2.0**-7
        if d is not None and abs(self.scale * math.sqrt(d) - 1) <= 4 * eps:
            return None
        return _shortest(self.scale, self.dtype)

    def _sees(self, b: Builder, parts: Sequence[_Seen]) -> Expr:
        """[b, h, s, 1], with 1 for an axis that no part has: whether there is a key that all of these keep."""
        groups, kept = self.roles.groups, None
        for part in parts:
            x = b.expr(part.placed.value)
            if x.dtype.is_float:
                x = (x if part.factor == 1.0 else x * part.factor) > -math.inf
            condition = x if part.keep else b.logical_not(x)
            held = self._held(part.placed).split()
            spread = self.axes.place(b, condition, part.placed.layout, [groups[n] if n in held else () for n in groups])
            kept = spread if kept is None else kept & spread
        assert kept is not None
        if kept.shape[3] == 1:
            return kept
        return b.reduce_max(kept.cast(i32), axes=(3,), keep=True) > 0


@dataclass(frozen=True)
class _Read:
    """A mask as it was read: whether it is added to the scores, and as what (None: as a part of something)."""

    chosen: Chosen
    addend: Added | None
    added: bool
    reading: Reading


@dataclass(frozen=True)
class _Seen:
    """What keeps a key: where a condition is `keep`, or factor * an addend is not -inf."""

    placed: Placed
    keep: bool = True
    factor: float = 1.0


_Hazards = dict[Added, frozenset[str]]


def _shortest(number: float, dtype: DType) -> float:
    """The shortest decimal that rounds to this number in a dtype: 0.3 for 0.30000001192092896."""
    return number if dtype.numpy is None else float(str(dtype.numpy.type(number)))
