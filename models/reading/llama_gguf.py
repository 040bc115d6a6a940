"""Models of the Llama family in GGUF files: their metadata and tensor names, as llama.cpp writes them.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the keys; llama.cpp's convert_hf_to_gguf.py for
its changes of weights. For Llama (and Mistral, which it calls llama) it reorders the rows of q and k, so that pairs
that are rotated together are adjacent: weights are read unchanged, and rotated in the layout "interleaved". Other
models' rows are not reordered. It adds 1 to the weights of Gemma's norms, and leaves the scale of their scores to the
reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import treadle.frontends.language as t
from treadle.files.shown_names import printable
from treadle.frontends.binding import Entry, Table, consecutive
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.rotary import Divided, LinearScaling, Scaling
from treadle.ir.errors import CheckpointError, Hint
from treadle.models.family import OTHER_WAYS
from treadle.models.llama import llama

LAYOUTS = {"llama": "interleaved", **dict.fromkeys(("qwen2", "qwen3", "gemma2", "gemma3", "phi3"), "half")}
"""The supported architectures, and the layout of q and k."""

IMAGE_ENCODER = "clip"
"""The architecture of an image encoder with a projector (mmproj)."""

_LAYERS = 1_000
_ROTARY_DIMS = 1 << 16
_FACTORS = "rope_freqs.weight"
_BLOCK_TENSORS, _JOINED_BLOCK_TENSORS = (
    9,
    6,
)  # without biases; with q, k and v in one tensor, and gate and up in another
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""The layer counts of the models whose scores are scaled by dim / heads instead of the head's width."""


@dataclass(frozen=True)
class GGUFPart:
    """A GGUF file of a model, and the parameters that it holds.

    table   the table of the file's names
    scopes  the starts of the parameters' names
    """

    file: GGUFFile
    table: Table
    scopes: tuple[str, ...] = ("",)


def from_gguf(file: GGUFFile) -> t.Model:
    """Return the model in a file. Raises CheckpointError, with the key, for unsupported or missing values."""
    kind = file.architecture
    if kind == IMAGE_ENCODER:
        file.fail(
            "general.architecture",
            "is that of an image encoder (mmproj), which is read together with a language model",
            repr(kind),
            Hint(
                "the language model's file as MODEL, and this file as mmproj=",
                "the language model's file as MODEL, and this file as --mmproj",
            ),
        )
    if file.text("general.type", "model") == "adapter":
        base = file.text("general.base_model.0.name", "a model that it does not name")
        file.fail(
            "general.type",
            "is that of an adapter, which changes the weights of a model",
            f"an adapter of {printable(base)}",
            "merge it into its model, with llama.cpp: "
            f"llama-export-lora -m MODEL.gguf --lora {file.path} -o merged.gguf",
        )
    if kind not in LAYOUTS:
        received, hint = repr(kind), f"an architecture of {', '.join(LAYOUTS)}\n{OTHER_WAYS}"
        file.fail("general.architecture", "is not supported", received, hint)
    if file.integer(f"{kind}.expert_count", 0, least=0):
        file.fail(f"{kind}.expert_count", "is not supported: the feed-forward networks are mixtures of experts")
    layers = file.integer(f"{kind}.block_count", most=_LAYERS)
    if layers * (_JOINED_BLOCK_TENSORS if is_joined(file) else _BLOCK_TENSORS) > len(
        file
    ):  # before that many are traced
        file.fail(
            f"{kind}.block_count",
            "is larger than the file's number of tensors allows",
            f"{layers}, of {len(file)} tensors",
        )
    embeddings = file.record("token_embd.weight").shape
    dim = file.integer(f"{kind}.embedding_length")
    heads = file.integer(f"{kind}.attention.head_count")
    kv_heads = file.integer(f"{kind}.attention.head_count_kv", heads)
    if heads % kv_heads:
        file.fail(f"{kind}.attention.head_count_kv", "must divide the number of heads", f"{kv_heads}, of {heads} heads")
    if dim % heads and not file.has(f"{kind}.attention.key_length"):
        file.fail(f"{kind}.attention.head_count", "must divide the embedding's length", f"{heads}, of {dim}")
    head_dim = file.integer(f"{kind}.attention.key_length", dim // heads)
    if file.integer(f"{kind}.attention.value_length", head_dim) != head_dim:
        file.fail(f"{kind}.attention.value_length", "must equal key_length", f"key_length {head_dim}")
    dimensions = f"{kind}.rope.dimension_count"
    rotary_dims = file.integer(dimensions, head_dim, most=min(head_dim, _ROTARY_DIMS))
    if rotary_dims % 2 or rotary_dims > _ROTARY_DIMS:
        file.fail(dimensions, f"must be an even number up to {_ROTARY_DIMS}", f"{rotary_dims}")
    first = "blk.0"
    model = llama.configure(
        vocab=embeddings[0],
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        hidden=file.integer(f"{kind}.feed_forward_length"),
        eps=file.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in file,
        base=file.number(f"{kind}.rope.freq_base", 10000.0, least=1.0),
        scaling=read_scaling(file, kind, rotary_dims),
        rotary_dims=rotary_dims,
        layout=LAYOUTS[kind],
        qkv_bias=f"{first}.attn_q.bias" in file,
        out_bias=f"{first}.attn_output.bias" in file,
        mlp_bias=f"{first}.ffn_gate.bias" in file,
    )
    return model.configure(**read_own(file, kind, model.config))


def read_own(file: GGUFFile, kind: str, read: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one architecture in addition to the common options."""
    layers = range(read["layers"])
    match kind:
        case "qwen3":
            return {"qk_norm": "heads"}
        case "phi3":
            for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
                if name in file:
                    raise CheckpointError(
                        f"{name} is not supported: rotary frequencies that change with the length of the text",
                        within=f"{file.path}: byte {file.record(name).begin}, tensor {name}",
                    )
            return {"window": file.integer(f"{kind}.attention.sliding_window", 0, least=0) or None}
        case "gemma2" | "gemma3":
            period = file.integer(f"{kind}.attention.sliding_window_pattern", 2 if kind == "gemma2" else 6)
            largest = len(layers) == _LARGEST_GEMMAS[kind] and read["dim"] % read["heads"] == 0
            usual = (50.0, 30.0) if kind == "gemma2" else (0.0, 0.0)
            attention, logits = (
                file.number(f"{kind}.{part}_logit_softcapping", cap) or None
                for part, cap in zip(("attn", "final"), usual, strict=True)
            )
            return {
                "act": t.gelu_tanh,
                "embedding_scale": read["dim"] ** 0.5,
                "norm_place": "both",
                "scale": (read["dim"] // read["heads"] if largest else read["head_dim"]) ** -0.5,
                "softcap": attention,
                "logit_softcap": logits,
                "window": file.integer(f"{kind}.attention.sliding_window", 4096),
                "full_layers": tuple(i for i in layers if (i + 1) % period == 0),
            } | (
                {"qk_norm": "heads", "window_base": file.number(f"{kind}.rope.freq_base_swa", 10000.0, least=1.0)}
                if kind == "gemma3"
                else {}
            )
    return {}


def is_joined(file: GGUFFile) -> bool:
    """Return True if q, k and v are one tensor, and gate and up another."""
    return "blk.0.attn_qkv.weight" in file


SCALING = "linear"
"""The scaling of rotary frequencies by one factor, as GGUF names it."""


def read_scaling(file: GGUFFile, kind: str, dims: int) -> Scaling | None:
    """Return the scaling of rotary frequencies: a factor in the metadata, or a tensor of factors (Llama 3.1 and
    later).
    """
    key = f"{kind}.rope.scaling.type"
    named = file.text(key, "none")
    if named not in ("none", SCALING):
        file.fail(key, "is not supported", f"{named[:40]!r}; supported: none, linear")
    factor_key = f"{kind}.rope.scaling.factor" if named == SCALING else f"{kind}.rope.scale_linear"
    factor = file.number(factor_key, 1.0, least=1e-3, most=1e6)
    if _FACTORS not in file:
        return LinearScaling(factor) if factor != 1.0 else None
    record = file.record(_FACTORS)
    factors = file.array(_FACTORS) if record.shape == (dims // 2,) and record.dtype == "f32" else np.zeros(1)
    if factor != 1.0 or not np.all((factors >= 1e-3) & (factors <= 1e6)):
        raise CheckpointError(
            f"{_FACTORS} must be a factor for each pair of dimensions, from 0.001 to 1000000",
            received=f"{record}, for {dims} dimensions; linear factor {factor:g}",
            within=f"{file.path}: byte {record.begin}, tensor {_FACTORS}",
        )
    return Divided(tuple(factors.tolist()))


_MODULES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    **{f"layer.{{i}}.attn.{part}": f"blk.{{i}}.attn_{part}" for part in ("q", "k", "v", "q_norm", "k_norm")},
    "layer.{i}.attn.out": "blk.{i}.attn_output",
    **{f"layer.{{i}}.mlp.{part}": f"blk.{{i}}.ffn_{part}" for part in ("gate", "up", "down")},
    "layer.{i}.attn_norm": "blk.{i}.attn_norm",
    "layer.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "layer.{i}.attn_post_norm": "blk.{i}.post_attention_norm",
    "layer.{i}.mlp_post_norm": "blk.{i}.post_ffw_norm",
}
"""The names of modules: ours, and GGUF's."""


def gguf_names(parameter: str) -> str:
    """Return the name of a parameter's tensor."""
    module, _, part = parameter.rpartition(".")
    layer = next((word for word in module.split(".") if word.isdecimal()), "")
    general = ".".join("{i}" if word.isdecimal() else word for word in module.split("."))
    return f"{_MODULES[general].format(i=layer)}.{part}"


def table(file: GGUFFile, read: Mapping[str, Any]) -> Table:
    """Return the table of the file's names, for a model of that configuration."""
    named: dict[str, Entry] = {
        f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in _MODULES.items() for part in ("weight", "bias")
    }
    if is_joined(file):
        queries, keys = (read[heads] * read["head_dim"] for heads in ("heads", "kv_heads"))
        hidden = read["hidden"]
        parts = {
            "attn_qkv": {"attn.q": queries, "attn.k": keys, "attn.v": keys},
            "ffn_up": {"mlp.gate": hidden, "mlp.up": hidden},
        }
        for tensor, within in parts.items():
            rows = {f"layer.{{i}}.{ours}.weight": length for ours, length in within.items()}
            named |= consecutive(f"blk.{{i}}.{tensor}.weight", rows)
    return named
