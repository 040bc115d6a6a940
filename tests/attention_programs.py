"""Attention in the forms in which models write it: forms that must be recognised, and near misses that must not be.

Sizes are symbols: B rows, S queries, T keys; 4 heads of size 6. Grouped forms have 2 heads for keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.attention.distance_buckets import t5_buckets
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph

Array = np.ndarray[Any, Any]
Build = Callable[[Builder], Expr]

HEADS, SIZE = 4, 6
SCALE = SIZE**-0.5
LOW = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Form:
    """A form of attention, and the terms and attributes of the attention op that it is equal to."""

    name: str
    build: Build
    terms: str = ""
    scale: float | None = None
    softcap: float | None = None
    keeps_nan: bool = False


def graph_of(build: Build) -> Graph:
    b = Builder(Graph("attention"))
    b.outputs(y=build(b))
    return b.graph


# -- pieces ----------------------------------------------------------------------------------------------------


def q_k_v(b: Builder, keys: str = "S", heads: int = HEADS) -> tuple[Expr, Expr, Expr]:
    """Return q [b, h, s, d], and k and v [b, g, t, d]."""
    q = b.input("q", f"f32[B, {HEADS}, S, {SIZE}]")
    k, v = (b.input(name, f"f32[B, {heads}, {keys}, {SIZE}]") for name in "kv")
    return q, k, v


def swapped(b: Builder, k: Expr) -> Expr:
    return b.rearrange(k, pattern="... t d -> ... d t")


def products(b: Builder, change: Callable[[Expr], Expr], keys: str = "S") -> Expr:
    """softmax(change(q k^T)) v"""
    q, k, v = q_k_v(b, keys)
    return b.softmax(change(q @ swapped(b, k))) @ v


def scaled(b: Builder, change: Callable[[Expr], Expr] = lambda x: x, keys: str = "S") -> Expr:
    """softmax(change(scale q k^T)) v"""
    return products(b, lambda x: change(x * SCALE), keys)


def places(b: Builder, keys: str = "S") -> tuple[Expr, Expr]:
    """Positions of queries, [s, 1], and of keys, [t]."""
    return b.rearrange(b.iota(size="S"), pattern="s -> s 1"), b.iota(size=keys)


def triangle(b: Builder, keys: str = "S", off: int = 0) -> Expr:
    i, j = places(b, keys)
    return j <= (i + off if off else i)


def masked(
    b: Builder, keep: Callable[[], Expr], fill: float = -math.inf, keys: str = "S", over: float | None = None
) -> Expr:
    """Return attention whose scores are replaced by `fill` where `keep` is false; unless `over` is None, masked keys
    of a row also get the second number `over`.
    """

    def change(x: Expr) -> Expr:
        made: Expr = b.where(keep(), x, fill)
        return made if over is None else b.where(rows(b, keys), made, over)

    return scaled(b, change, keys)


def rows(b: Builder, keys: str = "S") -> Expr:
    """A condition on a row's keys, as [b, 1, 1, t]."""
    mask = b.input("mask", f"bool[B, {keys}]")
    return b.rearrange(mask, pattern="b t -> b 1 1 t")


def addend(b: Builder, keep: Expr, fill: float) -> Expr:
    return b.where(keep, 0.0, b.constant(fill))


def zeros_for_nan(b: Builder, p: Expr) -> Expr:
    return b.where(b.not_equal(p, p), 0.0, p)


def guarded_softmax(b: Builder, x: Expr) -> Expr:
    peak = b.reduce_max(x, axes=(-1,), keep=True)
    weights = b.exp(x - b.where(peak > -math.inf, peak, 0.0))
    total = b.reduce_sum(weights, axes=(-1,), keep=True)
    return weights / b.where(total > 0.0, total, 1.0)


# -- layouts ---------------------------------------------------------------------------------------------------


def _from_projections(b: Builder) -> Expr:
    """The form of PyTorch's modules: split, transpose, attend, transpose back, join."""
    x = b.input("x", f"f32[B, S, {HEADS * SIZE}]")
    q, k, v = (
        b.rearrange(
            b.linear(x, b.parameter(n, f"f32[{HEADS * SIZE}, {HEADS * SIZE}]")), pattern="b s (h=4 d) -> b s h d"
        )
        for n in "qkv"
    )
    q, v = (b.rearrange(y, pattern="b s h d -> b h s d") for y in (q, v))
    k = b.rearrange(k, pattern="b s h d -> b h d s")
    out = b.softmax(q @ k * SCALE) @ v
    return b.rearrange(b.rearrange(out, pattern="b h s d -> b s h d"), pattern="b s h d -> b s (h d)")


def _one_einsum_each(b: Builder) -> Expr:
    """Heads stay after the sequence axis."""
    q, k, v = (b.input(n, f"f32[B, {s}, {HEADS}, {SIZE}]") for n, s in (("q", "S"), ("k", "T"), ("v", "T")))
    p = b.softmax(b.einsum(q, k, equation="b s h d, b t h d -> b h s t") * SCALE)
    return b.einsum(p, v, equation="b h s t, b t h e -> b s h e")


def _transposed_scores(b: Builder) -> Expr:
    """Keys before queries: the softmax is over the axis before the last."""
    q, k, v = q_k_v(b, "T")
    p = b.softmax(b.einsum(k, q, equation="b h t d, b h s d -> b h t s") * SCALE, axis=2)
    return b.einsum(p, v, equation="b h t s, b h t e -> b h s e")


def _rows_and_heads_joined(b: Builder) -> Expr:
    """Scores of three dimensions, as in batched products; the mask has four."""
    q, k, v = q_k_v(b, "T")
    mask = rows(b, "T")
    q, k, v = (b.rearrange(x, pattern="b h s d -> (b h) s d") for x in (q, k, v))
    scores = b.rearrange(q @ swapped(b, k), pattern="(b h=4) s t -> b h s t") * SCALE
    p = b.softmax(b.rearrange(b.where(mask, scores, LOW), pattern="b h s t -> (b h) s t"))
    return b.rearrange(p @ v, pattern="(b h=4) s d -> b h s d")


def _two_dimensions(b: Builder) -> Expr:
    """Queries and keys of two dimensions, without batch and head axes."""
    q, k, v = (b.input(n, f"f32[{s}, {SIZE}]") for n, s in (("q", "S"), ("k", "T"), ("v", "T")))
    return b.softmax(q @ swapped(b, k) * SCALE) @ v


def _keys_as_a_linear_weight(b: Builder) -> Expr:
    q, k, v = (b.input(n, f"f32[{s}, {SIZE}]") for n, s in (("q", "S"), ("k", "T"), ("v", "T")))
    return b.softmax(b.linear(q, b.tanh(k)) * SCALE) @ v


def _of_windows(b: Builder) -> tuple[Expr, Expr, Expr, Expr]:
    """q, k, v as [(b w), h, s, d] with four windows for each image, and an addend for each of the four, as in Swin."""
    q, k, v = (b.input(n, f"f32[4*B, {HEADS}, S, {SIZE}]") for n in "qkv")
    return q, k, v, b.input("shifted", "f32[4, S, S]")


def _shifted_windows(b: Builder) -> Expr:
    """The addend repeated for every image, and the images joined with the windows"""
    q, k, v, shifted = _of_windows(b)
    each = b.expand(b.rearrange(shifted, pattern="w s t -> 1 w 1 s t"), shape=("B", 4, 1, "S", "S"))
    joined = b.rearrange(each, pattern="b w 1 s t -> (b w) 1 s t")
    return b.softmax(q @ swapped(b, k) * SCALE + joined) @ v


def _windows_of_scores(b: Builder) -> Expr:
    """The scores split into windows for the addend"""
    q, k, v, shifted = _of_windows(b)
    scores = b.rearrange(q @ swapped(b, k) * SCALE, pattern="(b w=4) h s t -> b w h s t")
    scores = scores + b.rearrange(shifted, pattern="w s t -> w 1 s t")
    return b.softmax(b.rearrange(scores, pattern="b w h s t -> (b w) h s t")) @ v


def _masked_windows(b: Builder) -> Expr:
    """Attention in windows that are rows and columns of an image, but one axis of the mask."""
    q, k, v = (
        b.rearrange(b.input(n, f"f32[B, 2, 2, {HEADS}, S, {SIZE}]"), pattern="b i j h s d -> (b i j) h s d")
        for n in "qkv"
    )
    mask = b.rearrange(b.input("mask", "bool[4, S, S]"), pattern="w s t -> 1 w 1 s t")
    each = b.rearrange(b.expand(mask, shape=("B", 4, 1, "S", "S")), pattern="b w 1 s t -> (b w) 1 s t")
    return b.softmax(b.where(each, q @ swapped(b, k) * SCALE, -math.inf)) @ v


def _one_query(b: Builder) -> Expr:
    """A step of generation: no axis of queries."""
    q = b.input("q", f"f32[B, {HEADS}, {SIZE}]")
    k, v = (b.input(n, f"f32[B, {HEADS}, T, {SIZE}]") for n in "kv")
    p = b.softmax(b.einsum(q, k, equation="b h d, b h t d -> b h t") * SCALE)
    return b.einsum(p, v, equation="b h t, b h t d -> b h d")


def _repeated(b: Builder, x: Expr, groups: int) -> Expr:
    wide = b.expand(b.rearrange(x, pattern="b g t d -> b g 1 t d"), shape=(None, None, HEADS // groups, None, None))
    return b.rearrange(wide, pattern="b g r t d -> b (g r) t d")


def _repeated_heads(groups: int) -> Build:
    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b, "T", groups)
        k, v = (_repeated(b, x, groups) for x in (k, v))
        return b.softmax(q @ swapped(b, k) * SCALE) @ v

    return build


def _repeated_keys_alone(b: Builder) -> Expr:
    """Attention with keys that are repeated for groups of heads, and with values for all heads."""
    q, k, _ = q_k_v(b, "T", 2)
    v = b.input("w", f"f32[B, {HEADS}, T, {SIZE}]")
    return b.softmax(q @ swapped(b, _repeated(b, k, 2)) * SCALE) @ v


def _multi_query(b: Builder) -> Expr:
    """One head of keys and values, without an axis for it."""
    q = b.input("q", f"f32[B, {HEADS}, S, {SIZE}]")
    k, v = (b.input(n, f"f32[B, T, {SIZE}]") for n in "kv")
    p = b.softmax(b.einsum(q, k, equation="b h s d, b t d -> b h s t") * SCALE)
    return b.einsum(p, v, equation="b h s t, b t e -> b h s e")


def _grouped_product(b: Builder) -> Expr:
    q, k, v = q_k_v(b, "T", 2)
    grouped = b.rearrange(q, pattern="b (g=2 r) s d -> b g r s d")
    p = b.softmax(b.einsum(grouped, k, equation="b g r s d, b g t d -> b g r s t") * SCALE)
    return b.rearrange(b.einsum(p, v, equation="b g r s t, b g t e -> b g r s e"), pattern="b g r s e -> b (g r) s e")


def _learned_queries(b: Builder) -> Expr:
    q = b.parameter("latents", f"f32[5, {SIZE}]")
    k, v = (b.input(n, f"f32[B, T, {SIZE}]") for n in "kv")
    p = b.softmax(b.einsum(q, k, equation="s d, b t d -> b s t") * SCALE)
    return p @ v


def _wide_softmax(b: Builder) -> Expr:
    """Half precision, with the softmax in f32."""
    q, k, v = (b.cast(x, to="f16") for x in q_k_v(b))
    p = b.softmax(b.cast(q @ swapped(b, k), to="f32") * SCALE)
    return b.cast(b.cast(p, to="f16") @ v, to="f32")


def _keys_of_the_past(b: Builder) -> Expr:
    """A step with a cache: keys and values begin with the cached ones."""
    q, *both = q_k_v(b)
    past = (b.input(f"past_{n}", f"f32[B, {HEADS}, T, {SIZE}]") for n in "kv")
    k, v = (b.concat(old, new, axis=2) for old, new in zip(past, both, strict=True))
    return b.softmax(q @ swapped(b, k) * SCALE) @ v


LAYOUTS = [
    Form("projections", _from_projections),
    Form("einsum", _one_einsum_each),
    Form("transposed scores", _transposed_scores),
    Form("rows and heads joined", _rows_and_heads_joined, "bias(b t)"),
    Form("two dimensions", _two_dimensions),
    Form("linear", _keys_as_a_linear_weight),
    Form("one query", _one_query),
    Form("shifted windows", _shifted_windows, "bias(b s t)"),
    Form("windows of scores", _windows_of_scores, "bias(b s t)"),
    Form("masked windows", _masked_windows, "mask(b s t)", keeps_nan=True),
    Form("cross", lambda b: scaled(b, keys="T")),
    Form("grouped by repeating", _repeated_heads(2)),
    Form("multi-query by repeating", _repeated_heads(1)),
    Form("keys repeated alone", _repeated_keys_alone),
    Form("multi-query", _multi_query),
    Form("grouped product", _grouped_product),
    Form("learned queries", _learned_queries),
    Form("softmax in f32", _wide_softmax),
    Form("keys of the past", _keys_of_the_past),
]


# -- scales and caps -------------------------------------------------------------------------------------------


def _scale_on(q_by: float, k_by: float, divide: bool = False) -> Build:
    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b)
        q, k = (q / (1 / q_by), k / (1 / k_by)) if divide else (q * q_by, k * k_by)
        return b.softmax(q @ swapped(b, k)) @ v

    return build


def _scaled_twice(b: Builder) -> Expr:
    """A scale on q, and another between cap and softmax."""
    q, k, v = q_k_v(b)
    scores = b.tanh((q * 0.5) @ swapped(b, k) / 3.0) * 3.0
    return b.softmax(-(scores * -0.5)) @ v


def _negative_cap(b: Builder) -> Expr:
    """Scores capped with a negative number. tanh is odd, so -3 tanh(x / -3) caps like 3 tanh(x / 3)."""
    return products(b, lambda x: b.tanh(x * SCALE / -3.0) * -3.0)


SCALES = [
    Form("no scale", lambda b: products(b, lambda x: x), scale=1.0),
    Form("other scale", lambda b: products(b, lambda x: x * 0.3), scale=0.3),
    Form("divided", lambda b: products(b, lambda x: x / SIZE**0.5)),
    Form("scale on q", _scale_on(SCALE, 1.0)),
    Form("scale on k", _scale_on(1.0, SCALE)),
    Form("root on both", _scale_on(SCALE**0.5, SCALE**0.5)),
    Form("root on both, divided", _scale_on(SCALE**0.5, SCALE**0.5, divide=True)),
    Form("soft-cap", lambda b: scaled(b, lambda x: b.tanh(x / 30.0) * 30.0), softcap=30.0),
    Form("soft-cap, times", lambda b: scaled(b, lambda x: 5.0 * b.tanh(x * 0.2)), softcap=5.0),
    Form("soft-cap, scaled after", _scaled_twice, scale=0.25, softcap=1.5),
    Form("negative soft-cap", _negative_cap, softcap=3.0),
    Form(
        "soft-cap, then a mask",
        lambda b: scaled(b, lambda x: b.where(triangle(b), b.tanh(x / 30.0) * 30.0, LOW)),
        "causal",
        softcap=30.0,
    ),
]


# -- masks -----------------------------------------------------------------------------------------------------


def _window(b: Builder, size: int, keys: str = "S") -> Expr:
    i, j = places(b, keys)
    return (j > i - size) & (i > j - size)


def _numbers(b: Builder, keys: str = "S") -> Expr:
    """1 for a real token, 0 for padding, as [b, 1, 1, t]."""
    return b.rearrange(b.input("ones", f"i64[B, {keys}]"), pattern="b t -> b 1 1 t")


def _minus_one_times(b: Builder, fill: float) -> Expr:
    """(1 - m) * fill, as BERT adds it"""
    return scaled(b, lambda x: x + (1.0 - b.cast(_numbers(b), to="f32")) * fill)


def lengths_reach(b: Builder, keys: str = "S") -> Expr:
    return b.iota(size=keys) < b.rearrange(b.input("lengths", "i64[B]"), pattern="b -> b 1 1 1")


def _segments(b: Builder) -> Expr:
    ids = b.input("segments", "i64[B, S]")
    return b.equal(b.rearrange(ids, pattern="b s -> b 1 s 1"), b.rearrange(ids, pattern="b t -> b 1 1 t"))


def _constant_triangle(b: Builder, fill: float | None = None, size: int = 64) -> Expr:
    """A table of the longest context, sliced to the sequence."""
    kept = np.tri(size, dtype=np.bool_)
    table = b.constant(kept[None, None] if fill is None else np.where(kept, 0.0, fill).astype(np.float32)[None, None])
    return b.slice(b.slice(table, axis=2, stop="S"), axis=3, stop="S")


def _guarded(b: Builder, keep: Expr) -> Expr:
    """PyTorch's own: zeros where the softmax is NaN"""
    q, k, v = q_k_v(b)
    x = q @ swapped(b, k) * SCALE + addend(b, keep, -math.inf)
    return zeros_for_nan(b, b.softmax(x)) @ v


def _guarded_spelled(b: Builder) -> Expr:
    q, k, v = q_k_v(b)
    return guarded_softmax(b, b.where(rows(b), q @ swapped(b, k) * SCALE, -math.inf)) @ v


def _masked_softmax(b: Builder, keep: Expr) -> Expr:
    q, k, v = q_k_v(b)
    return b.masked_softmax(b.where(keep, q @ swapped(b, k) * SCALE, -math.inf)) @ v


def _whole(b: Builder) -> Expr:
    return b.input("whole", f"bool[B, {HEADS}, S, S]")


MASKS = [
    Form(
        "causal, tril(ones) == 0",
        lambda b: scaled(b, lambda x: b.where(b.equal(_lower(b), 0.0), -math.inf, x)),
        "causal",
    ),
    Form(
        "causal, triu(ones, 1)", lambda b: scaled(b, lambda x: b.where(b.cast(_past(b), to="bool"), LOW, x)), "causal"
    ),
    Form("causal, triu(ones, 1) * -1e9", lambda b: scaled(b, lambda x: x + _past(b) * -1e9), "causal"),
    Form("causal, (1 - tril(ones)) * lowest", lambda b: scaled(b, lambda x: x + (1.0 - _lower(b)) * LOW), "causal"),
    Form("causal, triu(full(-inf), 1)", lambda b: scaled(b, lambda x: x + _past(b, -math.inf)), "causal"),
    Form("causal, a table cut", lambda b: scaled(b, lambda x: b.where(_cut(b), -math.inf, x)), "causal"),
    Form("causal", lambda b: masked(b, lambda: triangle(b)), "causal"),
    Form("causal, -1e9", lambda b: masked(b, lambda: triangle(b), -1e9), "causal"),
    Form("causal, lowest", lambda b: masked(b, lambda: triangle(b), LOW), "causal"),
    Form("causal, cross", lambda b: masked(b, lambda: triangle(b, "T"), keys="T"), "causal"),
    Form("causal, negated", lambda b: scaled(b, lambda x: b.where(_upper(b), -math.inf, x)), "causal"),
    Form("causal, not", lambda b: masked(b, lambda: b.logical_not(_upper(b))), "causal"),
    Form("causal, added", lambda b: scaled(b, lambda x: x + addend(b, triangle(b), LOW)), "causal"),
    Form("causal, added -inf", lambda b: scaled(b, lambda x: x + addend(b, triangle(b), -math.inf)), "causal"),
    Form("causal, i - j >= 0", lambda b: masked(b, lambda: _difference(b) >= 0), "causal"),
    Form("causal, floats", lambda b: masked(b, lambda: _as_floats(b)[0] >= _as_floats(b)[1]), "causal"),
    Form("causal, float distance", lambda b: masked(b, lambda: b.cast(_difference(b), to="f32") > -1.0), "causal"),
    Form("causal, half a float", lambda b: masked(b, lambda: b.cast(_difference(b), to="f32") > -0.5), "mask(s t)"),
    Form("causal window, floats", lambda b: masked(b, lambda: _float_window(b), LOW), "causal, window(3)"),
    Form("causal, constant", lambda b: masked(b, lambda: _constant_triangle(b)), "causal"),
    Form("causal, constant added", lambda b: scaled(b, lambda x: x + _constant_triangle(b, LOW)), "causal"),
    Form("causal, constant -inf", lambda b: scaled(b, lambda x: x + _constant_triangle(b, -math.inf)), "causal"),
    Form("causal, cast", lambda b: masked(b, lambda: b.cast(b.cast(triangle(b), to="f32"), to="bool")), "causal"),
    Form("causal, scaled after", lambda b: products(b, lambda x: b.where(triangle(b), x, -1e6) * SCALE), "causal"),
    Form("causal, positions of tokens", lambda b: masked(b, lambda: _by_positions(b)), "causal"),
    Form("window", lambda b: masked(b, lambda: _window(b, 2)), "window(2)"),
    Form("window, cross", lambda b: masked(b, lambda: _window(b, 2, "T"), keys="T"), "window(2)", keeps_nan=True),
    Form("causal window", lambda b: masked(b, lambda: triangle(b) & _window(b, 2), LOW), "causal, window(2)"),
    Form("lower window", lambda b: masked(b, lambda: _lower_window(b, 3) & triangle(b), LOW), "causal, window(3)"),
    Form("padding", lambda b: masked(b, lambda: lengths_reach(b)), "padding", keeps_nan=True),
    Form("padding, lowest", lambda b: masked(b, lambda: lengths_reach(b), LOW), "bias(b t)"),
    Form("padding, -1e9", lambda b: masked(b, lambda: lengths_reach(b), -1e9), "bias(b t)"),
    Form("padding, guarded", lambda b: _guarded(b, lengths_reach(b)), "padding"),
    Form("causal padding, guarded", lambda b: _guarded(b, triangle(b) & lengths_reach(b)), "causal, padding"),
    Form("causal padding", lambda b: masked(b, lambda: triangle(b) & lengths_reach(b), LOW), "bias(b s t)"),
    Form("segments", lambda b: masked(b, lambda: _segments(b)), "segments"),
    Form("causal segments", lambda b: masked(b, lambda: _segments(b) & triangle(b), LOW), "segments, causal"),
    Form("boolean", lambda b: masked(b, lambda: _whole(b)), "mask(b h s t)", keeps_nan=True),
    Form("boolean rows", lambda b: masked(b, lambda: rows(b)), "mask(b t)", keeps_nan=True),
    Form("boolean rows, -1e9", lambda b: masked(b, lambda: rows(b), -1e9), "bias(b t)"),
    Form("boolean rows, -1e4", lambda b: masked(b, lambda: rows(b), -1e4), "bias(b t)"),
    Form("boolean rows, lowest", lambda b: masked(b, lambda: rows(b), LOW), "bias(b t)"),
    Form("boolean, guarded", lambda b: _guarded(b, _whole(b)), "mask(b h s t)"),
    Form("boolean, masked softmax", lambda b: _masked_softmax(b, rows(b)), "mask(b t)"),
    Form("boolean, guarded, spelled", _guarded_spelled, "mask(b t)"),
    Form("causal rows, guarded", lambda b: _guarded(b, triangle(b) & rows(b)), "causal, mask(b t)"),
    Form("mask of queries", lambda b: masked(b, lambda: _queries(b)), "mask(b s)", keeps_nan=True),
    Form("mask of heads", lambda b: masked(b, lambda: _of_heads(b), LOW), "bias(h t)"),
    Form("numbers, added", lambda b: _minus_one_times(b, -1e9), "bias(b t)"),
    Form("numbers, lowest", lambda b: _minus_one_times(b, LOW), "bias(b t)"),
    Form("numbers as truths", lambda b: masked(b, lambda: _numbers(b) > 0), "mask(b t)", keeps_nan=True),
    Form(
        "two masks",
        lambda b: scaled(b, lambda x: b.where(triangle(b), x, LOW) + addend(b, rows(b), LOW)),
        "bias(s t), bias(b t)",
    ),
    Form(
        "two masks by -inf",
        lambda b: scaled(b, lambda x: b.where(triangle(b), b.where(rows(b), x, -math.inf), -math.inf)),
        "mask(b t), causal",
        keeps_nan=True,
    ),
    Form(
        "two masks by -inf, one a table",
        lambda b: scaled(b, lambda x: b.where(rows(b), x + _constant_triangle(b, -math.inf), -math.inf)),
        "causal, mask(b t)",
        keeps_nan=True,
    ),
]


FILLS = [
    Form("two fills", lambda b: masked(b, lambda: triangle(b), LOW, over=LOW), "bias(b s t)"),
    Form("two fills by -1e9", lambda b: masked(b, lambda: triangle(b), -1e9, over=-1e9), "bias(b s t)"),
    Form("two fills by two numbers", lambda b: masked(b, lambda: triangle(b), -1e4, over=-1e9), "bias(b s t)"),
    Form("a fill over -inf", lambda b: masked(b, lambda: triangle(b), -math.inf, over=LOW), "bias(b s t)"),
    Form(
        "a fill over a table of -inf",
        lambda b: scaled(b, lambda x: b.where(rows(b), x + _constant_triangle(b, -math.inf), -1e9)),
        "bias(b s t)",
    ),
    Form(
        "-inf over a fill",
        lambda b: masked(b, lambda: triangle(b), LOW, over=-math.inf),
        "mask(b t), bias(s t)",
        keeps_nan=True,
    ),
    Form(
        "a fill over an added mask",
        lambda b: scaled(b, lambda x: b.where(triangle(b), x + addend(b, rows(b), LOW), LOW)),
        "bias(b s t)",
    ),
    Form(
        "a fill over a mask of two",
        lambda b: scaled(b, lambda x: x + b.where(triangle(b), addend(b, rows(b), LOW), LOW)),
        "bias(b s t)",
    ),
    Form(
        "a fill over a bias",
        lambda b: scaled(b, lambda x: b.where(rows(b), x + _t5(b), LOW)),
        "bias(b t), t5_relative(6, 8, bidirectional)",
    ),
    Form(
        "a fill by -1e9 over a bias", lambda b: scaled(b, lambda x: b.where(rows(b), x + _t5(b), -1e9)), "bias(b h s t)"
    ),
    Form(
        "a fill over a bias from outside",
        lambda b: scaled(b, lambda x: b.where(rows(b), x + bias(b, "f32[S, S]"), LOW)),
        "bias(b s t)",
    ),
    Form(
        "fills of negated scores",
        lambda b: scaled(b, lambda x: -b.where(triangle(b), b.where(rows(b), -x, -LOW), -LOW)),
        "bias(b s t)",
    ),
]
"""In a row whose keys are all masked, the result is the average over the keys with the greatest fill value."""


def _lower(b: Builder, size: int | str = "S") -> Expr:
    """torch.tril(torch.ones(S, S))"""
    j = b.iota(size=size)
    keep = j <= b.rearrange(j, pattern="s -> s 1")
    return b.where(keep, b.expand(1.0, shape=(size, size)), 0.0)


def _past(b: Builder, number: float = 1.0) -> Expr:
    """torch.triu(torch.full((S, S), number), 1)"""
    i, j = places(b)
    return b.where(j >= i + 1, b.expand(number, shape=("S", "S")), 0.0)


def _cut(b: Builder) -> Expr:
    """nanoGPT's mask: torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)[:, :, :S, :S] == 0"""
    table = b.rearrange(_lower(b, 64), pattern="s t -> 1 1 s t")
    return b.equal(b.slice(b.slice(table, axis=2, stop="S"), axis=3, stop="S"), 0.0)


def _queries(b: Builder) -> Expr:
    """Padded queries, which see nothing"""
    return b.rearrange(b.input("mask", "bool[B, S]"), pattern="b s -> b 1 s 1")


def _of_heads(b: Builder) -> Expr:
    return b.rearrange(b.input("mask", f"bool[{HEADS}, S]"), pattern="h t -> h 1 t")


def _upper(b: Builder) -> Expr:
    i, j = places(b)
    return j > i


def _by_positions(b: Builder) -> Expr:
    at = b.positions(b.input("tokens", "i64[B, S]"))
    return b.rearrange(at, pattern="b t -> b 1 1 t") <= b.rearrange(at, pattern="b s -> b 1 s 1")


def _difference(b: Builder) -> Expr:
    i, j = places(b)
    return i - j


def _lower_window(b: Builder, size: int) -> Expr:
    i, j = places(b)
    return i - j < size


# -- biases ----------------------------------------------------------------------------------------------------


def _t5(b: Builder, far: int = 8, buckets: int = 6) -> Expr:
    """T5's bias: a table indexed by the clipped distance"""
    i, j = places(b)
    row = b.minimum(b.maximum(j - i, -far), far) + far
    table = b.gather(b.parameter("table", f"f32[{buckets}, {HEADS}]"), b.constant(_buckets(buckets, far)), axis=0)
    return b.rearrange(b.gather(table, row, axis=0), pattern="s t h -> 1 h s t")


def _buckets(buckets: int, far: int) -> Array:
    return t5_buckets(np.arange(-far, far + 1), buckets, far, True)


def _t5_by_logarithms(b: Builder, rows: int, far: int, bidirectional: bool) -> Expr:
    """Hugging Face's form of T5's bias: short distances one by one, longer ones by their logarithm"""
    i, j = places(b)
    offset = j - i
    count = rows // 2 if bidirectional else rows
    near = count // 2
    distance = b.abs(offset) if bidirectional else -b.minimum(offset, 0)
    log = b.log(b.cast(distance, to="f32") / near) / math.log(far / near) * (count - near)
    grown = b.minimum(b.cast(log, to="i64") + near, count - 1)
    bucket = b.where(distance < near, distance, grown)
    if bidirectional:
        bucket = b.cast(offset > 0, to="i64") * count + bucket
    table = b.parameter("table", f"f32[{rows}, {HEADS}]")
    return b.rearrange(b.embedding(table, bucket), pattern="s t h -> 1 h s t")


def _alibi(b: Builder, sign: int = 1) -> Expr:
    i, j = places(b)
    slopes = b.constant(np.float32([0.5, 0.25, 0.125, 0.0625]))
    return b.rearrange(slopes, pattern="h -> h 1 1") * b.cast(j - i if sign > 0 else i - j, to="f32")


def _as_floats(b: Builder) -> tuple[Expr, Expr]:
    i, j = places(b)
    return b.cast(i, to="f32"), b.cast(j, to="f32")


def _float_window(b: Builder) -> Expr:
    i, j = _as_floats(b)
    return (i - j < 3.0) & (j <= i)


def _alibi_of_floats(b: Builder) -> Expr:
    i, j = _as_floats(b)
    return b.rearrange(b.constant(np.float32([0.5, 0.25, 0.125, 0.0625])), pattern="h -> h 1 1") * (j - i)


def _one_slope(b: Builder) -> Expr:
    i, j = places(b)
    return b.cast(i - j, to="f32") * -0.5


def _of_later_keys(b: Builder) -> Expr:
    """A table indexed by "key comes later", plus a constant: a function of the distance, but not T5's buckets"""
    i, j = places(b)
    table = b.parameter("table", f"f32[32, {HEADS}]")
    return b.rearrange(b.embedding(table, b.cast(j > i, to="i64") + 16), pattern="s t h -> 1 h s t")


def _by_place(b: Builder) -> Expr:
    """A table indexed by i + j, which is not a distance"""
    i, j = places(b)
    table = b.parameter("table", f"f32[32, {HEADS}]")
    return b.rearrange(b.embedding(table, b.minimum(i + j, 31)), pattern="s t h -> 1 h s t")


def bias(b: Builder, type: str, pattern: str | None = None) -> Expr:
    x = b.input("bias", type)
    return x if pattern is None else b.rearrange(x, pattern=pattern)


BIASES = [
    Form("bias", lambda b: scaled(b, lambda x: x + bias(b, f"f32[B, {HEADS}, S, S]")), "bias(b h s t)"),
    Form("bias of heads", lambda b: scaled(b, lambda x: x + bias(b, f"f32[{HEADS}, S, S]")), "bias(h s t)"),
    Form("bias of rows", lambda b: scaled(b, lambda x: x + bias(b, "f32[B, S]", "b t -> b 1 1 t")), "bias(b t)"),
    Form("bias before the scale", lambda b: products(b, lambda x: (x + bias(b, "f32[S, S]")) * SCALE), "bias(s t)"),
    Form("bias taken off", lambda b: scaled(b, lambda x: x - bias(b, "f32[S, S]")), "bias(s t)"),
    Form("scores taken off", lambda b: products(b, lambda x: bias(b, "f32[S, S]") - x * -SCALE), "bias(s t)"),
    Form(
        "a sum of two",
        lambda b: scaled(b, lambda x: x + (bias(b, f"f32[{HEADS}, S, S]") + addend(b, rows(b), LOW))),
        "bias(b t), bias(h s t)",
    ),
    Form(
        "a masked bias",
        lambda b: scaled(b, lambda x: x + b.where(triangle(b), _t5(b), LOW)),
        "causal, t5_relative(6, 8, bidirectional)",
    ),
    Form(
        "a masked bias of -inf",
        lambda b: scaled(b, lambda x: x + b.where(triangle(b), addend(b, rows(b), -math.inf), LOW)),
        "bias(b s t)",
        keeps_nan=True,
    ),
    Form("t5", lambda b: products(b, lambda x: x + _t5(b)), "t5_relative(6, 8, bidirectional)", scale=1.0),
    Form(
        "t5, computed",
        lambda b: products(b, lambda x: x + _t5_by_logarithms(b, 32, 128, True)),
        "t5_relative(32, 128, bidirectional)",
        scale=1.0,
    ),
    Form(
        "t5, computed, causal",
        lambda b: products(b, lambda x: b.where(triangle(b), x + _t5_by_logarithms(b, 32, 128, False), LOW)),
        "causal, t5_relative(32, 128)",
        scale=1.0,
    ),
    Form("a table of later keys", lambda b: products(b, lambda x: x + _of_later_keys(b)), "bias(h s t)", scale=1.0),
    Form("a table by place", lambda b: products(b, lambda x: x + _by_place(b)), "bias(h s t)", scale=1.0),
    Form(
        "alibi, floats",
        lambda b: scaled(b, lambda x: b.where(triangle(b), x + _alibi_of_floats(b), LOW)),
        "causal, alibi",
    ),
    Form("alibi, i - j", lambda b: scaled(b, lambda x: b.where(triangle(b), x - _alibi(b, -1), LOW)), "causal, alibi"),
    Form(
        "alibi, one slope", lambda b: scaled(b, lambda x: b.where(triangle(b), x + _one_slope(b), LOW)), "causal, alibi"
    ),
    Form("alibi", lambda b: scaled(b, lambda x: b.where(triangle(b), x + _alibi(b), LOW)), "causal, alibi"),
    Form("a bias by -inf", lambda b: scaled(b, lambda x: x + b.log(_positive(b))), "bias(b t)", keeps_nan=True),
]


def _positive(b: Builder) -> Expr:
    """Masks by the logarithm of floats that are 0 or 1"""
    return b.cast(rows(b), to="f32")


FORMS = [*LAYOUTS, *SCALES, *MASKS, *FILLS, *BIASES]
