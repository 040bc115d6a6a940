"""T5: an encoder and a decoder whose only position information is an attention bias by distance (Raffel et al. 2020).

The declaration also covers T5 1.1 and mT5 (Xue et al. 2021): a gated feed-forward network, and an untied output.
"""

from __future__ import annotations

from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, Tied
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    read_flag,
    read_float,
    read_int,
    read_layers,
    require,
)

ACTIVATIONS = {"relu": t.relu, "gelu": t.gelu, "gelu_new": t.gelu_tanh, "silu": t.silu}

FEED_FORWARD = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gated-gelu": ("gelu_new", True),
    "gated-silu": ("silu", True),
}
"""The values of `feed_forward_proj`: the activation, and True if the network is gated."""


@t.model
def t5_encoder(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 32128,
    dim: int = 512,
    heads: int = 8,
    head_dim: int = 64,
    hidden: int = 2048,
    layers: int = 6,
    buckets: int = 32,
    max_distance: int = 128,
    act: t.Activation = t.relu,
    gated: bool = False,
    eps: float = 1e-6,
) -> dict[str, t.Tensor]:
    """T5's encoder: hidden states [B, S, dim] of tokens [B, S].

    lengths  [B], number of tokens of each row without padding; absent: all
    """
    mask = None if lengths is None else t.padding(lengths)
    attention: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "scale": 1.0, "projection_bias": False}
    feed_forward = t.gated_mlp if gated else t.mlp
    x = t.embed(tokens, vocab, dim, name="shared")
    with t.scope("encoder"):
        table = t.parameter("distance.weight", buckets, heads)
        bias = t.t5_relative(table, buckets=buckets, max_distance=max_distance, bidirectional=True)
        for _ in t.stack("block", layers):
            y = t.rms_norm(x, eps=eps, name="attn_norm")
            x += t.self_attention(y, mask=mask, bias=bias, name="attn", **attention)
            y = t.rms_norm(x, eps=eps, name="mlp_norm")
            x += feed_forward(y, hidden, act=act, bias=False, name="mlp")
        return {"hidden": t.rms_norm(x, eps=eps, name="norm")}


@t.model
def t5(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    decoder_tokens: Annotated[t.Tensor, t.i64["B T"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 32128,
    dim: int = 512,
    heads: int = 8,
    head_dim: int = 64,
    hidden: int = 2048,
    layers: int = 6,
    decoder_layers: int = 6,
    buckets: int = 32,
    max_distance: int = 128,
    act: t.Activation = t.relu,
    gated: bool = False,
    eps: float = 1e-6,
    tied: bool = True,
) -> dict[str, t.Tensor]:
    """T5: next-token logits [B, T, vocab] of decoder_tokens [B, T], conditioned on tokens [B, S].

    lengths  [B], number of tokens of each row without padding; absent: all
    tied     True: logits are scaled by dim**-0.5 and multiplied by the embedding table, else by a separate matrix
    """
    memory = t5_encoder(
        tokens, lengths, vocab=vocab, dim=dim, heads=heads, head_dim=head_dim, hidden=hidden, layers=layers,
        buckets=buckets, max_distance=max_distance, act=act, gated=gated, eps=eps,
    )["hidden"]  # fmt: skip
    mask = None if lengths is None else t.padding(lengths)
    attention: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "scale": 1.0, "projection_bias": False}
    feed_forward = t.gated_mlp if gated else t.mlp
    x = t.embed(decoder_tokens, tied="shared")
    with t.scope("decoder"):
        table = t.parameter("distance.weight", buckets, heads)
        bias = t.t5_relative(table, buckets=buckets, max_distance=max_distance)
        for _ in t.stack("block", decoder_layers):
            y = t.rms_norm(x, eps=eps, name="attn_norm")
            x += t.self_attention(y, causal=True, bias=bias, name="attn", **attention)
            y = t.rms_norm(x, eps=eps, name="cross_norm")
            x += t.cross_attention(y, memory, mask=mask, name="cross", **attention)
            y = t.rms_norm(x, eps=eps, name="mlp_norm")
            x += feed_forward(y, hidden, act=act, bias=False, name="mlp")
        x = t.rms_norm(x, eps=eps, name="norm")
    return {"logits": t.unembed(x * dim**-0.5, tied="shared") if tied else t.unembed(x, vocab, name="lm_head")}


ARCHITECTURES = {
    "T5ForConditionalGeneration": t5,
    "T5WithLMHeadModel": t5,
    "T5EncoderModel": t5_encoder,
    "MT5ForConditionalGeneration": t5,
    "MT5EncoderModel": t5_encoder,
}


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face T5Config or MT5Config."""
    mt5 = config.get("model_type") == "mt5"
    layers = read_layers(config, "num_layers")
    model: t.Model = choose_architecture(config, ARCHITECTURES)
    require(config, is_causal=None, is_decoder=False)
    model = model.configure(
        vocab=read_int(config, "vocab_size"),
        dim=read_int(config, "d_model"),
        heads=read_int(config, "num_heads"),
        head_dim=read_int(config, "d_kv"),
        hidden=read_int(config, "d_ff"),
        layers=layers,
        buckets=read_int(config, "relative_attention_num_buckets", 32, most=256),
        max_distance=read_int(config, "relative_attention_max_distance", 128, most=4096),
        eps=read_float(config, "layer_norm_epsilon", 1e-6),
        **read_feed_forward(config),
    )
    if model.name == "t5":
        require(config, is_encoder_decoder=True)
        model = model.configure(
            decoder_layers=read_layers(config, "num_decoder_layers", layers),
            tied=not mt5 and read_flag(config, "scale_decoder_outputs", _may_lack_output(config)),
        )
    return model


def read_feed_forward(config: Config) -> dict[str, Any]:
    """Return the options `act` and `gated`. Files may repeat the two halves of `feed_forward_proj` as separate keys;
    the separate keys take precedence.
    """
    usual = "gated-gelu" if config.get("model_type") == "mt5" else "relu"
    act, gated = choose(config, "feed_forward_proj", FEED_FORWARD, usual)
    return {
        "act": choose(config, "dense_act_fn", ACTIVATIONS, act),
        "gated": read_flag(config, "is_gated_act", gated),
    }


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. The first block of a stack stores the distance bias that all blocks of
    the stack share.
    """
    table: dict[str, Entry] = {
        "shared.weight": Tied(("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")),
        "lm_head.weight": ("lm_head.weight", "shared.weight") if _may_lack_output(config) else "lm_head.weight",
    }
    up = "wi_1" if read_feed_forward(config)["gated"] else "wi"
    for stack, last in (("encoder", 1), ("decoder", 2)):
        block = f"{stack}.block.{{i}}"
        table |= {
            f"{stack}.distance.weight": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{stack}.norm.weight": f"{stack}.final_layer_norm.weight",
            f"{block}.attn_norm.weight": f"{block}.layer.0.layer_norm.weight",
            f"{block}.cross_norm.weight": f"{block}.layer.1.layer_norm.weight",
            f"{block}.mlp_norm.weight": f"{block}.layer.{last}.layer_norm.weight",
            f"{block}.mlp.gate.weight": f"{block}.layer.{last}.DenseReluDense.wi_0.weight",
            f"{block}.mlp.up.weight": f"{block}.layer.{last}.DenseReluDense.{up}.weight",
            f"{block}.mlp.down.weight": f"{block}.layer.{last}.DenseReluDense.wo.weight",
        }
        for ours, theirs in zip(("q", "k", "v", "out"), "qkvo", strict=True):
            table[f"{block}.attn.{ours}.weight"] = f"{block}.layer.0.SelfAttention.{theirs}.weight"
            table[f"{block}.cross.{ours}.weight"] = f"{block}.layer.1.EncDecAttention.{theirs}.weight"
    return table


def _may_lack_output(config: Config) -> bool:
    """Return True if the file may lack lm_head, so that the embedding table is used instead.

    transformers 5 declares every model tied. If the matrix is separate, the file stores it nevertheless, and
    `scale_decoder_outputs` records how the model was trained.
    """
    return read_flag(config, "tie_word_embeddings", True)


ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}

FAMILY = Family(
    "t5", t5, ("t5", "mt5"), from_config, checkpoint,
    aliases=dict.fromkeys(("t5", "mt5"), ALIASES),
    irrelevant={
        "n_positions": "positions by distance have no maximum length",
        **dict.fromkeys(("num_decoder_layers", "scale_decoder_outputs"), "T5EncoderModel has no decoder, MT5 no scale"),
    },
)  # fmt: skip
