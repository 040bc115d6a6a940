"""Attention over a cache of keys and values, for generation steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Grid,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Window,
)
from treadle.ir.attention.cached_positions import live_positions
from treadle.ir.attention.seen_keys import reach_of
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Operand
from treadle.ir.ops.attending import Attending, masked, masked_softmax, of_row, weighted
from treadle.ir.ops.indexing import inside
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type

_SELF = ("f32[2,4,3,3]", "f32[3,4,6,3]", "f32[3,4,6,3]", "i64[2] < 3", "i64[2] < 4")
_LONG = ("f32[2,4,3,3]", "f32[3,4,12,3]", "f32[3,4,12,3]", "i64[2] < 3", "i64[2] < 9")
_GROUPED = ("f32[2,4,2,3]", "f32[3,2,6,3]", "f32[3,2,6,2]", "i64[2] < 3", "i64[2] < 5")
_ONE = ("f32[3,4,1,3]", "f32[4,2,7,3]", "f32[4,2,7,2]", "i64[3] < 4", "i64[3] < 7")
_RING = ("f32[2,4,2,3]", "f32[3,2,6,3]", "f32[3,2,6,2]", "i64[2] < 3", "i64[2] < 20")
_CROSS = ("f32[2,2,3,4]", "f32[3,1,6,4]", "f32[3,1,6,2]", "i64[2] < 3", "i64[2] < 9")


@op("cached_attention", linear="v")
class CachedAttention(Attending):
    """out[b, h, i] = sum_j p[b, h, i, j] v[rows[b], h, j],   p = softmax over the keys j that i may see of
    softcap(scale q[b, h, i] · k[rows[b], h, j]) + biases: `attention` over a cache, in which each row has a slot

    q [b, h, s, d], k [R, g, C, d], v [R, g, C, e], rows i64[b], start i64[b] -> [b, h, s, e]

    Query i of row b has position start[b] + i, and key j of a slot has position j. With `ring`, key j has the position
    x that is congruent to j modulo C and among the last C positions that were written, start[b] + s - C <= x < start[b]
    + s, which include the queries' own; x < 0 is not a key. Terms have the same meaning as in `attention`, at these
    positions: padding keeps key positions below lengths[b]. Operands with an axis of keys (mask, bias, key_segments)
    have an element for each of a slot's C keys, by j.

    A slot is written up to the queries, or up to lengths[b]. Later positions are never seen, whatever they hold, so
    causal or padding must be among the terms. A query that may see no key gets zeros. Heads share keys as in
    `attention`. k and v may have another float dtype than q, for example 16 bits to halve the cache; they are cast when
    they are read. The gradient is the body's gradient.

    terms    masks and biases, in any order; their operands follow start in the order of the terms
    scale    None: 1/sqrt(d)
    softcap  c: scores become c tanh(scores / c) before biases and masks (Gemma team 2024)
    ring     True if slots are rings, which needs causal. A chunk of s queries sees all of a window(w) if
             w + s - 1 <= C; the chunk's earlier queries do not see a key whose position was overwritten
    """

    q = Operand()
    k = Operand()
    v = Operand()
    rows = Operand()
    start = Operand()
    operand = Operand(variadic=True, optional=True)
    ring: bool = False

    first = ("q", "k", "v", "rows", "start")
    keys = "C"

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        operands = ["b (g r) s [d]", "@R g [C] [d]", "@R g [C] e", "b", "b", *self._term_rules()]
        return f"{', '.join(operands)} -> b (g r) s e"

    def dtypes(self) -> str:
        return f"{', '.join(['f', 'f1', 'f1', 'i64', 'i64', *self._term_dtypes()])} -> f"

    @property
    def is_causal(self) -> bool:
        """True if no query sees a key after its own position."""
        furthest = reach_of(self.terms)[1]
        return furthest is not None and furthest <= 0

    def check(self, types: Sequence[Type | None]) -> None:
        super().check(types)
        if self.ring and not self.is_causal:
            raise RuleError("a ring needs causal among the terms", hint="terms=(causal, ...)")
        if not self.is_causal and not any(isinstance(term, Padding) for term in self.terms):
            raise RuleError(
                "needs causal or padding among the terms: keys that are not written yet must not be seen",
                hint="terms=(causal, ...), or padding with the number of written keys of each row",
            )

    # -- meaning ---------------------------------------------------------------------------------------------

    def reference(self, q: Any, k: Any, v: Any, rows: Any, start: Any, *given: Any) -> Any:
        """Compute row by row, over only the keys that the row may see: the work grows with start + s, not with C."""
        (_, heads, queries, _), (slots, _, capacity, _) = q.shape, k.shape
        inside(self.name, rows, slots)
        out = np.zeros((len(q), heads, queries, v.shape[-1]), q.dtype)
        for b, (slot, past) in enumerate(zip(rows.tolist(), start.tolist(), strict=True)):
            lengths = [int(x[0][b]) for term, x in self.with_operands(given) if isinstance(term, Padding)]
            live = live_positions(self.terms, past, queries, capacity, lengths, ring=self.ring)
            i, j, one = past + np.arange(queries)[:, None], np.arange(live.start, live.stop), slice(b, b + 1)
            keys = j % capacity if self.ring else slice(live.start, live.stop)
            own = [of_row(x, operand.axes, one, keys) for operand, x in zip(self._taken, given, strict=True)]
            held_k, held_v = (x[slot][None, :, keys].astype(q.dtype) for x in (k, v))
            out[one] = self._attended(q[one], held_k, held_v, i, j, own)[0]
        return out

    def body(self, b: Builder, q: Expr, k: Expr, v: Expr, rows: Expr, start: Expr, *given: Expr) -> Expr:
        return self._body(b, q, k, v, rows, start, given, lambda scores: masked_softmax(b, scores))

    def lowering(self, b: Builder, q: Expr, k: Expr, v: Expr, rows: Expr, start: Expr, *given: Expr) -> Expr:
        """Build the body with its softmax as one op."""
        return self._body(b, q, k, v, rows, start, given, b.masked_softmax)

    def _body(self, b: Builder, q: Expr, k: Expr, v: Expr, rows: Expr, start: Expr, given: Any, softmax: Any) -> Expr:
        """Build attention over whole slots. Keys that no query of a row sees are set to 0, because they may be NaN,
        and 0 times NaN is NaN.
        """
        k, v = (b.gather(x, rows, axis=0).cast(q.dtype) for x in (k, v))
        grid = _CacheGrid(b, k.shape[1], q.shape[2], k.shape[2], start, ring=self.ring)
        keep = self._kept(grid, given)
        assert keep is not None  # causal or padding is among the terms
        if self.ring:
            keep = keep & (grid.j >= 0)
        seen = b.reduce_sum(keep.cast(start.dtype), axes=(1, 2, 3)) > 0
        seen = b.rearrange(seen, pattern="b t -> b 1 t 1")
        k, v = (b.where(seen, x, b.constant(0, x.dtype)) for x in (k, v))
        return weighted(b, softmax(masked(b, self._scored(grid, q, k, given), keep)), v)

    # -- cost ------------------------------------------------------------------------------------------------

    def flops_at(self, types: Sequence[Type | None], values: Mapping[str, int]) -> int | None:
        """Return an upper bound, since the lengths of rows are data: each query is assumed to see a whole slot, or the
        largest part of it that the terms allow.
        """
        q, k, v = (t.evaluate(values) for t in types[:3] if t is not None)
        low, high = reach_of(self.terms)
        pairs = k[2] if low is None or high is None else min(k[2], max(0, high - low + 1))
        return q[0] * q[1] * q[2] * pairs * self.pair_flops(q[3], v[3])

    samples = [
        S(*_SELF, terms=(Causal(),)),
        S(*_GROUPED, terms=(Causal(),), softcap=2.0),
        S(*_ONE, terms=(Causal(),), scale=-0.5),
        S(*_GROUPED, terms=(Causal(), Window(3))),
        S(*_RING, terms=(Causal(), Window(5)), ring=True),
        S(*_RING, "f32[4]", "f32[8,4]", terms=(Window(4), Alibi(), T5Relative(8, 5), Causal()), ring=True),
        S(*_ONE, terms=(Causal(),), ring=True),
        S("f64[2,4,2,3]", "f32[3,2,6,3]", "f32[3,2,6,2]", *_GROUPED[3:], terms=(Causal(),)),
        S(*_GROUPED, "f32[4]", terms=(Causal(), Alibi())),
        S(*_SELF, "f32[8,4]", terms=(T5Relative(8, 5), Causal()), scale=1.0),
        S(*_CROSS, "i64[2] < 7", terms=(Padding(),)),
        S(*_CROSS, "i64[2] < 7", "f32[8,2]", terms=(Padding(), Window(4), T5Relative(8, 5, True))),
        S(*_GROUPED, "i64[2,2] < 2", "i64[2,6] < 2", terms=(Segments(), Causal())),
        S(*_LONG, "bool[2,12]", "f32[4,3,12]", terms=(Causal(), BooleanMask("b t"), TensorBias("h s t"))),
        S(
            *_RING[:4],
            "i64[2] < 8",
            "i64[2] < 10",
            "f32[2,6]",
            terms=(Causal(), Window(4), Padding(), TensorBias("s t")),
            ring=True,
        ),
    ]
    errors = [
        (S(*_SELF), "needs causal or padding among the terms"),
        (S(*_SELF, terms=(Window(2),)), "needs causal or padding among the terms"),
        (S(*_CROSS, "i64[2]", terms=(Padding(),), ring=True), "a ring needs causal"),
        (S(*_SELF[:4], terms=(Causal(),)), "takes q, k, v, rows, start, received 4 operands"),
        (S(*_SELF[:3], "i32[2]", "i64[2]", terms=(Causal(),)), "rows must be i64, is i32"),
        (S(*_SELF[:3], "i64[2]", "i64[3]", terms=(Causal(),)), "axis b sizes disagree: 2 in q, 3 in start"),
        (S("f32[2,6,5,3]", *_SELF[1:], terms=(Causal(),)), "dimension 1 of q is 6, not a multiple of 4"),
        (S(*_SELF[:2], "f32[3,4,5,3]", *_SELF[3:], terms=(Causal(),)), "axis C sizes disagree: 6 in k, 5 in v"),
        (S(*_SELF[:2], "f32[2,4,6,3]", *_SELF[3:], terms=(Causal(),)), "axis R sizes disagree: 3 in k, 2 in v"),
        (S(*_SELF, "bool[2,5]", terms=(Causal(), BooleanMask("b t"))), "axis C sizes disagree: 6 in k, 5 in mask"),
        (S(_SELF[0], "f16[3,4,6,3]", *_SELF[2:], terms=(Causal(),)), "dtypes disagree: k is f16, v is f32"),
        (S(*_SELF, softcap=0.0, terms=(Causal(),)), "softcap must be positive"),
    ]


class _CacheGrid(Grid):
    """The positions of queries and keys of a cache.

    i   i64[b, 1, 1, s, 1]
    j   i64[C], or for a ring i64[b, 1, 1, 1, C], below 0 for slots without a key
    """

    def __init__(self, b: Builder, groups: Size, queries: Size, keys: Size, start: Expr, *, ring: bool) -> None:
        super().__init__(b, groups, queries, keys)
        self.start, self.ring = b.rearrange(start, pattern="b -> b 1 1 1 1"), ring

    @cached_property
    def i(self) -> Expr:
        return self.start + super().i

    @cached_property
    def j(self) -> Expr:
        slots = super().j
        if not self.ring:
            return slots
        newest = self.start + (self.queries - 1)
        return newest - (newest - slots) % self.keys
