"""RoBERTa: BERT, trained for longer and without the next-sentence task (Liu et al. 2019).

XLM-R (Conneau et al. 2020) and CamemBERT (Martin et al. 2020) have the same layers.
"""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Source, Table, Tied
from treadle.models import bert as base
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
    f"{prefix}{name}": head
    for prefix in ("Roberta", "XLMRoberta", "Camembert")
    for name, head in {
        "Model": None,
        "ForMaskedLM": "masked_lm",
        "ForSequenceClassification": "classifier",
        "ForTokenClassification": "token_classifier",
        "ForQuestionAnswering": "token_classifier",
        "ForMultipleChoice": "classifier",
    }.items()
}


@t.model
def roberta(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    token_types: Annotated[t.Tensor, t.i64["B S"]] | None = None,
    *,
    vocab: int = 50265,
    context: int = 512,
    types: int = 1,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu,
    eps: float = 1e-5,
    head: str | None = None,
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """RoBERTa: hidden states [B, S, dim] of tokens [B, S], or the output of a head.

    Rows are padded at their ends. lengths, token_types and head are the same as in BERT.
    """
    return base.bert(
        tokens, lengths, token_types, vocab=vocab, context=context, types=types, dim=dim, heads=heads, layers=layers,
        hidden=hidden, act=act, eps=eps, head=head, labels=labels,
    )  # fmt: skip


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face RobertaConfig, XLMRobertaConfig or CamembertConfig; its `architectures` choose the head."""
    base.require_encoder(config)
    head = choose_architecture(config, ARCHITECTURES)
    if head == "masked_lm":
        require(config, tie_word_embeddings=True, hidden_act="gelu")  # the activation of the head is always gelu
    first, end = _positions(config)
    return roberta.configure(
        **base.read_encoder(config, "gelu"),
        context=end - first,
        types=read_int(config, "type_vocab_size", 2),
        head=head,
    )


def checkpoint(config: Config) -> Table:
    """Return the table of BERT's names, with other names for the heads; unused position rows are left out."""
    word, positions = "embeddings.word_embeddings.weight", _positions(config)
    masked_lm = choose_architecture(config, ARCHITECTURES) == "masked_lm"
    table: dict[str, Entry] = {
        **base.name_encoder(),
        "embeddings.word.weight": Tied((word, "lm_head.decoder.weight")) if masked_lm else word,
        "embeddings.position.weight": Source("embeddings.position_embeddings.weight", rows=positions, of=positions[1]),
        "masked_lm.logits.bias": Tied(("lm_head.bias", "lm_head.decoder.bias")),
    }
    modules = {
        "masked_lm.transform": "lm_head.dense",
        "masked_lm.norm": "lm_head.layer_norm",
        "pooler": ("classifier.dense", "pooler.dense"),
        "logits": ("classifier.out_proj", "classifier", "qa_outputs"),
    }
    return table | weights_and_biases(modules)


def _positions(config: Config) -> tuple[int, int]:
    """Return the rows of the position table that tokens use.

    The padding token's id is the row for padding, and the first token uses the row after it (fairseq's convention).
    """
    first = read_int(config, "pad_token_id", 1, least=0) + 1
    return first, read_int(config, "max_position_embeddings", least=first + 1)


FAMILY = Family(
    "roberta",
    roberta,
    ("roberta", "xlm-roberta", "camembert"),
    from_config,
    checkpoint,
    prefixes=("", "roberta."),
    padding=padding_rows("embeddings.word.weight", default=1),
)
