"""Models from which a step is derived: causal and encoder-decoder families of the zoo, and models with the other
features that steps support.

There are also models without a step, each with the expected reason.
"""

from __future__ import annotations

import math
from typing import Annotated

import treadle as t
from tests.test_models import ZOO, small
from treadle.frontends.declarations import Model
from treadle.ir.graph import Graph
from treadle.models.llama import llama
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

Tokens = Annotated[t.Tensor, t.i64["B S"]]
Segments = Annotated[t.Tensor, t.i64["B S"]]
Lengths = Annotated[t.Tensor, t.i64["B"]]
Picture = Annotated[t.Tensor, t.f32["B 6"]]


@t.model
def alibi(tokens: Tokens, *, vocab: int = 11, dim: int = 12, heads: int = 3) -> t.Tensor:
    """ALiBi: biases by distance, with a soft-cap."""
    x = t.embed(tokens, vocab, dim, name="wte")
    for _ in t.stack("h", 2):
        y = t.self_attention(
            t.rms_norm(x, name="norm"), heads, mask=t.causal, bias=t.alibi([0.5, 0.25, 0.125]), softcap=2.0, name="attn"
        )
        x = x + y
    return t.unembed(x, tied="wte")


@t.model
def windows(tokens: Tokens, *, vocab: int = 11, dim: int = 12, heads: int = 3) -> t.Tensor:
    """Window attention next to full attention, as in Gemma 2 and 3; one of the layers has T5's distance bias."""
    x = t.embed(tokens, vocab, dim, name="wte")
    table = t.parameter("distance", 8, heads)
    for _ in t.stack("h", 2):
        x = x + t.self_attention(x, heads, mask=t.causal & t.window(3), name="near")
        x = x + t.self_attention(
            x, heads, mask=t.causal, bias=t.t5_relative(table, buckets=8, max_distance=16), name="far"
        )
    return t.unembed(x, tied="wte")


@t.model
def packed(tokens: Tokens, segments: Segments, lengths: Lengths, *, vocab: int = 11, dim: int = 12) -> t.Tensor:
    """Several texts in a row, and a padding mask that is passed once for a row."""
    x = t.embed(tokens, vocab, dim, name="wte") + t.embed(segments, 4, dim, name="segment")
    x = x + t.self_attention(x, 3, mask=t.causal & t.segments(segments) & t.padding(lengths), name="attn")
    return t.linear(x, vocab, name="head")


@t.model
def counted(tokens: Tokens, *, vocab: int = 11, dim: int = 12, context: int = 24) -> t.Tensor:
    """Positions computed by ops: one count indexes a table, one becomes sines, one becomes a decay."""
    count = t.iota(size=tokens.shape[1])
    angles = t.rearrange(t.cast(count, to="f32"), pattern="s -> s 1") * t.constant([1.0, 0.5, 0.1])
    waves = t.concat(t.sin(angles), t.cos(angles), axis=-1)
    table = t.parameter("wpe", context, dim)
    x = t.embed(tokens, vocab, dim, name="wte") + t.gather(table, count, axis=0)
    x = x + t.linear(waves, dim, name="waves") * t.rearrange(t.exp(t.cast(count, to="f32") * -0.1), pattern="s -> s 1")
    x = x + t.self_attention(x, 3, mask=t.causal, name="attn")
    return t.linear(x, vocab, name="head")


@t.model
def summed(tokens: Tokens, *, vocab: int = 11, dim: int = 12, heads: int = 3) -> t.Tensor:
    """Linear attention as two cumulative sums (Katharopoulos et al. 2020), next to a window."""
    x = t.embed(tokens, vocab, dim, name="wte")
    for _ in t.stack("h", 2):
        q, k, v = (t.split_heads(t.linear(x, dim, bias=False, name=n), heads) for n in "qkv")
        q, k = t.exp(q * 0.1), t.exp(k * 0.1)
        pairs = t.cumsum(t.einsum(k, v, equation="b h s d, b h s e -> b h s d e"), axis=2)
        weights = t.einsum(q, t.cumsum(k, axis=2), equation="b h s d, b h s d -> b h s")
        y = t.einsum(q, pairs, equation="b h s d, b h s d e -> b h s e") / t.rearrange(
            weights, pattern="b h s -> b h s 1"
        )
        x = x + t.linear(t.merge_heads(y), dim, name="out")
        x = x + t.self_attention(x, heads, mask=t.causal & t.window(4), name="near")
    before = t.cumsum(x, axis=1, exclusive=True)
    return t.linear(x + before * 0.1, vocab, name="head")


@t.model
def routed(tokens: Tokens, *, vocab: int = 11, dim: int = 12, experts: int = 4) -> t.Tensor:
    """Experts of all tokens of all rows as one axis; each token's choices are added to zeros of that axis."""
    x = t.embed(tokens, vocab, dim, name="wte")
    x = x + t.self_attention(x, 3, mask=t.causal, name="attn")
    flat = t.rearrange(x, "b s d -> (b s) d")
    best, chosen = t.top_k(t.sigmoid(t.linear(flat, experts, name="gate")), k=2)
    zeros = t.expand(t.constant(0.0), shape=(flat.shape[0], experts))
    shares = t.scatter_add(zeros, chosen, best, axis=1)
    held = t.einsum(flat, t.parameter("up", experts, dim, dim), equation="n d, e d h -> n e h")
    y = t.einsum(held, shares, equation="n e h, n e -> n h")
    return t.linear(x + t.rearrange(y, "(b=B s) d -> b s d"), vocab, name="head")


@t.model
def captioned(tokens: Tokens, picture: Picture, *, vocab: int = 11, dim: int = 12, blocks: str = "h") -> t.Tensor:
    """A vector that is passed once for a row and read by every block, and positions that do not begin at 0."""
    seen = t.linear(picture, dim, name="seen")
    x = t.embed(tokens, vocab, dim, name="wte") + t.embed(t.positions(tokens) + 2, 40, dim, name="wpe")
    for _ in t.stack(blocks, 2):
        x = x * t.rearrange(t.sigmoid(seen), pattern="b d -> b 1 d")
        x = x + t.self_attention(t.layer_norm(x, name="norm"), 3, mask=t.causal, name="attn")
    return t.linear(x, vocab, name="head")


@t.model
def across(tokens: Tokens, source: Annotated[t.Tensor, t.i64["B M"]], *, vocab: int = 11, dim: int = 12) -> t.Tensor:
    """Cross attention that depends on the query's position, with keys of a source text or of weights."""
    x = t.embed(tokens, vocab, dim, name="wte")
    x = x + t.self_attention(x, 3, mask=t.causal, name="attn")
    memory, table = t.embed(source, vocab, dim, name="source"), t.parameter("distance", 8, 3)
    distances = t.t5_relative(table, buckets=8, max_distance=16)
    x = x + t.cross_attention(x, memory, 3, bias=distances, name="by_distance")
    x = x + t.cross_attention(x, memory, 3, mask=t.window(4), name="near")
    x = x + t.cross_attention(x, memory, 3, mask=t.causal, name="before")
    keys = t.expand(t.parameter("keys", 1, 3, 5, 4), shape=(tokens.shape[0], None, None, None))
    q = t.split_heads(t.linear(x, dim, name="q"), 3)
    return t.linear(x + t.merge_heads(t.attention(q, keys, keys, mask=t.window(7))), vocab, name="head")


@t.model
def spread(tokens: Tokens) -> t.Tensor:
    """Positions expanded to the rows, as traced models have them: [s] and [1, s] to [b, s], [s] to [3, b, s]."""
    x, i = t.embed(tokens, 11, 12, name="wte"), t.iota(size=tokens.shape[1])
    x = x + t.expand(t.embed(i, 24, 12, name="wpe"), shape=(tokens.shape[0], None, None))
    waves = t.sin(t.expand(t.cast(i, to="f32"), shape=(3, tokens.shape[0], None)))
    x = x + t.rearrange(t.reduce_sum(waves, axes=(0,)), pattern="b s -> b s 1")
    positions = t.expand(t.rearrange(i, pattern="s -> 1 s"), shape=(tokens.shape[0], None))
    x = x + t.self_attention(
        x,
        3,
        mask=t.causal,
        rotate=lambda q: t.rotary(q, positions, t.rotary_frequencies(4)),
        name="attn",
    )
    return t.linear(x, 11, name="head")


@t.model
def beside_rows(tokens: Tokens) -> t.Tensor:
    """Positions with a dimension of size 1 in the place of the rows: [1, s] and [s, 1, 1]."""
    i = t.iota(size=tokens.shape[1])
    x = t.embed(tokens, 11, 12, name="wte") + t.embed(t.rearrange(i, pattern="s -> 1 s"), 24, 12, name="wpe")
    x = t.rearrange(x + t.self_attention(x, 3, mask=t.causal, name="attn"), pattern="b s d -> s b d")
    x = x * t.rearrange(t.exp(t.cast(i, to="f32") * -0.1), pattern="s -> s 1 1")
    return t.linear(t.rearrange(x, pattern="s b d -> b s d"), 11, name="head")


@t.model
def oddly_named(rows: Tokens, start: Picture, last: Annotated[t.Tensor, t.f32["B S 12"]]) -> t.Tensor:
    """Inputs with the names that a step uses for its own inputs about rows."""
    x = t.embed(rows, 11, 12, name="wte") + last
    for _ in t.stack("h", 2):
        x = x * t.rearrange(t.sigmoid(t.linear(start, 12, name="seen")), pattern="b d -> b 1 d")
        x = x + t.cumsum(x, axis=1) * 0.1 + t.self_attention(x, 3, mask=t.causal, name="attn")
    return t.linear(x, 11, name="head")


@t.model
def repeated(
    tokens: Tokens, source: Annotated[t.Tensor, t.i64["B M"]], picture: Picture, *, vocab: int = 11, dim: int = 12
) -> t.Tensor:
    """Nested blocks with one set of weights: every repetition has its own caches, rings, sums and keys."""
    seen = t.linear(picture, dim, name="seen")
    memory = t.embed(source, vocab, dim, name="source")
    x = t.embed(tokens, vocab, dim, name="wte")
    for _ in t.stack("h", 2, shared=True):
        x = x + t.self_attention(t.rms_norm(x, name="norm"), 3, mask=t.causal, name="attn")
        for _ in t.stack("inner", 2, shared=True):
            x = x + t.self_attention(x, 3, mask=t.causal & t.window(3), name="near")
            x = x * t.rearrange(t.sigmoid(t.linear(seen, dim, name="gate")), pattern="b d -> b 1 d")
        seen = t.linear(seen, dim, name="again")
        memory = memory + t.linear(memory, dim, name="memory")
        x = x + t.cross_attention(x, memory, 3, name="cross") + 0.1 * t.cumsum(x, axis=1)
    return t.unembed(x, tied="wte")


@t.model
def states_by_other_names(
    tokens: Tokens, source: Annotated[t.Tensor, t.i64["B M"]], M_length: Lengths, *, vocab: int = 11, dim: int = 12
) -> t.Tensor:
    """Weights and an input that have the names that a step uses for its states."""
    x = t.embed(tokens, vocab, dim, name="wte")
    x = x * t.rearrange(t.cast(M_length, to="f32"), pattern="b -> b 1 1")
    for _ in t.stack("h", 2):
        with t.scope("attn"):
            x = x + t.parameter("k", dim)
        x = x + t.self_attention(x, 3, mask=t.causal, name="attn")
    with t.scope("last.attn"):
        x = x + t.parameter("v", dim)
    x = x + t.self_attention(x, 3, mask=t.causal, name="last.attn")
    memory = t.embed(source, vocab, dim, name="source")
    x = x + t.cross_attention(x, memory, 3, name="cross")
    return t.linear(x, vocab, name="head")


@t.model
def by_heads(tokens: Tokens, *, vocab: int = 11, dim: int = 12) -> t.Tensor:
    """Decomposed attention, as fusion recognizes it, with grouped heads."""
    x = t.embed(tokens, vocab, dim, name="wte")
    q = t.split_heads(t.linear(x, 24, name="q"), 4)
    k, v = (t.split_heads(t.linear(x, 12, name=n), 2) for n in "kv")
    k, v = (
        t.rearrange(
            t.expand(t.rearrange(z, pattern="b g s d -> b g 1 s d"), shape=(None, None, 2, None, None)),
            pattern="b g r s d -> b (g r) s d",
        )
        for z in (k, v)
    )
    i = t.iota(size=tokens.shape[1])
    seen = t.rearrange(i, pattern="t -> 1 t") <= t.rearrange(i, pattern="s -> s 1")
    scores = t.einsum(q, k, equation="b h s d, b h t d -> b h s t") * (1 / math.sqrt(6))
    p = t.softmax(t.where(seen, scores, t.constant(-1e30, t.f32)))
    y = t.einsum(p, v, equation="b h s t, b h t e -> b h s e")
    return t.linear(t.merge_heads(y), vocab, name="head")


def optimized(model: Model) -> Graph:
    """Return a model's graph after the portable passes."""
    return PassManager(DEFAULT).run(model.graph()).graph


MODELS: dict[str, Model] = {
    **{name: ZOO[name][0] for name in ("gpt2", "llama", "t5", "t5 gated", "transformer", "bart", "bart hidden")},
    **{name: ZOO[name][0] for name in ("marian", "marian, two vocabularies", "whisper")},
    **{name: ZOO[name][0] for name in ("llama, windows beside full layers", "gpt_neox", "opt")},
    "llama, windows": small(llama, head_dim=6, kv_heads=1, tied=True, window=3, rotary_dims=4, norm_offset=1.0),
    **{
        m.name: m
        for m in (alibi, windows, packed, counted, summed, routed, captioned, across, spread, beside_rows, by_heads)
    },
    **{m.name: m for m in (repeated, states_by_other_names, oddly_named)},
}


# -- models without a step --------------------------------------------------------------------------------------------


@t.model
def convolved(tokens: Tokens) -> t.Tensor:
    x = t.rearrange(t.embed(tokens, 11, 12, name="wte"), pattern="b s d -> b d s")
    x = t.convolution(x, 12, (3,), padding=(1, 1), name="conv")
    return t.linear(t.rearrange(x, pattern="b d s -> b s d"), 11, name="head")


@t.model
def averaged(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    return t.linear(x - t.reduce_mean(x, axes=(1,), keep=True), 11, name="head")


@t.model
def seeing_all(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    return t.linear(t.self_attention(x, 3, name="attn"), 11, name="head")


@t.model
def both_ways(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    return t.linear(t.self_attention(x, 3, mask=t.window(3), name="attn"), 11, name="head")


@t.model
def turned_round(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    return t.linear(t.cumsum(x, axis=1, reverse=True), 11, name="head")


@t.model
def by_length(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    return t.linear(x * t.size(value=tokens.shape[1], dtype="f32"), 11, name="head")


@t.model
def shifted(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    before = t.slice(x, axis=1, start=0, stop=tokens.shape[1] - 1)
    nothing = t.expand(t.constant(0.0, t.f32), shape=(tokens.shape[0], 1, 12))
    return t.linear(x + t.concat(nothing, before, axis=1), 11, name="head")


@t.model
def summed_ones(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    count = t.cumsum(t.expand(t.constant(1.0, t.f32), shape=(tokens.shape[1],)), axis=0)
    return t.linear(x * t.rearrange(count, pattern="s -> s 1"), 11, name="head")


@t.model
def summed_positions(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    places = t.cumsum(t.cast(t.iota(size=tokens.shape[1]), to="f32"), axis=0)
    return t.linear(x * t.rearrange(places, pattern="s -> s 1"), 11, name="head")


@t.model
def tokens_first(tokens: Tokens) -> t.Tensor:
    x = t.rearrange(t.embed(tokens, 11, 12, name="wte"), pattern="b s d -> s b d")
    x = t.cumsum(x, axis=0)
    return t.linear(t.rearrange(x, pattern="s b d -> b s d"), 11, name="head")


@t.model
def projected_positions(tokens: Tokens) -> t.Tensor:
    angles = t.rearrange(t.cast(t.iota(size=tokens.shape[1]), to="f32"), pattern="s -> s 1") * t.constant([1.0, 0.5])
    waves = t.einsum(angles, t.parameter("waves", 2, 12), equation="s k, k d -> s d")
    return t.linear(t.embed(tokens, 11, 12, name="wte") + waves, 11, name="head")


@t.model
def rows_of_pictures_last(tokens: Tokens, picture: Picture) -> t.Tensor:
    seen = t.rearrange(t.linear(picture, 12, name="seen"), pattern="b d -> d b")
    x = t.einsum(t.embed(tokens, 11, 12, name="wte"), seen, equation="b s d, d b -> b s d")
    return t.linear(x, 11, name="head")


@t.model
def mean_of_source(tokens: Tokens, source: Annotated[t.Tensor, t.f32["B M"]]) -> t.Tensor:
    x = t.einsum(t.embed(tokens, 11, 12, name="wte"), source, equation="b s d, b m -> b s d")
    return t.linear(x, 11, name="head")


@t.model
def pairs_of_sources(
    tokens: Tokens, one: Annotated[t.Tensor, t.f32["B M"]], other: Annotated[t.Tensor, t.f32["B N"]]
) -> t.Tensor:
    pairs = t.einsum(one, other, equation="b m, b n -> b m n")
    x = t.einsum(t.embed(tokens, 11, 12, name="wte"), pairs, equation="b s d, b m n -> b s d")
    return t.linear(x, 11, name="head")


@t.model
def two_texts(tokens: Tokens, answers: Annotated[t.Tensor, t.i64["B T"]]) -> dict[str, t.Tensor]:
    embedded = {"text": t.embed(tokens, 11, 12, name="wte"), "answer": t.embed(answers, 11, 12, name="other")}
    return {name: t.self_attention(x, 3, mask=t.causal, name=name) for name, x in embedded.items()}


@t.model
def mean_of_rows(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    return t.linear(x - t.reduce_mean(x, axes=(0,), keep=True), 11, name="head")


@t.model
def row_numbers(tokens: Tokens) -> t.Tensor:
    number = t.rearrange(t.cast(t.iota(size=tokens.shape[0]), to="f32"), pattern="b -> b 1 1")
    return t.linear(t.embed(tokens, 11, 12, name="wte") * number, 11, name="head")


@t.model
def count_of_rows(tokens: Tokens) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    return t.linear(x * t.size(value=tokens.shape[0], dtype="f32"), 11, name="head")


@t.model
def rows_last(tokens: Annotated[t.Tensor, t.i64["S B"]]) -> t.Tensor:
    return t.linear(t.embed(tokens, 11, 12, name="wte"), 11, name="head")


REFUSED: dict[str, tuple[Model, str, str]] = {
    "convolution over time": (convolved, "conv", "t.convolution("),
    "a mean over the sequence": (averaged, "reduce_mean", "t.reduce_mean("),
    "attention to all": (seeing_all, "attention", "t.self_attention("),
    "a window to both sides": (both_ways, "attention", "t.self_attention("),
    "a sum from the end": (turned_round, "cumsum", "t.cumsum("),
    "a number that is the length": (by_length, "size", "t.size("),
}
"""Models without a step: the op that prevents it, and the tested fragment of the message."""

AS_IT_IS_BUILT: dict[str, tuple[Model, str, str, str]] = {
    "a sum of ones": (summed_ones, "cumsum carries along values that are the same in all rows", "f32[S]", "t.cumsum("),
    "a sum of positions": (
        summed_positions,
        "cumsum mixes values that depend on the tokens' positions",
        "f32[S]",
        "t.cumsum(",
    ),
    "tokens before rows": (
        tokens_first,
        "cumsum mixes tokens, but their rows are not its first dimension",
        "f32[S, B, 12]",
        "t.cumsum(",
    ),
    "a product of positions": (
        projected_positions,
        "einsum reads the tokens' positions, but cannot be computed with other positions for each row",
        "f32[S, 2], f32[2, 12]",
        "t.einsum(",
    ),
    "rows last in what is kept": (
        rows_of_pictures_last,
        "a value that it would store does not have the rows as its first dimension",
        "rearrange: f32[12, B]",
        "t.rearrange(",
    ),
    "a source of any length": (
        mean_of_source,
        "einsum reads source at every step, although its size is known only when a row begins",
        "f32[B, S, 12], f32[B, M]",
        "t.einsum(",
    ),
    "sources of two lengths": (
        pairs_of_sources,
        "a value that it would store has two dimensions of sizes known only at a call",
        "einsum: f32[B, M, N]",
        "t.einsum(",
    ),
}
"""Models that have no step although their ops could be stepped: the reason, the op, and a fragment of the message.
"""
