"""Tiny Hugging Face models as ONNX files, written by both of torch's exporters, with their inputs.

    export("bert", folder, dynamo=True, attention="sdpa")        -> folder/bert.onnx

Batch and sequence axes are dynamic: B, S, and T for the decoder's sequence. For images, only the batch axis is dynamic.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.hf_models import TINY, VOCAB
from tests.remembered_exports import remember_functions

Array = np.ndarray[Any, Any]

_TEXT = {"input_ids": ("B", "S"), "attention_mask": ("B", "S")}
_IMAGE = {"pixel_values": ("B",)}
_PAIR = {"input_ids": ("B", "S"), "attention_mask": ("B", "S"), "decoder_input_ids": ("B", "T")}


def takes(name: str) -> Mapping[str, tuple[str, ...]]:
    """Return the inputs of a model's export, and the names of their dynamic axes."""
    if name.startswith(("vit", "deit", "clip-vision")):
        return _IMAGE
    if name == "clip":
        return {"input_ids": ("N", "S"), "pixel_values": ("B",), "attention_mask": ("N", "S")}
    if name == "whisper":
        return {"input_features": ("B",), "decoder_input_ids": ("B", "T")}
    return _PAIR if name.startswith(("t5", "mt5", "bart", "marian")) and "encoder" not in name else _TEXT


def draw(name: str, seed: int, **sizes: int) -> dict[str, Array]:
    """Draw inputs whose axes have these sizes; the last row is padded from its middle on."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for key, axes in takes(name).items():
        shape = tuple(sizes[axis] for axis in axes)
        if key == "attention_mask":
            mask = np.ones(shape, np.int64)
            mask[-1, shape[1] // 2 + 1 :] = 0
            found[key] = mask
        elif key.endswith("ids"):
            found[key] = rng.integers(2, VOCAB - 1, shape)
        elif key == "input_features":
            found[key] = rng.standard_normal((*shape, 8, 48), np.float32)
        else:
            config: Any = TINY[name].config
            config = config.get("vision_config", config)
            side = config["image_size"] if isinstance(config["image_size"], list) else [config["image_size"]] * 2
            found[key] = rng.standard_normal((*shape, config["num_channels"], *side), np.float32)
    return found


class _FirstOutput(nn.Module):
    """A model that takes positional tensors and returns one tensor."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        kwargs: dict[str, Any] = dict(zip(self.names, given, strict=True))
        if "attention_mask" not in kwargs and hasattr(self.model.config, "use_cache"):
            kwargs["use_cache"] = False
        if "input_ids" in kwargs and getattr(self.model.config, "use_cache", None) is not None:
            kwargs["use_cache"] = False
        out = self.model(**kwargs, return_dict=True)
        for key in ("logits", "logits_per_image", "last_hidden_state", "text_embeds", "image_embeds"):
            if key in out:
                return out[key]
        return out[0]


def export(
    name: str, folder: Path, *, dynamo: bool, attention: str = "sdpa", opset: int = 18, model: Any = None
) -> Path:
    """Write a tiny model's ONNX file and return its path. Errors of the exporter propagate."""
    built = TINY[name].build() if model is None else model
    built.set_attn_implementation(attention)
    names = tuple(takes(name))
    example = tuple(torch.from_numpy(x) for x in draw(name, 0, B=2, S=5, T=4, N=3).values())
    wrapped = _FirstOutput(built, names).eval()
    path = folder / f"{name}-{'dynamo' if dynamo else 'script'}-{attention}-{opset}.onnx"
    axes = {key: dict(enumerate(dims)) for key, dims in takes(name).items()}
    options: dict[str, Any] = {"input_names": list(names), "output_names": ["y"], "opset_version": opset}
    if dynamo:
        options |= {"dynamo": True, "dynamic_shapes": (tuple(axes.values()),), "verbose": False}
    else:
        options |= {"dynamo": False, "dynamic_axes": axes}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    remember_functions()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(wrapped, example, str(path), **options)
    return path
