"""The Llama kind: a decoder with rotary positions, RMS norms and gated feed-forward networks (Touvron et al. 2023).

One declaration for what differs by an option: Mistral's window (Jiang et al. 2023), Qwen2's biases (Yang et al. 2024),
Gemma's norms, scaled embeddings and gelu (Gemma team 2024). SmolLM is Llama by another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Table
from treadle.frontends.rotary import Dynamic, LinearScaling, Llama3, Scaling
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    read_flag,
    read_float,
    read_int,
    read_layers,
    require,
)

ACTIVATIONS = {
    "silu": t.silu,
    "gelu": t.gelu,
    "gelu_pytorch_tanh": t.gelu_tanh,
    "gelu_new": t.gelu_tanh,
    "relu": t.relu,
}


@t.model
def llama(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    *,
    vocab: int = 32000,
    dim: int = 4096,
    heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: int = 32,
    hidden: int = 11008,
    act: t.Activation = t.silu,
    eps: float = 1e-6,
    tied: bool = False,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    rotary_dims: int | None = None,
    layout: str = "half",
    window: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    scaled_embeddings: bool = False,
    norm_offset: float = 0.0,
) -> dict[str, t.Tensor]:
    """Llama: next-token logits [B, S, vocab] of tokens [B, S].

    kv_heads           key/value heads that the query heads share; None: one each
    head_dim           size of a head; None: dim / heads
    base, scaling      of the rotary frequencies, see `t.rotary_frequencies`
    rotary_dims        how much of a head is turned, from its start; None: all
    layout             which dimensions turn together: "half", or "interleaved" as in GGUF files
    window             how many positions a token sees, its own included; None: all before it
    scaled_embeddings  embeddings are multiplied by sqrt(dim)
    norm_offset        what is added to a norm's weight: Gemma stores it less 1
    """
    if head_dim is None and dim % heads:
        raise FrontendError(f"a width of {dim} does not split into {heads} heads", hint="give head_dim=")
    size = head_dim or dim // heads
    positions = t.positions(tokens)
    frequencies = t.rotary_frequencies(
        rotary_dims or size, base=base, scaling=scaling, length=t.size_of(tokens, 1)
    )  # fmt: skip
    attention: dict[str, Any] = {
        "kv_heads": kv_heads,
        "head_dim": size,
        "mask": None if window is None else t.window(window),
        "projection_bias": qkv_bias,
        "output_bias": out_bias,
        "rotate": lambda x: t.rotary(x, positions, frequencies, layout=layout),
    }

    x = t.embed(tokens, vocab, dim, name="embed")
    if scaled_embeddings:
        x *= dim**0.5
    for _ in t.stack("layer", layers):
        x += t.self_attention(norm(x, eps, norm_offset, "attn_norm"), heads, causal=True, name="attn", **attention)
        x += t.gated_mlp(norm(x, eps, norm_offset, "mlp_norm"), hidden, act=act, bias=mlp_bias, name="mlp")
    x = norm(x, eps, norm_offset, "norm")
    return {"logits": t.unembed(x, tied="embed") if tied else t.unembed(x, vocab, name="lm_head")}


def norm(x: t.Tensor, eps: float, offset: float, name: str) -> t.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset)"""
    if not offset:
        return t.rms_norm(x, eps=eps, name=name)
    with t.scope(name):
        weight = t.parameter("weight", x.shape[-1], init="zeros")
        return t.ops.rms_norm(x, weight + offset, eps=eps)


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma": "GemmaForCausalLM",
}


# What Hugging Face's classes have where a file does not say. Older files leave out what is so.
_DEFAULTS: Mapping[str, Config] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256},
}


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face LlamaConfig, MistralConfig, Qwen2Config or GemmaConfig."""
    kind = choose(config, "model_type", {k: k for k in ARCHITECTURES})
    config = {**_DEFAULTS[kind], **config}
    choose_architecture(config, {ARCHITECTURES[kind]: llama})
    bias = read_flag(config, "attention_bias", False)
    heads = read_int(config, "num_attention_heads")
    model = llama.configure(
        vocab=read_int(config, "vocab_size"),
        dim=read_int(config, "hidden_size"),
        heads=heads,
        kv_heads=read_int(config, "num_key_value_heads", heads),
        head_dim=None if config.get("head_dim") is None else read_int(config, "head_dim"),
        layers=read_layers(config, "num_hidden_layers"),
        hidden=read_int(config, "intermediate_size"),
        eps=read_float(config, "rms_norm_eps", 1e-6),
        tied=read_flag(config, "tie_word_embeddings", kind == "gemma"),
        qkv_bias=bias,
        out_bias=bias,
        **read_rotary(config),
    )
    match kind:
        case "llama":
            model = model.configure(mlp_bias=read_flag(config, "mlp_bias", False))
        case "mistral" if config.get("sliding_window") is not None:
            model = model.configure(window=read_int(config, "sliding_window"))
        case "qwen2":
            require(config, use_sliding_window=False, layer_types=["full_attention"] * model.config["layers"])
            model = model.configure(qkv_bias=True)
        case "gemma":
            if config.get("use_bidirectional_attention"):
                require(config, use_bidirectional_attention=False)
            # Files say gelu and mean its approximation by tanh, as Gemma was trained.
            act = choose(config, "hidden_act", {**ACTIVATIONS, "gelu": t.gelu_tanh}, "gelu_pytorch_tanh")
            return model.configure(act=act, scaled_embeddings=True, norm_offset=1.0)
    return model.configure(act=choose(config, "hidden_act", ACTIVATIONS, "silu"))


def read_rotary(config: Config) -> dict[str, Any]:
    """The base and the scaling: in `rope_parameters`, or before transformers 5 in `rope_theta` and `rope_scaling`."""
    named = next((n for n in ("rope_parameters", "rope_scaling") if config.get(n) is not None), None)
    options = {} if named is None else config[named]
    if not isinstance(options, Mapping):
        raise CheckpointError(f"config.json: {named} must be an object", received=repr(options)[:80])
    require(options, partial_rotary_factor=1.0)
    require(config, partial_rotary_factor=1.0)
    base = read_float(options, "rope_theta", read_float(config, "rope_theta", 10000.0))
    kinds = {"default": None, "linear": read_linear, "dynamic": read_dynamic, "llama3": read_llama3}
    key = "rope_type" if "rope_type" in options or "type" not in options else "type"
    read = choose(options, key, kinds, "default")
    return {"base": base, "scaling": None if read is None else read(options, config)}


def read_linear(options: Config, config: Config) -> Scaling:
    return LinearScaling(read_factor(options, "factor"))


def read_dynamic(options: Config, config: Config) -> Scaling:
    return Dynamic(read_factor(options, "factor"), read_int(config, "max_position_embeddings"))


def read_llama3(options: Config, config: Config) -> Scaling:
    low, high = (read_factor(options, f"{end}_freq_factor") for end in ("low", "high"))
    if low >= high:
        raise CheckpointError(
            "config.json: low_freq_factor must be less than high_freq_factor", received=f"{low} and {high}"
        )
    return Llama3(read_factor(options, "factor"), low, high, read_int(options, "original_max_position_embeddings"))


def read_factor(options: Config, name: str) -> float:
    """A number from 1e-3 to 1e6, which keeps frequencies finite."""
    value = read_float(options, name, 0.0)
    if not 1e-3 <= value <= 1e6:
        raise CheckpointError(f"config.json: {name} must be a number from 0.001 to 1000000", received=str(value))
    return value


def checkpoint(config: Config) -> Table:
    """Hugging Face's names."""
    layer = "model.layers.{i}"
    modules = {
        "embed": "model.embed_tokens",
        "layer.{i}.attn_norm": f"{layer}.input_layernorm",
        "layer.{i}.mlp_norm": f"{layer}.post_attention_layernorm",
        "norm": "model.norm",
        "lm_head": "lm_head",
        **{f"layer.{{i}}.attn.{n}": f"{layer}.self_attn.{n}_proj" for n in "qkv"},
        "layer.{i}.attn.out": f"{layer}.self_attn.o_proj",
        **{f"layer.{{i}}.mlp.{n}": f"{layer}.mlp.{n}_proj" for n in ("gate", "up", "down")},
    }
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in ("weight", "bias")}


FAMILY = Family("llama", llama, ("llama", "mistral", "qwen2", "gemma"), from_config, checkpoint)
