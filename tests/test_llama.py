"""The Llama kind: rotary positions against Hugging Face's code, what may be stepped, and options that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.frontends.rotary import Dynamic, Yarn
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.ir.ops.rotary import Rotary
from treadle.models.llama import llama
from treadle.resolving import resolve

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as by_pairs
from transformers.models.stablelm.modeling_stablelm import apply_rotary_pos_emb as by_halves

from tests.hf_models import save

LLAMA3 = {"rope_type": "llama3", "factor": 8, "high_freq_factor": 4, "original_max_position_embeddings": 64}

SMALL = {"vocab": 11, "dim": 12, "heads": 3, "kv_heads": 1, "head_dim": 6, "hidden": 20, "layers": 2}


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("turned", [4, 10])
def test_equals_hugging_face_in_part_and_whole(layout: str, turned: int) -> None:
    """StableLM turns halves of a part of each head, GLM neighbours; both in float64 here."""
    rng = np.random.default_rng(turned)
    x, positions = rng.standard_normal((2, 3, 5, 10)), rng.integers(0, 99, (2, 5))
    frequencies = 10000.0 ** (-np.arange(0, turned, 2) / turned)
    angles = positions[:, :, None] * frequencies
    cos, sin = (torch.from_numpy(np.concatenate([wave(angles)] * 2, -1)) for wave in (np.cos, np.sin))
    q = torch.from_numpy(x)
    if layout == "half":
        expected = torch.cat([by_halves(q[..., :turned], q[..., :turned], cos, sin)[0], q[..., turned:]], -1)
    else:
        expected = by_pairs(q, q, cos, sin)[0]
    ours = Rotary(layout=layout).reference(x, positions, frequencies)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-13)


def test_what_may_be_stepped() -> None:
    """Positions go on from the past; frequencies that depend on the length of the sequence do not."""
    import treadle

    assert treadle.follow(llama.configure(**SMALL).graph(), "S").step()
    refused = treadle.follow(llama.configure(**SMALL, scaling=Dynamic(2.0, 8)).graph(), "S").step()
    assert not refused
    assert "models/llama.py" in str(refused)


def test_refusals_of_the_declaration() -> None:
    for config, what in (
        ({"head_dim": 5}, "rotary positions turn pairs"),
        ({"base": 0.0}, "rotary positions turn pairs"),
        ({"head_dim": 2, "scaling": Yarn(2.0, 8)}, "yarn scaling needs more than one rotary frequency"),
        ({"norm_place": "around"}, "llama has no norm_place 'around'"),
        ({"qk_norm": "each"}, "llama has no qk_norm 'each'"),
        ({"head_dim": None, "heads": 5}, "a width of 12 does not split into 5 heads"),
    ):
        with pytest.raises(FrontendError, match=what):
            llama.configure(**{**SMALL, **config}).graph()
    assert isinstance(llama, t.Model)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor must be a list of numbers"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters must be an object"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor must be a number from 0.001"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama-3", {"rope_parameters": {**LLAMA3, "low_freq_factor": 4}}, "must be less than high_freq_factor"),
        ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types is"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ],
)  # fmt: skip
def test_unknown_option(tmp_path: Path, name: str, options: dict[str, Any], what: str) -> None:
    save(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(CheckpointError, match=r"config\.json: ") as caught:
        resolve(tmp_path)
    assert what in caught.value.what


def test_options_as_they_were_before_transformers_5(tmp_path: Path) -> None:
    save("llama-linear", tmp_path)
    now = resolve(tmp_path).graph
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": rope["factor"]}}
    path.write_text(json.dumps(config))
    assert resolve(tmp_path).graph == now
