"""The GPT-NeoX family: a decoder with parallel attention and feed-forward networks (Black et al. 2022).

A layer computes x + attention(norm(x)) + mlp(norm(x)), with rotary positions and layer norms. One declaration covers
models that differ by an option: GPT-J's single norm and pairs of neighbours (Wang & Komatsuzaki 2021), Phi-1, 1.5 and 2
(Gunasekar et al. 2023), Falcon's shared keys and values (Almazrouei et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Table, Tied, consecutive
from treadle.frontends.rotary import Scaling, temperature_of
from treadle.models.family import (
    SUMMARIES,
    Config,
    Family,
    choose,
    choose_architecture,
    padding_rows,
    read_flag,
    read_float,
    read_int,
    read_layers,
    require,
    require_head_dim,
    weights_and_biases,
)
from treadle.models.gpt2 import ALIASES as GPT2_ALIASES
from treadle.models.llama import warmed
from treadle.models.reading.rotary_config import read_rotary

ACTIVATIONS = {
    "gelu": t.gelu,
    "gelu_new": t.gelu_tanh,
    "gelu_fast": t.gelu_tanh,
    "gelu_pytorch_tanh": t.gelu_tanh,
    "relu": t.relu,
    "silu": t.silu,
}


@t.model
def gpt_neox(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    *,
    vocab: int = 50432,
    dim: int = 6144,
    heads: int = 64,
    kv_heads: int | None = None,
    layers: int = 44,
    hidden: int = 24576,
    act: t.Activation = t.gelu,
    eps: float = 1e-5,
    tied: bool = False,
    head_bias: bool = False,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    rotary_dims: int | None = 24,
    layout: str = "half",
    parallel: bool = True,
    mlp_norm: bool = True,
    qk_norm: bool = False,
    attn_bias: bool = True,
    mlp_bias: bool = True,
) -> dict[str, t.Tensor]:
    """GPT-NeoX: next-token logits [B, S, vocab] of tokens [B, S].

    kv_heads       number of key/value heads that the query heads share; None: one each
    base, scaling  of the rotary frequencies, see `t.rotary_frequencies`
    rotary_dims    number of dimensions of a head that are rotated, from its start; None: all
    layout         pairs of dimensions that are rotated together: "half", or "interleaved"
    parallel       True: the feed-forward network reads the same input as attention; else it comes after it
    mlp_norm       True: the feed-forward network has a separate norm; else it reads the output of attention's norm
    qk_norm        True: queries and keys have layer norms, over each head
    """
    size = dim // heads
    positions = t.positions(tokens)
    frequencies = t.rotary_frequencies(
        rotary_dims or size, base=base, scaling=scaling, length=t.size_of(tokens, 1)
    )  # fmt: skip
    temperature, part = temperature_of(scaling), rotary_dims or size

    def turned(x: t.Tensor) -> t.Tensor:
        x = t.rotary(x, positions, frequencies, layout=layout)
        return x if part == size else warmed(x, part, temperature)

    attention: dict[str, Any] = {
        "kv_heads": kv_heads,
        "scale": size**-0.5 * temperature**2 if temperature != 1.0 and part == size else None,
        "projection_bias": attn_bias,
        "normalize": (lambda x, name: t.layer_norm(x, eps=eps, name=name)) if qk_norm else None,
        "rotate": turned,
    }

    x = t.embed(tokens, vocab, dim, name="embed")
    for _ in t.stack("layer", layers):
        y = t.layer_norm(x, eps=eps, name="attn_norm")
        attended = t.self_attention(y, heads, causal=True, name="attn", **attention)
        if not parallel:
            x += attended
        if mlp_norm:
            y = t.layer_norm(x, eps=eps, name="mlp_norm")
        if parallel:
            x += attended
        x += t.mlp(y, hidden, act=act, bias=mlp_bias, name="mlp")
    x = t.layer_norm(x, eps=eps, name="norm")
    head: dict[str, Any] = {"tied": "embed"} if tied else {"vocab": vocab}
    return {"logits": t.unembed(x, bias=head_bias, name="lm_head", **head)}


def read_gpt_neox(config: Config) -> dict[str, Any]:
    dim, heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    require_head_dim(config, dim // heads)
    return read_rotary(config, dim // heads, part=0.25, names=("rotary_emb_base", "rotary_pct")) | {
        "dim": dim,
        "heads": heads,
        "layers": read_layers(config, "num_hidden_layers"),
        "hidden": read_int(config, "intermediate_size"),
        "act": choose(config, "hidden_act", ACTIVATIONS, "gelu"),
        "eps": read_float(config, "layer_norm_eps", 1e-5),
        "tied": read_flag(config, "tie_word_embeddings", False),
        "parallel": read_flag(config, "use_parallel_residual", True),
        "attn_bias": read_flag(config, "attention_bias", True),
    }


def read_gptj(config: Config) -> dict[str, Any]:
    dim = read_int(config, "n_embd")
    return {
        "dim": dim,
        "heads": read_int(config, "n_head"),
        "layers": read_layers(config, "n_layer"),
        "hidden": read_int(config, "n_inner", 4 * dim),
        "act": choose(config, "activation_function", ACTIVATIONS, "gelu_new"),
        "eps": read_float(config, "layer_norm_epsilon", 1e-5),
        "tied": read_flag(config, "tie_word_embeddings", False),
        "head_bias": True,
        "rotary_dims": read_int({"rotary_dim": 64, **config}, "rotary_dim"),  # null rotates no head dimensions
        "layout": "interleaved",
        "mlp_norm": False,
        "attn_bias": False,
    }


def read_phi(config: Config) -> dict[str, Any]:
    dim, heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    require_head_dim(config, dim // heads)
    return read_rotary(config, dim // heads, part=0.5) | {
        "dim": dim,
        "heads": heads,
        "kv_heads": read_int(config, "num_key_value_heads", heads),
        "layers": read_layers(config, "num_hidden_layers"),
        "hidden": read_int(config, "intermediate_size"),
        "act": choose(config, "hidden_act", ACTIVATIONS, "gelu_new"),
        "eps": read_float(config, "layer_norm_eps", 1e-5),
        "tied": read_flag(config, "tie_word_embeddings", False),
        "head_bias": True,
        "mlp_norm": False,
        "qk_norm": read_flag(config, "qk_layernorm", False),
    }


def read_falcon(config: Config) -> dict[str, Any]:
    """Falcon-40B shares keys and values among groups of heads; Falcon-7B shares a single pair among all heads."""
    dim, heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    grouped = read_flag(config, "new_decoder_architecture", False)
    require(config, alibi=False)  # Hugging Face rounds its biases to bf16
    parallel = read_flag(config, "parallel_attn", True)
    norms = read_int(config, "num_ln_in_parallel_attn", 2 if grouped else 1, most=2)
    if grouped:
        require(config, parallel_attn=True)
        kv_heads = read_int(config, "num_kv_heads", heads)
    else:
        kv_heads = 1 if read_flag(config, "multi_query", True) else heads
        if parallel and norms != 1:
            require(config, num_ln_in_parallel_attn=1)
    bias = read_flag(config, "bias", False)
    return read_rotary(config, dim // heads) | {
        "dim": dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "layers": read_layers(config, "num_hidden_layers"),
        "hidden": read_int(config, "ffn_hidden_size", 4 * dim),
        "act": choose(config, "activation", ACTIVATIONS, "gelu"),
        "eps": read_float(config, "layer_norm_epsilon", 1e-5),
        "tied": read_flag(config, "tie_word_embeddings", True),
        "parallel": parallel,
        "mlp_norm": norms == 2 or not parallel,
        "attn_bias": bias,
        "mlp_bias": bias,
    }


KINDS: Mapping[str, tuple[str, Any]] = {
    "gpt_neox": ("GPTNeoXForCausalLM", read_gpt_neox),
    "gptj": ("GPTJForCausalLM", read_gptj),
    "phi": ("PhiForCausalLM", read_phi),
    "falcon": ("FalconForCausalLM", read_falcon),
}
"""The supported values of `model_type`. For each: Hugging Face's class, and the function that reads its config."""


def read_kind(config: Config) -> str:
    """Return the config's `model_type`, one of `KINDS`."""
    kind = choose(config, "model_type", {k: k for k in KINDS})
    assert isinstance(kind, str)
    return kind


def read_options(config: Config) -> dict[str, Any]:
    """Return the options of `gpt_neox` from a config.

    Raises CheckpointError, with the option's name, for an unsupported option.
    """
    require(config, is_causal=True)
    options: dict[str, Any] = KINDS[read_kind(config)][1](config)
    return {"vocab": read_int(config, "vocab_size"), **options}


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face GPTNeoXConfig, GPTJConfig, PhiConfig or FalconConfig."""
    choose_architecture(config, {KINDS[read_kind(config)][0]: gpt_neox})
    return gpt_neox.configure(**read_options(config))


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names."""
    options = read_options(config)
    modules: dict[str, str | tuple[str, ...]] = {}
    match kind := read_kind(config):
        case "gpt_neox":
            layer = "gpt_neox.layers.{i}"
            modules = {
                "embed": "gpt_neox.embed_in",
                "norm": "gpt_neox.final_layer_norm",
                "layer.{i}.attn_norm": f"{layer}.input_layernorm",
                "layer.{i}.mlp_norm": f"{layer}.post_attention_layernorm",
                "layer.{i}.attn.out": f"{layer}.attention.dense",
                "layer.{i}.mlp.up": f"{layer}.mlp.dense_h_to_4h",
                "layer.{i}.mlp.down": f"{layer}.mlp.dense_4h_to_h",
            }
        case "gptj":
            layer = "transformer.h.{i}"
            modules = {
                "embed": "transformer.wte",
                "norm": "transformer.ln_f",
                "layer.{i}.attn_norm": f"{layer}.ln_1",
                **{f"layer.{{i}}.attn.{n}": f"{layer}.attn.{n}_proj" for n in ("q", "k", "v", "out")},
                "layer.{i}.mlp.up": f"{layer}.mlp.fc_in",
                "layer.{i}.mlp.down": f"{layer}.mlp.fc_out",
            }
        case "phi":
            layer = "model.layers.{i}"
            modules = {
                "embed": "model.embed_tokens",
                "norm": "model.final_layernorm",
                "layer.{i}.attn_norm": f"{layer}.input_layernorm",
                **{f"layer.{{i}}.attn.{n}": f"{layer}.self_attn.{n}_proj" for n in "qkv"},
                **{f"layer.{{i}}.attn.{n}_norm": f"{layer}.self_attn.{n}_layernorm" for n in "qk"},
                "layer.{i}.attn.out": f"{layer}.self_attn.dense",
                "layer.{i}.mlp.up": f"{layer}.mlp.fc1",
                "layer.{i}.mlp.down": f"{layer}.mlp.fc2",
            }
        case "falcon":
            layer = "transformer.h.{i}"
            norms = [f"{layer}.{name}" for name in ("ln_attn", "ln_mlp", "input_layernorm", "post_attention_layernorm")]
            modules = {
                "embed": "transformer.word_embeddings",
                "norm": "transformer.ln_f",
                "layer.{i}.attn_norm": (norms[0], norms[2]),
                "layer.{i}.mlp_norm": (norms[1], norms[3]),
                "layer.{i}.attn.out": f"{layer}.self_attention.dense",
                "layer.{i}.mlp.up": f"{layer}.mlp.dense_h_to_4h",
                "layer.{i}.mlp.down": f"{layer}.mlp.dense_4h_to_h",
            }
    modules["lm_head"] = ("lm_head", "embed_out")  # the name in GPT-NeoX's older files
    table = weights_and_biases(modules)
    if kind in ("gpt_neox", "falcon"):
        for part in ("weight", "bias"):
            stored = f"{layer}.{'attention' if kind == 'gpt_neox' else 'self_attention'}.query_key_value.{part}"
            rows, groups = joined(options)
            names = {f"layer.{{i}}.attn.{name}.{part}": length for name, length in rows.items()}
            table |= consecutive(stored, names, groups=groups)
    if options["tied"]:
        embed = table["embed.weight"]
        assert isinstance(embed, tuple)
        table["embed.weight"] = Tied((*embed, "lm_head.weight", "embed_out.weight"))
    return table


def joined(options: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Return the number of rows of queries, keys and values in each group of rows of their common tensor, and the
    number of groups.

    A group holds the queries of the heads that share a key and a value, followed by that key and that value.
    """
    size = options["dim"] // options["heads"]
    groups = options.get("kv_heads") or options["heads"]
    return {"q": options["heads"] // groups * size, "k": size, "v": size}, groups


def padding(config: Config) -> Mapping[str, int]:
    """Return the padding row of Phi's embedding table, if its config names one; the other models have none."""
    return padding_rows("embed.weight")(config) if read_kind(config) == "phi" else {}


_NO_END = "rotary positions have no maximum length"

FAMILY = Family(
    "gpt_neox", gpt_neox, tuple(KINDS), from_config, checkpoint,
    aliases={
        "gptj": GPT2_ALIASES,
        "falcon": {"n_embed": "hidden_size"},
    },
    irrelevant={
        **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _NO_END),
        "rotary": "is ignored by GPT-J, whose positions are always rotary",
        "scale_attn_weights": "is ignored by GPT-J, whose scores are always scaled",
        "num_kv_heads": "belongs to Falcon's new architecture; the old architecture has one pair, or one for each head",
        "multi_query": "belongs to Falcon's old architecture",
        "apply_residual_connection_post_layernorm": "belongs to Falcon's first code; no library version reads it",
        **SUMMARIES,
    },
    padding=padding,
)  # fmt: skip
