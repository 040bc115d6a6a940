"""Decoders from Hugging Face folders: logits equal Hugging Face's, for whole texts and by steps; and refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle.backends.registry import find_backend
from treadle.explaining.fusion import explain_fusion
from treadle.ir.errors import CheckpointError, PassError
from treadle.models.registry import family_of
from treadle.resolving import resolve
from treadle.stepped import open_stepped

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.decoder_models import DECODERS
from tests.hf_models import VOCAB, answer
from tests.test_huggingface_models import TOLERANCE, without_one_key

Array = np.ndarray[Any, Any]

TOKENS = np.random.default_rng(5).integers(0, VOCAB, (2, 11))


@dataclass(frozen=True)
class Saved:
    """A small decoder's folder, and Hugging Face's logits of `TOKENS`."""

    name: str
    folder: Path
    logits: Array

    @property
    def layers(self) -> int:
        return int(DECODERS[self.name].config.get("num_hidden_layers", 3))

    def assert_close(self, ours: Array, theirs: Array) -> None:
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(self.logits).max()


@pytest.fixture(scope="module", params=DECODERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    model = DECODERS[name].build()
    model.save_pretrained(folder)
    return Saved(name, folder, answer(model, {"tokens": TOKENS})["logits"])


# -- the same numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_equals_hugging_face_whole_and_stepped(saved: Saved, backend: str) -> None:
    """Rows of two lengths are prefilled in chunks, and then continue token by token, beyond every window."""
    reason = find_backend(backend).available()
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    exe = t.compile(saved.folder, backend=backend, **DECODERS[saved.name].given)
    saved.assert_close(exe(tokens=TOKENS)["logits"], saved.logits)
    session = exe.session(rows=2, capacity=16, chunk=4)
    rows, begun = [session.open(), session.open()], (6, 1)
    logits = session.prefill({row: TOKENS[n, : begun[n]].tolist() for n, row in enumerate(rows)})
    for step in range(TOKENS.shape[1] - max(begun) + 1):
        for n, row in enumerate(rows):
            saved.assert_close(logits[row], saved.logits[n, begun[n] + step - 1])
        if begun[0] + step < TOKENS.shape[1]:
            logits = session.step({row: int(TOKENS[n, begun[n] + step]) for n, row in enumerate(rows)})


def test_takes_every_tensor(saved: Saved) -> None:
    resolved = resolve(saved.folder)
    assert resolved.unused == resolved.unread == ()


def test_attention_is_found_in_each_layer(saved: Saved) -> None:
    explained = explain_fusion(saved.folder)
    assert explained.counts["attention"] == saved.layers
    assert "softmax" not in explained.counts


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_longrope_turns_by_a_texts_length(backend: str, tmp_path: Path) -> None:
    """One compilation serves short and long texts; it has a step only if no text is longer than the context."""
    if reason := find_backend(backend).available():
        pytest.skip(f"backend {backend}: {reason}")
    tiny = DECODERS["phi3-long"]
    theirs = replace(tiny, config={**tiny.config, "original_max_position_embeddings": 8}).build()
    theirs.save_pretrained(tmp_path)
    exe = t.compile(tmp_path, backend=backend)
    for length in (1, 8, 9, 11):
        tokens = TOKENS[:, :length]
        wanted = answer(theirs, {"tokens": tokens})["logits"]
        assert np.abs(exe(tokens=tokens)["logits"] - wanted).max() < TOLERANCE * np.abs(wanted).max()
    with pytest.raises(PassError, match="size: the axis is sliced") as caught:
        exe.session(rows=1)
    assert "longest=N, up to the number of positions before scaling" in (caught.value.hint or "")
    assert t.compile(tmp_path, backend=backend, longest=8).session(rows=1).capacity == 8  # as the hint says
    session = open_stepped(tmp_path, backend=backend).session(rows=1)
    assert session.capacity == 8


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_sessions_of_scaled_rotary_positions(scaling: str, tmp_path: Path) -> None:
    """Frequencies that depend on the length are constants up to the number of positions before scaling."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 8}
    rope = {"rope_type": scaling, "factor": 2.0, "rope_theta": 10000.0, **(factors if scaling == "longrope" else {})}
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    most = 8 if scaling == "dynamic" else 16
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=most, rope_parameters=rope
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    session = open_stepped(tmp_path, backend="numpy").session(rows=1)
    assert session.capacity == 8
    tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    wanted = answer(theirs, {"tokens": tokens})["logits"]
    row = session.open()
    found = [
        session.prefill({row: tokens[0, :3].tolist()})[row],
        *(session.step({row: int(i)})[row] for i in tokens[0, 3:]),
    ]
    np.testing.assert_allclose(np.stack(found), wanted[0, 2:], atol=TOLERANCE * np.abs(wanted).max())
    exe = t.compile(tmp_path, backend="numpy")
    with pytest.raises(PassError, match="has no axis that may be stepped") as caught:
        exe.session(rows=1)
    assert "longest=N" in (caught.value.hint or "")
    assert t.compile(tmp_path, backend="numpy", longest=8).session(rows=1).capacity == 8  # as the hint says
    longer = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    wanted = answer(theirs, {"tokens": longer})["logits"]
    np.testing.assert_allclose(exe(tokens=longer)["logits"], wanted, atol=TOLERANCE * np.abs(wanted).max())


# -- the config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted({each.architecture for each in DECODERS.values()}))
def test_a_key_that_a_config_leaves_out_has_hugging_faces_default(architecture: str) -> None:
    """Config files are written without the keys whose values equal the library's defaults."""
    config = getattr(transformers, architecture).config_class().to_dict() | {"architectures": [architecture]}
    family = family_of(config)
    whole = family.from_config(config)
    for key, rest in without_one_key(config):
        if key in ("architectures", "model_type"):
            continue
        try:
            found = family.from_config(rest)
            assert found == whole or found.graph() == whole.graph(), key
        except CheckpointError as refused:
            if key not in str(refused):
                raise


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, **options}}


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("yarn", rope("longest"), "rope_type is 'longest'"),
        ("yarn", rope("longrope"), "short_factor must be a list of numbers"),
        ("yarn", rope("yarn"), "factor must be a number from 0.001"),
        ("yarn", rope("yarn", factor=2, beta_fast=1, beta_slow=2), "beta_slow must be less than beta_fast"),
        ("yarn", rope("yarn", factor=2, attention_factor=0), "attention_factor must be a number from 0.001"),
        ("yarn", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ("qwen3", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("qwen3-windows", {"layer_types": ["full_attention"]}, "layer_types must name"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a number from 1e-9"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types must name"),
        ("gemma3", {"rope_parameters": {"sliding_attention": rope("linear")["rope_parameters"]}}, "rope_type is 'lin"),
        ("gemma3", {"rope_parameters": {"sliding_attention": [1]}}, "sliding_attention must be an object"),
        ("phi3", rope("linear", factor=2), "rope_type is 'linear'"),
        ("phi3", rope("yarn", short_factor=[1.0] * 3), "long_factor must be a list of numbers"),
        ("phi3", rope("su", short_factor=[1.0] * 3, long_factor=[2.0] * 2), "long_factor must have a factor for each"),
        ("phi3", rope("longrope", short_factor=[1.0, 0, 1], long_factor=[2.0] * 3), "short_factor must be a number"),
        ("phi3-part", rope("default", partial_rotary_factor=0.4), "partial_rotary_factor must give an even number"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a number from 1e-9"),
        ("gptj", {"rotary_dim": None}, "rotary_dim must be a positive integer"),
        ("phi", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("falcon", {"alibi": True}, "alibi is True"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
        (
            "falcon-grouped",
            {"num_ln_in_parallel_attn": 3},
            "num_ln_in_parallel_attn must be a positive integer up to 2",
        ),
        ("falcon-grouped", {"parallel_attn": False}, "parallel_attn is False"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ("opt", {"architectures": ["OPTForSequenceClassification"]}, "architectures is"),
    ],
)
def test_unsupported_features_are_named(name: str, options: dict[str, Any], what: str) -> None:
    tiny = DECODERS[name]
    config = getattr(transformers, tiny.architecture).config_class(**tiny.config).to_dict()
    config = json.loads(json.dumps({**config, "architectures": [tiny.architecture], **options}))
    with pytest.raises(CheckpointError, match=r"config\.json: ") as caught:
        family_of(config).from_config(config)
    assert what in caught.value.what
    assert caught.value.hint or caught.value.received


BEFORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt_neox": (
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 500.0, "rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "gemma3_text": (
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
        {
            "rope_theta": 2e6,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "stablelm": (
        {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
}
"""The value of `rope_parameters`, and its form before transformers 5."""


@pytest.mark.parametrize("kind", BEFORE)
def test_settings_as_they_were_before_transformers_5(kind: str) -> None:
    now, before = BEFORE[kind]
    sizes = {"vocab_size": 11, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": kind, **sizes, "num_hidden_layers": 2, "intermediate_size": 20}
    read = family_of(config).from_config
    assert read({**config, "rope_parameters": now}) == read({**config, **before}) != read(config)
