"""ModernBERT: an encoder with rotary positions, a norm before each part, and windows (Warner et al. 2024)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, Tied, consecutive
from treadle.ir.errors import FrontendError
from treadle.models.bert import ACTIVATIONS
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    count_labels,
    padding_rows,
    read_flag,
    read_float,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)
from treadle.models.reading.llama_config import read_layer_types
from treadle.models.reading.recorded_config import layered
from treadle.models.reading.rotary_config import read_object

HEADS = ("masked_lm", "classifier", "token_classifier")

POOLINGS = ("cls", "mean")
"""The input of a classifier: the first token, or the mean over a row's tokens without padding."""

ARCHITECTURES = {
    "ModernBertModel": None,
    "ModernBertForMaskedLM": "masked_lm",
    "ModernBertForSequenceClassification": "classifier",
    "ModernBertForTokenClassification": "token_classifier",
    "ModernBertForQuestionAnswering": "token_classifier",
    "ModernBertForMultipleChoice": "classifier",
}


@t.model
def modernbert(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 50368,
    dim: int = 768,
    heads: int = 12,
    layers: int = 22,
    hidden: int = 1152,
    act: t.Activation = t.gelu,
    eps: float = 1e-5,
    base: float = 160000.0,
    window: int = 128,
    window_base: float = 10000.0,
    full_layers: tuple[int, ...] = (0, 3, 6, 9, 12, 15, 18, 21),
    attn_bias: bool = False,
    mlp_bias: bool = False,
    norm_bias: bool = False,
    head: str | None = None,
    head_act: t.Activation = t.gelu,
    head_bias: bool = False,
    output_bias: bool = True,
    pooling: str = "cls",
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """ModernBERT: hidden states [B, S, dim] of tokens [B, S], or the output of a head.

    lengths            [B], number of tokens of each row without padding; absent: all
    base, window_base  of the rotary frequencies, in layers with full attention and in layers with a window
    window             width of a window in positions: half of them on either side, and the token itself
    full_layers        the layers (from 0) with full attention
    head               None, or one of HEADS; each begins with a linear layer and a norm
    head_act           that layer's activation; head_bias, True if it has a bias
    output_bias        True if masked_lm's logits have a bias
    pooling            the classifier's input, see POOLINGS
    """
    if dim % heads:
        raise FrontendError(
            f"a width of {dim} does not split into {heads} heads", hint="the number of heads must divide the width"
        )
    if pooling not in POOLINGS:
        raise FrontendError(f"modernbert has no pooling {pooling!r}", hint="one of " + ", ".join(POOLINGS))
    norm = partial(t.layer_norm, eps=eps, bias=norm_bias)
    positions = t.positions(tokens)
    far_waves, near_waves = (t.rotary_frequencies(dim // heads, base=each) for each in (base, window_base))
    padding = None if lengths is None else t.padding(lengths)

    def turned(x: t.Tensor, by: t.Tensor) -> t.Tensor:
        return t.rotary(x, positions, by)

    with t.scope("embeddings"):
        x = norm(t.embed(tokens, vocab, dim, name="word"), name="norm")
    for i in t.stack("layer", layers):
        near = i not in full_layers
        masks = [mask for mask in (t.window(window // 2 + 1) if near else None, padding) if mask is not None]
        x += t.self_attention(
            norm(x, name="attn_norm") if i else x,  # the embeddings' norm has already been applied
            heads,
            mask=masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None,
            projection_bias=attn_bias,
            rotate=partial(turned, by=near_waves if near else far_waves),
            name="attn",
        )
        x += t.gated_mlp(norm(x, name="mlp_norm"), hidden, act=act, bias=mlp_bias, name="mlp")
    x = norm(x, name="norm")

    def prepared(x: t.Tensor) -> t.Tensor:
        with t.scope("head"):
            return norm(head_act(t.linear(x, dim, bias=head_bias, name="dense")), name="norm")

    match head:
        case None:
            return {"hidden": x}
        case "masked_lm":
            return t.unembed(prepared(x), tied="embeddings.word", bias=output_bias)
        case "classifier":
            pooled = t.gather(x, t.constant(0), axis=1) if pooling == "cls" else mean(x, tokens, lengths)
            return t.linear(prepared(pooled), labels, name="logits")
        case "token_classifier":
            return t.linear(prepared(x), labels, name="logits")
        case _:
            raise FrontendError(f"modernbert has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def mean(x: t.Tensor, tokens: t.Tensor, lengths: t.Tensor | None) -> t.Tensor:
    """Return the mean [B, D] of x [B, S, D] over each row's tokens without padding."""
    if lengths is None:
        return t.reduce_mean(x, axes=(1,))
    count = t.rearrange(lengths, pattern="b -> b 1")
    real = t.rearrange(t.less(t.positions(tokens), count), pattern="b s -> b s 1")
    return t.reduce_sum(t.where(real, x, 0.0), axes=(1,)) / t.cast(count, to=x.dtype)


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face ModernBertConfig; its `architectures` choose the head."""
    require(config, is_causal=False)
    # the default of the library, which has no meaning for this model
    require(config, position_embedding_type="absolute")
    head = choose_architecture(config, ARCHITECTURES)
    if head == "masked_lm":
        require(config, tie_word_embeddings=True)
    layers = read_layers(config, "num_hidden_layers", 22)
    every = read_int(config, "global_attn_every_n_layers", 3)
    full_base, window_base = read_bases(config)
    return modernbert.configure(
        vocab=read_int(config, "vocab_size", 50368),
        dim=read_int(config, "hidden_size", 768),
        heads=read_int(config, "num_attention_heads", 12),
        layers=layers,
        hidden=read_int(config, "intermediate_size", 1152),
        act=choose(config, "hidden_activation", ACTIVATIONS, "gelu"),
        eps=read_float(config, "norm_eps", 1e-5),
        base=full_base,
        window=read_window(config),
        window_base=window_base,
        full_layers=read_layer_types(config, layers, list(range(0, layers, every))),
        attn_bias=read_flag(config, "attention_bias", False),
        mlp_bias=read_flag(config, "mlp_bias", False),
        norm_bias=read_flag(config, "norm_bias", False),
        head=head,
        head_act=choose(config, "classifier_activation", ACTIVATIONS, "gelu"),
        head_bias=read_flag(config, "classifier_bias", False),
        output_bias=read_flag(config, "decoder_bias", True),
        pooling=choose(config, "classifier_pooling", {kind: kind for kind in POOLINGS}, "cls"),
        labels=count_labels(config),
    )


def read_window(config: Config) -> int:
    """Return the full width of the attention window, in the same way as transformers.

    If `sliding_window` is set, the width is twice its value. Otherwise, it is `local_attention`.
    """
    if config.get("sliding_window") is not None:
        return 2 * read_int(config, "sliding_window")
    return read_int(config, "local_attention", 128)


def read_bases(config: Config) -> list[float]:
    """Return the bases of the rotary frequencies of layers with full attention, and of layers with a window.

    They are in `rope_parameters`, or before transformers 5 in `global_rope_theta` and `local_rope_theta`.
    `rope_scaling` applies to both.
    """
    parameters, scaling = (read_object(config, name) for name in ("rope_parameters", "rope_scaling"))
    bases = []
    for name, key, base in (
        ("full_attention", "global_rope_theta", 160000.0),
        ("sliding_attention", "local_rope_theta", 10000.0),
    ):
        part = layered(scaling, read_object(parameters, name))
        for kind in ("rope_type", "type"):
            choose(part, kind, {"default": None}, "default")
        bases.append(read_float(part, "rope_theta", read_float(config, key, base)))
    return bases


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. Files store q, k and v in one matrix, and the gate in one matrix with
    the gated part.
    """
    dim, hidden = read_int(config, "hidden_size", 768), read_int(config, "intermediate_size", 1152)
    layer, word = "layers.{i}", "embeddings.tok_embeddings.weight"
    masked_lm = choose_architecture(config, ARCHITECTURES) == "masked_lm"
    table: dict[str, Entry] = {
        "embeddings.word.weight": Tied((word, "decoder.weight")) if masked_lm else word,
        "logits.weight": "classifier.weight",
        "logits.bias": ("classifier.bias", "decoder.bias"),
    }
    table |= weights_and_biases(
        {
            "embeddings.norm": "embeddings.norm",
            "layer.{i}.attn_norm": f"{layer}.attn_norm",
            "layer.{i}.attn.out": f"{layer}.attn.Wo",
            "layer.{i}.mlp_norm": f"{layer}.mlp_norm",
            "layer.{i}.mlp.down": f"{layer}.mlp.Wo",
            "norm": "final_norm",
        }
    )
    for part in ("weight", "bias"):
        names = [f"layer.{{i}}.attn.{name}.{part}" for name in "qkv"]
        table |= consecutive(f"{layer}.attn.Wqkv.{part}", dict.fromkeys(names, dim))
        names = [f"layer.{{i}}.mlp.{name}.{part}" for name in ("gate", "up")]
        table |= consecutive(f"{layer}.mlp.Wi.{part}", dict.fromkeys(names, hidden))
    return table


FAMILY = Family(
    "modernbert", modernbert, ("modernbert",), from_config, checkpoint,
    prefixes=("", "model."), irrelevant={
        "max_position_embeddings": "rotary positions have no maximum length",
        "layer_norm_eps": "the library reads norm_eps",
    },
    padding=padding_rows("embeddings.word.weight", default=50283),
)  # fmt: skip
