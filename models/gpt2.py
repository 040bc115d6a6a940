"""GPT-2: a decoder with learned positions and the norm before each part (Radford et al. 2019)."""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Source, Table
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    read_float,
    read_int,
    read_layers,
    require,
)

ACTIVATIONS = {"gelu_new": t.gelu_tanh, "gelu_pytorch_tanh": t.gelu_tanh, "gelu": t.gelu, "relu": t.relu}


@t.model
def gpt2(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    *,
    vocab: int = 50257,
    context: int = 1024,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int | None = None,
    act: t.Activation = t.gelu_tanh,
    eps: float = 1e-5,
) -> t.Tensor:
    """GPT-2: next-token logits [B, S, vocab] of tokens [B, S]."""
    x = t.embed(tokens, vocab, dim, name="wte") + t.embed(t.positions(tokens), context, dim, name="wpe")
    for _ in t.stack("h", layers):
        x += t.self_attention(t.layer_norm(x, eps=eps, name="ln_1"), heads, causal=True, name="attn")
        x += t.mlp(t.layer_norm(x, eps=eps, name="ln_2"), hidden or 4 * dim, act=act, name="mlp")
    return t.unembed(t.layer_norm(x, eps=eps, name="ln_f"), tied="wte")


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face GPT2Config."""
    choose_architecture(config, {"GPT2LMHeadModel": gpt2})
    require(
        config,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
        add_cross_attention=False,
    )
    return gpt2.configure(
        vocab=read_int(config, "vocab_size"),
        context=read_int(config, "n_positions"),
        dim=read_int(config, "n_embd"),
        heads=read_int(config, "n_head"),
        layers=read_layers(config, "n_layer"),
        hidden=None if config.get("n_inner") is None else read_int(config, "n_inner"),
        act=choose(config, "activation_function", ACTIVATIONS),
        eps=read_float(config, "layer_norm_epsilon", 1e-5),
    )


def checkpoint(config: Config) -> Table:
    """Hugging Face keeps weights as [in, out], and queries, keys and values in one matrix."""
    dim = read_int(config, "n_embd")
    table: dict[str, Entry] = {
        "wte.weight": "wte.weight",
        "wpe.weight": "wpe.weight",
        "h.{i}.ln_{j}.weight": "h.{i}.ln_{j}.weight",
        "h.{i}.ln_{j}.bias": "h.{i}.ln_{j}.bias",
        "h.{i}.attn.out.weight": Source("h.{i}.attn.c_proj.weight", transpose=True),
        "h.{i}.attn.out.bias": "h.{i}.attn.c_proj.bias",
        "h.{i}.mlp.up.weight": Source("h.{i}.mlp.c_fc.weight", transpose=True),
        "h.{i}.mlp.up.bias": "h.{i}.mlp.c_fc.bias",
        "h.{i}.mlp.down.weight": Source("h.{i}.mlp.c_proj.weight", transpose=True),
        "h.{i}.mlp.down.bias": "h.{i}.mlp.c_proj.bias",
        "ln_f.weight": "ln_f.weight",
        "ln_f.bias": "ln_f.bias",
    }
    for part, name in enumerate("qkv"):
        rows = (part * dim, (part + 1) * dim)
        table[f"h.{{i}}.attn.{name}.weight"] = Source("h.{i}.attn.c_attn.weight", transpose=True, rows=rows)
        table[f"h.{{i}}.attn.{name}.bias"] = Source("h.{i}.attn.c_attn.bias", rows=rows)
    return table


FAMILY = Family("gpt2", gpt2, ("gpt2",), from_config, checkpoint, prefixes=("", "transformer."))
