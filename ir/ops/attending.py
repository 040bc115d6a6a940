"""Shared parts of the attention ops: terms and their operands, scores, and the softmax that weights the values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from treadle.ir.attention.attention_terms import BiasTerm, Grid, T5Relative, Term, TermOperand
from treadle.ir.attention.term_text import read_term
from treadle.ir.attribute_values import attribute_codec
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.operation import Array, Composite
from treadle.ir.ops.along_axes import wide_array
from treadle.ir.ops.normalization import MaskedSoftmax
from treadle.ir.types import Type, f32

T = TypeVar("T")

attribute_codec("Term", read_term, "Term | str")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attending(Composite):
    """Base of the ops whose queries attend to keys under terms; q, k and v come first.

    terms    masks and biases, in any order; their operands follow the op's own in the order of the terms
    scale    None: 1/sqrt(d)
    softcap  c: scores become c tanh(scores / c) before biases and masks (Gemma team 2024)
    """

    terms: tuple[Term, ...] = ()
    scale: float | None = None
    softcap: float | None = None
    accumulates = f32

    first: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    """The op's own operands, by name."""
    keys: ClassVar[str] = "t"
    """The factor of the keys in the axis rule."""

    # -- rules -----------------------------------------------------------------------------------------------

    @property
    def _taken(self) -> list[TermOperand]:
        return [operand for term in self.terms for operand in term.operands]

    def _term_rules(self) -> list[str]:
        """Return the axis rules of the terms' operands."""
        return [operand.rule(self.keys) for operand in self._taken]

    def _term_dtypes(self) -> list[str]:
        return [operand.dtype for operand in self._taken]

    @property
    def positional(self) -> frozenset[str]:
        named = frozenset().union(*(term.positional for term in self.terms))
        return frozenset(self.keys if name == "t" else name for name in named)

    @property
    def has_standard_terms(self) -> bool:
        """True if every term is of a standard kind, which all backends implement. Otherwise a backend lowers the
        body.
        """
        return all(term.is_standard for term in self.terms)

    def operand_names(self, count: int) -> list[str]:
        """Return the op's own operand names, then the names of the terms' operands. If a name occurs again, it is
        numbered.
        """
        names: list[str] = []
        for name in [*self.first, *(o.name for o in self._taken)]:
            again = sum(n.rstrip("0123456789") == name for n in names)
            names.append(f"{name}{again + 1}" if again else name)
        return [*names, *(f"operand{n}" for n in range(len(names), count))][:count]

    def check(self, types: Sequence[Type | None]) -> None:
        names = self.operand_names(len(self.first) + len(self._taken))
        if len(types) != len(names):
            raise RuleError(f"takes {', '.join(names)}, received {len(types)} operands")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise RuleError(f"softcap must be positive, is {self.softcap}")
        if self.scale is not None and not math.isfinite(self.scale):  # else every score would be infinite or NaN
            raise RuleError(f"scale must be finite, is {self.scale}", hint="a finite number, or none for 1/sqrt(d)")
        q = types[0]
        if self.scale is None and q is not None and q.rank == 4 and not q.shape[-1].constant:
            raise RuleError(f"needs a scale, since heads have size {q.shape[-1]}", hint="pass scale")
        for term, operands in self.with_operands(types[len(self.first) :]):
            if isinstance(term, T5Relative) and (table := operands[0]) is not None and table.rank == 2:
                rows = table.shape[0]
                if rows != term.buckets:
                    raise RuleError(f"the table of {term} must have {term.buckets} buckets, has {rows}")

    def with_operands(self, given: Sequence[T]) -> Iterator[tuple[Term, tuple[T, ...]]]:
        """Yield each term with its own operands, taken from the operands of all terms."""
        rest = iter(given)
        for term in self.terms:
            yield term, tuple(next(rest) for _ in term.operands)

    def scale_for(self, d: int) -> float:
        """Return the factor by which q k is multiplied, for heads of size d."""
        return 1 / math.sqrt(d) if self.scale is None else self.scale

    def pair_flops(self, d: int, e: int) -> int:
        """Return the number of operations for one pair of a query and a key: 2 (d + e) in the two products, a few for
        scale, maximum, difference, exponential and sum, 3 for a soft-cap, and 1 for each bias.
        """
        between = 5 + 3 * (self.softcap is not None) + sum(isinstance(t, BiasTerm) for t in self.terms)
        return 2 * (d + e) + between

    @property
    def begins_later(self) -> bool:
        """True if the op's queries are a part of all queries, and their positions do not start at 0."""
        return False

    # -- meaning ---------------------------------------------------------------------------------------------

    def _attended(
        self, q: Array, k: Array, v: Array, i: Array, j: Array, given: Sequence[Array]
    ) -> tuple[Array, Array]:
        """Return the attention of queries at positions i [s, 1] to keys at j [t], and the probabilities.

        As in the body, scores and probabilities are rounded to the op's dtype, so that a bias that overflows the dtype
        is infinite. Sums are not rounded.
        """
        dtype, scores = q.dtype, self._seen_scores(q, k, i, j, given)
        peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(peak > -np.inf, peak, 0))
        total = weights.sum(axis=-1, keepdims=True)
        probabilities = (weights / np.where(total > 0, total, 1)).astype(dtype)
        return weighted_array(probabilities, v).astype(dtype), probabilities

    def _seen_scores(self, q: Array, k: Array, i: Array, j: Array, given: Sequence[Array]) -> Array:
        """Return the scores, rounded to the dtype and held in a wider one; -inf for keys that a query may not see."""
        dtype, (rows, heads, count, d), (_, groups, keys, _) = q.dtype, q.shape, k.shape
        together = (rows, groups, heads // groups * count)  # queries of all heads with the same keys
        queries = wide_array(self.scale_for(d) * q).reshape(*together, d)
        scores = queries @ np.swapaxes(wide_array(k), -1, -2)
        scores = scores.astype(dtype).reshape(rows, heads, count, keys)
        if self.softcap is not None:
            scores = self.softcap * np.tanh(scores / self.softcap)
        keep = np.ones((), np.bool_)
        for term, operands in self.with_operands(given):
            if isinstance(term, BiasTerm):
                scores = scores + term.reference(i, j, *operands)
            else:
                keep = keep & term.reference(i, j, *operands)
        seen: Array = wide_array(np.where(keep, scores, -np.inf))
        return seen

    def _scored(self, grid: Grid, q: Expr, k: Expr, given: Sequence[Expr], *, scaled_last: bool = False) -> Expr:
        """Return the scores [b, g, r, s, t], with biases and without masks. scaled_last: scale the products, not the
        queries.
        """
        b, scale = grid.b, self.scale_for(q.shape[-1].constant or 1)
        queries = q if scaled_last else q * scale
        scores = b.einsum(grouped(b, queries, k), k, equation="b g r s d, b g t d -> b g r s t")
        if scaled_last:
            scores = scores * scale
        if self.softcap is not None:
            scores = b.tanh(scores / self.softcap) * self.softcap
        for term, operands in self.with_operands(given):
            if isinstance(term, BiasTerm):
                scores = scores + term.body(grid, *operands)
        return scores

    def _kept(self, grid: Grid, given: Sequence[Expr]) -> Expr | None:
        """Return the intersection of all masks, laid out against [b, g, r, s, t]; None without a mask."""
        keep: Expr | None = None
        for term, operands in self.with_operands(given):
            if not isinstance(term, BiasTerm):
                made = term.body(grid, *operands)
                keep = made if keep is None else keep & made
        return keep


# -- parts of references -----------------------------------------------------------------------------------


def weighted_array(weights: Array, v: Array) -> Array:
    """Return the sum of values [b, g, t, e] with weights [b, (g r), s, t], in at least float32: [b, (g r), s, e]."""
    (rows, heads, count, keys), (_, groups, _, e) = weights.shape, v.shape
    out: Array = wide_array(weights).reshape(rows, groups, heads // groups * count, keys) @ wide_array(v)
    return out.reshape(rows, heads, count, e)


def of_row(x: Array, axes: str, row: slice, keys: Any) -> Array:
    """Return the part of a term's operand that belongs to one row and some keys."""
    parts = {"b": row, "t": keys}
    taken: Array = x[tuple(parts.get(axis, slice(None)) for axis in axes.split())]
    return taken


# -- parts of bodies ---------------------------------------------------------------------------------------


def masked(b: Builder, scores: Expr, keep: Expr | None) -> Expr:
    """Return the scores, with -inf where a mask is false."""
    return scores if keep is None else b.where(keep, scores, b.constant(-math.inf, scores.dtype))


def grouped(b: Builder, x: Expr, k: Expr) -> Expr:
    """Return [b, (g r), s, d] with its heads grouped by the heads of k."""
    return b.rearrange(x, pattern=f"b (g={k.shape[1]} r) s d -> b g r s d")


def heads_merged(b: Builder, x: Expr) -> Expr:
    """Return [b, g, r, s, d] with one axis of heads."""
    return b.rearrange(x, pattern="b g r s d -> b (g r) s d")


def weighted(b: Builder, weights: Expr, v: Expr) -> Expr:
    """Return the sum of values v with `weights`: [b, (g r), s, e]."""
    return heads_merged(b, b.einsum(weights, v, equation="b g r s t, b g t e -> b g r s e"))


def masked_softmax(b: Builder, scores: Expr) -> Any:
    """Build the softmax over the last axis from primitives. A row whose scores are all -inf becomes zeros."""
    return MaskedSoftmax().body(b, scores)
