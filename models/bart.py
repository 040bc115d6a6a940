"""BART: the Transformer of 2017 with learned positions, normalized embeddings and gelu (Lewis et al. 2020)."""

from __future__ import annotations

from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Source, Table, Tied
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
from treadle.models.transformer import decode, encode

ACTIVATIONS = {
    "gelu": t.gelu,
    "gelu_new": t.gelu_tanh,
    "relu": t.relu,
    "swish": t.silu,
    "silu": t.silu,
}


@t.model
def bart(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    decoder_tokens: Annotated[t.Tensor, t.i64["B T"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 50265,
    context: int = 1024,
    dim: int = 768,
    encoder_heads: int = 12,
    encoder_layers: int = 6,
    encoder_hidden: int = 3072,
    decoder_heads: int = 12,
    decoder_layers: int = 6,
    decoder_hidden: int = 3072,
    act: t.Activation = t.gelu,
    scaled: bool = False,
    logits: bool = True,
) -> dict[str, t.Tensor]:
    """BART: next-token logits [B, T, vocab] of decoder_tokens [B, T], conditioned on tokens [B, S].

    lengths  [B], number of tokens of each row without padding; absent: all
    scaled   True: embeddings are multiplied by sqrt(dim)
    logits   False: the output is the hidden states [B, T, dim] of the decoder
    """
    mask = None if lengths is None else t.padding(lengths)
    x, y = t.embed(tokens, vocab, dim, name="shared"), t.embed(decoder_tokens, tied="shared")
    if scaled:
        x, y = x * dim**0.5, y * dim**0.5
    with t.scope("encoder"):
        x = t.layer_norm(x + t.embed(t.positions(tokens), context, dim, name="positions"), name="norm")
        memory = encode(x, encoder_layers, encoder_hidden, act, mask, heads=encoder_heads)
    with t.scope("decoder"):
        y = t.layer_norm(y + t.embed(t.positions(decoder_tokens), context, dim, name="positions"), name="norm")
        y = decode(y, memory, decoder_layers, decoder_hidden, act, mask, heads=decoder_heads)
    if not logits:
        return {"hidden": y}
    return {"logits": t.unembed(y, tied="shared") + t.parameter("logits_bias", 1, vocab, init="zeros")}


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face BartConfig."""
    require(config, tie_word_embeddings=True, normalize_before=False, add_final_layer_norm=False)
    require(config, is_causal=None)
    require(config, normalize_embedding=True, static_position_embeddings=False, is_encoder_decoder=True)
    return bart.configure(
        logits=choose_architecture(config, {"BartForConditionalGeneration": True, "BartModel": False}),
        context=read_int(config, "max_position_embeddings"),
        **read_sizes(config),
    )


def read_sizes(config: Config) -> dict[str, Any]:
    """Return the options that the configurations of BART and Marian share."""
    return {
        "vocab": read_int(config, "vocab_size"),
        "dim": read_int(config, "d_model"),
        "encoder_heads": read_int(config, "encoder_attention_heads"),
        "encoder_layers": read_layers(config, "encoder_layers"),
        "encoder_hidden": read_int(config, "encoder_ffn_dim"),
        "decoder_heads": read_int(config, "decoder_attention_heads"),
        "decoder_layers": read_layers(config, "decoder_layers"),
        "decoder_hidden": read_int(config, "decoder_ffn_dim"),
        "act": choose(config, "activation_function", ACTIVATIONS),
        "scaled": read_flag(config, "scale_embedding", False),
    }


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. Two unused rows at the start of the position tables are left out
    (fairseq's padding).
    """
    end = 2 + read_int(config, "max_position_embeddings")
    table = name_blocks() | {"shared.weight": SHARED, "logits_bias": "final_logits_bias"}
    for stack in ("encoder", "decoder"):
        table[f"{stack}.positions.weight"] = Source(f"{stack}.embed_positions.weight", rows=(2, end), of=end)
        table |= weights_and_biases({f"{stack}.norm": f"{stack}.layernorm_embedding"})
    return table


SHARED = Tied(("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"))
"""The table that embeds both sequences and computes the logits."""


def name_blocks() -> dict[str, Entry]:
    """Return Hugging Face's names of the parameters that `encode` and `decode` declare."""
    table: dict[str, Entry] = {}
    for stack in ("encoder", "decoder"):
        layer = f"{stack}.layers.{{i}}"
        modules = {
            "attn_norm": "self_attn_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
            "mlp_norm": "final_layer_norm",
        }
        modules |= {"cross_norm": "encoder_attn_layer_norm"}
        for ours, theirs in {"attn": "self_attn", "cross": "encoder_attn"}.items():
            modules |= {f"{ours}.{part}": f"{theirs}.{part}_proj" for part in ("q", "k", "v", "out")}
        table |= weights_and_biases({f"{stack}.layer.{{i}}.{n}": f"{layer}.{name}" for n, name in modules.items()})
    return table


ALIASES = {
    "num_attention_heads": "encoder_attention_heads",
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
}
"""Other names of keys in the configurations of BART, Marian and Whisper."""

UNUSED = {
    "add_bias_logits": "the bias is a tensor of the file",
    "extra_pos_embeddings": "follows from the shape of the position table",
    **dict.fromkeys(
        ("student_encoder_layers", "student_decoder_layers", "replacing_rate"), "records how the model was distilled"
    ),
}
"""Keys of BART and Marian that change no output, each with the reason."""

FAMILY = Family(
    "bart", bart, ("bart",), from_config, checkpoint,
    prefixes=("", "model."), aliases={"bart": ALIASES}, irrelevant=UNUSED,
    padding=padding_rows("shared.weight", default=1),
    buffers=("logits_bias",),
)  # fmt: skip
