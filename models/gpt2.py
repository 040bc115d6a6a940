"""GPT-2: a decoder with learned positions and the norm before each part (Radford et al. 2019).

A classifier reads a text's last token, the only token that sees all others (Radford et al. 2018, figure 1).
"""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Source, Table, Tied, consecutive
from treadle.ir.errors import FrontendError
from treadle.models.family import (
    SUMMARIES,
    Config,
    Family,
    choose,
    choose_architecture,
    count_labels,
    read_float,
    read_int,
    read_layers,
    require,
)

ACTIVATIONS = {"gelu_new": t.gelu_tanh, "gelu_pytorch_tanh": t.gelu_tanh, "gelu": t.gelu, "relu": t.relu}

HEADS = ("hidden", "classifier", "token_classifier")

ARCHITECTURES = {
    "GPT2LMHeadModel": None,
    "GPT2Model": "hidden",
    "GPT2ForSequenceClassification": "classifier",
    "GPT2ForTokenClassification": "token_classifier",
    "GPT2ForQuestionAnswering": "token_classifier",
}


@t.model
def gpt2(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 50257,
    context: int = 1024,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int | None = None,
    act: t.Activation = t.gelu_tanh,
    eps: float = 1e-5,
    head: str | None = None,
    labels: int = 2,
) -> dict[str, t.Tensor] | t.Tensor:
    """GPT-2: next-token logits [B, S, vocab] of tokens [B, S], or the output of another head.

    lengths  [B], number of tokens of each row without padding; absent: all
    head     None, or one of HEADS: "hidden" returns hidden states [B, S, dim], "classifier" logits [B, labels] of the
             last token before padding, "token_classifier" logits [B, S, labels]
    """
    x = t.embed(tokens, vocab, dim, name="wte") + t.embed(t.positions(tokens), context, dim, name="wpe")
    padding = None if lengths is None else t.padding(lengths)
    for _ in t.stack("h", layers):
        y = t.layer_norm(x, eps=eps, name="ln_1")
        x += t.self_attention(y, heads, causal=True, mask=padding, name="attn")
        x += t.mlp(t.layer_norm(x, eps=eps, name="ln_2"), hidden or 4 * dim, act=act, name="mlp")
    x = t.layer_norm(x, eps=eps, name="ln_f")

    match head:
        case None:
            return t.unembed(x, tied="wte")
        case "hidden":
            return {"hidden": x}
        case "classifier":
            return t.linear(last(x, lengths), labels, bias=False, name="logits")
        case "token_classifier":
            return t.linear(x, labels, name="logits")
        case _:
            raise FrontendError(f"gpt2 has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def last(x: t.Tensor, lengths: t.Tensor | None) -> t.Tensor:
    """Return the last token [B, D] before padding of each row of x [B, S, D]."""
    if lengths is None:
        found = t.slice(x, axis=1, start=-1)
    else:
        index = t.expand(t.rearrange(lengths - 1, pattern="b -> b 1 1"), shape=(None, None, x.shape[2]))
        found = t.take_along_axis(x, index, axis=1)
    return t.rearrange(found, pattern="b 1 d -> b d")


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face GPT2Config; its `architectures` choose the head."""
    head = choose_architecture(config, ARCHITECTURES)
    require(config, is_causal=True)
    require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    if head is None:
        require(config, tie_word_embeddings=True)
    return gpt2.configure(
        vocab=read_int(config, "vocab_size"),
        context=read_int(config, "n_positions"),
        dim=read_int(config, "n_embd"),
        heads=read_int(config, "n_head"),
        layers=read_layers(config, "n_layer"),
        hidden=None if config.get("n_inner") is None else read_int(config, "n_inner"),
        act=choose(config, "activation_function", ACTIVATIONS),
        eps=read_float(config, "layer_norm_epsilon", 1e-5),
        head=head,
        labels=count_labels(config),
    )


def checkpoint(config: Config) -> Table:
    """Return the table of names. Hugging Face stores weights as [in, out], and q, k and v in one matrix."""
    dim = read_int(config, "n_embd")
    head = choose_architecture(config, ARCHITECTURES)
    table: dict[str, Entry] = {
        "wte.weight": Tied(("wte.weight", "lm_head.weight")) if head is None else "wte.weight",
        "wpe.weight": "wpe.weight",
        "h.{i}.ln_{j}.weight": "h.{i}.ln_{j}.weight",
        "h.{i}.ln_{j}.bias": "h.{i}.ln_{j}.bias",
        "h.{i}.attn.out.weight": Source("h.{i}.attn.c_proj.weight", transpose=True),
        "h.{i}.attn.out.bias": "h.{i}.attn.c_proj.bias",
        "h.{i}.mlp.up.weight": Source("h.{i}.mlp.c_fc.weight", transpose=True),
        "h.{i}.mlp.up.bias": "h.{i}.mlp.c_fc.bias",
        "h.{i}.mlp.down.weight": Source("h.{i}.mlp.c_proj.weight", transpose=True),
        "h.{i}.mlp.down.bias": "h.{i}.mlp.c_proj.bias",
        "ln_f.weight": "ln_f.weight",
        "ln_f.bias": "ln_f.bias",
        "logits.weight": ("score.weight", "classifier.weight", "qa_outputs.weight"),
        "logits.bias": ("classifier.bias", "qa_outputs.bias"),
    }
    for part in ("weight", "bias"):
        names = [f"h.{{i}}.attn.{name}.{part}" for name in "qkv"]
        table |= consecutive(f"h.{{i}}.attn.c_attn.{part}", dict.fromkeys(names, dim), transpose=part == "weight")
    return table


ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

FAMILY = Family(
    "gpt2", gpt2, ("gpt2",), from_config, checkpoint,
    prefixes=("", "transformer."),
    aliases={"gpt2": ALIASES},
    irrelevant={"n_ctx": "is the older name of n_positions, which no version reads", **SUMMARIES},
)  # fmt: skip
