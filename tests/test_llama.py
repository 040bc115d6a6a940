"""The Llama family: rotary positions compared with Hugging Face's code, models that have a step, and refused
options.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.frontends.rotary import Divided, Dynamic, LinearScaling, Llama3, LongRope, Scaling, Yarn
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.ir.ops.rotary import Rotary
from treadle.models.llama import llama
from treadle.models.registry import family_of
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
    """StableLM rotates halves of a part of each head, GLM rotates neighboring elements; both are in float64 here."""
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


def test_axes_that_can_be_stepped() -> None:
    """Positions can continue from past tokens; frequencies that depend on the length of the sequence cannot."""
    import treadle

    assert treadle.follow(llama.configure(**SMALL).graph(), "S").step()
    refused = treadle.follow(llama.configure(**SMALL, scaling=Dynamic(2.0, 8)).graph(), "S").step()
    assert not refused
    assert "models/llama.py" in str(refused)


def test_refusals_of_the_declaration() -> None:
    for config, what in (
        ({"head_dim": 5}, "rotary positions need an even number"),
        ({"base": 0.0}, "the base of rotary positions"),
        ({"head_dim": 2, "scaling": Yarn(2.0, 8)}, "yarn scaling needs more than one rotary frequency"),
        ({"base": 1.0, "scaling": Yarn(2.0, 8)}, "yarn scaling needs .* a base that is not 1"),
        ({"scaling": Divided((1.0, 2.0))}, "2 factors for 3 rotary frequencies"),
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


BARE = {
    "model_type": "llama", "vocab_size": 11, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 20,
}  # fmt: skip


def read(options: dict[str, Any], **config: Any) -> dict[str, Any]:
    """Return the options that are read from a config with heads of 8 elements and these rotary positions."""
    config = {**BARE, **config, "rope_parameters": options}
    return dict(family_of(config).from_config(config).config)


def warmth(weight: float, factor: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


LONG = {"rope_type": "longrope", "short_factor": [1.0, 2, 3, 4], "long_factor": [5.0, 6, 7, 8]}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("options", "config", "scaling"),
    [
        ({"rope_type": "linear", "factor": 3}, {}, LinearScaling(3.0)),
        ({"rope_type": "dynamic", "factor": 3}, {"max_position_embeddings": 64}, Dynamic(3.0, 64)),
        ({**LLAMA3, "low_freq_factor": 1}, {}, Llama3(8.0, 1.0, 4.0, 64)),
        ({"rope_type": "yarn", "factor": 4}, {}, Yarn(4.0, 2048, temperature=warmth(1, 4))),
        ({"rope_type": "yarn", "factor": 0.5, ORIGINAL: 2}, {}, Yarn(0.5, 2)),
        ({"rope_type": "yarn", "factor": 4, ORIGINAL: 9}, {ORIGINAL: 8}, Yarn(4.0, 8, temperature=warmth(1, 4))),
        (
            {
                "rope_type": "yarn",
                "factor": 4,
                "beta_fast": 0,
                "beta_slow": 2,
                "truncate": False,
                "attention_factor": 3,
            },
            {"max_position_embeddings": 64},
            Yarn(4.0, 64, slow=2.0, truncate=False, temperature=3.0),
        ),
        (
            {"rope_type": "yarn", "factor": 4, "beta_fast": 9, "beta_slow": 0, "mscale": 0.7, "mscale_all_dim": 0.5},
            {},
            Yarn(4.0, 2048, fast=9.0, temperature=warmth(0.7, 4) / warmth(0.5, 4)),
        ),
        ({"rope_type": "yarn", "factor": 4, "mscale": 0.7}, {}, Yarn(4.0, 2048, temperature=warmth(1, 4))),
        (
            {**LONG, "factor": 4, ORIGINAL: 64},
            {},
            LongRope((1, 2, 3, 4), (5, 6, 7, 8), 64, math.sqrt(1 + math.log(4) / math.log(64))),
        ),
        (
            {**LONG, ORIGINAL: 2},
            {"max_position_embeddings": 16},
            LongRope((1, 2, 3, 4), (5, 6, 7, 8), 2, math.sqrt(1 + math.log(8) / math.log(2))),
        ),
        ({**LONG, "factor": 0.5, ORIGINAL: 64}, {}, LongRope((1, 2, 3, 4), (5, 6, 7, 8), 64)),
        (
            {**LONG, "attention_factor": 1.25, "factor": 4, ORIGINAL: 64},
            {},
            LongRope((1, 2, 3, 4), (5, 6, 7, 8), 64, 1.25),
        ),
    ],
)
def test_scalings_as_a_config_says_them(options: dict[str, Any], config: dict[str, Any], scaling: Scaling) -> None:
    assert read(options, **config)["scaling"] == scaling


@pytest.mark.parametrize(
    ("options", "config", "what"),
    [
        ({**LONG, "factor": 4, ORIGINAL: 1}, {}, f"{ORIGINAL} must be an integer from 2"),
        ({**LONG, "factor": 4}, {ORIGINAL: 1}, f"{ORIGINAL} must be an integer from 2"),
        ({**LONG, "factor": 4}, {"max_position_embeddings": 1}, "max_position_embeddings must be an integer from 2"),
        ({**LONG, "factor": 4}, {}, "max_position_embeddings must be an integer from 2"),
        ({**LONG, ORIGINAL: 64}, {}, "max_position_embeddings must be a positive integer"),
        ({"rope_type": "yarn", "factor": 4, "beta_slow": 32}, {}, "beta_slow must be less than beta_fast"),
        (LONG["short_factor"] * 20, {}, "rope_parameters must be an object"),
        ({**LONG, "short_factor": "12345" * 20}, {}, "short_factor must be a list of numbers"),
        (
            {},
            {"layer_types": ["full_attention"] * 9, "model_type": "qwen3", "use_sliding_window": True},
            "layer_types must",
        ),
        ({"sliding_attention": [1] * 99}, {"model_type": "gemma3_text"}, "sliding_attention must be an object"),
        ({"full_attention": [1] * 99}, {"model_type": "modernbert"}, "full_attention must be an object"),
    ],
)
def test_positions_that_are_refused(options: Any, config: dict[str, Any], what: str) -> None:
    """A long value is truncated in the error."""
    with pytest.raises(CheckpointError, match=f"config.json: {what}") as caught:
        read(options, **config)
    assert len(caught.value.received or "") == 80 or len(str(options)) + len(str(config)) < 200


def test_how_much_of_a_head_turns() -> None:
    for part, dims in ((0.25, 2), (0.5, 4), (1, None)):
        assert read({"partial_rotary_factor": part}, model_type="gpt_neox")["rotary_dims"] == dims
    for part in (0.2, 0.4, 1.5, 2.0, 1e308):
        with pytest.raises(CheckpointError, match="must give an even number of rotated dimensions of a head"):
            read({"partial_rotary_factor": part}, model_type="gpt_neox")


def test_defaults_of_missing_config_keys() -> None:
    """The defaults of Hugging Face's classes, for options whose effect is not visible in a small graph."""
    windows = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 30}
    assert read({}, model_type="qwen3", **windows)["full_layers"] == tuple(range(28))
    assert read({}, model_type="qwen3", **windows, max_window_layers=0)["full_layers"] == ()
    assert read({}, model_type="qwen3", **windows | {"sliding_window": None})["full_layers"] == tuple(range(30))
    gemma = read({}, model_type="gemma3_text", num_hidden_layers=13)
    assert (gemma["full_layers"], gemma["window"], gemma["window_base"], gemma["base"]) == ((5, 11), 4096, 1e4, 1e6)
    assert read({}, model_type="gemma2", num_hidden_layers=5)["full_layers"] == (1, 3)
    assert read({}, model_type="gemma3_text", sliding_window_pattern=1)["full_layers"] == (0, 1)
    assert read({}, model_type="falcon", new_decoder_architecture=True, num_ln_in_parallel_attn=1)["mlp_norm"] is False
    assert read({}, model_type="granite", logits_scaling=4)["logit_scale"] == 0.25


def test_options_as_they_were_before_transformers_5(tmp_path: Path) -> None:
    save("llama-linear", tmp_path)
    now = resolve(tmp_path).graph
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": rope["factor"]}}
    path.write_text(json.dumps(config))
    assert resolve(tmp_path).graph == now
