"""Small random Hugging Face models as ONNX files, by both of torch's exporters: the files that benchmarks/fusion.py
measures.

    export(Case("bert", "dynamo", "sdpa", 18), folder)      -> folder/bert-dynamo-sdpa-18.onnx

Weights are drawn, norms and biases too. Batch and sequence axes are dynamic: B, S, and T for a decoder's; for images
and sound the batch alone. If an exporter cannot keep them, the file has the example's sizes: `Exported.fixed`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

Array = np.ndarray[Any, Any]

LAYERS = 2
VOCABULARY = 48
EXAMPLE = {"B": 2, "S": 7, "T": 5}
EXPORTERS = ("dynamo", "script")
ATTENTIONS = ("eager", "sdpa")
OPSETS = {"dynamo": (18, 23), "script": (14, 18)}
"""For each exporter, its oldest opset with everything that these models need, and a later one."""

_TOKENS = {"input_ids": "B S", "attention_mask": "B S"}
_PAIR = {**_TOKENS, "decoder_input_ids": "B T"}
_CROSS = {"input_ids": "B T", "encoder_hidden_states": "B S", "encoder_attention_mask": "B S"}
_PIXELS = {"pixel_values": "B"}


@dataclass(frozen=True)
class Small:
    """A class of Hugging Face's with its configuration.

    kinds    attentions in a layer: a decoder with cross attention has two, a pair of encoder and decoder three
    inputs   their names and dynamic axes; the first one determines the shape
    part     the exported submodule, if it is not the whole model
    ort      the model type for ONNX Runtime's optimizer: the model's own, or the nearest supported one
    """

    architecture: str
    config: Mapping[str, Any]
    kinds: int = 1
    inputs: Mapping[str, str] = field(default_factory=lambda: _TOKENS)
    part: str = ""
    ort: tuple[str, ...] = ("bert",)


def _bert(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 56,
        "max_position_embeddings": 40,
    } | more


def _llama(**more: Any) -> dict[str, Any]:
    return _bert(num_key_value_heads=2, max_position_embeddings=64, head_dim=8) | more


_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 56,
    "num_heads": 4,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
_BART = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_WHISPER = {
    **_BART,
    "num_mel_bins": 10,
    "max_source_positions": 12,
    "max_target_positions": 40,
}
_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": LAYERS,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "dim": 32,
    "n_heads": 4,
    "n_layers": LAYERS,
    "hidden_dim": 56,
}
_CLIP_TEXT = _bert(bos_token_id=0, eos_token_id=5)

SMALL: Mapping[str, Small] = {
    "gpt2": Small("GPT2LMHeadModel", _GPT2, ort=("gpt2",)),
    "bert": Small("BertModel", _bert()),
    "roberta": Small("RobertaModel", _bert(pad_token_id=1)),
    "distilbert": Small("DistilBertModel", _DISTILBERT),
    "albert": Small("AlbertModel", _bert(embedding_size=12)),
    "t5-encoder": Small("T5EncoderModel", _T5, ort=("t5",)),
    "t5-decoder": Small("T5Model", _T5, kinds=2, inputs=_CROSS, part="decoder", ort=("t5",)),
    "bart": Small("BartModel", _BART, kinds=3, inputs=_PAIR, ort=("bart",)),
    "marian": Small("MarianModel", {**_BART, "scale_embedding": True}, kinds=3, inputs=_PAIR, ort=("bart",)),
    "vit": Small("ViTModel", _VIT, inputs=_PIXELS, ort=("vit",)),
    "clip-text": Small("CLIPTextModel", _CLIP_TEXT, ort=("clip",)),
    "clip-vision": Small("CLIPVisionModel", _VIT, inputs=_PIXELS, ort=("clip",)),
    "llama": Small("LlamaForCausalLM", _llama(), ort=("qwen3", "gpt2")),
    "mistral": Small("MistralForCausalLM", _llama(sliding_window=4), ort=("qwen3", "gpt2")),
    "qwen2": Small("Qwen2ForCausalLM", _llama(), ort=("qwen3", "gpt2")),
    "gemma": Small("GemmaForCausalLM", _llama(num_key_value_heads=1), ort=("qwen3", "gpt2")),
    "whisper-encoder": Small("WhisperModel", _WHISPER, inputs={"input_features": "B"}, part="encoder", ort=("bart",)),
    "whisper-decoder": Small(
        "WhisperModel",
        _WHISPER,
        kinds=2,
        inputs={"input_ids": "B T", "attention_mask": "B T", "encoder_hidden_states": "B S"},
        part="decoder",
        ort=("bart",),
    ),
}


@dataclass(frozen=True)
class Case:
    """One export: the model, the exporter, the attention implementation of Hugging Face, and the opset."""

    model: str
    exporter: str
    attention: str
    opset: int

    @property
    def small(self) -> Small:
        return SMALL[self.model]

    @property
    def attentions(self) -> int:
        """Number of attentions in the model."""
        return LAYERS * self.small.kinds

    def __str__(self) -> str:
        return f"{self.model}-{self.exporter}-{self.attention}-{self.opset}"

    @staticmethod
    def parse(text: str) -> Case:
        """Return the case that `str` wrote."""
        model, exporter, attention, opset = text.rsplit("-", 3)
        return Case(model, exporter, attention, int(opset))


def cases() -> Iterator[Case]:
    """Yield all cases, model by model."""
    for model, exporter, attention in itertools.product(SMALL, EXPORTERS, ATTENTIONS):
        for opset in OPSETS[exporter]:
            yield Case(model, exporter, attention, opset)


@dataclass(frozen=True)
class Exported:
    """A file, and a flag that is set if its axes are fixed to the example's sizes.

    They are fixed if the exporter failed with dynamic ones.
    """

    path: Path
    fixed: bool = False


def draw(case: Case, seed: int, sizes: Mapping[str, int], padding: str = "right") -> dict[str, Array]:
    """Draw inputs whose axes have these sizes; the "right", the "left" or "all" of the last sequence is padding."""
    rng = np.random.default_rng(seed)
    config = case.small.config
    found: dict[str, Array] = {}
    for name, axes in case.small.inputs.items():
        shape = tuple(sizes[axis] for axis in axes.split())
        if name.endswith("attention_mask"):
            mask = np.ones(shape, np.int64)
            half = shape[1] // 2
            mask[-1, {"right": slice(half + 1, None), "left": slice(half), "all": slice(None)}[padding]] = 0
            found[name] = mask
        elif name.endswith("ids"):
            found[name] = rng.integers(2, VOCABULARY, shape)  # 0 and 1 are padding in some models
        elif name == "pixel_values":
            found[name] = rng.standard_normal((*shape, 3, config["image_size"], config["image_size"]), np.float32)
        elif name == "input_features":
            mels, places = config["num_mel_bins"], 2 * config["max_source_positions"]
            found[name] = rng.standard_normal((*shape, mels, places), np.float32)
        else:
            found[name] = rng.standard_normal((*shape, config["d_model"]), np.float32)
    return found


def build(small: Small, **config: Any) -> nn.Module:
    """Build the model in float32 with drawn weights, in evaluation mode; the same each time."""
    cls = getattr(transformers, small.architecture)
    model: nn.Module = cls(cls.config_class(**{**small.config, **config})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            weight.normal_(mean, 0.2, generator=generator)
        module: Any
        for module in model.modules():
            if hasattr(module, "create_weight"):  # Marian's sinusoids
                module.weight.copy_(module.create_weight())
    return model


class _OneOutput(nn.Module):
    """A model that takes its tensors in order, keeps no cache, and returns one tensor."""

    def __init__(self, model: nn.Module, part: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model.get_submodule(part)
        self.names = names
        self.caches = getattr(model.config, "use_cache", None) is not None and "pixel_values" not in names
        self.caches = self.caches and part != "encoder"

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = dict(zip(self.names, given, strict=True))
        if self.caches:
            arguments["use_cache"] = False
        out = self.model(**arguments, return_dict=True)
        found: torch.Tensor = out["logits"] if "logits" in out else out["last_hidden_state"]
        return found


def _wrapped(case: Case, **config: Any) -> nn.Module:
    model: Any = build(case.small, **config)
    model.set_attn_implementation(case.attention)
    return _OneOutput(model, case.small.part, tuple(case.small.inputs)).eval()


def answers(case: Case, inputs: Mapping[str, Array]) -> Array:
    """Return the results of Hugging Face's own model."""
    with torch.no_grad():
        found: Array = _wrapped(case)(*(torch.from_numpy(inputs[name]) for name in case.small.inputs)).numpy()
    return found


def export(case: Case, folder: Path, **config: Any) -> Exported:
    """Write the case's file; `config` changes its configuration. Errors of the exporter propagate."""
    path = folder / f"{case}.onnx"
    wrapped, names = _wrapped(case, **config), tuple(case.small.inputs)
    example = tuple(torch.from_numpy(x) for x in draw(case, 0, EXAMPLE).values())
    axes = {name: dict(enumerate(text.split())) for name, text in case.small.inputs.items()}
    options: dict[str, Any] = {"input_names": list(names), "output_names": ["y"], "opset_version": case.opset}
    dynamic: dict[str, Any]
    if case.exporter == "dynamo":
        options |= {"dynamo": True, "verbose": False}
        dynamic = {"dynamic_shapes": (tuple(axes.values()),)}
    else:
        options |= {"dynamo": False}
        dynamic = {"dynamic_axes": axes}
    with quiet(), torch.no_grad():
        try:
            torch.onnx.export(wrapped, example, str(path), **options, **dynamic)
            return Exported(path)
        except Exception:
            torch.onnx.export(wrapped, example, str(path), **options)
            return Exported(path, fixed=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the output of exporters and optimizers."""
    kept = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(kept)
