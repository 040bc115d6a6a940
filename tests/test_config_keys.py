"""Keys of a config.json: read as transformers reads them, refused, known to be irrelevant, or reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.published_configs import PUBLISHED
from treadle.ir.errors import CheckpointError
from treadle.models.reading.irrelevant_keys import IRRELEVANT
from treadle.models.reading.recorded_config import RecordedConfig, layered
from treadle.models.registry import family_of

# -- keys that are read ------------------------------------------------------------------------------------------------


def test_keys_that_are_not_looked_up_are_told() -> None:
    config = RecordedConfig({"a": 1, "b": 2, "none": None, "part": {"c": 3, "d": 4}, "names": {"0": "x"}})
    assert config["a"] == 1
    assert config.get("absent", 5) == 5
    assert config["part"]["c"] == 3
    assert len(config["names"]) == 1
    assert config.unread() == [("b",), ("part", "d")]
    assert config.asked == {"a", "absent", "part", "names"}
    assert "b" in config and config.unread() == [("b",), ("part", "d")]


def test_a_key_is_found_by_its_other_names() -> None:
    aliases = {"num_hidden_layers": "n_layer"}
    for name in ("n_layer", "num_hidden_layers"):
        config = RecordedConfig({name: 3}, aliases)
        assert config["n_layer"] == config["num_hidden_layers"] == 3
        assert config.unread() == []
    assert RecordedConfig({"n_layer": 3, "num_hidden_layers": 3}, aliases)["n_layer"] == 3
    with pytest.raises(CheckpointError, match="n_layer and num_hidden_layers are two names of one"):
        RecordedConfig({"n_layer": 3, "num_hidden_layers": 4}, aliases).get("n_layer")


def test_a_layer_below_is_read_where_those_above_lack_a_key() -> None:
    above, below = RecordedConfig({"a": 1}), RecordedConfig({"a": 2, "b": 3})
    config = layered(above, below)
    assert config["a"] == 1
    assert config["b"] == 3
    assert below.unread() == [("a",)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_without_a_report(name: str) -> None:
    config = PUBLISHED[name]
    assert family_of(config).read(config).unread == ()


# -- against transformers ----------------------------------------------------------------------------------------------

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file

from tests.fuzz.config_keys import ABSENT, MODELS, Base, Case, bases, cases, fields_of, quiet, save, verdict
from treadle.resolving import resolve

DRAWN = 12
"""Number of bases in the suite, with five cases each. `python -m tests.fuzz.config_keys` runs all."""


@pytest.fixture(autouse=True, scope="module")
def silence() -> None:
    quiet()


@pytest.mark.parametrize("seed", range(DRAWN))
def test_drawn_cases_are_equal_refused_or_reported(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    names = bases(every=True)
    base = save(names[rng.integers(len(names))], tmp_path / "base")
    every = list(cases(base))
    for at in rng.choice(len(every), 5, replace=False):
        found = verdict(base, every[at], tmp_path / "case")
        assert found.outcome in ("equal", "refused", "both", "lenient", "reported"), f"{every[at]}: {found.detail}"


@pytest.mark.parametrize("name", bases())
def test_every_field_of_transformers_is_known(name: str) -> None:
    """Every field of the library's config class is read, or listed as irrelevant with a reason."""
    tiny = MODELS[name.removesuffix(" before")]
    architecture = tiny.architecture
    made = getattr(transformers, architecture).config_class(**tiny.config).to_dict()
    config = RecordedConfig(json.loads(json.dumps(made)) | {"architectures": [architecture]})
    family = family_of(config)
    aliases = family.aliases.get(made["model_type"], {})
    family.from_config(config)
    family.checkpoint(config)
    known = {*IRRELEVANT, *family.irrelevant, *config.asked, *aliases}
    assert sorted(set(fields_of(architecture)) - known) == []


def test_other_names_are_those_of_transformers() -> None:
    for name in bases():
        config_class = getattr(transformers, MODELS[name.removesuffix(" before")].architecture).config_class
        family = family_of({"model_type": config_class.model_type})
        ours = dict(family.aliases.get(config_class.model_type, {}))
        ours.pop("n_embed", None)  # Falcon's class reads this key under its old name
        assert ours == config_class.attribute_map, name


# One change each, with the outcome that it must have.
EQUAL, REFUSED, REPORTED = "equal", "refused", "reported"
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
CHANGES: list[tuple[str, str, Any, str]] = [
    ("gpt2", "is_causal", False, REFUSED),
    ("llama", "is_causal", False, REFUSED),
    ("bert", "is_causal", False, EQUAL),
    ("bert", "is_causal", True, REFUSED),
    ("t5", "is_causal", False, REFUSED),
    ("clip-text", "is_causal", False, REFUSED),
    ("llama", "rope_scaling", LINEAR, EQUAL),
    ("llama", "rope_scaling", {}, EQUAL),
    ("gpt-neox", "rope_scaling", LINEAR, EQUAL),
    ("gpt-neox", "rope_theta", 500.0, EQUAL),
    ("gpt-neox", "head_dim", 4, REFUSED),
    ("gpt-neox", "head_dim", 8, EQUAL),
    ("gpt-neox before", "rope_theta", 500.0, EQUAL),
    ("gpt-neox before", "rotary_emb_base", 500.0, EQUAL),
    ("gemma3", "attn_logit_softcapping", 3.0, EQUAL),
    ("gemma3", "rope_parameters", LINEAR, EQUAL),
    ("gemma3", "rope_scaling", {"type": "linear", "factor": 2.0}, REFUSED),
    ("gemma3 before", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, EQUAL),
    ("t5", "dense_act_fn", "silu", EQUAL),
    ("t5-gated-unscaled", "dense_act_fn", "gelu", EQUAL),
    ("modernbert", "sliding_window", 2, EQUAL),
    ("modernbert", "rope_scaling", {"rope_theta": 500.0}, EQUAL),
    ("gpt2", "num_hidden_layers", 2, REFUSED),
    ("gpt2", "num_hidden_layers", 3, EQUAL),
    ("gpt2-classifier", "num_labels", 7, "both"),
    ("llama", "per_layer_config", {"1": {"hidden_act": "gelu"}}, "both"),
    ("llama", "quantization_config", {"quant_method": "fp8"}, "both"),
    ("phi3", "num_key_value_heads", 1, "both"),
    ("falcon", "num_attention_heads", 3, "both"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return {}


@pytest.mark.parametrize(("name", "key", "value", "outcome"), CHANGES)
def test_one_key_is_changed(
    name: str, key: str, value: Any, outcome: str, folders: dict[str, Base], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if name not in folders:
        folders[name] = save(name, tmp_path_factory.mktemp("base"))
    found = verdict(folders[name], Case(name, (key,), value), tmp_path_factory.mktemp("case"))
    assert found.outcome == outcome, found.detail


def test_a_key_that_is_not_known_is_reported(tmp_path: Path) -> None:
    base = save("llama", tmp_path)
    rope = {**base.config["rope_parameters"], "mrope_section": [1, 1]}
    config = {**base.config, "sliding": 3, "nothing": None, "attention_dropout": 0.5, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve(tmp_path).unread == ("rope_parameters.mrope_section", "sliding")


@pytest.mark.parametrize(
    ("name", "config", "tied", "output"),
    [
        ("llama", {"tie_word_embeddings": True}, "model.embed_tokens.weight", "lm_head.weight"),
        ("gpt-neox", {"tie_word_embeddings": True}, "gpt_neox.embed_in.weight", "embed_out.weight"),
        ("gpt2", {}, "transformer.wte.weight", "lm_head.weight"),
        ("opt", {}, "model.decoder.embed_tokens.weight", "lm_head.weight"),
        ("bert-masked-lm", {}, "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("roberta-masked-lm", {}, "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("albert-masked-lm", {}, "albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"),
        ("distilbert-masked-lm", {}, "distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
        ("electra-generator", {}, "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
        ("mpnet-masked-lm", {}, "mpnet.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("modernbert-masked-lm", {}, "model.embeddings.tok_embeddings.weight", "decoder.weight"),
        ("bart", {}, "model.shared.weight", "lm_head.weight"),
        ("marian", {}, "model.shared.weight", "lm_head.weight"),
        ("t5", {}, "shared.weight", "decoder.embed_tokens.weight"),
        ("whisper", {}, "model.decoder.embed_tokens.weight", "proj_out.weight"),
    ],
)
def test_tied_tensors_must_agree(name: str, config: dict[str, Any], tied: str, output: str, tmp_path: Path) -> None:
    """The library ties these tensors if they are equal, or if the file has only one of them. If they differ, it does
    not.
    """
    base = save(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**base.config, **config}))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[output] = tensors[tied].copy()
    save_file(tensors, path)
    agreeing = resolve(tmp_path).weights
    assert agreeing is not None
    save_file({n: x for n, x in tensors.items() if n != tied}, path)
    alone = resolve(tmp_path).weights
    assert alone is not None
    assert all(np.array_equal(alone[each], agreeing[each]) for each in agreeing)
    tensors[output] = tensors[output] * 2
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="differ, although config") as caught:
        resolve(tmp_path)
    assert output in caught.value.what


def test_absent_is_no_value() -> None:
    assert Case("x", ("a",), ABSENT).config({"a": 1, "b": 2}) == {"b": 2}
