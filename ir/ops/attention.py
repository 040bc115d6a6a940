"""Attention over a sequence: `attention`, and the same op with its probabilities as a second result. Masks and biases
are terms (`treadle.ir.attention.attention_terms`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
from treadle.ir.attention.seen_keys import leave_a_key, live_pairs, reach_of
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.graph import Node
from treadle.ir.op_registry import op
from treadle.ir.operation import Demand, Grads, Op, Operand
from treadle.ir.ops.along_axes import not_empty
from treadle.ir.ops.attending import Attending, grouped, heads_merged, masked, masked_softmax, weighted
from treadle.ir.ops.attention_steps import stepped_attention
from treadle.ir.ops.elementwise import Cast
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.stepping import Held, Kept, Stepping
from treadle.ir.transforms.differentiate import backward, operand_gradients
from treadle.ir.types import DType, Type, f32, f64, i64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OverSequence(Attending):
    """Base of attention in which the position of a query or key is its index. Derived ops have one or two results."""

    start: Size = ZERO
    """The position of the first query. The following queries have the following positions."""
    pairs = ("s", "t")

    # -- rules -----------------------------------------------------------------------------------------------

    def check(self, types: Sequence[Type | None]) -> None:
        super().check(types)
        if (self.start.constant or 0) < 0:
            raise RuleError(f"the position of the first query must be 0 or more, is {self.start}")

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        """Return the axis rule. If no query sees a key after its own position, the rule reads t only up to s."""
        furthest = reach_of(self.terms)[1]
        t = "[t<=s]" if furthest is not None and furthest <= 0 and self.start == ZERO else "[t]"
        operands = ["b (g r) s [d]", f"b g {t} [d]", f"b g {t} e", *self._term_rules()]
        return f"{', '.join(operands)} -> b (g r) s e"

    def dtypes(self) -> str:
        return f"{', '.join(['f', 'f', 'f', *self._term_dtypes()])} -> f"

    @property
    def begins_later(self) -> bool:
        return self.start != ZERO

    # -- meaning ---------------------------------------------------------------------------------------------

    def reference(self, q: Any, k: Any, v: Any, *given: Any) -> Any:
        return self._whole(q, k, v, given)[0]

    def _whole(self, q: Any, k: Any, v: Any, given: Sequence[Any]) -> tuple[Any, Any]:
        first = self.start.evaluate({})
        return self._attended(q, k, v, first + np.arange(q.shape[2])[:, None], np.arange(k.shape[2]), given)

    def _scores(self, b: Builder, q: Expr, k: Expr, given: Sequence[Expr], *, scaled_last: bool = False) -> Expr:
        """Return the scores [b, g, r, s, t], with -inf where a mask is false."""
        grid = Grid(b, k.shape[1], q.shape[2], k.shape[2], self.start)
        scores = self._scored(grid, q, k, given, scaled_last=scaled_last)
        return masked(b, scores, self._kept(grid, given))

    def _scores_to_lower(self, b: Builder, q: Expr, k: Expr, given: Sequence[Expr]) -> Expr:
        """Return the scores for a backend's lowering: scaled after the product if a backend can scale them while it
        stores them.

        In 16 bits, the queries are scaled before the product instead, because the product might overflow. They are also
        scaled first if heads share keys: these queries are stored again anyway, with the queries of one key head
        adjacent.
        """
        alone = q.shape[1] == k.shape[1]
        return self._scores(b, q, k, given, scaled_last=alone and q.dtype in (f32, f64))

    def _gradient(self, b: Builder, g: Any, g_probabilities: Any, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Build the gradient. p are the probabilities, and dp = dout v', plus the gradient of the result p if p is
        used:

        dv = p' dout,  dscores = p (dp - sum_t p dp);  then the gradient of the scores' body. If p has no gradient of
        its own, that sum is sum_e dout out.
        """
        q, k, v, *given = inputs
        start = len(b.function.nodes)
        scores = self._scores(b, q, k, [x for x in given if x is not None])
        nodes = b.function.nodes[start:]
        weights = masked_softmax(b, scores) if len(outputs) == 1 else grouped(b, outputs[1], k)
        g_weights: Any = None if g_probabilities is None else grouped(b, g_probabilities, k)
        g_v = None
        if g is not None:
            g_out = grouped(b, g, k)
            through = b.einsum(g_out, v, equation="b g r s e, b g t e -> b g r s t")
            g_weights = through if g_weights is None else through + g_weights
            g_v = b.einsum(weights, g_out, equation="b g r s t, b g r s e -> b g t e")
        if g_probabilities is None:
            mean = grouped(b, b.reduce_sum(g * outputs[0], axes=(3,), keep=True), k)
        else:
            mean = b.reduce_sum(weights * g_weights, axes=(4,), keep=True)
        found = backward(b, nodes, {scores.value: weights * (g_weights - mean)})
        g_q, g_k, _, *g_given = operand_gradients(found, [q, k, None, *given])
        return [g_q, g_k, g_v, *g_given]

    # -- cost ------------------------------------------------------------------------------------------------

    def live_pairs(self, queries: int, keys: int) -> int:
        """Return the number of pairs of a query and a key that have a score, in one head of one row; see
        `attention_terms`.
        """
        return live_pairs(self.terms, queries, keys, self.start.evaluate({}))

    def flops_at(self, types: Sequence[Type | None], values: Mapping[str, int]) -> int | None:
        """Count the operations of pairs that may have a score, and no others."""
        q, k, v = (t.evaluate(values) for t in types[:3] if t is not None)
        pairs = live_pairs(self.terms, q[2], k[2], self.start.evaluate(values))
        return q[0] * q[1] * pairs * self.pair_flops(q[3], v[3])

    def on_part(self, factor: str, start: Size) -> Op | None:
        """Return the op on a part of the queries, which keep their positions."""
        return dataclasses.replace(self, start=self.start + start) if factor == "s" else None


# -- the ops -----------------------------------------------------------------------------------------------

_SELF = ("f32[2,4,5,3]", "f32[2,4,5,3]", "f32[2,4,5,3]")
_GROUPED = ("f32[2,4,5,3]", "f32[2,2,5,3]", "f32[2,2,5,2]")
_CROSS = ("f32[2,2,3,4]", "f32[2,1,6,4]", "f32[2,1,6,2]")
_SAMPLES = [
    S(*_SELF),
    S(*_CROSS, scale=1.0),
    S(*_GROUPED, terms=(Causal(),), softcap=2.0),
    S(*_CROSS, terms=(Causal(),)),
    S(*_SELF, terms=(Causal(), Window(2))),
    S(*_CROSS, terms=(Window(3),)),
    S(*_GROUPED, "i64[2] < 6", terms=(Padding(),)),
    S(*_SELF, "i64[2,5] < 3", "i64[2,5] < 3", terms=(Segments(), Causal())),
    S(*_CROSS, "i64[2,3] < 3", "i64[2,6] < 3", terms=(Segments(),)),
    S(*_GROUPED, "bool[2,4,5,5]", terms=(BooleanMask(),)),
    S(*_CROSS, "bool[2,6]", terms=(BooleanMask("b t"),)),
    S(*_GROUPED, "f32[2,4,5,5]", terms=(TensorBias(),)),
    S(*_CROSS, "f32[2,3,6]", "f32[6]", terms=(TensorBias("h s t"), TensorBias("t"))),
    S(*_GROUPED, "f32[8,4]", terms=(T5Relative(8, 4, True),), scale=1.0),
    S(*_CROSS, "f32[6,2]", terms=(T5Relative(6, 5), Causal())),
    S(*_GROUPED, "f32[4]", terms=(Causal(), Alibi())),
    S(*_GROUPED, "i64[2] < 6", "f32[4]", terms=(Causal(), Window(3), Padding(), Alibi()), softcap=3.0),
    S(*_CROSS, terms=(Causal(), Window(3)), start=2),
    S(*_CROSS, "f32[6,2]", "f32[2]", terms=(T5Relative(6, 5), Alibi(), Causal()), start=3),
    S(*_SELF, terms=(Causal(), Window(2)), start=4),
]
_ERRORS = [
    (S("f32[2,6,5,3]", "f32[2,4,5,3]", "f32[2,4,5,3]"), "dimension 1 of q is 6, not a multiple of 4"),
    (S("f32[2,4,5,3]", "f32[2,4,5,2]", "f32[2,4,5,3]"), "axis d sizes disagree: 3 in q, 2 in k"),
    (S("f32[2,4,5,3]", "f32[2,4,5,3]", "f32[2,4,6,3]"), "axis t sizes disagree: 5 in k, 6 in v"),
    (S("f32[2,4,5]", "f32[2,4,5,3]", "f32[2,4,6,3]"), "q must have rank 4, has rank 3"),
    (S("f32[2,4,5,D]", "f32[2,4,5,D]", "f32[2,4,5,3]"), "needs a scale, since heads have size D"),
    (S(*_SELF, softcap=0.0), "softcap must be positive"),
    (S(*_SELF, scale=math.nan), "scale must be finite, is nan"),
    (S(*_SELF, scale=-math.inf), "scale must be finite, is -inf"),
    (S(*_SELF, terms=(Padding(),)), "takes q, k, v, lengths, received 3 operands"),
    (S(*_SELF, "i64[3]", terms=(Padding(),)), "axis b sizes disagree: 2 in q, 3 in lengths"),
    (S(*_SELF, "i32[2]", terms=(Padding(),)), "lengths must be i64, is i32"),
    (S(*_CROSS, "i64[2,6]", "i64[2,6]", terms=(Segments(),)), "3 in q, 6 in query_segments"),
    (S(*_SELF, "bool[2,5,5]", terms=(BooleanMask(),)), "mask must have rank 4, has rank 3"),
    (S(*_SELF, "f32[2,3]", terms=(TensorBias("b t"),)), "axis t sizes disagree: 5 in k, 3 in bias"),
    (S(*_SELF, "f32[16,4]", terms=(T5Relative(),)), "must have 32 buckets, has 16"),
    (S(*_SELF, "f32[6]", terms=(Alibi(),)), "dimension 0 of slopes is 6"),
    (S(*_SELF, terms=(Causal(),), start=-1), "the position of the first query must be 0 or more, is -1"),
]


@op("attention", linear="v")
class Attention(_OverSequence):
    """out[b, h, i] = sum_j p[b, h, i, j] v[b, h, j],   p = softmax over the keys j that i may see of
    softcap(scale q[b, h, i] · k[b, h, j]) + biases        (Vaswani et al. 2017)

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e] -> [b, h, s, e]

    Query heads share key/value heads in order: with h = g r, head n uses head n // r (Ainslie et al. 2023). If a query
    may see no key, its result and its gradient are zeros.

    terms    masks and biases, in any order; their operands follow v in the order of the terms
    scale    None: 1/sqrt(d)
    softcap  c: scores become c tanh(scores / c) before biases and masks (Gemma team 2024)
    start    the position of the first query, read by terms with positions: 0, unless the queries are a part of others
    to       the dtype of the result and the biases, in which scores and sums are computed; None: the dtype of q, k
             and v. If it is wider than v, weights may be rounded to v's dtype before they multiply v
    """

    to: DType | None = None

    @property
    def keys_in_parts(self) -> tuple[str, str] | None:
        """Factors of queries and keys if the terms read only the distance of a query and a key, not their positions;
        otherwise None.
        """
        return ("s", "t") if all(term.relative for term in self.terms) and self.start == ZERO else None

    def on_keys(self, b: Builder, operands: Sequence[Expr], ahead: Size) -> list[Expr]:
        """Build (out, max, sum) of attention between some of the queries and some of the keys. `merge_parts` merges
        such parts.

        ahead  the position of the first of the keys, relative to the first of the queries
        """
        q, k, v, *given = self._wide(operands)
        offset = b.expand(b.constant(0, i64), shape=(q.shape[0],)) + ahead
        terms, scale, softcap = self.terms, self.scale, self.softcap
        return list(b.attention_parts(q, k, v, offset, *given, terms=terms, scale=scale, softcap=softcap))

    @property
    def sees_ahead(self) -> bool:
        """True if a query may see keys after it."""
        furthest = reach_of(self.terms)[1]
        return furthest is None or furthest > 0

    reads_slots = frozenset({"k", "v"})
    step = "appends its keys and values to caches, and reads the slots of its rows"
    q = Operand()
    k = Operand()
    v = Operand()
    operand = Operand(variadic=True, optional=True)

    def dtypes(self) -> str:
        if self.to is None:
            return super().dtypes()
        terms = [str(self.to) if dtype == "f" else dtype for dtype in self._term_dtypes()]
        return f"{', '.join(['f', 'f', 'f', *terms])} -> {self.to}"

    def _wide(self, operands: Sequence[Expr]) -> list[Expr]:
        """Return the operands, with q, k and v cast to the result's dtype."""
        if self.to is None:
            return list(operands)
        return [x.cast(self.to) if n < 3 and x.dtype is not self.to else x for n, x in enumerate(operands)]

    def reference(self, q: Any, k: Any, v: Any, *given: Any) -> Any:
        if self.to is not None:
            q, k, v = (x.astype(np.promote_types(x.dtype, self.to.numpy or np.float32)) for x in (q, k, v))
        return super().reference(q, k, v, *given)

    def body(self, b: Builder, q: Expr, k: Expr, v: Expr, *given: Expr) -> Expr:
        narrow = v.dtype
        q, k, v = self._wide([q, k, v])
        weights = masked_softmax(b, self._scores(b, q, k, given))
        if self.to is not None and narrow is not self.to:
            weights = weights.cast(narrow).cast(self.to)
        return weighted(b, weights, v)

    def lowering(self, b: Builder, q: Expr, k: Expr, v: Expr, *given: Expr) -> Expr:
        """Build the body with its softmax as one op."""
        q, k, v = self._wide([q, k, v])
        return weighted(b, b.masked_softmax(self._scores_to_lower(b, q, k, given)), v)

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], held: Held) -> Any:
        """Build attention over the slots of a cache; see `treadle.ir.ops.attention_steps`.

        If `to` is set, queries are not rounded first, and neither are the keys and values that a cache stores.
        """
        if self.begins_later:
            return None
        if self.to is None:
            return stepped_attention(self, step, operands, held)
        wide = [self._unrounded(step.b, x) if n < 3 and isinstance(x, Expr) else x for n, x in enumerate(operands)]
        return stepped_attention(dataclasses.replace(self, to=None), step, wide, held)

    def _unrounded(self, b: Builder, x: Expr) -> Expr:
        node = x.value.node
        if isinstance(node, Node) and isinstance(node.op, Cast) and node.inputs[0].type.dtype is self.to:
            return b.expr(node.inputs[0])
        return self._wide([x])[0]

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        wide = [None if x is None else self._wide([x])[0] if n < 3 else x for n, x in enumerate(inputs)]
        found = self._gradient(b, grads[0], None, wide, outputs)
        return [
            g.cast(x.dtype) if g is not None and x is not None and g.dtype is not x.dtype else g
            for g, x in zip(found, inputs, strict=True)
        ]

    samples = [
        *_SAMPLES,
        S("f16[2,4,5,3]", "f16[2,2,5,3]", "f16[2,2,5,2]", "f32[2,5]", terms=(Causal(), TensorBias("b t")), to="f32"),
        S("f16[2,2,3,4]", "f16[2,1,6,4]", "f16[2,1,6,2]", to="f32", softcap=2.0),
    ]
    errors = [
        *_ERRORS,
        (
            S("f16[2,4,5,3]", "f16[2,4,5,3]", "f16[2,4,5,3]", "f16[5]", terms=(TensorBias("t"),), to="f32"),
            "bias must be f32",
        ),
    ]


@op("attention_with_probabilities")
class AttentionWithProbabilities(_OverSequence):
    """out, p = attention(q, k, v), and its probabilities p, which are the weights of the values

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e] -> [b, h, s, e], [b, h, s, t]

    This op is for models that return the probabilities: p is stored as a whole, which `attention` never does. For a
    query that may see no key, the probabilities and the result are zeros. Operands and attributes are the same as in
    `attention`.
    """

    q = Operand()
    k = Operand()
    v = Operand()
    operand = Operand(variadic=True, optional=True)

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return f"{super().axis_rule(ranks)}, b (g r) s [t]"

    def dtypes(self) -> str:
        return f"{super().dtypes()}, f"

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        k = types[1]
        return not_empty(k, (2,), "softmax") if k is not None and k.rank == 4 else []

    def reference(self, q: Any, k: Any, v: Any, *given: Any) -> Any:
        return self._whole(q, k, v, given)

    def body(self, b: Builder, q: Expr, k: Expr, v: Expr, *given: Expr) -> tuple[Expr, Expr]:
        """Build the op. Use softmax, for which backends have kernels, if no row of scores can be -inf throughout. The
        last op of each result is a product or a softmax, which can write directly to the result's memory.
        """
        scores = heads_merged(b, self._scores(b, q, k, given))
        p = b.softmax(scores) if self._leaves_a_key(q, k) else masked_softmax(b, scores)
        return self._out(b, p, k, v), p

    def lowering(self, b: Builder, q: Expr, k: Expr, v: Expr, *given: Expr) -> tuple[Expr, Expr]:
        """Build the body with its softmax as one op, even if a row may be -inf throughout."""
        scores = heads_merged(b, self._scores_to_lower(b, q, k, given))
        p = b.softmax(scores) if self._leaves_a_key(q, k) else b.masked_softmax(scores)
        return self._out(b, p, k, v), p

    def _leaves_a_key(self, q: Expr, k: Expr) -> bool:
        return leave_a_key(self.terms, q.shape[2], k.shape[2], self.start)

    def _out(self, b: Builder, p: Expr, k: Expr, v: Expr) -> Expr:
        alone = p.shape[1] == k.shape[1]
        return b.matmul(p, v) if alone else weighted(b, grouped(b, p, k), v)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        g, g_probabilities = grads
        return self._gradient(b, g, g_probabilities, inputs, outputs)

    samples = _SAMPLES
    errors = [
        *_ERRORS,
        (S("f32[2,4,5,3]", "f32[2,4,0,3]", "f32[2,4,0,3]"), "an axis of size 0 has no softmax"),
    ]
