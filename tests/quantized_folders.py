"""Small model folders whose linear layers are quantized, written by encoders that share no code with the readers.

Each encoder draws integers, zeros and scales, packs them as the format's layout table says, one integer at a time, and
returns the numbers that they mean: f32[N, K].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, Any]
Stored = dict[str, Array]
Encoder = Callable[[np.random.Generator, int, int], tuple[Stored, Array]]
"""Returns the tensors of a module's weight, by the end of their names, and its numbers, for N outputs and K inputs."""

DIM, HIDDEN, VOCAB, LAYERS, HEADS = 64, 128, 96, 2, 4
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": DIM, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": DIM, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": DIM, "n_layer": LAYERS, "n_head": HEADS,
    "n_positions": 64, "vocab_size": VOCAB, "activation_function": "gelu_new",
}  # fmt: skip


def layers(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Return the linear layers of a model as (N, K), and the shapes of its other tensors."""
    linear: dict[str, tuple[int, int]] = {}
    other: dict[str, tuple[int, ...]] = {}
    kind = config["model_type"]
    for i in range(LAYERS):
        if kind == "bert":
            base = f"encoder.layer.{i}"
            for name in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ):
                linear[f"{base}.{name}"] = (DIM, DIM)
            linear[f"{base}.intermediate.dense"] = (HIDDEN, DIM)
            linear[f"{base}.output.dense"] = (DIM, HIDDEN)
            for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
                other |= {f"{base}.{norm}.{part}": (DIM,) for part in ("weight", "bias")}
        elif kind == "gpt2":
            base = f"transformer.h.{i}"
            linear[f"{base}.attn.c_attn"] = (3 * DIM, DIM)
            linear[f"{base}.attn.c_proj"] = (DIM, DIM)
            linear[f"{base}.mlp.c_fc"] = (4 * DIM, DIM)
            linear[f"{base}.mlp.c_proj"] = (DIM, 4 * DIM)
            other |= {f"{base}.{norm}.{part}": (DIM,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        else:
            base = f"model.layers.{i}"
            for name, n in (("q_proj", DIM), ("k_proj", DIM // 2), ("v_proj", DIM // 2), ("o_proj", DIM)):
                linear[f"{base}.self_attn.{name}"] = (n, DIM)
                if kind == "qwen2" and name != "o_proj":
                    other[f"{base}.self_attn.{name}.bias"] = (n,)
            linear |= {f"{base}.mlp.{name}": (HIDDEN, DIM) for name in ("gate_proj", "up_proj")}
            linear[f"{base}.mlp.down_proj"] = (DIM, HIDDEN)
            other |= {f"{base}.{norm}.weight": (DIM,) for norm in ("input_layernorm", "post_attention_layernorm")}
    if kind == "bert":
        other |= {f"{name}.bias": (n,) for name, (n, _) in linear.items()}
        other |= {f"embeddings.LayerNorm.{part}": (DIM,) for part in ("weight", "bias")}
        other["embeddings.word_embeddings.weight"] = (VOCAB, DIM)
        other["embeddings.position_embeddings.weight"] = (64, DIM)
        other["embeddings.token_type_embeddings.weight"] = (2, DIM)
        other |= {"pooler.dense.weight": (DIM, DIM), "pooler.dense.bias": (DIM,)}
    elif kind == "gpt2":
        other |= {f"{name}.bias": (n,) for name, (n, _) in linear.items()}
        other |= {"transformer.wte.weight": (VOCAB, DIM), "transformer.wpe.weight": (64, DIM)}
        other |= {f"transformer.ln_f.{part}": (DIM,) for part in ("weight", "bias")}
    else:
        other |= {
            "model.embed_tokens.weight": (VOCAB, DIM),
            "model.norm.weight": (DIM,),
            "lm_head.weight": (VOCAB, DIM),
        }
    return linear, other


def write_folder(
    folder: Path,
    encode: Encoder,
    quantization: Mapping[str, Any] | None,
    config: Mapping[str, Any] = LLAMA,
    change: Callable[[Stored], None] = lambda tensors: None,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write a folder with quantized linear layers, and the same model with their numbers in float32; return both.

    change  changes the tensors of the quantized folder before they are written
    """
    rng = np.random.default_rng(seed)
    linear, other = layers(config)
    plain: Stored = {}
    for name, shape in other.items():
        values = rng.standard_normal(shape) * 0.1
        plain[name] = (values + ("norm" in name.lower() or ".ln_" in name)).astype(np.float32)
    stored, numbers = dict(plain), dict(plain)
    for module, (n, k) in linear.items():
        parts, meant = encode(rng, n, k)
        stored |= {module + part: np.ascontiguousarray(array) for part, array in parts.items()}
        turned = meant.T if config["model_type"] == "gpt2" else meant
        numbers[f"{module}.weight"] = np.ascontiguousarray(turned)
    change(stored)
    quantized, wide = folder / "quantized", folder / "plain"
    for place, tensors, settings in ((quantized, stored, quantization), (wide, numbers, None)):
        place.mkdir(parents=True)
        save_tensors(tensors, place / "model.safetensors")
        more = {} if settings is None else {"quantization_config": settings}
        (place / "config.json").write_text(json.dumps({**config, **more}))
    return quantized, wide


def save_tensors(tensors: Stored, path: Path) -> None:
    """Write tensors, those of ml_dtypes' narrow floats too."""
    save_file(tensors, path)


def scales_of(rng: np.random.Generator, *shape: int, dtype: Any = np.float16) -> Array:
    return (0.01 + 0.02 * rng.random(shape)).astype(dtype)


def packed(q: Array, bits: int) -> Array:
    """Pack integers along the last axis into words, the lowest first."""
    rows = q.reshape(-1, q.shape[-1])
    made = np.zeros((len(rows), q.shape[-1] * bits // 32), np.uint32)
    for row, values in zip(made, rows, strict=True):
        wide = 0
        for i, value in enumerate(values):
            wide |= int(value) << (bits * i)
        row[:] = [(wide >> (32 * i)) & 0xFFFFFFFF for i in range(len(row))]
    return made.view(np.int32).reshape(*q.shape[:-1], -1)


def meaning(q: Array, zeros: Array, scales: Array, groups: Array) -> Array:
    """Return scale[n, g] (q[n, k] - zero[n, g]), for the group of each k."""
    made = np.empty(q.shape, np.float32)
    for k, g in enumerate(groups):
        made[:, k] = scales[:, g].astype(np.float32) * (q[:, k].astype(np.float32) - zeros[:, g].astype(np.float32))
    return made


def gptq(
    bits: int = 4, group: int = 32, *, symmetric: bool = True, version: int = 1, order: bool = False, index: bool = True
) -> Encoder:
    """Return an encoder to GPTQ's layout; group -1: a whole row."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        size = k if group == -1 else group
        count = k // size
        q = rng.integers(0, 1 << bits, (n, k))
        zeros = rng.integers(1, (1 << bits) - 1, (n, count)) if not symmetric else np.full((n, count), 1 << (bits - 1))
        scales = scales_of(rng, n, count)
        groups = np.arange(k) // size
        if order:
            groups = rng.permutation(groups)
        parts = {
            ".qweight": packed(q, bits).T,
            ".qzeros": packed((zeros - (version == 1)).T, bits),
            ".scales": scales.T,
        }
        if index:
            parts[".g_idx"] = groups.astype(np.int32)
        return parts, meaning(q, zeros, scales, groups)

    return encode


def awq(group: int = 32, version: str = "gemm") -> Encoder:
    """Return an encoder to AWQ's layouts."""

    def words(q: Array) -> Array:
        """Pack [m, N]: nibble i of word j is column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
        made = np.zeros((len(q), q.shape[1] // 8), np.uint32)
        for row in range(len(q)):
            for j in range(made.shape[1]):
                for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    made[row, j] |= np.uint32(int(q[row, 8 * j + column]) << (4 * i))
        return made.view(np.int32)

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        count = k // group
        q, zeros, scales = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, count)), scales_of(rng, n, count)
        meant = meaning(q, zeros, scales, np.arange(k) // group)
        if version == "gemm":
            return {".qweight": words(q.T), ".qzeros": words(zeros.T), ".scales": scales.T}, meant
        width = -(-count // 8)
        padding = ((0, 0), (0, 8 * width - count))
        wide, padded = np.pad(zeros, padding), np.pad(scales, padding)
        return {".qweight": packed(q, 4), ".qzeros": packed(wide, 4), ".scales": padded}, meant

    return encode


def gptq_settings(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **more}
