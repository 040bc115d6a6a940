"""Programs that look like attention but are not, or that are attention with other terms than they seem to have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.attention_programs import (
    HEADS,
    LOW,
    SCALE,
    SIZE,
    Build,
    addend,
    bias,
    lengths_reach,
    masked,
    places,
    products,
    q_k_v,
    rows,
    scaled,
    swapped,
    triangle,
)
from treadle.ir.builder import Builder, Expr


@dataclass(frozen=True)
class NearMiss:
    """A program that looks like attention: the reason that it is not, and the terms of any other attention that is
    fused.
    """

    name: str
    build: Build
    reason: str
    terms: str | None = None


def _wrong_axis(b: Builder) -> Expr:
    q, k, v = q_k_v(b)
    return b.softmax(q @ swapped(b, k) * SCALE, axis=2) @ v


def _over_heads(b: Builder) -> Expr:
    q, k, v = q_k_v(b)
    return b.softmax(q @ swapped(b, k) * SCALE, axis=1) @ v


def _also_returned(b: Builder) -> Expr:
    q, k, v = q_k_v(b)
    p = b.softmax(q @ swapped(b, k) * SCALE)
    return b.concat(p @ v, p, axis=3)


def _sink(b: Builder, *, shifted: bool = False) -> Expr:
    """A learned score per head takes part in the softmax, and its probability is dropped (gpt-oss)."""
    q, k, v = q_k_v(b)
    scores = q @ swapped(b, k) * SCALE
    sink = b.rearrange(b.parameter("sink", f"f32[{HEADS}]"), pattern="h -> 1 h 1 1")
    joined = b.concat(scores, b.expand(sink, shape=(*scores.shape[:3], 1)), axis=3)
    joined = joined - b.reduce_max(joined, axes=(3,), keep=True) if shifted else joined
    return b.slice(b.softmax(joined), axis=3, stop=scores.shape[3]) @ v


def _used_twice(b: Builder) -> Expr:
    q, k, v = q_k_v(b)
    p = b.softmax(q @ swapped(b, k) * SCALE)
    return p @ v + p @ (v * v)


def _after(change: Callable[[Builder, Expr], Expr]) -> Build:
    def build(b: Builder) -> Expr:
        q, k, v = q_k_v(b)
        return change(b, b.softmax(q @ swapped(b, k) * SCALE)) @ v

    return build


def _data_scale(b: Builder) -> Expr:
    return scaled(b, lambda x: x * b.input("temperature", "f32[B, 1, 1, 1]"))


def _data_divisor(b: Builder) -> Expr:
    return products(b, lambda x: x / b.input("temperature", "f32[]"))


def _roles_swapped(b: Builder) -> Expr:
    """Attention with q and k swapped: the softmax is over the queries, which the product with the values sums."""
    q, k, v = q_k_v(b)
    return b.einsum(b.softmax(k @ swapped(b, q) * SCALE), v, equation="b h t s, b h t e -> b h s e")


def _feature_product(b: Builder) -> Expr:
    """q^T k: the product sums over the sequence, so the scores are between features."""
    q, k, v = q_k_v(b)
    p = b.softmax(b.einsum(q, k, equation="b h s d, b h s f -> b h d f") * SCALE)
    return b.einsum(p, v, equation="b h d f, b h s d -> b h s f")


def _no_sum(b: Builder) -> Expr:
    """An outer product of queries and keys"""
    q, k = (b.input(n, "f32[B, S]") for n in "qk")
    p = b.softmax(b.einsum(q, k, equation="b s, b t -> b s t"))
    return p @ b.input("v", f"f32[B, S, {SIZE}]")


def _values_transposed(b: Builder) -> Expr:
    """The last product sums over the queries' axis instead of the keys' axis."""
    q, k, v = q_k_v(b)
    p = b.softmax(q @ swapped(b, k) * SCALE)
    return b.einsum(p, v, equation="b h s t, b h s e -> b h t e")


def _heads_summed(b: Builder) -> Expr:
    q, k, v = q_k_v(b)
    p = b.softmax(q @ swapped(b, k) * SCALE)
    return b.einsum(p, v, equation="b h s t, b h t e -> b s e")


def _clipped(b: Builder) -> Expr:
    return scaled(b, lambda x: b.minimum(b.maximum(x, -50.0), 50.0))


def _scores_returned(b: Builder) -> Expr:
    q, k, v = q_k_v(b)
    x = q @ swapped(b, k) * SCALE
    return b.concat(b.softmax(x) @ v, x, axis=3)


def _depends_on_scores(b: Builder) -> Expr:
    return scaled(b, lambda x: x + b.tanh(x))


def _two_softmaxes(b: Builder) -> Expr:
    return _after(lambda b, p: b.softmax(p))(b)


def _high_fill(b: Builder) -> Expr:
    return masked(b, lambda: triangle(b), -100.0)


def _zero_fill(b: Builder) -> Expr:
    return masked(b, lambda: triangle(b), 0.0)


def _mask_of_tensors(b: Builder) -> Expr:
    return scaled(b, lambda x: b.where(triangle(b), x, bias(b, "f32[S, S]")))


def _cap_after_mask(b: Builder) -> Expr:
    return scaled(b, lambda x: b.tanh(b.where(triangle(b), x, LOW) / 30.0) * 30.0)


def _cap_after_bias(b: Builder) -> Expr:
    return scaled(b, lambda x: b.tanh((x + bias(b, "f32[S, S]")) / 30.0) * 30.0)


def _softmax_of_input(b: Builder) -> Expr:
    return b.softmax(b.input("scores", f"f32[B, {HEADS}, S, S]")) @ b.input("v", f"f32[B, {HEADS}, S, {SIZE}]")


def _weights_as_keys(b: Builder) -> Expr:
    """A layer with a softmax in the middle"""
    x = b.input("x", "f32[B, S, 8]")
    return b.linear(b.softmax(b.linear(x, b.parameter("up", "f32[12, 8]"))), b.parameter("down", "f32[8, 12]"))


def _additive_attention(b: Builder) -> Expr:
    """Bahdanau's attention: there is no product of queries and keys"""
    q, k, v = (b.input(n, f"f32[B, S, {SIZE}]") for n in "qkv")
    hidden = b.tanh(b.rearrange(q, pattern="b s d -> b s 1 d") + b.rearrange(k, pattern="b t d -> b 1 t d"))
    return b.softmax(b.reduce_sum(hidden, axes=(3,), keep=False)) @ v


def _regrouped(b: Builder) -> Expr:
    """A reshape that splits rows of probabilities"""
    q, k, v = (b.input(n, f"f32[6, {SIZE}]") for n in "qkv")
    p = b.reshape(b.softmax(q @ swapped(b, k) * SCALE), shape=(4, 9))
    return p @ b.concat(v, b.slice(v, axis=0, stop=3), axis=0)


def _narrowed_scores(b: Builder) -> Expr:
    """Scores rounded to half precision, then widened again"""
    return scaled(b, lambda x: b.cast(b.cast(x, to="f16"), to="f32"))


def _a_mask_of_two(b: Builder) -> Expr:
    """Two masks: -1e9 is filled in, and -1e9 is added. In a row without keys, some scores remain near -1e9"""
    return scaled(b, lambda x: b.where(rows(b), x + addend(b, lengths_reach(b), -1e9), -1e9))


def _there_and_back(b: Builder) -> Expr:
    """Float32's lowest number as a bias, doubled and halved: the result is -inf, although the bias itself is finite"""
    return scaled(b, lambda x: b.where(rows(b), x, LOW) * 2.0 * 0.5)


def _of_three(b: Builder) -> Expr:
    """Three factors in one product: queries, keys and a weight for each feature"""
    q, k, v = q_k_v(b)
    x = b.einsum(q, k, b.input("w", f"f32[{SIZE}]"), equation="b h s d, b h t d, d -> b h s t")
    return b.softmax(x) @ v


def _one_key(b: Builder) -> Expr:
    q = b.input("q", f"f32[B, {HEADS}, S, {SIZE}]")
    k, v = (b.input(n, f"f32[B, {HEADS}, 1, {SIZE}]") for n in "kv")
    return b.softmax(q @ swapped(b, k)) @ v


def many_addends(b: Builder, count: int) -> Expr:
    """One bias, added `count` times"""

    def change(x: Expr) -> Expr:
        each = bias(b, "f32[S, S]")
        for _ in range(count):
            x = x + each
        return x

    return products(b, change)


def many_casts(b: Builder, count: int) -> Expr:
    """Probabilities that are cast `count` times, by casts that cannot be combined"""

    def change(b: Builder, p: Expr) -> Expr:
        for n in range(count - 1):
            p = b.cast(p, to=("f16", "bf16")[n % 2])
        return b.cast(p, to="f32")

    return _after(change)(b)


def _quantized(b: Builder, x: Expr) -> Expr:
    """The form that quantizers emit: rounding to an integer dtype, and back to floats"""
    steps = b.minimum(b.maximum(b.round(x / 0.25) + 3.0, -128.0), 127.0)
    back: Expr = (b.cast(b.cast(steps, to="i8"), to="f32") - 3.0) * 0.25
    return back


NEAR_MISSES = [
    NearMiss("softmax over queries", _wrong_axis, "does not sum over the axis of the softmax"),
    NearMiss("softmax over heads", _over_heads, "the softmax is over an axis that both factors of the scores have"),
    NearMiss("probabilities returned", _also_returned, "the probabilities are used elsewhere, by concat"),
    NearMiss("two products with values", _used_twice, "the probabilities are used elsewhere, by matmul"),
    NearMiss("dropout", _after(lambda b, p: p * b.input("drop", f"f32[B, {HEADS}, S, S]")), "multiplied by a tensor"),
    NearMiss("dropout's scale", _after(lambda b, p: p * 1.25), "multiplied by a constant before"),
    NearMiss("masked after", _after(lambda b, p: b.where(triangle(b), p, 0.0)), "masked or shifted after the softmax"),
    NearMiss("shifted after", _after(lambda b, p: p + 1e-9), "masked or shifted after the softmax, by add"),
    NearMiss("sharpened after", _after(lambda b, p: b.pow(p, 1.5)), "go through pow before the product"),
    NearMiss("a sink", _sink, "a part of the probabilities is dropped before the product"),
    NearMiss("a shifted sink", lambda b: _sink(b, shifted=True), "such as that of an attention sink"),
    NearMiss("two softmaxes", _two_softmaxes, "a second softmax follows the first"),
    NearMiss("temperature of rows", _data_scale, "the scale is a tensor, so it depends on data"),
    NearMiss("temperature", _data_divisor, "the scale is a tensor, so it depends on data"),
    NearMiss("roles swapped", _roles_swapped, "does not sum over the axis of the softmax"),
    NearMiss("features against features", _feature_product, "does not sum over the axis of the softmax"),
    NearMiss("outer product", _no_sum, "not a sum over an axis of queries and keys"),
    NearMiss("values along queries", _values_transposed, "does not sum over the axis of the softmax"),
    NearMiss("heads summed", _heads_summed, "also sums over an axis other than the softmax's"),
    NearMiss("clipped", _clipped, "the scores are clipped"),
    NearMiss("scores returned", _scores_returned, "the scores are used elsewhere, by concat"),
    NearMiss("a bias of the scores", _depends_on_scores, "the scores are used elsewhere, by "),
    NearMiss("a fill too high", _high_fill, "replaces scores by -100, which does not mask keys"),
    NearMiss("a fill of zero", _zero_fill, "replaces scores by 0"),
    NearMiss("a mask of two tensors", _mask_of_tensors, "the mask selects between two tensors"),
    NearMiss("cap after mask", _cap_after_mask, "a mask is applied before the soft-cap"),
    NearMiss("cap after bias", _cap_after_bias, "a bias is added before the soft-cap"),
    NearMiss("scores from outside", _softmax_of_input, "the scores are an input, not a product"),
    NearMiss("weights as keys", _weights_as_keys, "the keys are weights: a layer with a softmax"),
    NearMiss("additive attention", _additive_attention, "the scores go through reduce_sum"),
    NearMiss("regrouped", _regrouped, "the probabilities are reshaped across their axes"),
    NearMiss("scores rounded", _narrowed_scores, "the scores are cast from f32 to f16, which is lossy"),
    NearMiss(
        "a fill over an added mask",
        _a_mask_of_two,
        "a row in which every key is masked by -1e+09 depends on more than that mask",
    ),
    NearMiss("past the range and back", _there_and_back, "the factors of masks exceed the range of f32 on the way"),
    NearMiss(
        "scores as low as the mask",
        lambda b: products(b, lambda x: b.where(triangle(b), x * 1e6, -1e9)),
        "scores times 1e+06 may be as low as the mask's -1e+09",
    ),
    NearMiss(
        "keys raised to inf",
        lambda b: scaled(b, lambda x: x - b.where(rows(b), 0.0, b.constant(-math.inf))),
        "an addend of the scores may be inf",
    ),
    NearMiss("three factors", _of_three, "the product is of 3 operands, not of queries and keys"),
    NearMiss("one key", _one_key, "there is only one key, so the softmax of its score is always 1"),
    NearMiss(
        "whole probabilities",
        _after(lambda b, p: b.cast(b.cast(p, to="i32"), to="f32")),
        "the probabilities are cast to i32",
    ),
    NearMiss("scores times nothing", lambda b: products(b, lambda x: x * 0.0), "the scores are multiplied by 0"),
    NearMiss("scores by infinity", lambda b: products(b, lambda x: x / math.inf), "the scores are divided by inf"),
    NearMiss("quantized scores", lambda b: scaled(b, lambda x: _quantized(b, x)), "the scores are quantized"),
    NearMiss("quantized probabilities", _after(_quantized), "the probabilities are quantized"),
    NearMiss("two caps", lambda b: scaled(b, lambda x: b.tanh(b.tanh(x / 30.0) * 20.0)), "a second soft-cap"),
    NearMiss("many addends", lambda b: many_addends(b, 48), "the chain before the softmax is too long"),
    NearMiss("many casts", lambda b: many_casts(b, 48), "the chain after the softmax is too long"),
    # fused, but with other terms than it seems to have
    NearMiss(
        "triangle one off", lambda b: masked(b, lambda: triangle(b, off=1)), "keeps keys up to 1 after", "mask(s t)"
    ),
    NearMiss(
        "triangle one short",
        lambda b: masked(b, lambda: triangle(b, off=-1), LOW),
        "keeps keys up to 1 before",
        "bias(s t)",
    ),
    NearMiss(
        "triangle upside down", lambda b: masked(b, lambda: _lower(b)), "keys from the query itself on", "mask(s t)"
    ),
    NearMiss(
        "triangle at the last key",
        lambda b: masked(b, lambda: _aligned_at_end(b), LOW, keys="T"),
        "positions differ by -S+T",
        "bias(s t)",
    ),
    NearMiss(
        "window one off",
        lambda b: masked(b, lambda: _uneven(b)),
        "from 2 before the query to 1 after the query",
        "mask(s t), mask(s t)",
    ),
    NearMiss(
        "constant with a hole",
        lambda b: masked(b, lambda: _holed(b)),
        "the constant is not a band of positions",
        "mask(s t)",
    ),
]


def _lower(b: Builder) -> Expr:
    i, j = places(b)
    return j >= i


def _aligned_at_end(b: Builder) -> Expr:
    i, j = places(b, "T")
    return j <= i + (b.size(value="T") - b.size(value="S"))


def _uneven(b: Builder) -> Expr:
    i, j = places(b)
    return (j >= i - 2) & (j <= i + 1)


def _holed(b: Builder) -> Expr:
    kept = np.tri(64, dtype=np.bool_)
    kept[3, 1] = False
    return b.slice(b.slice(b.constant(kept), axis=0, stop="S"), axis=1, stop="S")
