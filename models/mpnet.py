"""MPNet: BERT without token types, with T5's attention bias by distance (Song et al. 2020)."""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Source, Table, Tied
from treadle.ir.errors import FrontendError
from treadle.models.bert import block, embed_tokens, pool, read_encoder, unmask
from treadle.models.family import (
    Config,
    Family,
    choose_architecture,
    padding_rows,
    read_int,
    require,
    weights_and_biases,
)

HEADS = ("pooler", "masked_lm", "classifier", "token_classifier")

ARCHITECTURES = {
    "MPNetModel": None,
    "MPNetForMaskedLM": "masked_lm",
    "MPNetForSequenceClassification": "classifier",
    "MPNetForTokenClassification": "token_classifier",
    "MPNetForQuestionAnswering": "token_classifier",
    "MPNetForMultipleChoice": "classifier",
}

_BUCKETS, _MAX_DISTANCE = 32, 128
_FIRST = 2
"""The row of the position table for the first token. The rows before it are for padding, as in RoBERTa."""


@t.model
def mpnet(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 30527,
    context: int = 512,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu,
    eps: float = 1e-5,
    head: str | None = None,
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """MPNet: hidden states [B, S, dim] of tokens [B, S], or the output of a head.

    lengths  [B], number of tokens of each row without padding; absent: all. Rows are padded at their ends
    head     None, or one of HEADS
    """
    with t.scope("embeddings"):
        x = embed_tokens(tokens, None, vocab=vocab, context=context, types=0, dim=dim, eps=eps)

    mask = None if lengths is None else t.padding(lengths)
    table = t.parameter("distance.weight", _BUCKETS, heads)
    bias = t.t5_relative(table, buckets=_BUCKETS, max_distance=_MAX_DISTANCE, bidirectional=True)
    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, mask=mask, bias=bias, act=act, eps=eps)

    match head:
        case None:
            return {"hidden": x}
        case "pooler":
            return {"hidden": x, "pooled": pool(x)}
        case "masked_lm":
            return unmask(x, dim, act=t.gelu, eps=eps)
        case "classifier":
            return t.linear(pool(x), labels, name="logits")
        case "token_classifier":
            return t.linear(x, labels, name="logits")
        case _:
            raise FrontendError(f"mpnet has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face MPNetConfig; its `architectures` choose the head."""
    require(config, is_causal=False)
    require(config, relative_attention_num_buckets=_BUCKETS)  # the class uses 32 whatever the config says
    head = choose_architecture(config, ARCHITECTURES)
    if head == "masked_lm":
        require(config, tie_word_embeddings=True)
    return mpnet.configure(
        **read_encoder(config, "gelu", vocab=30527, dim=768, heads=12, layers=12, hidden=3072),
        context=_positions(config) - _FIRST,
        head=head,
    )


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names; unused position rows are left out."""
    block, word, positions = "encoder.layer.{i}", "embeddings.word_embeddings.weight", _positions(config)
    masked_lm = choose_architecture(config, ARCHITECTURES) == "masked_lm"
    table: dict[str, Entry] = {
        "embeddings.word.weight": Tied((word, "lm_head.decoder.weight")) if masked_lm else word,
        "embeddings.position.weight": Source(
            "embeddings.position_embeddings.weight", rows=(_FIRST, positions), of=positions
        ),
        "distance.weight": "encoder.relative_attention_bias.weight",
        "masked_lm.logits.bias": Tied(("lm_head.bias", "lm_head.decoder.bias")),
    }
    modules = {
        "embeddings.norm": "embeddings.LayerNorm",
        "layer.{i}.attn.q": f"{block}.attention.attn.q",
        "layer.{i}.attn.k": f"{block}.attention.attn.k",
        "layer.{i}.attn.v": f"{block}.attention.attn.v",
        "layer.{i}.attn.out": f"{block}.attention.attn.o",
        "layer.{i}.attn_norm": f"{block}.attention.LayerNorm",
        "layer.{i}.mlp.up": f"{block}.intermediate.dense",
        "layer.{i}.mlp.down": f"{block}.output.dense",
        "layer.{i}.mlp_norm": f"{block}.output.LayerNorm",
        "masked_lm.transform": "lm_head.dense",
        "masked_lm.norm": "lm_head.layer_norm",
        "pooler": ("classifier.dense", "pooler.dense"),
        "logits": ("classifier.out_proj", "classifier", "qa_outputs"),
    }
    return table | weights_and_biases(modules)


def _positions(config: Config) -> int:
    return read_int(config, "max_position_embeddings", 512, least=_FIRST + 1)


FAMILY = Family(
    "mpnet",
    mpnet,
    ("mpnet",),
    from_config,
    checkpoint,
    prefixes=("", "mpnet."),
    padding=padding_rows("embeddings.word.weight", default=1),
)
