"""Masks and biases with their operands, and `attend`, which applies attention with them.

    attend(b, q, k, v, masks=causal & window(128) & padding(lengths))
    attend(b, q, k, v, masks=causal, biases=alibi(slopes) + tensor_bias(x, "h s t"))

Masks intersect (`&`), biases add up (`+`); `treadle.ir.attention.attention_terms` defines each.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.builder import Builder, Expr, ExprLike
from treadle.ir.errors import GraphError, Hint
from treadle.ir.sizing.sizes import Size
from treadle.ir.source_lines import user_line
from treadle.ir.types import boolean

_POSITIONS = 2  # the axis of positions of q [b, h, s, d] and k [b, h, t, d]


@dataclass(frozen=True)
class _Applied:
    """Terms with their operands: tensors, or arrays, which become constants when the terms are applied."""

    entries: tuple[tuple[Term, tuple[ExprLike, ...]], ...] = ()
    sign: ClassVar[str]
    noun: ClassVar[str]
    by_tensor: ClassVar[str]
    """The hint for a combination that the terms do not have: a tensor can have any values."""

    def __str__(self) -> str:
        return f" {self.sign} ".join(term.text for term, _ in self.entries)

    def __bool__(self) -> bool:
        """Raise GraphError: Python's `a and b` would be b alone, without an error."""
        raise GraphError(
            f"{self.noun} have no truth value",
            received=str(self) or None,
            source=str(user_line() or "") or None,
            hint=f"a {self.sign} b combines them; `mask is None` is true for a missing one",
        )

    def __call__(self, *_: object) -> NoReturn:
        """Raise GraphError: `causal` is a mask, not a function that returns one."""
        raise GraphError(
            f"{self.noun} are not callable",
            received=str(self) or None,
            source=str(user_line() or "") or None,
            hint="t.causal, without parentheses",
        )

    def __or__(self, other: object) -> NoReturn:
        """Raise GraphError: terms have one combination."""
        raise self._no("union")

    def __sub__(self, other: object) -> NoReturn:
        """Raise GraphError, as `|` does."""
        raise self._no("difference")

    def __invert__(self) -> NoReturn:
        """Raise GraphError, as `|` does."""
        raise self._no("complement")

    def __neg__(self) -> NoReturn:
        """Raise GraphError, as `|` does."""
        raise self._no("negative")

    __ror__, __xor__, __rxor__, __rsub__ = __or__, __sub__, __sub__, __sub__

    def _no(self, operation: str) -> GraphError:
        return GraphError(
            f"{self.noun} have no {operation}",
            received=str(self) or None,
            source=str(user_line() or "") or None,
            hint=self.by_tensor,
        )


@dataclass(frozen=True)
class Masks(_Applied):
    """An intersection of masks: a query sees the keys that every mask keeps. Without masks it sees all keys.

    entries  each mask's term and its operands. `t.causal` and the functions for masks make them
    """

    sign = "&"
    noun = "masks"
    by_tensor = (
        't.boolean_mask(seen, "s t"), with seen of positions: i = t.iota(size=x.shape[-2]), '
        "seen = i[:, None] >= i[None, :]"
    )

    def __and__(self, other: object) -> Masks:
        """Return the intersection. Raises GraphError if `other` is not masks."""
        if not isinstance(other, Masks):
            raise _mismatch("masks intersect with masks only", other)
        return Masks(self.entries + other.entries)

    __rand__ = __and__

    def __add__(self, other: object) -> NoReturn:
        """Raise GraphError: masks intersect."""
        raise _mismatch("masks do not add up", other, "a & b keeps the keys that both a and b keep")


@dataclass(frozen=True)
class Biases(_Applied):
    """A sum of biases, which is added to the scores.

    entries  each bias's term and its operands. The functions for biases, such as `t.alibi`, make them
    """

    sign = "+"
    noun = "biases"
    by_tensor = 't.tensor_bias(x, "h s t"), with x computed by tensor ops'

    def __add__(self, other: object) -> Biases:
        """Return the sum. Raises GraphError if `other` is not biases."""
        if not isinstance(other, Biases):
            projections = f"projection_bias={other}, for biases of the projections" if isinstance(other, bool) else None
            raise _mismatch("biases add to biases only", other, projections)
        return Biases(self.entries + other.entries)

    __radd__ = __add__

    def __and__(self, other: object) -> NoReturn:
        """Raise GraphError: biases add up."""
        raise _mismatch("biases add up, and do not intersect", other)

    __rand__ = __and__


_AXES = {3: ("b s t", "h s t"), 4: ("b h s t", "b h s t")}
"""The axes that a mask and a bias of a rank have in PyTorch."""


def _tensor_hint(x: Any) -> str:
    """Return the hint for a tensor of the model, of NumPy or of PyTorch in place of a mask or a bias."""
    shape = x.type.shape if isinstance(x, Expr) else x.shape
    if len(shape) == 1:
        return "mask=t.padding(x), with a length for each row; bias=t.alibi(x), with a slope for each head"
    of_rows = len(shape) == 2 and shape[0] != shape[1]  # such as the attention_mask of Hugging Face
    mask, bias = _AXES.get(len(shape), ("b t", "b t") if of_rows else ("s t", "s t"))
    is_array = not isinstance(x, Expr)  # whose zeros and ones, or numbers, are converted
    boolean_x = "x" if is_array or x.dtype is boolean else "x != 0"
    float_x = "x" if is_array or x.dtype.is_float else "x.to(t.f32)"
    masks, biases = f't.boolean_mask({boolean_x}, "{mask}")', f't.tensor_bias({float_x}, "{bias}")'
    hint = f"{masks} as a mask, {biases} as a bias, with the axes of x"
    return hint if mask != "s t" or isinstance(x, Expr) else f"mask=t.causal for a lower triangle; {hint}"


def _mismatch(what: str, other: object, hint: str | None = None) -> GraphError:
    if hint is None and isinstance(other, _Applied):
        hint = "attention takes both: mask=..., bias=..."
    elif hint is None and hasattr(other, "ndim"):
        hint = _tensor_hint(other)
    elif hint is None and isinstance(other, list | tuple) and all(isinstance(each, Masks) for each in other):
        hint = "a & b, in place of [a, b]"
    elif hint is None and other is True:
        hint = "mask=t.causal"
    elif hint is None and isinstance(other, str) and other.lower() in ("causal", "alibi", "padding"):
        hint = {"causal": "mask=t.causal", "alibi": "bias=t.alibi(slopes)", "padding": "mask=t.padding(lengths)"}[
            other.lower()
        ]
    return GraphError(
        what,
        received=str(other) if isinstance(other, _Applied | Expr) else repr(other)[:80],
        source=str(user_line() or "") or None,
        hint=hint,
    )


# -- masks ---------------------------------------------------------------------------------------------------

causal = Masks(((Causal(), ()),))
"""Keys up to the query's own position."""


_INCLUDED = Hint(
    "test an optional input for None before masking by it, or include it: inputs=(...,)",
    "test an optional input for None before masking by it, or include it: --inputs NAME",
)


def _given(x: object, what: str, example: str = "numpy.array(...)") -> ExprLike:
    """Return the tensor or array of a mask or bias. Raises GraphError if an optional input was left out.

    example  an array that it can be, in a hint
    """
    if isinstance(x, Expr | np.ndarray | list | tuple) or hasattr(x, "__array__"):
        return x  # type: ignore[return-value]  # a tensor of PyTorch becomes a constant as NumPy's arrays do
    raise GraphError(
        f"{what} must be a tensor of the model, or an array",
        received="None" if x is None else type(x).__name__,
        source=str(user_line() or "") or None,
        hint=_INCLUDED if x is None else f"{example}, or a tensor",
    )


def window(size: int) -> Masks:
    """Keys less than `size` positions away, on either side; with causal, the last `size`. Raises GraphError."""
    return Masks(((Window(size), ()),))


def padding(lengths: ExprLike) -> Masks:
    """A row's first lengths[b] keys. lengths: i64[b]."""
    return Masks(((Padding(), (_given(lengths, "lengths", "[3, 5], the length of each row"),)),))


def segments(queries: ExprLike, keys: ExprLike | None = None) -> Masks:
    """Keys of the query's own segment. queries: i64[b, s]; keys: i64[b, t], by default the queries' segments."""
    return Masks(((Segments(), (_given(queries, "segments"), _given(queries if keys is None else keys, "segments"))),))


def boolean_mask(mask: ExprLike, axes: str = "b h s t") -> Masks:
    """Keys where mask is true. mask: bool, with some of the axes b, h, s and t. Raises GraphError."""
    if _adds(mask):
        raise _mismatch("a mask is true or false", mask, f'bias=t.tensor_bias(x, "{axes}"), where -inf masks a key')
    return Masks(((BooleanMask(axes), (_given(mask, "a mask"),)),))


def _adds(mask: object) -> bool:
    """Return True for an array of other numbers than 0 and 1, such as the masks that PyTorch adds to the scores."""
    if not isinstance(mask, Expr):
        with suppress(RuntimeError, TypeError, ValueError):  # reported with the model's other constants
            array = np.asarray(mask)
            return array.dtype.kind == "f" and not np.isin(array, (0, 1)).all()
    return False


# -- biases --------------------------------------------------------------------------------------------------


def tensor_bias(x: ExprLike, axes: str = "b h s t") -> Biases:
    """A bias x: a tensor with some of the axes b, h, s and t, as `axes` names them. Raises GraphError."""
    return Biases(((TensorBias(axes), (_given(x, "a bias"),)),))


def t5_relative(table: ExprLike, *, buckets: int = 32, max_distance: int = 128, bidirectional: bool = False) -> Biases:
    """T5's learned bias by distance, in tokens. table: float[buckets, h]. Raises GraphError.

    max_distance   distances from here on share the last bucket
    bidirectional  True if keys after the query have half of the buckets; False: they share the bucket of distance 0
    """
    return Biases(((T5Relative(buckets, max_distance, bidirectional), (_given(table, "a table of biases"),)),))


def alibi(slopes: ExprLike) -> Biases:
    """Each head's slope times (j - i). slopes: float[h]."""
    return Biases(((Alibi(), (_given(slopes, "slopes", "[0.5, 0.25], the slope of each head"),)),))


def attend(
    b: Builder,
    q: Expr,
    k: Expr,
    v: Expr,
    *,
    masks: Masks | None = None,
    biases: Biases | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    name: str | None = None,
) -> Expr:
    """Apply attention: q [b, h, s, d], k [b, g, t, d], v [b, g, t, e] -> [b, h, s, e].

    The op's terms are the masks, then the biases, in their order. Raises RuleError if shapes do not match, GraphError
    if biases are passed as masks or masks as biases.
    """
    terms, operands = _applied(masks, biases, q, k)
    return b.attention(q, k, v, *operands, terms=terms, scale=scale, softcap=softcap, name=name)


def attend_with_probabilities(
    b: Builder,
    q: Expr,
    k: Expr,
    v: Expr,
    *,
    masks: Masks | None = None,
    biases: Biases | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Expr, Expr]:
    """Return the result of `attend`, and the probabilities [b, h, s, t]. Raises the same errors."""
    terms, operands = _applied(masks, biases, q, k)
    return b.attention_with_probabilities(q, k, v, *operands, terms=terms, scale=scale, softcap=softcap)


def _applied(masks: Masks | None, biases: Biases | None, q: Expr, k: Expr) -> tuple[tuple[Term, ...], list[ExprLike]]:
    """Return the terms, and their operands in order."""
    # `&` and `+` check the types.
    entries = () if masks is None else (Masks() & masks).entries
    entries += () if biases is None else (Biases() + biases).entries
    for term, given in entries:
        if isinstance(term, BooleanMask | TensorBias):
            _check_positions(term, given[0], {"s": q.type.shape[_POSITIONS], "t": k.type.shape[_POSITIONS]})
    return tuple(term for term, _ in entries), [x for _, given in entries for x in given]


def _check_positions(term: BooleanMask | TensorBias, x: ExprLike, positions: Mapping[str, Size]) -> None:
    """Raise GraphError if x has a fixed number of positions along an axis that may have any number of them.

    positions  the numbers of queries and keys, by their axes "s" and "t"
    """
    shape = x.type.shape if isinstance(x, Expr) else [Size.of(size) for size in np.shape(x)]  # type: ignore[arg-type]
    for axis, size in zip(term.axes.split(), shape, strict=False):
        wanted = positions.get(axis, size)
        if size.constant not in (None, 1) and wanted.constant is None:
            raise GraphError(
                f"the {term.name} has {size} positions, but the model takes any number of them, {wanted}",
                received=f"axis {axis} of {term.axes!r}",
                source=str(user_line() or "") or None,
                hint=f"mask=t.causal, or {Masks.by_tensor}",
            )
