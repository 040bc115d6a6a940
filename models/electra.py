"""ELECTRA: BERT, trained to find the tokens that a small masked language model has replaced (Clark et al. 2020).

Both models of figure 2 are this declaration: the generator with the head "masked_lm", the discriminator with
"discriminator".
"""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, Tied
from treadle.ir.errors import FrontendError
from treadle.models.bert import block, embed_tokens, pool, read_encoder, require_encoder, unmask
from treadle.models.family import (
    SUMMARIES,
    Config,
    Family,
    choose_architecture,
    padding_rows,
    read_int,
    require,
    weights_and_biases,
)

HEADS = ("discriminator", "masked_lm", "classifier", "token_classifier")

ARCHITECTURES = {
    "ElectraModel": None,
    "ElectraForPreTraining": "discriminator",
    "ElectraForMaskedLM": "masked_lm",
    "ElectraForSequenceClassification": "classifier",
    "ElectraForTokenClassification": "token_classifier",
    "ElectraForQuestionAnswering": "token_classifier",
    "ElectraForMultipleChoice": "classifier",
}


@t.model
def electra(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    token_types: Annotated[t.Tensor, t.i64["B S"]] | None = None,
    *,
    vocab: int = 30522,
    context: int = 512,
    types: int = 2,
    embedding: int = 128,
    dim: int = 256,
    heads: int = 4,
    layers: int = 12,
    hidden: int = 1024,
    act: t.Activation = t.gelu,
    eps: float = 1e-12,
    head: str | None = None,
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """ELECTRA: hidden states [B, S, dim] of tokens [B, S], or the output of a head.

    embedding  width of the embedding tables; if it differs from dim, a linear layer widens it
    head       None, or one of HEADS; "discriminator" returns logits [B, S], positive for replaced tokens

    lengths and token_types are the same as in BERT.
    """
    with t.scope("embeddings"):
        x = embed_tokens(tokens, token_types, vocab=vocab, context=context, types=types, dim=embedding, eps=eps)
        if embedding != dim:
            x = t.linear(x, dim, name="widen")

    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, mask=mask, act=act, eps=eps)

    match head:
        case None:
            return {"hidden": x}
        case "discriminator":
            x = act(t.linear(x, dim, name="discriminator"))
            return {"logits": t.rearrange(t.linear(x, 1, name="logits"), pattern="b s 1 -> b s")}
        case "masked_lm":
            return unmask(x, embedding, act=t.gelu, eps=eps)
        case "classifier":
            return t.linear(pool(x, act=t.gelu), labels, name="logits")
        case "token_classifier":
            return t.linear(x, labels, name="logits")
        case _:
            raise FrontendError(f"electra has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face ElectraConfig; its `architectures` choose the head."""
    require_encoder(config)
    head = choose_architecture(config, ARCHITECTURES)
    if head == "masked_lm":
        require(config, tie_word_embeddings=True)
    if config.get("architectures") == ["ElectraForMultipleChoice"]:  # no other class has configured pooling
        require(config, summary_type="first", summary_use_proj=True, summary_activation="gelu")
    return electra.configure(
        **read_encoder(config, "gelu", vocab=30522, dim=256, heads=4, layers=12, hidden=1024),
        context=read_int(config, "max_position_embeddings", 512),
        types=read_int(config, "type_vocab_size", 2),
        embedding=read_int(config, "embedding_size", 128),
        head=head,
    )


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. In multiple choice, the pooling layer is called `summary`."""
    block, word = "encoder.layer.{i}", "embeddings.word_embeddings.weight"
    masked_lm = choose_architecture(config, ARCHITECTURES) == "masked_lm"
    table: dict[str, Entry] = {
        "embeddings.word.weight": Tied((word, "generator_lm_head.weight")) if masked_lm else word,
        "embeddings.position.weight": "embeddings.position_embeddings.weight",
        "embeddings.token_type.weight": "embeddings.token_type_embeddings.weight",
        "masked_lm.logits.bias": "generator_lm_head.bias",
    }
    modules = {
        "embeddings.norm": "embeddings.LayerNorm",
        "embeddings.widen": "embeddings_project",
        "layer.{i}.attn.q": f"{block}.attention.self.query",
        "layer.{i}.attn.k": f"{block}.attention.self.key",
        "layer.{i}.attn.v": f"{block}.attention.self.value",
        "layer.{i}.attn.out": f"{block}.attention.output.dense",
        "layer.{i}.attn_norm": f"{block}.attention.output.LayerNorm",
        "layer.{i}.mlp.up": f"{block}.intermediate.dense",
        "layer.{i}.mlp.down": f"{block}.output.dense",
        "layer.{i}.mlp_norm": f"{block}.output.LayerNorm",
        "masked_lm.transform": "generator_predictions.dense",
        "masked_lm.norm": "generator_predictions.LayerNorm",
        "discriminator": "discriminator_predictions.dense",
        "pooler": ("classifier.dense", "sequence_summary.summary"),
        "logits": (
            "classifier.out_proj",
            "classifier",
            "qa_outputs",
            "discriminator_predictions.dense_prediction",
        ),
    }
    return table | weights_and_biases(modules)


FAMILY = Family(
    "electra",
    electra,
    ("electra",),
    from_config,
    checkpoint,
    prefixes=("", "electra."),
    padding=padding_rows("embeddings.word.weight", default=0),
    irrelevant=SUMMARIES,
)
