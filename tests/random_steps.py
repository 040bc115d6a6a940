"""Random causal models from which a step function can be derived. They mix all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np

import treadle as t
from treadle.frontends.declarations import Model

Tokens = Annotated[t.Tensor, t.i64["B S"]]
Source = Annotated[t.Tensor, t.i64["B M"]]
Picture = Annotated[t.Tensor, t.f32["B 6"]]
Lengths = Annotated[t.Tensor, t.i64["B"]]

VOCABULARY, CONTEXT = 11, 24


def drawn_model(rng: np.random.Generator, *, context: int = CONTEXT, shared: bool = False, wide: bool = False) -> Model:
    """Return a model of tokens [B, S]: one to four blocks, repeated or not, of one to four layers each.

    context  number of positions of a position table
    shared   repetitions share their weights, and blocks may be nested
    wide     widths are multiples of 32, so that all weights fit into blocks of 4 bits
    """
    heads = int(rng.choice([1, 2, 4]))
    dim = heads * int(rng.choice([2, 4])) if not wide else int(rng.choice([32, 64]))
    seeds = [int(rng.integers(1 << 30)) for _ in range(int(rng.integers(1, 5)))]
    repeats = int(rng.integers(1, 3)) + shared
    has_source, has_picture = (bool(x) for x in rng.random(2) < 0.3)
    first = int(rng.integers(1 << 30))

    def body(tokens: t.Tensor, source: t.Tensor | None, lengths: t.Tensor | None, picture: t.Tensor | None) -> t.Tensor:
        x = _begun(np.random.default_rng(first), tokens, dim, context)
        memory = None if source is None else _encoded(source, dim)
        seen = None if picture is None else t.linear(picture, dim, name="seen")
        for number, seed in enumerate(seeds):
            for _ in t.stack(f"block{number}", repeats, shared=shared):
                drawn = np.random.default_rng(seed)
                for layer in range(int(drawn.integers(1, 5))):
                    if shared and layer == number == 0:
                        one = int(drawn.integers(1 << 30))
                        for _ in t.stack(f"layer{layer}", 2, shared=True):
                            x = _layer(np.random.default_rng(one), x, tokens, dim, heads, memory, lengths, seen)
                        continue
                    with t.scope(f"layer{layer}"):
                        x = _layer(drawn, x, tokens, dim, heads, memory, lengths, seen)
        return t.linear(x, VOCABULARY, name="head")

    return _declared(body, has_source, has_picture)


def _declared(body: Callable[..., t.Tensor], has_source: bool, has_picture: bool) -> Model:
    """Return a model with the inputs that its body reads."""
    if has_source and has_picture:

        @t.model
        def drawn(tokens: Tokens, source: Source, lengths: Lengths, picture: Picture) -> t.Tensor:
            return body(tokens, source, lengths, picture)

        return drawn
    if has_source:

        @t.model
        def drawn_with_source(tokens: Tokens, source: Source, lengths: Lengths) -> t.Tensor:
            return body(tokens, source, lengths, None)

        return drawn_with_source
    if has_picture:

        @t.model
        def drawn_with_picture(tokens: Tokens, picture: Picture) -> t.Tensor:
            return body(tokens, None, None, picture)

        return drawn_with_picture

    @t.model
    def drawn_alone(tokens: Tokens) -> t.Tensor:
        return body(tokens, None, None, None)

    return drawn_alone


def _begun(rng: np.random.Generator, tokens: t.Tensor, dim: int, context: int) -> t.Tensor:
    """Return embedded tokens with an encoding of their positions."""
    x = t.embed(tokens, VOCABULARY, dim, name="wte")
    match rng.integers(5):
        case 0:
            return x + t.embed(t.positions(tokens), context, dim, name="wpe")
        case 1:
            return x + t.gather(t.parameter("wpe", context, dim), t.iota(size=tokens.shape[1]), axis=0)
        case 2:
            return x + t.sinusoidal_positions(t.positions(tokens), dim)
        case 3:
            count = t.rearrange(t.cast(t.iota(size=tokens.shape[1]), to="f32"), pattern="s -> s 1")
            return x * t.exp(count * -0.05) + t.sin(count * t.parameter("angles", dim))
    return x


def _encoded(source: t.Tensor, dim: int) -> t.Tensor:
    """Return an encoded source text, which all later layers may read."""
    x = t.embed(source, VOCABULARY, dim, name="source")
    for _ in t.stack("encoder", 2):
        x = x + t.self_attention(t.rms_norm(x, name="norm"), 1, name="attn")
    return x


def _layer(
    rng: np.random.Generator,
    x: t.Tensor,
    tokens: t.Tensor,
    dim: int,
    heads: int,
    memory: t.Tensor | None,
    lengths: t.Tensor | None,
    seen: t.Tensor | None,
) -> t.Tensor:
    y = [lambda: x, lambda: t.rms_norm(x, name="norm"), lambda: t.layer_norm(x, name="norm")][rng.integers(3)]()
    kind = rng.integers(8)
    if kind == 0:
        y = t.mlp(y, 3 * dim, act=[t.gelu, t.relu, t.silu][rng.integers(3)], name="mlp")
    elif kind == 1:
        y = t.gated_mlp(y, 2 * dim, act=t.silu, name="mlp")
    elif kind == 2:
        y = t.cumsum(y, axis=1, exclusive=bool(rng.integers(2))) * 0.1
    elif kind == 3:
        y = _linear_attention(y, dim, heads)
    elif kind == 4 and memory is not None and lengths is not None:
        mask = t.padding(lengths) if rng.integers(2) else None
        y = t.cross_attention(y, memory, heads, mask=mask, name="cross")
    elif kind == 5 and seen is not None:
        return x * t.rearrange(t.sigmoid(seen), pattern="b d -> b 1 d")
    else:
        y = _attention(rng, y, tokens, heads)
    return x + y if rng.random() < 0.8 else y + t.tanh(x)


def _linear_attention(x: t.Tensor, dim: int, heads: int) -> t.Tensor:
    q, k, v = (t.split_heads(t.linear(x, dim, bias=False, name=n), heads) for n in "qkv")
    q, k = t.exp(q * 0.1), t.exp(k * 0.1)
    pairs = t.cumsum(t.einsum(k, v, equation="b h s d, b h s e -> b h s d e"), axis=2)
    weights = t.einsum(q, t.cumsum(k, axis=2), equation="b h s d, b h s d -> b h s")
    y = t.einsum(q, pairs, equation="b h s d, b h s d e -> b h s e") / t.rearrange(weights, pattern="b h s -> b h s 1")
    return t.merge_heads(y)


def _attention(rng: np.random.Generator, x: t.Tensor, tokens: t.Tensor, heads: int) -> t.Tensor:
    mask, bias = t.causal, None
    if rng.random() < 0.4:
        mask = mask & t.window(int(rng.integers(1, 6)))
    if rng.random() < 0.2:
        mask = mask & t.segments(tokens // 4)
    match rng.integers(4):
        case 0:
            bias = t.alibi(np.linspace(0.1, 0.5, heads).tolist())
        case 1:
            bias = t.t5_relative(t.parameter("distance", 8, heads), buckets=8, max_distance=16)
    kv_heads = int(rng.choice([n for n in (1, 2, 4) if heads % n == 0]))
    head_dim = int(rng.choice([2, 4]))
    rotate = None
    if rng.random() < 0.4:
        frequencies = t.rotary_frequencies(head_dim)
        layout = str(rng.choice(["half", "interleaved"]))
        positions = t.positions(tokens)

        def rotate(q: t.Tensor) -> t.Tensor:
            return t.rotary(q, positions, frequencies, layout=layout)

    return t.self_attention(
        x,
        heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mask=mask,
        bias=bias,
        softcap=2.0 if rng.random() < 0.2 else None,
        rotate=rotate,
        name="attn",
    )
