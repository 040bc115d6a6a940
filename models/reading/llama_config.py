"""Readers of a config.json of the Llama family, as options of the declaration `treadle.models.llama.llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import treadle.frontends.language as t
from treadle.ir.errors import CheckpointError
from treadle.models.family import (
    Config,
    choose,
    read_flag,
    read_float,
    read_int,
    read_layers,
    require,
    require_head_dim,
)
from treadle.models.reading.recorded_config import layered
from treadle.models.reading.rotary_config import read_object, read_rotary

ACTIVATIONS = {
    "silu": t.silu,
    "gelu": t.gelu,
    "gelu_pytorch_tanh": t.gelu_tanh,
    "gelu_new": t.gelu_tanh,
    "relu": t.relu,
}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "granite": "GraniteForCausalLM",
}
"""The supported values of `model_type`, each with Hugging Face's class."""

_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMAS = {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256}

# Defaults of Hugging Face's classes. Older files leave out values that equal the default.
_DEFAULTS: Mapping[str, Config] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "gemma": {**_GEMMA, "num_key_value_heads": 16},
    "gemma2": {**_GEMMAS, "sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": {**_GEMMAS, "sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    "olmo2": {"rms_norm_eps": 1e-5},
    "stablelm": {"num_key_value_heads": 32},
}


IRRELEVANT = {
    **dict.fromkeys(
        ("max_position_embeddings", "original_max_position_embeddings"),
        "rotary positions have no maximum length, unless their scaling depends on it",
    ),
    "rope_interleaved": "belongs to the trainer; a folder's weights are in the library's order",
    "use_mrope": "belongs to models that read images",
    "attention_bias": "Phi-3's and StableLM's classes do not read it",
    "attn_logit_softcapping": "Gemma 3's class stores it and does not use it",
    "hidden_act": "Gemma 2 and 3 read hidden_activation",
}
"""Keys that change no output of a kind that does not read them, each with the reason."""


def read_kind(config: Config) -> str:
    """Return the config's `model_type`, one of `ARCHITECTURES`."""
    kind = choose(config, "model_type", {k: k for k in ARCHITECTURES})
    assert isinstance(kind, str)
    return kind


def read_options(config: Config) -> dict[str, Any]:
    """Return the options of `llama` from a config.

    Raises CheckpointError, with the option's name, for an unsupported option.
    """
    kind = read_kind(config)
    require(config, is_causal=True)
    config = layered(config, _DEFAULTS.get(kind, {}))
    dim, heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    head_dim = None if config.get("head_dim") is None else read_int(config, "head_dim")
    options: dict[str, Any] = {
        "vocab": read_int(config, "vocab_size"),
        "dim": dim,
        "heads": heads,
        "kv_heads": read_int(config, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "layers": read_layers(config, "num_hidden_layers"),
        "hidden": read_int(config, "intermediate_size"),
        "eps": read_float(config, "layer_norm_eps", 1e-5)
        if kind == "stablelm"
        else read_float(config, "rms_norm_eps", 1e-6),
        "tied": read_flag(config, "tie_word_embeddings", False),
    }
    if kind.startswith("gemma"):
        options |= {"act": _gelu_of_gemma(config, kind), "embedding_scale": dim**0.5, "norm_offset": 1.0}
    else:
        options["act"] = choose(config, "hidden_act", ACTIVATIONS, "silu")
    if kind not in ("phi3", "stablelm"):
        bias = read_flag(config, "attention_bias", False)
        options |= {"qkv_bias": bias, "out_bias": bias}
    size = head_dim or dim // heads
    match kind:
        case "gemma3_text":
            options |= read_local_rotary(config, size)
        case "phi3":
            options |= read_rotary(as_longrope(config), size, part=1.0, kinds=("default", "longrope"))
        case "stablelm":
            options |= read_rotary(config, size, part=0.25)
        case _:
            options |= read_rotary(config, size)
    return options | _read_own(kind, config, options)


def as_longrope(config: Config) -> Config:
    """Return Phi-3's config; its first files call longrope su or yarn."""
    for name in ("rope_parameters", "rope_scaling"):
        given = config.get(name)
        if isinstance(given, Mapping):
            for key in ("rope_type", "type"):
                if given.get(key) in ("su", "yarn"):
                    given = layered({key: "longrope"}, given)
            config = layered({name: given}, config)
    return config


def _read_own(kind: str, config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one kind in addition to the common options."""
    match kind:
        case "llama":
            return {"mlp_bias": read_flag(config, "mlp_bias", False)}
        case "mistral" | "phi3":
            return {"window": read_window(config)}
        case "qwen2":
            require(config, use_sliding_window=False)
            return {"qkv_bias": True, **_windows_of_qwen(config, options["layers"])}
        case "qwen3":
            return {"qk_norm": "heads", **_windows_of_qwen(config, options["layers"])}
        case "gemma":
            _require_causal(config)
            return {}
        case "gemma2":
            return _read_gemma(config, kind, options["layers"], period=2)
        case "gemma3_text":
            period = read_int(config, "sliding_window_pattern", read_int(config, "_sliding_window_pattern", 6))
            return {"qk_norm": "heads", **_read_gemma(config, kind, options["layers"], period)}
        case "olmo2":
            return {"norm_place": "after", "qk_norm": "whole"}
        case "stablelm":
            require(config, use_parallel_residual=False, qk_layernorm=False)
            require_head_dim(config, options["dim"] // options["heads"])
            return {"layer_norms": True, "qkv_bias": read_flag(config, "use_qkv_bias", False)}
        case "granite":
            return {
                "mlp_bias": read_flag(config, "mlp_bias", False),
                "scale": read_multiplier(config, "attention_multiplier"),
                "embedding_scale": read_multiplier(config, "embedding_multiplier"),
                "residual_scale": read_multiplier(config, "residual_multiplier"),
                "logit_scale": 1.0 / read_multiplier(config, "logits_scaling"),
            }
    raise AssertionError(kind)


def _read_gemma(config: Config, kind: str, layers: int, period: int) -> dict[str, Any]:
    """Gemma 2 and 3: four norms a layer, soft-caps, and full attention in every `period`-th layer."""
    _require_causal(config)
    types = read_layer_types(config, layers, [i for i in range(layers) if (i + 1) % period == 0])
    return {
        "norm_place": "both",
        "scale": read_multiplier(config, "query_pre_attn_scalar") ** -0.5,
        "softcap": read_cap(config, "attn_logit_softcapping") if kind == "gemma2" else None,
        "logit_softcap": read_cap(config, "final_logit_softcapping"),
        "window": read_window(config),
        "full_layers": types,
    }


def _gelu_of_gemma(config: Config, kind: str) -> t.Activation:
    # The first Gemma's files name gelu but mean its tanh approximation, with which it was trained.
    named, gelu = ("hidden_act", t.gelu_tanh) if kind == "gemma" else ("hidden_activation", t.gelu)
    act: t.Activation = choose(config, named, {**ACTIVATIONS, "gelu": gelu}, "gelu_pytorch_tanh")
    return act


def _require_causal(config: Config) -> None:
    if config.get("use_bidirectional_attention"):
        require(config, use_bidirectional_attention=False)


def _windows_of_qwen(config: Config, layers: int) -> dict[str, Any]:
    window, first = read_window(config), read_int(config, "max_window_layers", 28, least=0)
    if not read_flag(config, "use_sliding_window", False):
        require(config, layer_types=["full_attention"] * layers)
        return {}
    full = range(layers if window is None else min(first, layers))
    return {"window": window, "full_layers": read_layer_types(config, layers, list(full))}


def read_local_rotary(config: Config, head_dim: int) -> dict[str, Any]:
    """Return the separate, unscaled rotary positions of layers with a window, as in Gemma 3."""
    scaling, given = (read_object(config, name) for name in ("rope_scaling", "rope_parameters"))
    full, near = (read_object(given, name) for name in ("full_attention", "sliding_attention"))
    for kind in ("rope_type", "type"):
        choose(near, kind, {"default": None}, "default")
    if "type" in scaling and scaling.get("rope_type") != scaling["type"]:
        raise CheckpointError(
            "config.json: rope_scaling has the key type, which Hugging Face's class of Gemma 3 does not read",
            received=repr(scaling)[:80],
            hint="rename it to rope_type to scale the positions, or remove rope_scaling",
        )
    base = read_float(near, "rope_theta", read_float(config, "rope_local_base_freq", 10000.0))
    full = layered({"rope_parameters": layered(scaling, full), "rope_scaling": None}, config)
    return {**read_rotary(full, head_dim, base=1e6), "window_base": base}


def read_layer_types(config: Config, layers: int, full: list[int]) -> tuple[int, ...]:
    """Return the layers with full attention: from `layer_types`, one entry for each layer, or else `full`."""
    types = config.get("layer_types")
    if types is None:
        return tuple(full)
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise CheckpointError(
            f"config.json: layer_types must name {' or '.join(known)} for each of {layers} layers",
            received=repr(types)[:80],
        )
    return tuple(i for i, kind in enumerate(types) if kind == "full_attention")


def read_window(config: Config) -> int | None:
    """Return the number of positions that a token sees; None for all."""
    return None if config.get("sliding_window") is None else read_int(config, "sliding_window")


def read_cap(config: Config, name: str) -> float | None:
    """Return a soft-cap; None for none."""
    return None if config.get(name) is None else read_multiplier(config, name)


def read_multiplier(config: Config, name: str) -> float:
    """Return a number from 1e-9 to 1e9, 1 if it is missing."""
    value = read_float(config, name, 1.0)
    if not 1e-9 <= value <= 1e9:
        raise CheckpointError(f"config.json: {name} must be a number from 1e-9 to 1e9", received=str(value))
    return value
