"""Models of the zoo from Hugging Face folders: the results equal Hugging Face's, and folders that do not fit raise
errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from treadle.backends.registry import backend_names, find_backend
from treadle.frontends.binding import bind
from treadle.frontends.declarations import Model
from treadle.frontends.huggingface import open_checkpoint
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.models.registry import family_of
from treadle.resolving import Resolved, resolve

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.hf_models import TINY, VOCAB, Tiny, answer, save

Array = np.ndarray[Any, Any]
Run = Callable[..., Mapping[str, Array]]

TOLERANCE = 2e-5
"""Tolerance for max|a - b| / max|b|, with float32 on one side or both. float32's spacing is 1.2e-7. A sum of some tens
of products in another order is a few spacings off, and a dozen such sums follow each other. The tolerance is far
above rounding, and far below the effect of a wrong norm eps, an approximate gelu or a distance bias that is one
bucket off.
"""


# -- the same numbers ------------------------------------------------------------------------------------------


def prepare(runner: str, graph: Graph, weights: Mapping[str, Array]) -> Run:
    """Return a function that runs the graph on its inputs: by the reference in float64, or by a backend's
    executable.
    """
    if runner == "interpreter":
        return lambda **inputs: interpret(graph, inputs, weights, float64=True)
    backend = find_backend(runner)
    reason = backend.available()
    if reason is not None:
        pytest.skip(f"backend {runner}: {reason}")
    return backend.compile(graph, Target("cpu"), weights)


@dataclass(frozen=True, eq=False)
class Saved:
    """A tiny Hugging Face model, and its folder. All runners share its answers, and the model as we read it."""

    name: str
    folder: Path
    theirs: Any
    answers: dict[tuple[str, ...], dict[str, Array]] = field(default_factory=dict)
    resolved: dict[tuple[str, ...], Resolved] = field(default_factory=dict)

    def answer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        key = tuple(f"{name} {array.shape} {array.tobytes().hex()}" for name, array in inputs.items())
        if key not in self.answers:
            self.answers[key] = answer(self.theirs, inputs)
        return self.answers[key]

    def resolve(self, *inputs: str) -> Resolved:
        if inputs not in self.resolved:
            self.resolved[inputs] = resolve(self.folder, inputs=inputs, **TINY[self.name].given)
        return self.resolved[inputs]


@pytest.fixture(scope="module", params=[name for name in TINY if name != "biogpt"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    return Saved(name, folder, save(name, folder))


def draw(graph: Graph, sizes: Mapping[str, int], tiny: Tiny | None = None) -> dict[str, Array]:
    """Draw inputs of a model of the zoo for these sizes of its symbols; in each batch, one row has the full length."""
    first, padding = (0, None) if tiny is None else (tiny.first, tiny.padding)
    rng = np.random.default_rng(list(sizes.values()))
    batch, length = sizes["B"], sizes["S"]
    ranges = {"tokens": VOCAB, "decoder_tokens": VOCAB, "token_types": 3}
    drawn: dict[str, Array] = {}
    for v in graph.main.inputs:
        shape = v.type.evaluate(sizes)
        if v.name in ranges:
            drawn[v.name] = rng.integers(first if v.name == "tokens" else 0, ranges[v.name], shape)
        elif v.name == "pixels":
            drawn[v.name] = rng.standard_normal(shape, np.float32)
    if any(v.name == "lengths" for v in graph.main.inputs):
        drawn["lengths"] = rng.permutation(np.append(rng.integers(1, length + 1, batch - 1), length))
        if padding is not None:
            drawn["tokens"][np.arange(length) >= drawn["lengths"][:, None]] = padding
    return drawn


SIZES = [
    {"B": 1, "S": 1, "T": 1, "N": 2},
    {"B": 3, "S": 7, "T": 4, "N": 1},
    {"B": 2, "S": 16, "T": 24, "N": 3},
]


def assert_close(ours: Mapping[str, Array], theirs: Mapping[str, Array], case: str, real: Array | None = None) -> None:
    """Assert that each of our outputs equals Hugging Face's output of the same name; outputs [B, S, ...] are compared
    only where `real` is true.
    """
    assert ours
    assert ours.keys() <= theirs.keys()
    for name in ours:
        assert ours[name].shape == theirs[name].shape
        left, right = ours[name], theirs[name]
        if real is not None and right.ndim > 1 and right.shape[:2] == real.shape:
            left, right = left[real], right[real]
        worst = np.abs(left - right).max() / np.abs(right).max()
        assert worst < TOLERANCE, f"{name} of {case}"


def runners(name: str) -> list[str]:
    """Return the interpreter, and the backends that run a model: all for the base of each architecture; other heads
    and options take turns.
    """
    number, names = list(TINY).index(name), backend_names()
    if TINY[name].renamed:
        return ["interpreter"]
    return ["interpreter", *(names if "-" not in name else [names[number % len(names)]])]


@pytest.mark.parametrize(
    ("saved", "runner"),
    [(name, runner) for name in TINY if name != "biogpt" for runner in runners(name)],
    indirect=["saved"],
)
def test_equals_hugging_face(saved: Saved, runner: str) -> None:
    """One compilation serves every size and returns Hugging Face's outputs, for each combination of optional inputs."""
    model, tiny = saved.resolve().model, TINY[saved.name]
    assert model is not None
    optional = [i.name for i in model.declared_inputs if i.optional]
    for count in range(len(optional) + 1):
        resolved = saved.resolve(*optional[:count])
        assert resolved.weights is not None
        run = prepare(runner, resolved.graph, resolved.weights)
        for sizes in SIZES:
            inputs, real = draw(resolved.graph, sizes, tiny), None
            if tiny.windowed and "lengths" in inputs:
                real = np.arange(sizes["S"]) < inputs["lengths"][:, None]
            assert_close(run(**inputs), saved.answer(inputs), f"{', '.join(inputs)} at {sizes}", real)


def test_takes_every_tensor(saved: Saved) -> None:
    """The only unused tensors of a folder are the pooler's, if no output needs it, and DINOv2's mask token.

    All keys of the config are known, too.
    """
    resolved = saved.resolve()
    assert resolved.unread == ()
    unused = resolved.unused
    masks = [name for name in unused if name.endswith("embeddings.mask_token")]
    assert len(masks) == (1 if saved.name.startswith("dinov2") else 0)
    poolers = [name for name in unused if name not in masks]
    assert all(name.startswith("pooler.") for name in poolers)
    assert len(poolers) == (2 if saved.name in ("bert", "roberta", "albert", "vit", "deit", "mpnet") else 0)


def test_the_family_of_the_documentation(tmp_path: Path) -> None:
    """The model file that docs/models.md shows reads BioGPT and returns the same outputs as Hugging Face."""
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, "biogpt.py", "exec"), names)
    theirs = save("biogpt", tmp_path)

    checkpoint, family = open_checkpoint(tmp_path), names["FAMILY"]
    graph = family.from_config(checkpoint.config).graph()
    wanted = {name: (value.type.static_shape or (), value.type.dtype) for name, value in graph.parameters.items()}
    binding = bind(wanted, family.checkpoint(checkpoint.config), checkpoint, prefixes=family.prefixes)
    assert not binding.unused
    inputs = draw(graph, SIZES[1])
    assert_close(interpret(graph, inputs, binding.arrays, float64=True), answer(theirs, inputs), "biogpt")


def test_old_names(tmp_path: Path) -> None:
    """The first checkpoints of BERT use gamma and beta, and put `bert.` before a model without a head."""
    save("bert-pooler", tmp_path)
    new = resolve(tmp_path, head="pooler").weights
    tensors = load_file(tmp_path / "model.safetensors")
    for now, then in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {name.replace(now, then): x for name, x in tensors.items()}
    save_file({f"bert.{name}": x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    old = resolve(tmp_path, head="pooler").weights
    assert new is not None
    assert old is not None
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[name], new[name]) for name in new)


def test_separate_output(tmp_path: Path) -> None:
    """T5 1.1 has an output matrix. If its config requires the matrix, the embeddings are not used instead."""
    save("t5-gated", tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    weights = resolve(tmp_path).weights
    assert weights is not None
    assert not np.array_equal(weights["lm_head.weight"], weights["shared.weight"])
    change_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of") as caught:
        resolve(tmp_path)
    assert "lm_head.weight" in str(caught.value)


# -- folders that do not fit -----------------------------------------------------------------------------------


def change_config(folder: Path, **options: Any) -> None:
    """Set options of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def change_tensors(folder: Path, change: Callable[[dict[str, Array]], object]) -> None:
    """Change a folder's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete BERT folder, to be damaged."""
    save("bert-masked-lm", tmp_path)
    return tmp_path


def test_missing_and_misshapen_tensors_are_all_listed(folder: Path) -> None:
    def damage(tensors: dict[str, Array]) -> None:
        name = "bert.encoder.layer.1.attention.self.query.weight"
        tensors["bert.encoder.layer.1.attention.self.qeury.weight"] = tensors.pop(name)
        del tensors["cls.predictions.bias"]
        tensors["bert.embeddings.LayerNorm.weight"] = np.ones(23, np.float32)

    change_tensors(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        resolve(folder)
    text = str(caught.value)
    assert "lacks 2 of the" in text
    assert "holds 1 that do not fit" in text
    assert "nearest: bert.encoder.layer.1.attention.self.qeury.weight" in text
    assert "masked_lm.logits.bias <- cls.predictions.bias or cls.predictions.decoder.bias" in text
    assert "embeddings.norm.weight needs f32[24]; bert.embeddings.LayerNorm.weight is f32[23]" in text


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"hidden_act": "mish"}, "config.json: hidden_act is 'mish'"),
        ({"hidden_act": ["gelu"]}, "config.json: hidden_act is ['gelu']"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"architectures": ["BertLMHeadModel"]}, "architectures is ['BertLMHeadModel']"),
        ({"architectures": "BertModel"}, "architectures is 'BertModel'"),
        ({"model_type": "barts"}, "model_type is 'barts'"),
        ({"model_type": ["bert"]}, "model_type is ['bert']"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"vocab_size": True}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer up to 10000"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number"),
        ({"id2label": []}, "id2label must be an object"),
    ],
)  # fmt: skip
def test_unknown_option(folder: Path, options: dict[str, Any], what: str) -> None:
    change_config(folder, **options)
    with pytest.raises(CheckpointError) as caught:
        resolve(folder)
    assert what in caught.value.what
    assert caught.value.hint or caught.value.received


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"n_inner": "wide"}),
        ("t5", {"architectures": ["T5ForTokenClassification"]}),
        ("t5", {"feed_forward_proj": "gated-mish"}),
        ("t5", {"scale_decoder_outputs": "yes"}),
        ("t5", {"relative_attention_max_distance": 10**9}),
    ],
)
def test_unknown_option_of(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    save(name, tmp_path)
    change_config(tmp_path, **options)
    (option,) = options
    with pytest.raises(CheckpointError, match=f"config.json: {option}"):
        resolve(tmp_path)


def test_heads_that_do_not_divide_the_width(folder: Path) -> None:
    change_config(folder, num_attention_heads=5)
    with pytest.raises(FrontendError, match="a width of 24 does not split into 5 heads") as caught:
        resolve(folder)
    assert caught.value.source is not None
    assert caught.value.source.startswith("models/bert.py:")


# Published models that the families support: an architecture, and the differences from the library's defaults.
_BASE: dict[str, tuple[str, dict[str, Any]]] = {
    "albert-base": ("AlbertModel", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),
    "bart-base": ("BartForConditionalGeneration", {
        "d_model": 768, "encoder_layers": 6, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072,
        "decoder_layers": 6, "decoder_attention_heads": 12, "decoder_ffn_dim": 3072,
    }),
    "bert-base": ("BertModel", {}),
    "clip-vit-base-patch32": ("CLIPModel", {"text_config": {"eos_token_id": 2}}),
    "clip-vit-base-patch32's text": ("CLIPTextModel", {"eos_token_id": 2}),
    "clip-vit-base-patch32's images": ("CLIPVisionModel", {}),
    "dinov2-base": ("Dinov2Model", {"image_size": 518, "num_labels": 1000}),
    "distilbert-base": ("DistilBertModel", {}),
    "electra-small": ("ElectraModel", {}),
    "gpt-neox-20b": ("GPTNeoXForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama-7b": ("LlamaForCausalLM", {}),
    "ModernBERT-base": ("ModernBertModel", {}),
    "mpnet-base": ("MPNetModel", {"max_position_embeddings": 514, "layer_norm_eps": 1e-5}),
    "opt-125m": ("OPTForCausalLM", {}),
    "opus-mt": ("MarianMTModel", {
        "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
        "decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048,
        "activation_function": "swish", "scale_embedding": True,
    }),
    "roberta-base": ("RobertaModel", {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "siglip-base-patch16-224": ("SiglipModel", {}),
    "siglip-base-patch16-224's text": ("SiglipTextModel", {}),
    "siglip-base-patch16-224's images": ("SiglipVisionModel", {}),
    "t5-small": ("T5ForConditionalGeneration", {}),
    "t5-small's encoder": ("T5EncoderModel", {}),
    "vit-base-patch16-224": ("ViTModel", {"num_labels": 1000}),
    "whisper-tiny.en": ("WhisperForConditionalGeneration", {"vocab_size": 51864}),
}  # fmt: skip

# The heads of these models, besides the shared settings.
_HEADS = {
    "albert-base": ["AlbertForSequenceClassification"],
    "bert-base": ["BertForSequenceClassification"],
    "dinov2-base": ["Dinov2ForImageClassification"],
    "distilbert-base": ["DistilBertForSequenceClassification"],
    "electra-small": ["ElectraForSequenceClassification"],
    "gpt2": ["GPT2ForSequenceClassification"],
    "ModernBERT-base": ["ModernBertForMaskedLM", "ModernBertForSequenceClassification"],
    "mpnet-base": ["MPNetForSequenceClassification"],
    "roberta-base": ["RobertaForSequenceClassification"],
    "vit-base-patch16-224": ["ViTForImageClassification"],
}


@pytest.mark.parametrize("name", _BASE)
def test_a_family_without_options_is_a_model_that_there_is(name: str) -> None:
    architecture, options = _BASE[name]
    config = getattr(transformers, architecture).config_class(**options).to_dict()
    for each in (architecture, *_HEADS.get(name, ())):
        made = family_of(config).from_config(config | {"architectures": [each]})
        given = {option: value for option, value in made.config.items() if option == "head"}
        assert made.graph() == Model(made.function, given, made.optional_inputs).graph(), each


def without_one_key(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield copies of a config, each without one key, or without one key of a nested part."""
    for key, value in config.items():
        rest = {k: v for k, v in config.items() if k != key}
        yield key, rest
        if isinstance(value, dict) and key.endswith("_config"):
            yield from ((inner, {**rest, key: part}) for inner, part in without_one_key(value))


@pytest.mark.parametrize(
    "name", sorted({each.architecture: name for name, each in TINY.items() if name != "biogpt"}.values())
)
def test_a_key_that_a_config_leaves_out_has_hugging_faces_default(name: str) -> None:
    """Config files are written without the keys whose values equal the library's defaults."""
    architecture = TINY[name].architecture
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
