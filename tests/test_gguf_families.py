"""GGUF files of Qwen3, Gemma 2 and 3 and Phi-3: files in llama.cpp's form give the logits of Hugging Face's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.ir.errors import CheckpointError
from treadle.resolving import resolve

pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.decoder_models import DECODERS
from tests.fuzz.gguf_files import Sizes, vocabulary, write_model
from tests.hf_models import Tiny, answer
from tests.test_huggingface_models import TOLERANCE, prepare
from treadle.files.mapped_files import is_mapped
from treadle.ir.encodings.encoding import Encoding

Array = np.ndarray[Any, Any]

SIZES: dict[str, Any] = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "intermediate_size": 64,
}

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Hugging Face's module names, and llama.cpp's names of their tensors."""

GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

FILES: dict[str, tuple[str, dict[str, Any], dict[str, int | float]]] = {
    "qwen3": ("qwen3", {}, {}),
    "gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "attention.sliding_window": 4},
    ),
    "gemma3": (
        "gemma3",
        {"sliding_window_pattern": 6, "query_pre_attn_scalar": 8},
        {"attention.sliding_window": 4, "rope.freq_base": 1e6, "rope.freq_base_swa": 10000.0},
    ),
    "phi3": ("phi3", {"rms_norm_eps": 1e-6}, {"attention.sliding_window": 5}),
}
"""For each file: a small decoder, its config besides the sizes, and its entries in the file's metadata."""


def write(path: Path, name: str, *, head_dim: int = 8, layers: int = 6, form: str = "", **keys: int) -> Any:
    """Write the file that llama.cpp would write. If `form` is given, matrices are random blocks of that form. Return
    Hugging Face's model with the same weights.
    """
    family, options, own = FILES[name]
    config = {**DECODERS[family].config, **SIZES, **options, "head_dim": head_dim, "num_hidden_layers": layers}
    model = Tiny(DECODERS[family].architecture, config).build()
    is_gemma = family.startswith("gemma")
    names = {**NAMES, **(GEMMA if is_gemma else {})}
    weights: dict[str, Array] = {}
    for theirs, weight in model.state_dict().items():
        module = theirs.removesuffix(".weight")
        if module == "lm_head" and model.config.tie_word_embeddings:
            continue
        block = ""
        if module.startswith("model.layers."):
            _, _, i, module = module.split(".", 3)
            block = f"blk.{i}."
        offset = 1.0 if is_gemma and "norm" in module else 0.0
        held = weight.numpy() + np.float32(offset)
        if form and held.ndim == 2:
            held = Encoding(form).sample(np.random.default_rng(len(weights)), held.shape)
            weight.copy_(weight.new_tensor(Encoding(form).decode(held)))
        weights[f"{block}{names[module]}.weight"] = held
    metadata = {key: value for key, value in own.items() if key != "rope.freq_base"} | keys
    count = metadata.pop("block_count", layers)
    sizes = Sizes(layers=int(count), architecture=name, base=float(own.get("rope.freq_base", 10000.0)))
    write_model(
        path,
        sizes,
        weights,
        keys={"attention.key_length": head_dim, "attention.value_length": head_dim, **metadata},
        held={name: form for name, weight in weights.items() if weight.dtype == np.uint8},
    )
    return model


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("runner", ["numpy", "torch"])
def test_equals_hugging_face(tmp_path: Path, name: str, runner: str) -> None:
    theirs = write(tmp_path / "model.gguf", name)
    resolved = resolve(tmp_path / "model.gguf")
    assert resolved.unused == ()
    assert resolved.weights is not None
    tokens = np.random.default_rng(2).integers(0, len(vocabulary()), (2, 11))
    expected = answer(theirs, {"tokens": tokens})["logits"]
    ours = prepare(runner, resolved.graph, resolved.weights)(tokens=tokens)["logits"]
    assert np.abs(ours - expected).max() / np.abs(expected).max() < TOLERANCE


@pytest.mark.parametrize(("runner", "form"), [("numpy", "q5_1"), ("torch", "q5_1"), ("numpy", "mxfp4")])
def test_rows_of_a_tensor_in_blocks_stay_in_blocks(tmp_path: Path, runner: str, form: str) -> None:
    """In Phi-3, query, key and value are one tensor, and so are gate and up."""
    theirs = write(tmp_path / "model.gguf", "phi3", form=form)
    resolved = resolve(tmp_path / "model.gguf")
    assert resolved.weights is not None
    matrices = [value for value in resolved.graph.parameters.values() if value.type.rank == 2]
    assert all(str(value.type).endswith(f"as {form}") for value in matrices)
    joined = [resolved.weights[f"layer.0.attn.{part}.weight"] for part in "qkv"]
    assert all(is_mapped(rows) for rows in joined)
    tokens = np.random.default_rng(2).integers(0, len(vocabulary()), (2, 11))
    expected = answer(theirs, {"tokens": tokens})["logits"]
    ours = prepare(runner, resolved.graph, resolved.weights)(tokens=tokens)["logits"]
    assert np.abs(ours - expected).max() / np.abs(expected).max() < TOLERANCE


def test_the_largest_gemma_scales_scores_by_another_width(tmp_path: Path) -> None:
    """llama.cpp recognizes this model by its number of layers. Scores are scaled by dim / heads, which is 8 here,
    although a head has 4 elements.
    """
    for layers, scale in ((46, 8**-0.5), (6, 4**-0.5)):
        write(tmp_path / "model.gguf", "gemma2", head_dim=4, layers=layers)
        model = resolve(tmp_path / "model.gguf").model
        assert model is not None
        assert model.config["scale"] == scale


def test_unsupported_features_are_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "qwen3", expert_count=8)
    with pytest.raises(CheckpointError, match="expert_count is not supported"):
        resolve(tmp_path / "model.gguf")
    write(tmp_path / "model.gguf", "phi3", block_count=60)
    with pytest.raises(CheckpointError, match="block_count is larger than the file's number of tensors allows"):
        resolve(tmp_path / "model.gguf")
