"""Attention and rotary positions in ONNX.

    attention(q, k, v, lengths, slopes, terms=(causal, padding, alibi))
      -->  Attention(q, k, v, mask, is_causal=1, scale=...)                   from opset 23 on
      -->  MatMul(Softmax(MatMul(scale q, k') + mask), v)                     before opset 23, and for f64

attention_with_probabilities has a second result: the operator's qk_matmul_output, or the result of the Softmax.

The operator has one mask, either bool (true where a key is visible) or numbers that are added to the scores. All terms
other than `causal` are computed from their bodies and combined into this mask. The operator agrees with our op in the
following: causality compares key j <= query i, without past keys; the soft-cap comes before the mask; heads share keys
in order; and a query without visible keys gets zeros. The standard specifies the zeros since onnx 1.23, and ONNX
Runtime implements them. Softmax gives NaN for such a query, so the second form ends with a Where, unless every query
provably sees a key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from treadle.backends.onnx.spelled_line import OnnxLine, Tensor
from treadle.ir.attention.attention_terms import AXES, BiasTerm, BooleanMask, Causal, Grid, TensorBias, Term
from treadle.ir.attention.seen_keys import leave_a_key
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.source_lines import SourceLine
from treadle.ir.types import Type, boolean, f64, i32

_SOURCE = SourceLine("attention", 0)
_AFTER_SOFTMAX = 3  # the mode in which the fourth result is the Softmax's


def attention(line: OnnxLine) -> Sequence[Tensor]:
    """Emit the Attention operator if the opset has it and the dtype is not f64, for which ONNX Runtime has no kernel.
    Otherwise emit its body, also for probabilities of a symbolic number of keys: onnx infers 0 of them.

    The operator's results are the output, keys and values (with past ones), and the probabilities.
    """
    infers_none = len(line.node.results) == 2 and line.type("k").shape[2].constant is None
    if line.w.opset < 23 or line.q.dtype is f64 or infers_none:
        return _spelled_out(line)
    others = [t for t in line.op.terms if not isinstance(t, Causal)]
    attributes: dict[str, Any] = {"scale": _scale(line)}
    if len(others) < len(line.op.terms):
        attributes["is_causal"] = 1
    if line.op.softcap is not None:
        attributes["softcap"] = line.op.softcap
    mask = [_mask(line, others, full=True)[0]] if others else []
    if len(line.node.results) == 1:
        return [line.add("Attention", line.q, line.k, line.v, *mask, **attributes)]
    attributes["qk_matmul_output_mode"] = _AFTER_SOFTMAX
    out, _, _, probabilities = line.w.add_all("Attention", line.q, line.k, line.v, *mask, results=4, **attributes)
    return [out, probabilities]


def _scale(line: OnnxLine) -> float:
    return float(line.op.scale_for(line.type("q").shape[-1].constant or 1))  # a symbolic width needs a scale


# -- the mask ------------------------------------------------------------------------------------------------------


def _mask(line: OnnxLine, terms: Sequence[Term], *, full: bool) -> tuple[Tensor, Type]:
    """Return all terms as one mask: bool, or float if one of them is a bias.

    The mask is [s, t], or [b or 1, h or 1, s, t]. If `full`, s and t have their full sizes, as ONNX Runtime requires.
    """
    b = _builder(line)
    q, k = line.type("q"), line.type("k")
    grid = Grid(b, q.shape[1], q.shape[2], k.shape[2])  # each head forms its own group
    given = iter([b.input(n, v.type) for n, v in zip(line.names[3:], line.node.inputs[3:], strict=True)])
    keep: Expr | None = None
    bias: Expr | None = None
    for term in terms:
        made = _laid_out(b, grid, term, [next(given) for _ in term.operands])
        if isinstance(term, BiasTerm):
            bias = made if bias is None else bias + made
        else:
            keep = made if keep is None else keep & made
    mask = keep if bias is None else bias
    if bias is not None and keep is not None:
        mask = b.where(keep, bias, b.constant(-math.inf, bias.dtype))
    assert mask is not None  # there is at least one term
    shape = (*mask.shape[:-2], grid.queries, grid.keys)
    b.outputs(mask=b.expand(mask, shape=shape) if full and mask.shape != shape else mask)
    made_of = b.graph.main.outputs["mask"].type
    return line.expanded(b.graph, line.present[3:])["mask"], made_of


def _builder(line: OnnxLine) -> Builder:
    """Return a builder of a graph that will replace the line."""
    b = Builder(Graph(line.op.name))
    b.graph.symbols = dict(line.w.graph.symbols)
    b.source = _SOURCE
    return b


def _laid_out(b: Builder, grid: Grid, term: Term, operands: Sequence[Expr]) -> Expr:
    """Return a term that broadcasts against [b, h, s, t]. The term's body broadcasts against [b, g, r, s, t], and may
    lack some leading axes.
    """
    if isinstance(term, BooleanMask | TensorBias):
        laid: Expr = b.rearrange(
            operands[0], pattern=f"{term.axes} -> {' '.join(a if a in term.axes else '1' for a in AXES)}"
        )
        return laid
    made = term.body(grid, *operands)
    if made.rank < 3:  # the term depends only on positions: [s, t]
        return made
    names = ["b", "g", "r", "s", "t"][5 - made.rank :]
    laid = b.rearrange(made, pattern=f"{' '.join(names)} -> {'b' if 'b' in names else '1'} (g r) s t")
    return laid


# -- without the operator ------------------------------------------------------------------------------------------


def _spelled_out(line: OnnxLine) -> list[Tensor]:
    """Emit two products with a softmax between them."""
    terms = line.op.terms
    mask = _mask(line, terms, full=False) if terms else None
    b = _builder(line)
    q, k, v = (b.input(name, line.type(name)) for name in ("q", "k", "v"))
    tensors = [line.q, line.k, line.v]
    limit: Expr | None = None
    if mask is not None:
        limit = b.input("mask", mask[1])
        tensors.append(mask[0])
    shared = q.shape[1] != k.shape[1]
    grouped = f"b (g={k.shape[1]} r) s d -> b g r s d"
    query = q if _scale(line) == 1 else q * _scale(line)
    keys = b.rearrange(k, pattern="b g t d -> b g 1 d t" if shared else "b h t d -> b h d t")
    scores = b.matmul(b.rearrange(query, pattern=grouped) if shared else query, keys)
    if line.op.softcap is not None:
        scores = b.tanh(scores / line.op.softcap) * line.op.softcap
    if limit is not None:
        held = b.rearrange(limit, pattern=_grouping(limit, k)) if shared and limit.rank == 4 else limit
        infinite = b.constant(-math.inf, scores.dtype)
        scores = b.where(held, scores, infinite) if held.dtype is boolean else scores + held
    weights = b.softmax(scores, axis=-1)
    made = [b.matmul(weights, b.rearrange(v, pattern="b g t e -> b g 1 t e") if shared else v)]
    if len(line.node.results) == 2:
        made.append(weights)
    if shared:
        made = [b.rearrange(x, pattern="b g r s e -> b (g r) s e") for x in made]
    if limit is not None and not leave_a_key(terms, q.shape[2], k.shape[2]):
        seen = _seen(b, limit)
        made = [b.where(seen, x, b.constant(0, x.dtype)) for x in made]
    b.outputs(**{f"out{n}": x for n, x in enumerate(made)})
    return list(line.expanded(b.graph, tensors).values())


def _grouping(mask: Expr, k: Expr) -> str:
    """Return the pattern that rearranges a mask's heads into the groups of k. A mask with one head applies to all
    groups.
    """
    return "b 1 s t -> b 1 1 s t" if mask.shape[1].constant == 1 else f"b (g={k.shape[1]} r) s t -> b g r s t"


def _seen(b: Builder, mask: Expr) -> Expr:
    """Return a condition [b or 1, h or 1, s, 1], true if a query sees at least one key."""
    least = 0 if mask.dtype is boolean else -math.inf
    numbers = mask.cast(i32) if mask.dtype is boolean else mask
    seen: Expr = b.reduce_max(numbers, axes=(-1,), keep=True) > least
    return seen


# -- rotary --------------------------------------------------------------------------------------------------------


def rotary(line: OnnxLine) -> Tensor:
    """Emit RotaryEmbedding, with caches of cosines and sines for each row's positions."""
    w, frequencies = line.w, line.frequencies
    positions = w.add("Unsqueeze", w.cast(line.positions, frequencies.dtype), w.integers(2))
    angles = w.add("Mul", positions, frequencies)
    cos, sin = (w.cast(w.add(name, angles), line.x.dtype) for name in ("Cos", "Sin"))
    f, d = (line.type(name).shape[-1].constant for name in ("frequencies", "x"))
    attributes: dict[str, int] = {"interleaved": 1} if line.op.layout == "interleaved" else {}
    if 2 * f < d:
        attributes["rotary_embedding_dim"] = 2 * f
    made: Tensor = line.add("RotaryEmbedding", line.x, cos, sin, **attributes)
    return made
