"""The Transformer: an encoder and a decoder that consist of attention (Vaswani et al. 2017).

`encode` and `decode` are the two columns of the paper's figure 1, between the embeddings and the output. BART and
Marian use them too, and differ in the other layers.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Table
from treadle.models.family import Config, Family, read_int, read_layers, require


def encode(
    x: t.Tensor, layers: int, hidden: int, act: t.Activation, mask: t.Masks | None, **attention: Any
) -> t.Tensor:
    """The left column: self-attention, then a feed-forward network, each added to its input and normalized."""
    for _ in t.stack("layer", layers):
        x = t.layer_norm(x + t.self_attention(x, mask=mask, name="attn", **attention), name="attn_norm")
        x = t.layer_norm(x + t.mlp(x, hidden, act=act, name="mlp"), name="mlp_norm")
    return x


def decode(
    x: t.Tensor, memory: t.Tensor, layers: int, hidden: int, act: t.Activation, mask: t.Masks | None, **attention: Any
) -> t.Tensor:
    """The right column: causal self-attention, attention to the encoder's output, then a feed-forward network."""
    for _ in t.stack("layer", layers):
        x = t.layer_norm(x + t.self_attention(x, causal=True, name="attn", **attention), name="attn_norm")
        x = t.layer_norm(x + t.cross_attention(x, memory, mask=mask, name="cross", **attention), name="cross_norm")
        x = t.layer_norm(x + t.mlp(x, hidden, act=act, name="mlp"), name="mlp_norm")
    return x


@t.model
def transformer(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    decoder_tokens: Annotated[t.Tensor, t.i64["B T"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 37000,
    dim: int = 512,
    heads: int = 8,
    layers: int = 6,
    hidden: int = 2048,
) -> dict[str, t.Tensor]:
    """The Transformer: next-token logits [B, T, vocab] of decoder_tokens [B, T], conditioned on tokens [B, S].

    One table embeds both sequences and computes the logits (3.4). The projections of attention have no biases (3.2.2);
    the feed-forward network has them (equation 2).

    lengths  [B], number of tokens of each row without padding; absent: all
    """
    mask = None if lengths is None else t.padding(lengths)
    attention: dict[str, Any] = {"heads": heads, "projection_bias": False}

    def place(x: t.Tensor, ids: t.Tensor) -> t.Tensor:
        return x * math.sqrt(dim) + t.sinusoidal_positions(t.positions(ids), dim)

    x = place(t.embed(tokens, vocab, dim, name="shared"), tokens)
    y = place(t.embed(decoder_tokens, tied="shared"), decoder_tokens)
    with t.scope("encoder"):
        memory = encode(x, layers, hidden, t.relu, mask, **attention)
    with t.scope("decoder"):
        y = decode(y, memory, layers, hidden, t.relu, mask, **attention)
    return {"logits": t.unembed(y, tied="shared")}


def from_config(config: Config) -> t.Model:
    """Read a config.json that has `"model_type": "transformer"` and the declaration's own options.

    Hugging Face has no class for this model. Such a folder is written by the user, and its weights have our names.
    """
    require(config, architectures=None)
    base = transformer.defaults
    sizes: dict[str, Any] = {name: read_int(config, name, base[name]) for name in ("vocab", "dim", "heads", "hidden")}
    return transformer.configure(layers=read_layers(config, "layers", base["layers"]), **sizes)


def checkpoint(config: Config) -> Table:
    """Return an empty table: every weight is stored under its own name."""
    return {}


FAMILY = Family("transformer", transformer, ("transformer",), from_config, checkpoint)
