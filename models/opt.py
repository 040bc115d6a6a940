"""OPT: a decoder with learned positions and ReLU (Zhang et al. 2022)."""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Source, Table, Tied
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    padding_rows,
    read_flag,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)

ACTIVATIONS = {"relu": t.relu, "gelu": t.gelu, "gelu_new": t.gelu_tanh, "silu": t.silu}


@t.model
def opt(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    *,
    vocab: int = 50272,
    context: int = 2048,
    dim: int = 768,
    embedding: int | None = None,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.relu,
    bias: bool = True,
    norm_before: bool = True,
    last_norm: bool = True,
) -> t.Tensor:
    """OPT: next-token logits [B, S, vocab] of tokens [B, S].

    embedding    width of the embeddings, which are projected to dim and back; None: dim
    norm_before  True: the norm comes before each part; else after the residual sum, as in OPT-350m
    last_norm    True if there is a norm before the logits
    """
    x = t.embed(tokens, vocab, embedding or dim, name="word")
    if embedding is not None:
        x = t.linear(x, dim, bias=False, name="project_in")
    x += t.embed(t.positions(tokens), context, dim, name="position")
    for _ in t.stack("layer", layers):
        y = t.layer_norm(x, name="attn_norm") if norm_before else x
        x += t.self_attention(y, heads, causal=True, projection_bias=bias, name="attn")
        x = x if norm_before else t.layer_norm(x, name="attn_norm")
        y = t.layer_norm(x, name="mlp_norm") if norm_before else x
        x += t.mlp(y, hidden, act=act, bias=bias, name="mlp")
        x = x if norm_before else t.layer_norm(x, name="mlp_norm")
    if last_norm:
        x = t.layer_norm(x, name="norm")
    if embedding is not None:
        x = t.linear(x, embedding, bias=False, name="project_out")
    return t.unembed(x, tied="word")


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face OPTConfig."""
    choose_architecture(config, {"OPTForCausalLM": opt})
    require(config, layer_norm_elementwise_affine=True, tie_word_embeddings=True, is_causal=True)
    dim = read_int(config, "hidden_size")
    embedding = read_int(config, "word_embed_proj_dim", dim)
    before = read_flag(config, "do_layer_norm_before", True)
    no_last = read_flag(config, "_remove_final_layer_norm", False)
    return opt.configure(
        vocab=read_int(config, "vocab_size"),
        context=read_int(config, "max_position_embeddings"),
        dim=dim,
        embedding=None if embedding == dim else embedding,
        heads=read_int(config, "num_attention_heads"),
        layers=read_layers(config, "num_hidden_layers"),
        hidden=read_int(config, "ffn_dim"),
        act=choose(config, "activation_function", ACTIVATIONS, "relu"),
        bias=read_flag(config, "enable_bias", True),
        norm_before=before,
        last_norm=before and not no_last,
    )


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names; two rows of the position table are unused."""
    layer = "layers.{i}"
    modules = {
        "project_in": "project_in",
        "project_out": "project_out",
        "layer.{i}.attn_norm": f"{layer}.self_attn_layer_norm",
        **{f"layer.{{i}}.attn.{n}": f"{layer}.self_attn.{n}_proj" for n in ("q", "k", "v", "out")},
        "layer.{i}.mlp_norm": f"{layer}.final_layer_norm",
        "layer.{i}.mlp.up": f"{layer}.fc1",
        "layer.{i}.mlp.down": f"{layer}.fc2",
        "norm": "final_layer_norm",
    }
    table = weights_and_biases(modules)
    table["word.weight"] = Tied(("embed_tokens.weight", "lm_head.weight"))
    end = 2 + read_int(config, "max_position_embeddings")
    table["position.weight"] = Source("embed_positions.weight", rows=(2, end), of=end)
    return table


FAMILY = Family(
    "opt",
    opt,
    ("opt",),
    from_config,
    checkpoint,
    prefixes=("model.decoder.", "decoder.", ""),
    padding=padding_rows("word.weight", default=1),
)
