"""ALBERT: BERT with one layer's weights for all layers, and a narrow embedding table (Lan et al. 2020)."""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, Tied
from treadle.ir.errors import FrontendError
from treadle.models.bert import HEADS, block, embed_tokens, follows, pool, read_encoder, unmask
from treadle.models.family import (
    Config,
    Family,
    choose_architecture,
    padding_rows,
    read_int,
    require,
    weights_and_biases,
)

ARCHITECTURES = {
    "AlbertModel": None,
    "AlbertForMaskedLM": "masked_lm",
    "AlbertForSequenceClassification": "classifier",
    "AlbertForTokenClassification": "token_classifier",
    "AlbertForQuestionAnswering": "token_classifier",
    "AlbertForMultipleChoice": "classifier",
    "AlbertForPreTraining": "pretraining",
}


@t.model
def albert(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    token_types: Annotated[t.Tensor, t.i64["B S"]] | None = None,
    *,
    vocab: int = 30000,
    context: int = 512,
    types: int = 2,
    embedding: int = 128,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu_tanh,
    eps: float = 1e-12,
    head: str | None = None,
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """ALBERT: hidden states [B, S, dim] of tokens [B, S], or the output of a head.

    embedding  width of the embedding tables (E in the paper), which a linear layer widens to dim (H)

    lengths, token_types and head are the same as in BERT.
    """
    with t.scope("embeddings"):
        x = embed_tokens(tokens, token_types, vocab=vocab, context=context, types=types, dim=embedding, eps=eps)
        x = t.linear(x, dim, name="widen")

    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("layer", layers, shared=True):
        x = block(x, heads, hidden, mask=mask, act=act, eps=eps)

    match head:
        case None:
            return {"hidden": x}
        case "pooler":
            return {"hidden": x, "pooled": pool(x)}
        case "masked_lm":
            return unmask(x, embedding, act=act, eps=eps)
        case "classifier":
            return t.linear(pool(x), labels, name="logits")
        case "token_classifier":
            return t.linear(x, labels, name="logits")
        case "pretraining":
            return {"logits": unmask(x, embedding, act=act, eps=eps), "next_sentence": follows(x)}
        case _:
            raise FrontendError(f"albert has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


ARE_TIED = ("masked_lm", "pretraining")
"""The heads that read the embedding table."""


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face AlbertConfig; its `architectures` choose the head."""
    require(config, is_causal=False)
    require(config, position_embedding_type="absolute", num_hidden_groups=1, inner_group_num=1)
    head = choose_architecture(config, ARCHITECTURES)
    if head in ARE_TIED:
        require(config, tie_word_embeddings=True)
    return albert.configure(
        **read_encoder(config, "gelu_new"),
        context=read_int(config, "max_position_embeddings"),
        types=read_int(config, "type_vocab_size", 2),
        embedding=read_int(config, "embedding_size", 128),
        head=head,
    )


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names, where the one shared layer is the first layer of the first group."""
    layer, word = "encoder.albert_layer_groups.0.albert_layers.0", "embeddings.word_embeddings.weight"
    head = choose_architecture(config, ARCHITECTURES)
    table: dict[str, Entry] = {
        "embeddings.word.weight": Tied((word, "predictions.decoder.weight")) if head in ARE_TIED else word,
        "embeddings.position.weight": "embeddings.position_embeddings.weight",
        "embeddings.token_type.weight": "embeddings.token_type_embeddings.weight",
        "masked_lm.logits.bias": Tied(("predictions.bias", "predictions.decoder.bias")),
    }
    modules = {
        "embeddings.norm": "embeddings.LayerNorm",
        "embeddings.widen": "encoder.embedding_hidden_mapping_in",
        "layer.attn.q": f"{layer}.attention.query",
        "layer.attn.k": f"{layer}.attention.key",
        "layer.attn.v": f"{layer}.attention.value",
        "layer.attn.out": f"{layer}.attention.dense",
        "layer.attn_norm": f"{layer}.attention.LayerNorm",
        "layer.mlp.up": f"{layer}.ffn",
        "layer.mlp.down": f"{layer}.ffn_output",
        "layer.mlp_norm": f"{layer}.full_layer_layer_norm",
        "masked_lm.transform": "predictions.dense",
        "masked_lm.norm": "predictions.LayerNorm",
        "next_sentence": "sop_classifier.classifier",  # predicts which of two sentences came first
        "logits": ("classifier", "qa_outputs"),
    }
    return table | weights_and_biases(modules)


FAMILY = Family(
    "albert", albert, ("albert",), from_config, checkpoint,
    prefixes=("", "albert."),
    irrelevant=dict.fromkeys(
        ("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks", "layers_to_keep"),
        "belongs to the first implementation, and no class reads it",
    ),
    padding=padding_rows("embeddings.word.weight", default=0),
)  # fmt: skip
