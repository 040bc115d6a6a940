"""Details of RoBERTa, DistilBERT, ViT and CLIP besides their results: padding, patches, end tokens, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.explaining.fusion import explain_fusion
from treadle.ir.analysis.following import follow
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.ir.interpreter import interpret
from treadle.models.clip import clip_text
from treadle.models.distilbert import distilbert
from treadle.models.family import Config
from treadle.models.modernbert import modernbert
from treadle.models.registry import family_of
from treadle.models.roberta import roberta
from treadle.models.vit import embed_patches, vit
from treadle.resolving import resolve

Array = np.ndarray[Any, Any]


# -- RoBERTa ---------------------------------------------------------------------------------------------------


def test_roberta_with_padding_at_the_end(tmp_path: Path) -> None:
    """Positions are numbered from the row after the padding row, whatever follows the end of a text."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=37, hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40,
        max_position_embeddings=14,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.RobertaModel(config).eval()
    theirs.save_pretrained(tmp_path)
    resolved = resolve(tmp_path, inputs=("lengths",))
    assert resolved.graph.symbols["S"].upper == 12

    lengths = np.array([12, 5, 1])
    tokens = np.random.default_rng(0).integers(2, 37, (3, 12))
    real = np.arange(12) < lengths[:, None]
    tokens[~real] = config.pad_token_id
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens), attention_mask=torch.from_numpy(real)).last_hidden_state.numpy()
    assert resolved.weights is not None
    found = interpret(resolved.graph, {"tokens": tokens, "lengths": lengths}, resolved.weights, float64=True)["hidden"]
    assert np.abs(found - expected)[real].max() / np.abs(expected[real]).max() < 2e-5


def test_rows_of_roberta_and_distilbert_may_be_packed() -> None:
    for model in (roberta, distilbert):
        verdict = follow(model.configure(layers=2, inputs=("lengths",)).graph(), "S").pack()
        assert verdict, str(verdict)


# -- images ----------------------------------------------------------------------------------------------------


def test_patches_are_flattened_and_projected() -> None:
    """Equation 1 of the ViT paper: [x1 E; x2 E; ...], with patches counted row by row."""

    @t.model
    def patches(pixels: t.f32["B 3 height width"], *, height=8, width=12):
        return embed_patches(pixels, 5, 4)

    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 8, 12))
    weight, bias = rng.standard_normal((5, 3, 4, 4)), rng.standard_normal(5)
    found = interpret(patches.graph(), {"pixels": pixels}, {"patch.weight": weight, "patch.bias": bias}, float64=True)
    (sequence,) = found.values()
    corners = [(top, left) for top in (0, 4) for left in (0, 4, 8)]
    expected = [pixels[:, :, i : i + 4, j : j + 4].reshape(2, -1) @ weight.reshape(5, -1).T + bias for i, j in corners]
    np.testing.assert_allclose(sequence, np.stack(expected, axis=1), rtol=1e-12)


def test_images_have_the_configured_size() -> None:
    graph = vit.configure(height=32, layers=1).graph()
    assert str(graph.main.inputs[0].type) == "f32[B, 3, 32, 224]"
    assert str(graph.parameters["embeddings.position"].type) == "f32[1, 29, 768]"
    assert "embeddings.distillation" not in graph.parameters
    assert str(vit.configure(distilled=True, layers=1).graph().parameters["embeddings.position"].type) == (
        "f32[1, 198, 768]"
    )


def test_a_teacher_needs_its_token() -> None:
    with pytest.raises(FrontendError, match="a distilled_classifier needs a distillation token"):
        resolve("vit", head="distilled_classifier")
    for family in ("vit", "albert", "distilbert"):
        with pytest.raises(FrontendError, match=f"{family} has no head 'tail'"):
            resolve(family, head="tail")


# -- CLIP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "places"), [(None, (1, 4)), (7, (3, 0))])
def test_a_text_is_its_end(end: int | None, places: tuple[int, int]) -> None:
    """The end is the first token with the greatest id, or the first token whose id is an end token."""
    model = clip_text.configure(vocab=12, dim=8, heads=2, layers=1, hidden=8, end=end)
    graph = model.graph()
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(v.type.static_shape or ()) for name, v in graph.parameters.items()}
    tokens = np.array([[1, 9, 2, 7, 7], [7, 1, 2, 3, 11]])
    found = interpret(graph, {"tokens": tokens}, weights, float64=True)
    np.testing.assert_array_equal(found["pooled"], found["hidden"][[0, 1], places])


CLIP = {
    "model_type": "clip",
    "text_config": {"hidden_size": 64, "eos_token_id": 2},
    "vision_config": {"image_size": 64, "patch_size": 16},
}


def configured(config: Config) -> t.Model:
    return family_of(config).from_config(config)


def test_old_configurations_of_clip() -> None:
    """Old configurations leave out defaults, use 2 as the end token, and may repeat all keys under older names."""
    model = configured(CLIP)
    assert model.config["text"]["end"] is None
    assert model.config["text"]["dim"] == 64
    assert model.config["text"]["context"] == 77
    assert (model.config["height"], model.config["width"], model.config["projection"]) == (64, 64, 512)
    again = configured({**CLIP, "text_config_dict": {"hidden_size": 32}, "vision_config_dict": None})
    assert (again.config["text"]["dim"], again.config["text"]["end"]) == (32, 49407)
    assert again.config["height"] == 64


# -- later models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [("electra", 3), ("mpnet", 3), ("modernbert", 5), ("dinov2-gated", 3), ("siglip", 6), ("camembert", 3)],
)
def test_attention_is_found_in_each_layer(name: str, count: int, tmp_path: Path) -> None:
    """SigLIP's two and three layers, and the attention that pools image features."""
    pytest.importorskip("transformers")
    from tests.hf_models import save

    save(name, tmp_path)
    explained = explain_fusion(tmp_path)
    assert explained.counts["attention"] == count
    assert "softmax" not in explained.counts


def test_modernbert_as_it_was_before_transformers_5() -> None:
    kind = {"model_type": "modernbert", "num_hidden_layers": 4}
    before = {"global_rope_theta": 500.0, "local_rope_theta": 30.0, "global_attn_every_n_layers": 2}
    now = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }
    assert configured({**kind, **before}) == configured({**kind, **now}) != configured(kind)


def test_a_sequence_that_pools_by_its_mean_counts_real_tokens_alone() -> None:
    model = modernbert.configure(
        vocab=12, dim=8, heads=2, layers=1, hidden=8, head="classifier", pooling="mean", inputs=("lengths",)
    )
    graph, rng = model.graph(), np.random.default_rng(0)
    weights = {name: rng.standard_normal(v.type.static_shape or ()) for name, v in graph.parameters.items()}
    tokens = rng.integers(0, 12, (2, 6))
    short = interpret(graph, {"tokens": tokens[:, :4], "lengths": np.array([4, 4])}, weights, float64=True)["logits"]
    padded = interpret(graph, {"tokens": tokens, "lengths": np.array([4, 4])}, weights, float64=True)["logits"]
    np.testing.assert_allclose(padded, short, rtol=1e-10)
    with pytest.raises(FrontendError, match="modernbert has no pooling 'last'"):
        modernbert.configure(pooling="last").graph()


# -- refusals --------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}
TEXT = {**SIZES, "vocab_size": 37, "max_position_embeddings": 24}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({**SIZES, "model_type": "vit", "qkv_bias": False}, "qkv_bias is False"),
        ({**SIZES, "model_type": "vit", "pooler_output_size": 12}, "pooler_output_size is 12"),
        ({**SIZES, "model_type": "vit", "patch_size": [16, 8]}, "patch_size must be one side of a square"),
        ({**SIZES, "model_type": "vit", "image_size": 8}, "patch_size must be one side of a square"),
        ({**SIZES, "model_type": "vit", "image_size": [224]}, "image_size must be a positive integer"),
        ({**SIZES, "model_type": "vit", "architectures": ["DeiTModel"]}, "architectures is ['DeiTModel']"),
        ({**SIZES, "model_type": "deit", "image_size": [224, "wide"]}, "image_size must be a positive integer"),
        ({**TEXT, "model_type": "albert", "num_hidden_groups": 2}, "num_hidden_groups is 2"),
        ({**TEXT, "model_type": "albert", "inner_group_num": 2}, "inner_group_num is 2"),
        ({**TEXT, "model_type": "roberta", "pad_token_id": -1}, "pad_token_id must be an integer from 0"),
        ({**TEXT, "model_type": "roberta", "pad_token_id": 23}, "max_position_embeddings must be an integer from 25"),
        (
            {**TEXT, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "hidden_act": "relu"},
            "hidden_act is 'relu'",
        ),
        ({**TEXT, "model_type": "mpnet", "relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64"),
        ({**TEXT, "model_type": "mpnet", "max_position_embeddings": 2}, "max_position_embeddings must be an integer"),
        ({**TEXT, "model_type": "electra", "is_decoder": True}, "is_decoder is True"),
        (
            {**TEXT, "model_type": "electra", "architectures": ["ElectraForMultipleChoice"], "summary_type": "mean"},
            "summary_type is 'mean'",
        ),
        ({**TEXT, "model_type": "camembert", "architectures": ["RobertaForCausalLM"]}, "architectures is"),
        ({"model_type": "modernbert", "classifier_pooling": "max"}, "classifier_pooling is 'max'"),
        ({"model_type": "modernbert", "rope_scaling": {"type": "linear", "factor": 2}}, "type is 'linear'"),
        ({"model_type": "modernbert", "rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "type is 'yarn'"),
        ({"model_type": "modernbert", "rope_parameters": {"sliding_attention": [1]}}, "sliding_attention must be an"),
        ({"model_type": "modernbert", "layer_types": ["full_attention"]}, "layer_types must name"),
        (
            {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "tie_word_embeddings": False},
            "tie_word_embeddings is False",
        ),
        ({"model_type": "dinov2", "image_size": [224, 196]}, "image_size must be one side of a square"),
        ({"model_type": "dinov2", "use_swiglu_ffn": "yes"}, "use_swiglu_ffn must be true or false"),
        ({"model_type": "siglip", "text_config": {"projection_size": 512}}, "embeddings of the same dimension"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "embeddings of the same dimension"),
        ({"model_type": "siglip_vision_model", "image_size": [224, 196]}, "image_size must be one side of a square"),
        ({"model_type": "clip", "text_config": []}, "text_config must be an object"),
        ({"model_type": "clip", "vision_config": {"hidden_act": "mish"}}, "hidden_act is 'mish'"),
        ({"model_type": "clip_text_model", "eos_token_id": [2]}, "eos_token_id must be an integer from 0"),
    ],
)  # fmt: skip
def test_refuses_what_it_does_not_know(config: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        configured(config)
    assert what in caught.value.what
    assert caught.value.hint or caught.value.received
