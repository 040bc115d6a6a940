"""DistilBERT: BERT with half of its layers, and without token types (Sanh et al. 2019)."""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, Tied
from treadle.ir.errors import FrontendError
from treadle.models.bert import ACTIVATIONS, block, embed_tokens, pool, unmask
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    count_labels,
    padding_rows,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)

HEADS = ("masked_lm", "classifier", "token_classifier")

ARCHITECTURES = {
    "DistilBertModel": None,
    "DistilBertForMaskedLM": "masked_lm",
    "DistilBertForSequenceClassification": "classifier",
    "DistilBertForTokenClassification": "token_classifier",
    "DistilBertForQuestionAnswering": "token_classifier",
    "DistilBertForMultipleChoice": "classifier",
}


@t.model
def distilbert(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 30522,
    context: int = 512,
    dim: int = 768,
    heads: int = 12,
    layers: int = 6,
    hidden: int = 3072,
    act: t.Activation = t.gelu,
    eps: float = 1e-12,
    head: str | None = None,
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """DistilBERT: hidden states [B, S, dim] of tokens [B, S], or the output of a head.

    lengths  [B], number of tokens of each row without padding; absent: all
    head     None, or one of HEADS
    """
    with t.scope("embeddings"):
        x = embed_tokens(tokens, None, vocab=vocab, context=context, types=0, dim=dim, eps=eps)

    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, mask=mask, act=act, eps=eps)

    match head:
        case None:
            return {"hidden": x}
        case "masked_lm":
            return unmask(x, dim, act=act, eps=eps)
        case "classifier":
            return t.linear(pool(x, act=t.relu), labels, name="logits")
        case "token_classifier":
            return t.linear(x, labels, name="logits")
        case _:
            raise FrontendError(f"distilbert has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face DistilBertConfig; its `architectures` choose the head."""
    require(config, is_causal=False)
    head = choose_architecture(config, ARCHITECTURES)
    if head == "masked_lm":
        require(config, tie_word_embeddings=True)
    return distilbert.configure(
        vocab=read_int(config, "vocab_size"),
        context=read_int(config, "max_position_embeddings"),
        dim=read_int(config, "dim"),
        heads=read_int(config, "n_heads"),
        layers=read_layers(config, "n_layers"),
        hidden=read_int(config, "hidden_dim"),
        act=choose(config, "activation", ACTIVATIONS, "gelu"),
        head=head,
        labels=count_labels(config),
    )


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. Sinusoidal positions are a table in the file, too."""
    block, word = "transformer.layer.{i}", "embeddings.word_embeddings.weight"
    masked_lm = choose_architecture(config, ARCHITECTURES) == "masked_lm"
    table: dict[str, Entry] = {
        "embeddings.word.weight": Tied((word, "vocab_projector.weight")) if masked_lm else word,
        "embeddings.position.weight": "embeddings.position_embeddings.weight",
        "masked_lm.logits.bias": "vocab_projector.bias",
    }
    modules = {
        "embeddings.norm": "embeddings.LayerNorm",
        "layer.{i}.attn.q": f"{block}.attention.q_lin",
        "layer.{i}.attn.k": f"{block}.attention.k_lin",
        "layer.{i}.attn.v": f"{block}.attention.v_lin",
        "layer.{i}.attn.out": f"{block}.attention.out_lin",
        "layer.{i}.attn_norm": f"{block}.sa_layer_norm",
        "layer.{i}.mlp.up": f"{block}.ffn.lin1",
        "layer.{i}.mlp.down": f"{block}.ffn.lin2",
        "layer.{i}.mlp_norm": f"{block}.output_layer_norm",
        "masked_lm.transform": "vocab_transform",
        "masked_lm.norm": "vocab_layer_norm",
        "pooler": "pre_classifier",
        "logits": ("classifier", "qa_outputs"),
    }
    return table | weights_and_biases(modules)


FAMILY = Family(
    "distilbert", distilbert, ("distilbert",), from_config, checkpoint,
    prefixes=("", "distilbert."),
    aliases={
        "distilbert": {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
    },
    irrelevant={
        "sinusoidal_pos_embds": "the file holds the position table",
        "tie_weights_": "is an older name of tie_word_embeddings, which no version reads",
    },
    padding=padding_rows("embeddings.word.weight", default=0),
)  # fmt: skip
