"""The plan of attention for a softmax between two products: the roles of the axes, and q, k, v and the terms.

Rows in which every key is masked decide which terms are possible. In primitives, such a row is NaN (-inf and a plain
softmax), zeros (-inf, guarded) or an average (a large negative number that replaces scores, or is added to them);
attention gives zeros. The plan keeps each of these results: see `AttentionPlan`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import AXES, MaskTerm, TensorBias
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Value
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.types import DType, f32, i32
from treadle.passes.cleanup.canonicalize import is_lossless
from treadle.passes.framework.rewriting import Refusal
from treadle.passes.fusion.attention.chain import Seen, terms_of_chain
from treadle.passes.fusion.attention.core import Mismatch, Placed, Scores, Values, Weighting
from treadle.passes.fusion.attention.origins import Origin, is_weight, origin_of
from treadle.passes.fusion.attention.roles import Roles, Said
from treadle.passes.fusion.axis_tracking import Axes, Layout


class AttentionPlan:
    """The attention that replaces one site. Raises Mismatch if the site cannot be attention.

    1. A mask by -inf is a mask. If it may mask every key of a row and the softmax is not guarded, NaN is restored.
    2. A mask by a large negative number is a mask if every row is sure to keep a key under all masks. Otherwise it
       becomes an addend in three cases: it was added in the graph; it was filled in, and the number absorbs the
       scores; or it was filled in, the queries of empty rows can be set to zero, and nothing else masks those rows.
    3. A fill overrides everything before it, including other masks. If a row may be without keys, all steps up to the
       last fill become one bias, in which they override one another as in the graph.
    4. A sum beyond the range of the dtype, such as float32's lowest number twice, is -inf as in the graph; see 1.
    5. A fill stops the gradient of the scores that it replaces. If a row may be without keys and the graph will be
       differentiated, a fill is added, however low its number, and the queries of empty rows are set to zero.

    With `zero_empty_rows` every mask is a mask.

    said     the attributes of an attention that is already one op; None for attention in primitives
    trained  True if the graph will be differentiated
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
        said: Said | None = None,
        *,
        trained: bool = False,
    ) -> None:
        self.said = said
        self.axes, self.layout, self.weighting, self.values, self.scores = axes, layout, weighting, values, scores
        self.nodes = scores.nodes
        self._find_origins()
        self.roles = Roles(axes, self._groups(), symbols, by_offset)
        known = () if said is None else said.terms
        masks = [f for f in known if isinstance(f.term, MaskTerm)]
        guarded, rule = values.guarded or zero_empty_rows, "FuseAttention" if said is None else "RefineAttention"
        self.chain = terms_of_chain(self.roles, scores, zero_empty_rows, guarded, masks, rule, trained=trained)
        self.chain.masks[:0] = masks
        self.chain.biases[:0] = [f for f in known if not isinstance(f.term, MaskTerm)]
        self.dtype = self._widest()
        if not 1 / self.dtype.greatest <= abs(self.scale) <= self.dtype.greatest:
            self._fail(f"the scale is {self.scale:g}, which {self.dtype} cannot hold")
        narrow = self.chain.overflows_in
        if narrow is not None and narrow is not self.dtype:
            reason = f"masks are added up in {narrow} and exceed its range, but attention is in {self.dtype}"
            raise Mismatch(
                reason, scores.product, self.nodes, f"cast the scores to {self.dtype} before the masks are added"
            )
        for placed in values.returned:
            if not is_lossless(placed.value.type.dtype, self.dtype):
                what = f"the probabilities are returned in {placed.value.type.dtype}, but attention is in {self.dtype}"
                raise Mismatch(what, weighting.anchor, self.nodes, f"return the probabilities in {self.dtype}")

    def _atoms(self, layout: Layout) -> set[int]:
        return {atom for dim in self.axes.resolved(layout) for atom in dim}

    # -- roles -------------------------------------------------------------------------------------------------

    def _find_origins(self) -> None:
        """Distinguish q from k, and find their origins. The axis of the softmax is the axis of the keys."""
        scores, values = self.scores, self.values
        keys = set(self.axes.flat(self.layout[self.weighting.axis]))
        if not keys:
            raise Mismatch(
                "there is only one key, so the softmax of its score is always 1", self.weighting.anchor, self.nodes
            )
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
            self._fail("the scores are not a sum over an axis of queries and keys")
        everything, result = self._atoms(self.layout), self._atoms(values.result)
        if result & keys or not keys <= self._atoms(values.values.layout):
            self._fail("the product with the values does not sum over the axis of the softmax", values=True)
        if everything - result != keys:
            self._fail("the product with the values also sums over an axis other than the softmax's", values=True)

        axis = self.weighting.axis
        repeated = (*self.layout[:axis], *self.layout[axis + 1 :]) if self.said is None else self.said.heads

        def is_batch(atom: int) -> bool:  # called while atoms may still be split
            return atom in self._atoms(repeated)

        self.q, self.k, self.v = (origin_of(self.axes, x, is_batch) for x in (q, k, values.values))
        if self.v.factor != 1.0:
            self.v = Origin(((values.values, 1.0),))
        if self.said is None and is_weight(self.k.placed.value):
            self._fail("the keys are weights: a layer with a softmax, not attention")
        self.scale = scores.scale * self.q.factor * self.k.factor

    def _fail(self, reason: str, values: bool = False) -> None:
        raise Mismatch(reason, self.values.product if values else self.scores.product, self.nodes)

    def _groups(self) -> dict[str, tuple[int, ...]]:
        """Return the atoms of b, h = (g r), s and t. The atoms of g, d and e are stored in the plan."""
        axes = self.axes
        dims = list(axes.resolved(self.layout))
        t = dims.pop(self.weighting.axis)
        shared = self._atoms(self.k.placed.layout) | self._atoms(self.v.placed.layout)
        s = dims.pop() if dims and not shared.intersection(dims[-1]) else ()
        rest = [atom for dim in dims for atom in dim]
        r = tuple(atom for atom in rest if atom not in shared)
        first = dims[0] if dims else ()
        if len(dims) == 1 and len(first) > 1:
            first = first[:1]  # rows and heads are joined in one dimension
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
                self._fail(f"the {what} have an axis that attention lacks")
        return {"b": b, "h": (*g, *r), "s": s, "t": t}

    def _held(self, placed: Placed) -> str:
        return self.roles.held(placed.layout)

    def _widest(self) -> DType:
        """Return the dtype of the attention: the dtype among q, k, v, the scores and biases that holds all numbers of
        the others.
        """
        if self.said is not None:
            return self.said.dtype
        values = [x.placed.value for x in (self.q, self.k, self.v)] + [self.scores.product.results[0]]
        operands = [operand for f in self.chain.biases for operand in f.operands]
        found = [v.type.dtype for v in values if v.type.dtype.is_float]
        dtypes = list(dict.fromkeys((*found, *(dtype for operand in operands for dtype in operand.dtypes))))
        for wide in (*dtypes, f32):
            if all(is_lossless(dtype, wide) for dtype in dtypes) and all(operand.fits(wide) for operand in operands):
                return wide
        self._fail(f"no dtype holds all of {', '.join(map(str, dtypes))}")
        return f32

    # -- building ----------------------------------------------------------------------------------------------

    @property
    def replaced(self) -> tuple[Value, ...]:
        """The values that attention replaces: the product with the values, and the probabilities if they are
        returned.
        """
        return (self.values.product.results[0], *(placed.value for placed in self.values.returned))

    def build(self, b: Builder) -> list[Expr] | Refusal:
        """Build the attention. Return the replacement of each replaced value, or a refusal."""
        try:
            made = self._built(b)
        except TreadleError as error:
            return Refusal(f"attention does not accept this: {error.what}")
        for old, new in zip(self.replaced, made, strict=True):
            if new.type != old.type:
                return Refusal(f"attention would return {new.type} for {old.type}")
        return made

    def _built(self, b: Builder) -> list[Expr]:
        roles, axes = self.roles, self.axes
        groups = roles.groups
        q = self._laid_out(b, self.q, (groups["b"], groups["h"], groups["s"], self.d))
        k = self._laid_out(b, self.k, (groups["b"], self.g, groups["t"], self.d))
        v = self._laid_out(b, self.v, (groups["b"], self.g, groups["t"], self.e))
        chain = self.chain
        if chain.emptied:
            q = b.where(self._sees(b, [self._kept(b, part) for part in chain.emptied]), q, b.constant(0, q.dtype))
        fused = (*chain.masks, *chain.biases)
        given = [[operand.build(b, roles, self.dtype) for operand in f.operands] for f in fused]
        operands = [x for each in given for x in each]
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
        kept = [self._kept(b, part) for part in chain.kept_nan]
        if chain.biases_lose:
            added = [(f.term.axes, x[0]) for f, x in zip(fused, given, strict=True) if isinstance(f.term, TensorBias)]
            kept.append(self._not_lost(b, added))
        if kept:
            seen = self._sees(b, kept)
            made = [b.where(seen, x, b.constant(math.nan, x.dtype)) for x in made]
        by_row = (groups["b"], groups["h"], groups["s"])
        wanted = [(Placed(self.values.product.results[0], self.values.result), made[0], self.e)]
        wanted += [(placed, made[1], groups["t"]) for placed in returned]
        return [axes.place(b, x.cast(p.value.type.dtype), (*by_row, last), p.layout) for p, x, last in wanted]

    def _laid_out(self, b: Builder, origin: Origin, wanted: Sequence[Sequence[int]]) -> Expr:
        placed = origin.as_laid_out(self.axes, wanted)
        return self.axes.place(b, b.expr(placed.value).cast(self.dtype), placed.layout, wanted)

    def _scale_attribute(self, q: Expr) -> float | None:
        """Return the scale, or None if it equals the default 1/sqrt(d) up to the rounding of two constants of the
        dtype.
        """
        if self.said is not None and self.q.factor * self.k.factor == 1.0:
            return self.said.scale
        d = q.shape[-1].constant
        if d is not None and abs(self.scale * math.sqrt(d) - 1) <= 4 * self.dtype.spacing:
            return None
        return _shortest(self.scale, self.dtype)

    def _kept(self, b: Builder, part: Seen) -> Expr:
        """Build a mask over [b, h, s, t] that is true where a condition or an addend keeps a key. An axis that the
        condition or addend lacks has size 1.
        """
        x = b.expr(part.placed.value)
        if x.dtype.is_float:
            x = (x if part.factor == 1.0 else x * part.factor) > -math.inf
        groups, held = self.roles.groups, self._held(part.placed).split()
        wanted = [groups[name] if name in held else () for name in groups]
        return self.axes.place(b, x if part.keep else b.logical_not(x), part.placed.layout, wanted)

    def _not_lost(self, b: Builder, biases: Sequence[tuple[str, Expr]]) -> Expr:
        """Build a mask over [b, h, s, t] that is true where the sum of the biases is not -inf. Each bias has its own
        axes.
        """
        total: Expr | None = None
        for axes, x in biases:
            right = " ".join(name if name in axes.split() else "1" for name in AXES)
            spread = b.rearrange(x, pattern=f"{axes} -> {right}")
            total = spread if total is None else total + spread
        assert total is not None
        return total > -math.inf

    def _sees(self, b: Builder, kept: Iterable[Expr]) -> Expr:
        """Build a mask [b, h, s, 1] that is true where all masks in `kept` together keep some key. An axis that none of
        them has is of size 1.
        """
        every = functools.reduce(lambda x, y: x & y, kept)
        if every.shape[3] == 1:
            return every
        return b.reduce_max(every.cast(i32), axes=(3,), keep=True) > 0


def _shortest(number: float, dtype: DType) -> float:
    """Return the shortest decimal that rounds to this number in a dtype: 0.3 for 0.30000001192092896."""
    return number if dtype.numpy is None else float(str(dtype.numpy.type(number)))
