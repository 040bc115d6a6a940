"""BERT: a bidirectional encoder with the norm after each part (Devlin et al. 2019).

The heads are options of a single declaration: in the paper, too, tasks differ only in the last layer (figures 1 and 4).
"""

from __future__ import annotations

from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, Tied
from treadle.frontends.layers import Activation
from treadle.ir.attention.masking import Biases, Masks
from treadle.ir.errors import FrontendError
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    count_labels,
    padding_rows,
    read_float,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)

ACTIVATIONS = {"gelu": t.gelu, "gelu_new": t.gelu_tanh, "gelu_pytorch_tanh": t.gelu_tanh, "relu": t.relu}

HEADS = ("pooler", "masked_lm", "classifier", "token_classifier", "pretraining")

ARCHITECTURES = {
    "BertModel": None,
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "classifier",
    "BertForTokenClassification": "token_classifier",
    "BertForQuestionAnswering": "token_classifier",
    "BertForMultipleChoice": "classifier",
    "BertForNextSentencePrediction": "classifier",
    "BertForPreTraining": "pretraining",
}
"""The head of each of Hugging Face's classes. The start and the end of an answer are two labels of a token. In multiple
choice, each row is a question with one of its choices, and has a single label: the score.
"""


@t.model
def bert(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    token_types: Annotated[t.Tensor, t.i64["B S"]] | None = None,
    *,
    vocab: int = 30522,
    context: int = 512,
    types: int = 2,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu,
    eps: float = 1e-12,
    head: str | None = None,
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """BERT: hidden states [B, S, dim] of tokens [B, S], or the output of a head.

    lengths      [B], number of tokens of each row without padding; absent: all
    token_types  [B, S], the segment of each token; absent: the first
    head         None, or one of HEADS
    """
    with t.scope("embeddings"):
        x = embed_tokens(tokens, token_types, vocab=vocab, context=context, types=types, dim=dim, eps=eps)

    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, mask=mask, act=act, eps=eps)

    match head:
        case None:
            return {"hidden": x}
        case "pooler":
            return {"hidden": x, "pooled": pool(x)}
        case "masked_lm":
            return unmask(x, dim, act=act, eps=eps)
        case "classifier":
            return t.linear(pool(x), labels, name="logits")
        case "token_classifier":
            return t.linear(x, labels, name="logits")
        case "pretraining":
            return {"logits": unmask(x, dim, act=act, eps=eps), "next_sentence": follows(x)}
        case _:
            raise FrontendError(f"bert has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def embed_tokens(
    tokens: t.Tensor, token_types: t.Tensor | None, *, vocab: int, context: int, types: int, dim: int, eps: float
) -> t.Tensor:
    """Return the normalized sum of embeddings of tokens, positions and token types: [B, S, dim].

    token_types  None: all tokens are of the first type
    types        number of token types; 0: tokens have no types
    """
    x = t.embed(tokens, vocab, dim, name="word")
    x += t.embed(t.positions(tokens), context, dim, name="position")
    if types:
        x += t.embed(t.constant(0) if token_types is None else token_types, types, dim, name="token_type")
    return t.layer_norm(x, eps=eps, name="norm")


def block(
    x: t.Tensor,
    heads: int,
    hidden: int,
    *,
    mask: Masks | None,
    bias: Biases | None = None,
    act: Activation,
    eps: float,
) -> t.Tensor:
    """One layer of the encoder: attention, then a feed-forward network, each added to its input and then normalized."""
    x = t.layer_norm(x + t.self_attention(x, heads, mask=mask, bias=bias, name="attn"), eps=eps, name="attn_norm")
    return t.layer_norm(x + t.mlp(x, hidden, act=act, name="mlp"), eps=eps, name="mlp_norm")


def pool(x: t.Tensor, *, act: Activation = t.tanh) -> t.Tensor:
    """Return a sequence [B, S, D] as one vector [B, D]: its first token's state after a linear layer."""
    first = t.gather(x, t.constant(0), axis=1)
    return act(t.linear(first, x.shape[-1], name="pooler"))


def follows(x: t.Tensor) -> t.Tensor:
    """Return two logits [B, 2]: the second sentence of a row follows the first, or it does not."""
    return t.linear(pool(x), 2, name="next_sentence")


def unmask(x: t.Tensor, dim: int, *, act: Activation, eps: float) -> t.Tensor:
    """Return logits [B, S, vocab] for masked tokens, from the embedding table, whose width is dim."""
    with t.scope("masked_lm"):
        x = t.layer_norm(act(t.linear(x, dim, name="transform")), eps=eps, name="norm")
        return t.unembed(x, tied="embeddings.word", bias=True)


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face BertConfig; its `architectures` choose the head."""
    require_encoder(config)
    head = choose_architecture(config, ARCHITECTURES)
    if head in ("masked_lm", "pretraining"):
        require(config, tie_word_embeddings=True)
    return bert.configure(
        **read_encoder(config),
        context=read_int(config, "max_position_embeddings"),
        types=read_int(config, "type_vocab_size", 2),
        head=head,
    )


def require_encoder(config: Config) -> None:
    """Refuse options that turn BERT or a similar model into a decoder, and position embeddings that are not added to
    the tokens.
    """
    require(config, position_embedding_type="absolute")
    require(config, is_decoder=False, add_cross_attention=False, is_causal=False)


def read_encoder(config: Config, act: str | None = None, **missing: int) -> dict[str, Any]:
    """Return the options that configs of BERT and similar models share.

    act      the default activation of a config
    missing  the default sizes of a config, by our names: vocab, dim, heads, layers, hidden
    """
    return {
        "vocab": read_int(config, "vocab_size", missing.get("vocab")),
        "dim": read_int(config, "hidden_size", missing.get("dim")),
        "heads": read_int(config, "num_attention_heads", missing.get("heads")),
        "layers": read_layers(config, "num_hidden_layers", missing.get("layers")),
        "hidden": read_int(config, "intermediate_size", missing.get("hidden")),
        "act": choose(config, "hidden_act", ACTIVATIONS, act),
        "eps": read_float(config, "layer_norm_eps", 1e-12),
        "labels": count_labels(config),
    }


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names."""
    table = name_encoder()
    if choose_architecture(config, ARCHITECTURES) in ("masked_lm", "pretraining"):
        table["embeddings.word.weight"] = Tied(("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"))
    return table


def name_encoder() -> dict[str, Entry]:
    """Return Hugging Face's names of the encoder's weights. Checkpoints from before 2019 call a norm's weight gamma and
    its bias beta.
    """
    block = "encoder.layer.{i}"
    table: dict[str, Entry] = {
        "embeddings.word.weight": "embeddings.word_embeddings.weight",
        "embeddings.position.weight": "embeddings.position_embeddings.weight",
        "embeddings.token_type.weight": "embeddings.token_type_embeddings.weight",
        "masked_lm.logits.bias": Tied(("cls.predictions.bias", "cls.predictions.decoder.bias")),
    }
    modules = {
        "layer.{i}.attn.q": f"{block}.attention.self.query",
        "layer.{i}.attn.k": f"{block}.attention.self.key",
        "layer.{i}.attn.v": f"{block}.attention.self.value",
        "layer.{i}.attn.out": f"{block}.attention.output.dense",
        "layer.{i}.mlp.up": f"{block}.intermediate.dense",
        "layer.{i}.mlp.down": f"{block}.output.dense",
        "masked_lm.transform": "cls.predictions.transform.dense",
        "pooler": "pooler.dense",
        "next_sentence": "cls.seq_relationship",
        "logits": ("classifier", "qa_outputs", "cls.seq_relationship"),
    }
    for ours, theirs in {
        "embeddings.norm": "embeddings.LayerNorm",
        "layer.{i}.attn_norm": f"{block}.attention.output.LayerNorm",
        "layer.{i}.mlp_norm": f"{block}.output.LayerNorm",
        "masked_lm.norm": "cls.predictions.transform.LayerNorm",
    }.items():
        table[f"{ours}.weight"] = (f"{theirs}.weight", f"{theirs}.gamma")
        table[f"{ours}.bias"] = (f"{theirs}.bias", f"{theirs}.beta")
    return table | weights_and_biases(modules)


_UNUSED_POOLER = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")

FAMILY = Family(
    "bert", bert, ("bert",), from_config, checkpoint,
    prefixes=("", "bert."),
    irrelevant={
        "directionality": "records how the model was trained",
        **dict.fromkeys((f"pooler_{part}" for part in _UNUSED_POOLER), "belongs to another pooler, which no class has"),
    },
    padding=padding_rows("embeddings.word.weight", default=0),
)  # fmt: skip
