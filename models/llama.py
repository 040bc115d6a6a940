"""The Llama family: a decoder with rotary positions, norms and gated feed-forward networks (Touvron et al. 2023).

One declaration covers models that differ by an option: Mistral's window (Jiang et al. 2023), Qwen's biases and norms of
queries and keys (Yang et al. 2024, 2025), Gemma's scaled embeddings, soft-caps, alternating windows and four norms a
layer (Gemma team 2024, 2025), Phi-3's partly rotated heads (Abdin et al. 2024), OLMo 2's norms after each part (OLMo
team 2024), StableLM's layer norms (Bellagente et al. 2024), Granite's multipliers (Granite team 2024). SmolLM is Llama
under another name. `treadle.models.reading.llama_config` reads their config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Source, Table, Tied, consecutive
from treadle.frontends.rotary import Scaling, temperature_of
from treadle.ir.errors import FrontendError, Hint
from treadle.models.family import Config, Family, choose_architecture, padding_rows, weights_and_biases
from treadle.models.reading.llama_config import ARCHITECTURES, IRRELEVANT, read_kind, read_options

NORM_PLACES = ("before", "after", "both")
"""The position of the norm of a part of a layer: before the part, after it (before the residual sum), or both."""

QK_NORMS = ("heads", "whole")
"""The axes over which queries and keys are normalized: each head, or all heads together."""


@t.model
def llama(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    *,
    vocab: int = 32000,
    dim: int = 4096,
    heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: int = 32,
    hidden: int = 11008,
    act: t.Activation = t.silu,
    eps: float = 1e-6,
    tied: bool = False,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    rotary_dims: int | None = None,
    layout: str = "half",
    window: int | None = None,
    full_layers: tuple[int, ...] = (),
    window_base: float | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    layer_norms: bool = False,
    norm_offset: float = 0.0,
    norm_place: str = "before",
    qk_norm: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    longest: int | None = None,
    insert: Callable[[t.Tensor], t.Tensor] | None = None,
    rotate: Callable[[t.Tensor], t.Tensor] | None = None,
) -> dict[str, t.Tensor]:
    """Llama: next-token logits [B, S, vocab] of tokens [B, S].

    kv_heads           number of key/value heads that the query heads share; None: one each
    head_dim           size of a head; None: dim / heads
    base, scaling      of the rotary frequencies, see `t.rotary_frequencies`
    rotary_dims        number of dimensions of a head that are rotated, from its start; None: all
    layout             pairs of dimensions that are rotated together: "half", or "interleaved" as in GGUF files
    window             number of positions that a token sees, its own included; None: all before it
    full_layers        the layers (from 0) with full causal attention although there is a window
    window_base        base of the rotary frequencies, unscaled, in layers with a window; None: as in the others
    layer_norms        True: norms are layer norms with biases, not RMS norms
    norm_offset        number that is added to an RMS norm's weight: Gemma stores the weight minus 1
    norm_place         position of the norm of each part of a layer, see `NORM_PLACES`
    qk_norm            axes of an RMS norm of queries and keys, see `QK_NORMS`; None: no such norm
    scale              of the scores; None: 1 / sqrt(head_dim)
    softcap            scores become c tanh(scores / c)
    embedding_scale    factor of embeddings; residual_scale, of a layer's residual terms; logit_scale, of logits
    logit_softcap      logits become c tanh(logits / c)
    longest            maximum number of tokens of a text; None: no limit. Up to the context of `Dynamic` and
                       `LongRope` scaling the model has a step
    insert             for models that call this one: a function that returns the embeddings [B, S, dim] with image
                       features in place of some; None: the embeddings unchanged
    rotate             likewise: a function that rotates queries and keys [B, heads, S, head_dim]; None: rotary
                       positions that count the tokens
    """
    if head_dim is None and dim % heads:
        even = max(dim // heads // 2 * 2, 2)  # rotary positions turn pairs
        hint = Hint(f"head_dim={even}", f"--set head_dim={even}")
        raise FrontendError(f"a width of {dim} does not split into {heads} heads", hint=hint)
    for name, value, known in (("norm_place", norm_place, NORM_PLACES), ("qk_norm", qk_norm, (None, *QK_NORMS))):
        if value not in known:
            raise FrontendError(f"llama has no {name} {value!r}", hint="one of " + ", ".join(map(str, known)))
    if longest is not None:
        t.bound("S", upper=longest)
    size = head_dim or dim // heads
    positions, dims = t.positions(tokens), rotary_dims or size
    frequencies = t.rotary_frequencies(dims, base=base, scaling=scaling, length=t.size_of(tokens, 1))
    windowed = frequencies if window_base is None else t.rotary_frequencies(dims, base=window_base)
    temperature = temperature_of(scaling)
    warm_scale = scale
    if temperature != 1.0 and dims == size:
        warm_scale = (size**-0.5 if scale is None else scale) * temperature**2
    attention: dict[str, Any] = {
        "kv_heads": kv_heads,
        "head_dim": size,
        "projection_bias": qkv_bias,
        "output_bias": out_bias,
        "softcap": softcap,
        "normalize": {
            None: None,
            "heads": partial(rms_norm, eps=eps, offset=norm_offset),
            "whole": partial(norm_of_heads, eps=eps),
        }[qk_norm],
    }

    def turned(x: t.Tensor, by: t.Tensor) -> t.Tensor:
        if rotate is not None:
            return rotate(x)
        x = t.rotary(x, positions, by, layout=layout)
        return warmed(x, dims, temperature) if by is frequencies and dims != size else x

    def norm(x: t.Tensor, name: str) -> t.Tensor:
        if layer_norms:
            return t.layer_norm(x, eps=eps, name=name)
        return rms_norm(x, name, eps=eps, offset=norm_offset)

    def normed_before(x: t.Tensor, part: str) -> t.Tensor:
        return x if norm_place == "after" else norm(x, f"{part}_norm")

    def added(x: t.Tensor, y: t.Tensor, part: str) -> t.Tensor:
        if norm_place != "before":
            y = norm(y, f"{part}_post_norm")
        return x + (y if residual_scale == 1.0 else y * residual_scale)

    x = t.embed(tokens, vocab, dim, name="embed")
    if insert is not None:
        x = insert(x)
    if embedding_scale != 1.0:
        x *= embedding_scale
    for i in t.stack("layer", layers):
        near = window is not None and i not in full_layers
        frequency = windowed if near else frequencies
        y = t.self_attention(
            normed_before(x, "attn"),
            heads,
            causal=True,
            mask=t.window(window) if window is not None and near else None,
            scale=warm_scale if frequency is frequencies else scale,
            rotate=partial(turned, by=frequency),
            name="attn",
            **attention,
        )
        x = added(x, y, "attn")
        y = t.gated_mlp(normed_before(x, "mlp"), hidden, act=act, bias=mlp_bias, name="mlp")
        x = added(x, y, "mlp")
    x = norm(x, "norm")
    logits = t.unembed(x, tied="embed") if tied else t.unembed(x, vocab, name="lm_head")
    if logit_scale != 1.0:
        logits *= logit_scale
    return {"logits": logits if logit_softcap is None else t.tanh(logits / logit_softcap) * logit_softcap}


def warmed(x: t.Tensor, dims: int, temperature: float) -> t.Tensor:
    """Return x [B, H, S, d] with its first `dims` dimensions, those that are rotated, multiplied by the temperature."""
    if temperature == 1.0:
        return x
    return x * t.constant([temperature] * dims + [1.0] * ((x.shape[-1].constant or dims) - dims))


def rms_norm(x: t.Tensor, name: str, *, eps: float, offset: float) -> t.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset)"""
    if not offset:
        return t.rms_norm(x, eps=eps, name=name)
    with t.scope(name):
        weight = t.parameter("weight", x.shape[-1], init="zeros")
        return t.ops.rms_norm(x, weight + offset, eps=eps)


def norm_of_heads(x: t.Tensor, name: str, *, eps: float) -> t.Tensor:
    """Return the RMS norm of x [B, H, S, d] over H and d together."""
    normed = t.rms_norm(t.merge_heads(x), eps=eps, name=name)
    return t.rearrange(normed, pattern=f"b s (h={x.shape[1]} d) -> b h s d")


def from_config(config: Config) -> t.Model:
    """Read the config.json of one of `ARCHITECTURES`."""
    choose_architecture(config, {ARCHITECTURES[read_kind(config)]: llama})
    return llama.configure(**read_options(config))


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names."""
    kind, layer = read_kind(config), "model.layers.{i}"
    modules = {
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "lm_head": "lm_head",
        **{f"layer.{{i}}.attn.{n}": f"{layer}.self_attn.{n}_proj" for n in "qkv"},
        **{f"layer.{{i}}.attn.{n}_norm": f"{layer}.self_attn.{n}_norm" for n in "qk"},
        "layer.{i}.attn.out": f"{layer}.self_attn.o_proj",
        **{f"layer.{{i}}.mlp.{n}": f"{layer}.mlp.{n}_proj" for n in ("gate", "up", "down")},
        "layer.{i}.attn_norm": f"{layer}.input_layernorm",
        "layer.{i}.mlp_norm": f"{layer}.post_attention_layernorm",
        # If a part has a norm after it, that norm has the name that otherwise belongs to the norm before the next part.
        "layer.{i}.attn_post_norm": f"{layer}.post_attention_layernorm",
        "layer.{i}.mlp_post_norm": f"{layer}.post_feedforward_layernorm",
    }
    if kind in ("gemma2", "gemma3_text"):
        modules["layer.{i}.mlp_norm"] = f"{layer}.pre_feedforward_layernorm"
    table, options = weights_and_biases(modules), read_options(config)
    if options["tied"]:
        table["embed.weight"] = Tied(("model.embed_tokens.weight", "lm_head.weight"))
    if kind == "phi3":
        table |= joined(options, layer)
    return table


def joined(options: Mapping[str, Any], layer: str) -> dict[str, Source]:
    """Return Phi-3's sources: q, k and v in one tensor, and gate and up in one."""
    size = options["head_dim"] or options["dim"] // options["heads"]
    queries, keys, hidden = options["heads"] * size, options["kv_heads"] * size, options["hidden"]
    rows = {
        f"layer.{{i}}.attn.{name}.weight": length for name, length in zip("qkv", (queries, keys, keys), strict=True)
    }
    both = {f"layer.{{i}}.mlp.{name}.weight": hidden for name in ("gate", "up")}
    return {
        **consecutive(f"{layer}.self_attn.qkv_proj.weight", rows),
        **consecutive(f"{layer}.mlp.gate_up_proj.weight", both),
    }


def padding(config: Config) -> Mapping[str, int]:
    """Return the padding row of the embedding table. Model types have different defaults for it."""
    kind = str(config.get("model_type"))
    default = 32000 if kind == "phi3" else 0 if kind.startswith("gemma") else None
    return padding_rows("embed.weight", default=default)(config)


FAMILY = Family("llama", llama, tuple(ARCHITECTURES), from_config, checkpoint, irrelevant=IRRELEVANT, padding=padding)
