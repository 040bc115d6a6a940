"""Attention in a generation step: it appends its keys and values to caches, and reads the slots of its rows there.

    attention(q, k, v, terms=[causal])   -->   %k = append(%k, k, rows, start, axis=2)
                                               %v = append(%v, v, rows, start, axis=2)
                                               cached_attention(q, %k, %v, rows, start, terms=[causal])

A cache may hold keys and values in 16 bits: they are cast before they are appended. If keys and values do not depend on
the tokens (cross-attention), they are in states already, or are weights; queries still have their rows' positions.
Operands of terms along the keys are cached like the keys. If a window hides keys from all later queries, the cache is a
ring, which overwrites these keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from treadle.ir.attention.attention_terms import Padding, Term
from treadle.ir.attention.seen_keys import reach_of
from treadle.ir.builder import Expr
from treadle.ir.sizing.sizes import ONE
from treadle.ir.stepping import Held, Kept, Stepping
from treadle.ir.types import i64

if TYPE_CHECKING:
    from treadle.ir.ops.attention import Attention

KEYS = 2
"""The axis of keys in k and v [b, g, t, d], and of queries in q [b, h, s, d]."""


def stepped_attention(op: Attention, step: Stepping, operands: Sequence[Expr | Kept | None], held: Held) -> Any:
    """Build the result of `Op.stepped` for attention.

    Returns None in these cases: keys are in a state that does not depend on the tokens, and values are not; only one of
    them extends along the tokens; a term has an operand whose rows cannot be distinguished, or that holds pairs of
    positions.
    """
    q, k, v, *given = operands
    if not isinstance(q, Expr):
        return None
    if isinstance(k, Kept) and isinstance(v, Kept):
        return _across(op, step, q, k, v, given, held)
    if isinstance(k, Expr) and isinstance(v, Expr) and not held[1] and not held[2]:
        rows = step.b.iota(size=k.shape[0], dtype=i64)  # each row reads its own keys, without a slot
        return _across(op, step, q, Kept(k, rows, None, False), Kept(v, rows, None, False), given, held)
    if isinstance(k, Expr) and isinstance(v, Expr) and held[1] == held[2] == {KEYS}:
        return _along(op, step, q, k, v, given, held)
    return None


def _across(
    op: Attention, step: Stepping, q: Expr, k: Kept, v: Kept, given: Sequence[Expr | Kept | None], held: Held
) -> Expr | None:
    """Build attention over keys that do not depend on the tokens; a padding term marks the real ones."""
    start = step.first if held[0] == {KEYS} else step.zeros()
    if op.reads_positions and q.shape[KEYS] != ONE and q.shape[KEYS].as_symbol is None:
        return None  # queries are not only tokens, so a query's position is not the position of its token
    terms, operands = list(op.terms), [x.read() if isinstance(x, Kept) else x for x in given]
    length = k.length if k.length is not None else v.length
    if length is None and not any(isinstance(term, Padding) for term in terms):
        length = step.b.expand(step.b.constant(k.state.shape[KEYS], i64), shape=step.rows.shape)
    if length is not None:
        terms, operands = [*terms, Padding()], [*operands, length]
    return _cached(op, step, q, k.state, v.state, k.rows, start, terms, operands)


def _along(
    op: Attention, step: Stepping, q: Expr, k: Expr, v: Expr, given: Sequence[Expr | Kept | None], held: Held
) -> Expr | None:
    """Build attention over the tokens that have been appended so far."""
    low, _ = reach_of(op.terms)
    taken = [operand for term in op.terms for operand in term.operands]
    operands: list[Expr | None] = []
    # A term's operand along the keys is indexed by position as the slot, which a ring does not preserve.
    along_keys = any("t" in o.axes.split() for o in taken)
    ring = f"{step.capacity}_{1 - low}" if low is not None and not along_keys else ""
    for n, (operand, x) in enumerate(zip(taken, given, strict=True)):
        axes = operand.axes.split()
        if "t" in axes:
            at = axes.index("t")
            if not isinstance(x, Expr) or axes[0] != "b" or held[3 + n] != {at}:
                return None
            cache = step.append(operand.name, x, at)
            operands.append(step.b.gather(cache, step.rows, axis=0))
        else:
            operands.append(x.read() if isinstance(x, Kept) else x)
    as_held = step.cache or k.dtype
    keys, values = (step.append(n, x.cast(as_held), KEYS, ring=ring) for n, x in (("k", k), ("v", v)))
    return _cached(op, step, q, keys, values, step.rows, step.first, op.terms, operands, ring=bool(ring))


def _cached(
    op: Attention,
    step: Stepping,
    q: Expr,
    keys: Expr,
    values: Expr,
    rows: Expr,
    first: Expr,
    terms: Sequence[Term],
    operands: Sequence[Any],
    *,
    ring: bool = False,
) -> Expr:
    found: Expr = step.b.cached_attention(
        q,
        keys,
        values,
        rows,
        first,
        *operands,
        terms=tuple(terms),
        scale=op.scale,
        softcap=op.softcap,
        ring=ring,
    )
    return found
