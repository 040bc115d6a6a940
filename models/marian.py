"""Marian: the Transformer of 2017 for machine translation, with swish and a bias of logits.

Junczys-Dowmunt et al. 2018, "Marian: Fast Neural Machine Translation in C++"; in its position encoding, all sines come
before all cosines.
"""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Table, Tied
from treadle.models.bart import ALIASES, SHARED, UNUSED, name_blocks, read_sizes
from treadle.models.family import Config, Family, choose_architecture, padding_rows, read_flag, read_int, require
from treadle.models.transformer import decode, encode


@t.model
def marian(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    decoder_tokens: Annotated[t.Tensor, t.i64["B T"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 58101,
    decoder_vocab: int | None = None,
    dim: int = 512,
    encoder_heads: int = 8,
    encoder_layers: int = 6,
    encoder_hidden: int = 2048,
    decoder_heads: int = 8,
    decoder_layers: int = 6,
    decoder_hidden: int = 2048,
    act: t.Activation = t.silu,
    scaled: bool = True,
) -> dict[str, t.Tensor]:
    """Marian: next-token logits [B, T, vocab] of decoder_tokens [B, T], conditioned on tokens [B, S].

    lengths        [B], number of tokens of each row without padding; absent: all
    decoder_vocab  size of the decoder's vocabulary if it differs from the encoder's; then each has its own table
    scaled         True: embeddings are multiplied by sqrt(dim)
    """
    mask = None if lengths is None else t.padding(lengths)
    source, target = ("shared", "shared") if decoder_vocab is None else ("encoder.tokens", "decoder.tokens")
    target_vocab = decoder_vocab or vocab

    def place(x: t.Tensor, ids: t.Tensor) -> t.Tensor:
        return (x * dim**0.5 if scaled else x) + t.sinusoidal_positions(t.positions(ids), dim, interleaved=False)

    x = place(t.embed(tokens, vocab, dim, name=source), tokens)
    if target == source:
        y = place(t.embed(decoder_tokens, tied=source), decoder_tokens)
    else:
        y = place(t.embed(decoder_tokens, target_vocab, dim, name=target), decoder_tokens)
    with t.scope("encoder"):
        memory = encode(x, encoder_layers, encoder_hidden, act, mask, heads=encoder_heads)
    with t.scope("decoder"):
        y = decode(y, memory, decoder_layers, decoder_hidden, act, mask, heads=decoder_heads)
    return {"logits": t.unembed(y, tied=target) + t.parameter("logits_bias", 1, target_vocab, init="zeros")}


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face MarianConfig."""
    require(config, tie_word_embeddings=True, normalize_before=False, add_final_layer_norm=False)
    require(config, normalize_embedding=False, static_position_embeddings=True, is_encoder_decoder=True)
    require(config, is_causal=None)
    choose_architecture(config, {"MarianMTModel": marian})
    shared = read_flag(config, "share_encoder_decoder_embeddings", True)
    vocab = read_int(config, "vocab_size")
    decoder_vocab = read_int(config, "decoder_vocab_size", vocab)
    if shared and decoder_vocab != vocab:
        require(config, decoder_vocab_size=vocab)
    return marian.configure(
        decoder_vocab=None if shared else decoder_vocab,
        **read_sizes(config),
    )


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. Files from before version 5 also store the sinusoids, which are not
    read.
    """
    return name_blocks() | {
        "shared.weight": SHARED,
        "encoder.tokens.weight": "encoder.embed_tokens.weight",
        "decoder.tokens.weight": Tied(("decoder.embed_tokens.weight", "lm_head.weight")),
        "logits_bias": "final_logits_bias",
    }


FAMILY = Family(
    "marian", marian, ("marian",), from_config, checkpoint,
    prefixes=("", "model."),
    aliases={"marian": ALIASES},
    irrelevant={**UNUSED, "max_position_embeddings": "sinusoids have no maximum length"},
    padding=padding_rows("shared.weight", "encoder.tokens.weight", "decoder.tokens.weight", default=58100),
    buffers=("logits_bias",),
)  # fmt: skip
