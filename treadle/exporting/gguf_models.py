"""Models of the Llama family as GGUF files: metadata and names as llama.cpp reads them.

The reverse of `treadle.models.reading.llama_gguf`, with the same sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import treadle.frontends.language as t
from treadle.backends.made_weights import as_numpy_weight
from treadle.backends.onnx.exporter import weights_alone
from treadle.exporting.format_hints import as_onnx, rounds_activations
from treadle.exporting.gguf_blocks_of import gguf_blocks, gguf_type
from treadle.exporting.gguf_tokens import gguf_vocabulary
from treadle.exporting.gguf_writing import GGUFWritten, write_gguf
from treadle.files.shown_names import printable
from treadle.frontends.rotary import Divided, LinearScaling, Llama3
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import f16
from treadle.models.family import LANGUAGE_ONLY
from treadle.models.reading.llama_gguf import SCALING, gguf_names
from treadle.program.source import Resolved

Array = np.ndarray[Any, Any]

_PLAIN: Mapping[str, Any] = {
    "norm_offset": 0.0, "norm_place": "before", "layer_norms": False, "scale": None, "softcap": None, "window": None,
    "window_base": None, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "logit_softcap": None,
}  # fmt: skip
"""The options of the declaration that must have these values; GGUF's architectures of other models are not written."""

_FIRST_POSITIONS = 2048  # the format requires a number; rotary positions have no maximum


def export_gguf(resolved: Resolved, graph: Graph, weights: Mapping[str, Any], path: Path) -> list[str]:
    """Write a model with its weights, tokenizer and chat template. Return notes on the weights that changed.

    graph    the optimized graph, whose types have the encodings of the weights

    Raises UsageError for a model, an encoding or a tokenizer that the format cannot hold, with the reason.
    """
    model = resolved.model
    if model is None or model.name != "llama":
        raise UsageError(
            "only models of the Llama family are written to GGUF files",
            received=printable(resolved.name),
            hint=LANGUAGE_ONLY if resolved.source.kind == "gguf" else as_onnx(graph),
        )
    if rounds_activations(graph):
        raise UsageError(
            "activations that are quantized at every call cannot be written to a GGUF file, which holds weights",
            hint=weights_alone(graph),
        )
    config = {**model.defaults, **model.config}
    try:
        kind = _architecture(config)
        settings = _settings(config, kind, resolved)
    except UsageError as error:
        error.hint = as_onnx(graph)
        raise
    metadata = {**settings, **_texts(resolved, config["vocab"])}
    notes: list[str] = []
    tensors = _tensors(graph, weights, config, kind, notes)
    write_gguf(path, metadata, tensors)
    return notes


def _architecture(config: Mapping[str, Any]) -> str:
    """Return GGUF's name of the architecture. Raises UsageError for options that it does not have."""
    for name, value in _PLAIN.items():
        if config[name] != value:
            raise UsageError(f"{name} cannot be written to a GGUF file", received=f"{name}={config[name]!r}"[:80])
    if config["act"] is not t.silu or config["qk_norm"] not in (None, "heads"):
        what = "another activation than silu, or norms of whole queries and keys, cannot be written to a GGUF file"
        raise UsageError(what, received=f"act={config['act'].__name__}, qk_norm={config['qk_norm']!r}")
    width = _width(config)
    if config["rotary_dims"] not in (None, width):
        raise UsageError("partly rotated heads cannot be written to a GGUF file", received=f"{config['rotary_dims']}")
    kind = "qwen3" if config["qk_norm"] else "qwen2" if config["qkv_bias"] and not config["out_bias"] else "llama"
    if kind != "llama" and config["layout"] != "half":
        raise UsageError(f"heads that are rotated in neighbors cannot be written as {kind}", received=config["layout"])
    return kind


def _width(config: Mapping[str, Any]) -> int:
    return int(config["head_dim"] or config["dim"] // config["heads"])


def _settings(config: Mapping[str, Any], kind: str, resolved: Resolved) -> dict[str, Any]:
    """Return the keys of the model's sizes."""
    width = _width(config)
    found: dict[str, Any] = {
        "general.architecture": kind,
        "general.name": resolved.name,
        "general.quantization_version": 2,
        f"{kind}.context_length": resolved.source.positions or config["longest"] or _FIRST_POSITIONS,
        f"{kind}.embedding_length": config["dim"],
        f"{kind}.block_count": config["layers"],
        f"{kind}.feed_forward_length": config["hidden"],
        f"{kind}.attention.head_count": config["heads"],
        f"{kind}.attention.head_count_kv": config["kv_heads"] or config["heads"],
        f"{kind}.attention.key_length": width,
        f"{kind}.attention.value_length": width,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config["eps"]),
        f"{kind}.rope.dimension_count": width,
        f"{kind}.rope.freq_base": float(config["base"]),
        f"{kind}.vocab_size": config["vocab"],
    }
    match config["scaling"]:
        case LinearScaling(factor):
            found |= {f"{kind}.rope.scaling.type": SCALING, f"{kind}.rope.scaling.factor": float(factor)}
        case None | Divided() | Llama3():
            pass
        case other:
            raise UsageError(
                "this scaling of rotary frequencies cannot be written to a GGUF file", received=str(other)[:80]
            )
    return found


def _texts(resolved: Resolved, count: int) -> dict[str, Any]:
    """Return the keys of the tokenizer; of a model without one, only that it has none."""
    source = resolved.source
    if not source.has_tokenizer:
        return {"tokenizer.ggml.model": "no_vocab"}
    return gguf_vocabulary(source.tokenizer(cut=False), count, source.end_tokens, source.chat_template)


def _factors(config: Mapping[str, Any]) -> Array | None:
    """Return the factor by which each rotary frequency is divided, if a tensor holds these factors."""
    scaling, width = config["scaling"], _width(config)
    if not isinstance(scaling, Divided | Llama3):
        return None
    plain = config["base"] ** (-np.arange(0, width, 2) / width)
    factors: Array = (plain / scaling.apply(plain)).astype(np.float32)
    return factors


def _tensors(
    graph: Graph, weights: Mapping[str, Any], config: Mapping[str, Any], kind: str, notes: list[str]
) -> list[GGUFWritten]:
    found = []
    factors = _factors(config)
    if factors is not None:
        found.append(GGUFWritten("rope_freqs.weight", factors.shape, "f32", factors.nbytes, lambda: factors))
    for name, value in graph.parameters.items():
        encoding, shape = value.type.encoding, tuple(size.evaluate({}) for size in value.type.shape)
        stored = gguf_names(name)
        if encoding is None:
            dtype = "f16" if value.type.dtype is f16 and len(shape) > 1 else "f32"  # ggml's norms are f32
            nbytes = (2 if dtype == "f16" else 4) * math.prod(shape)
            numbers = partial(_numbers, name, weights[name], dtype, config, kind)
            found.append(GGUFWritten(stored, shape, dtype, nbytes, numbers))
            continue
        form = gguf_type(name, encoding, shape[-1])
        if form != encoding.form and form in ("q8_0", "q4_1"):
            what = f"scales of {encoding} are rounded to float16 ({form}), the integers are unchanged"
            notes.append(f"{stored}: {what}")
        blocks = partial(_blocks, name, encoding, weights[name], config, kind)
        found.append(GGUFWritten(stored, shape, form, shape[0] * Encoding(form).bytes(shape[-1]), blocks))
    return found


def _numbers(name: str, weight: Any, dtype: str, config: Mapping[str, Any], kind: str) -> Array:
    return _rows(name, as_numpy_weight(weight), config, kind).astype("<f2" if dtype == "f16" else "<f4")


def _blocks(name: str, encoding: Encoding, weight: Any, config: Mapping[str, Any], kind: str) -> Array:
    return gguf_blocks(name, encoding, _rows(name, np.asarray(weight), config, kind))


def _rows(name: str, array: Array, config: Mapping[str, Any], kind: str) -> Array:
    """Return a weight with its rows in the file's order: pairs that are rotated together are neighbors in Llama's q
    and k.
    """
    part = name.rpartition(".")[0].rpartition(".")[2]
    if kind != "llama" or part not in ("q", "k") or config["layout"] == "interleaved":
        return array
    heads = config["heads"] if part == "q" else config["kv_heads"] or config["heads"]
    apart = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(np.swapaxes(apart, 1, 2)).reshape(array.shape)
