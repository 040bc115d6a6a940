"""Pairs of GGUF files, a language model and its image encoder (mmproj): the logits of Hugging Face's models, the images
of their folders, the choice of the second file, and errors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle as t
from treadle.cli import app
from treadle.continuation import TextWriter
from treadle.frontends.gguf_file import GGUFFile
from treadle.ir.errors import CheckpointError, UsageError
from treadle.models.clip import clip_vision
from treadle.models.llama import llama
from treadle.models.reading.mmproj_gguf import image_options
from treadle.models.siglip import siglip_vision
from treadle.program.source import ModelSource
from treadle.resolving import resolve
from treadle.serving.models import ServedWriter
from treadle.tasks.images.prompts import _FAMILIES, ImagePrompts
from treadle.tasks.images.reading import ImageReader, ImageSettings
from treadle.tasks.images.tiles import TileReader

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
for package in ("torch", "tokenizers", "PIL", "jinja2", "gguf"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from tests.fuzz.gguf_files import Sizes, judge, mutations, tensors, write_model
from tests.gguf_pairs import LANGUAGE, PROJECTOR, PairForm, write_pair
from tests.vision_answers import NEAR, compare_answers
from tests.vision_models import VisionModel, asked, image_files, save_vision_model

Pair = Callable[..., tuple[VisionModel, Path]]

CLIP = "clip.vision."
PLAIN = PairForm()


def encoder_of(language: Path) -> GGUFFile:
    """Return the image encoder of a pair."""
    return GGUFFile.open(language.parent / PROJECTOR)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Return a function that returns a model of a kind and its pair of files in a form."""
    models: dict[str, VisionModel] = {}
    files: dict[Any, Path] = {}

    def made(kind: str, form: PairForm = PLAIN) -> tuple[VisionModel, Path]:
        if kind not in models:
            models[kind] = save_vision_model(kind, tmp_path_factory.mktemp(kind), wide=True)
        if (kind, form) not in files:
            files[kind, form] = write_pair(models[kind], tmp_path_factory.mktemp("pair"), form)
        return models[kind], files[kind, form]

    return made


@pytest.fixture
def copied(pair: Pair, tmp_path: Path) -> Path:
    """Return the language model of a pair in a folder of its own."""
    for name in (LANGUAGE, PROJECTOR):
        shutil.copy(pair("llava")[1].parent / name, tmp_path / name)
    return tmp_path / LANGUAGE


# -- the same model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "form", "images"),
    [("llava", PairForm("F16", is_older=True), 1), ("smolvlm", PairForm(), 3), ("smolvlm", PairForm("Q8_0"), 1)],
)
def test_answers_are_those_of_hugging_face(kind: str, form: PairForm, images: int, pair: Pair) -> None:
    """A sample of `python -m tests.fuzz.vision pairs`."""
    made, place = pair(kind, form)
    write_pair(made, place.parent, form)  # again, since the model's weights become those of the latest form
    assert compare_answers(made, "numpy", images, place) <= NEAR


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_a_pair_is_the_model_of_its_folder(kind: str, pair: Pair) -> None:
    made, place = pair(kind)
    read, folder = (resolve(each) for each in (place, made.place))
    configs = [each.model.config for each in (read, folder) if each.model is not None]
    encoder = clip_vision if kind == "llava" else siglip_vision
    text, vision = (
        [{**part.defaults, **config[name]} for config in configs]
        for name, part in (("text", llama), ("vision", encoder))
    )
    assert [each.pop("layout") for each in text] == ["interleaved", "half"], "the order of rotated dimensions"
    for name in ("rotary_dims", "head_dim", "longest"):  # the files write what the folder leaves out
        assert {each.pop(name) for each in text} <= {None, 8}
    for part in (text, vision):
        assert part[0].pop("eps") == np.float32(part[1].pop("eps"))
        assert part[0] == part[1]
    assert all(configs[1][name] == value for name, value in configs[0].items() if name not in ("text", "vision"))
    shapes = [{name: value.type.shape for name, value in each.graph.parameters.items()} for each in (read, folder)]
    assert shapes[0] == shapes[1]

    prompts = []
    for source in (ModelSource.open(place), ModelSource.open(made.place)):
        images = ImagePrompts.open(source, source.tokenizer(cut=False))
        assert images is not None
        prompts.append(images.prompt("a <image> b <image>", [images.read(file) for file in image_files(2)]))
    assert prompts[0].ids == prompts[1].ids
    for name, array in prompts[1].inputs.items():
        assert np.array_equal(array, prompts[0].inputs[name]), name


def test_a_vocabulary_without_an_image_token(pair: Pair) -> None:
    """LLaVA's own vocabulary has none: the tokenizer gets one, whose embedding is not read."""
    prompts, logits = [], []
    for form in (PairForm(), PairForm(has_mark=False)):
        writer = TextWriter.open(pair("llava", form)[1], backend="numpy")
        prompt = writer.chat_prompt(writer.chat_template(), asked(1), writer.read_images(image_files(1)))
        session = writer.session(rows=1, capacity=len(prompt.ids))
        row = session.open(**prompt.inputs)
        logits.append(session.prefill({row: prompt.ids})[row])
        prompts.append(prompt)
    index = prompts[0].inputs["image_index"]
    assert np.array_equal(index, prompts[1].inputs["image_index"]) and (index > 0).sum() == 16
    assert {*np.array(prompts[1].ids)[index > 0]} == {writer.tokenizer.with_token("<image>")[1]}
    assert [n for n, i in zip(prompts[0].ids, index, strict=True) if not i] == [
        n for n, i in zip(prompts[1].ids, index, strict=True) if not i
    ]
    assert np.array_equal(logits[0], logits[1])
    source = ModelSource.open(pair("llava", PairForm(has_mark=False))[1])
    model = source.image_model
    assert model is not None
    few = replace(model, config={**model.config, "text": {**model.config["text"], "vocab": 270}})
    images = _FAMILIES["llava"](source, source.tokenizer(cut=False), few)
    ids = images.prompt("a<image>", [images.read(image_files(1)[0])]).ids
    assert ids[1:] == [0] * 16, "an id that the model has an embedding for"
    with pytest.raises(CheckpointError, match="the tokenizer has no image token <image>"):
        TextWriter.open(pair("smolvlm", PairForm(has_mark=False))[1], backend="numpy")


def test_keys_of_other_versions(pair: Pair, tmp_path: Path) -> None:
    """The first files have no projector type, later ones may have it under another name."""
    for keys in ({"clip.has_llava_projector": True}, {f"{CLIP}projector_type": "mlp"}):
        path = write_pair(pair("llava")[0], tmp_path, keys={"clip.projector_type": None, **keys})
        assert resolve(path).name == "llava"


def test_a_pair_with_qwen2(copied: Path) -> None:
    sizes = Sizes(architecture="qwen2")
    copied.unlink()
    write_model(copied, sizes, tensors(sizes))
    found = resolve(copied)
    assert found.name == "llava" and found.model is not None and found.model.config["text"]["layout"] == "half"


def test_weights_in_blocks_stay_in_blocks(pair: Pair) -> None:
    found = resolve(pair("smolvlm", PairForm("Q8_0"))[1])
    types = {name: str(value.type) for name, value in found.graph.parameters.items()}
    for name in ("vision.layer.0.mlp.up.weight", "connector.weight", "text.layer.0.attn.q.weight"):
        assert types[name].endswith("as q8_0"), name
    assert found.blocks["vision.embeddings.patch.weight"] == "f16" and not found.unused
    decoded = resolve(pair("smolvlm", PairForm("Q8_0"))[1], widen=["blocks"])
    assert all(" as " not in str(value.type) for value in decoded.graph.parameters.values())


def test_images_are_read_as_the_file_specifies(pair: Pair, tmp_path: Path) -> None:
    keys = {f"{CLIP}image_mean": [0.5, 0.25, 0.5], f"{CLIP}image_aspect_ratio": "pad"}
    options = image_options(encoder_of(write_pair(pair("llava")[0], tmp_path, keys=keys)))
    reader = ImageReader.open(ImageSettings.of(options, "file", "llava"), "llava", sides=(32, 32))
    assert (reader.mean, reader.square, reader.size, reader.crop) == ((0.5, 0.25, 0.5), True, 32, (32, 32))
    for longest in (None, 64):
        keys = {f"{CLIP}preproc_image_size": longest}
        options = image_options(encoder_of(write_pair(pair("smolvlm")[0], tmp_path, keys=keys)))
        tiles = TileReader.open(ImageSettings.of(options, "file", "idefics3"), "idefics3", side=32)
        assert (tiles.size, tiles.side) == (longest or 4 * 32, 32)


# -- the second file ---------------------------------------------------------------------------------------------------


def test_the_image_encoder_next_to_a_model_is_found(copied: Path) -> None:
    assert resolve(copied).name == "llava"
    assert ModelSource.open(copied, mmproj="none").resolve().name == "llama"
    encoder = (copied.parent / PROJECTOR).rename(copied.parent / "encoder.gguf")
    assert resolve(copied).name == "llama"
    assert ModelSource.open(copied, mmproj=encoder).resolve().name == "llava"


def test_several_image_encoders_are_listed(copied: Path) -> None:
    shutil.copy(copied.parent / PROJECTOR, copied.parent / "mmproj-f16.gguf")
    with pytest.raises(UsageError, match="there are 2 image encoders next to") as caught:
        resolve(copied)
    assert caught.value.received == f"mmproj-f16.gguf, {PROJECTOR}"
    assert "--mmproj FILE, one of them; or --mmproj none" in caught.value.hint.command  # type: ignore[union-attr]
    assert ModelSource.open(copied, mmproj=copied.parent / PROJECTOR).resolve().name == "llava"


def test_a_link_out_of_the_folder_is_not_followed(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "encoder.gguf"
    shutil.move(copied.parent / PROJECTOR, outside)
    (copied.parent / PROJECTOR).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the model's folder"):
        resolve(copied)
    assert ModelSource.open(copied, mmproj=outside).resolve().name == "llava"


def test_a_damaged_image_encoder_is_named(copied: Path, tmp_path: Path) -> None:
    (copied.parent / PROJECTOR).write_bytes(b"GGUF")
    for source in (ModelSource.open(copied), ModelSource.open(copied, mmproj=tmp_path / "absent.gguf")):
        with pytest.raises(CheckpointError) as caught:
            source.resolve()
        assert caught.value.what in ("the file ends too early", "the file does not exist")
        assert str(caught.value.hint).endswith('; or mmproj="none" reads the language model alone')
    assert ModelSource.open(copied, mmproj="none").resolve().name == "llama"


def test_links_in_a_hub_cache_are_followed(copied: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / "1").mkdir(parents=True)
    for name in (LANGUAGE, PROJECTOR):
        shutil.move(tmp_path / name, root / "blobs" / name[:3])
        (root / "snapshots" / "1" / name).symlink_to(Path("../../blobs") / name[:3])
    assert resolve(root / "snapshots" / "1" / LANGUAGE).name == "llava"


def test_files_that_change_are_refused(copied: Path) -> None:
    source = ModelSource.open(copied)
    source.resolve()
    data = (copied.parent / PROJECTOR).read_bytes()
    (copied.parent / PROJECTOR).write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="the file has changed since it was opened") as caught:
        source.check()
    assert PROJECTOR in (caught.value.within or "")


def test_only_a_gguf_file_takes_an_image_encoder(pair: Pair) -> None:
    made, place = pair("llava")
    with pytest.raises(UsageError, match="only a GGUF file has its image encoder in another file"):
        t.compile(made.place, mmproj=place.parent / PROJECTOR)
    with pytest.raises(UsageError, match="the image encoder of an opened model is chosen when it is opened"):
        t.compile(ModelSource.open(place), mmproj="none")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key", "value", "what"),
    [
        ("llava", "clip.projector_type", "ldp", "clip.projector_type is not supported"),
        ("llava", "clip.projector_type", None, "clip.projector_type is missing"),
        ("llava", "clip.has_vision_encoder", False, "clip.has_vision_encoder must be true"),
        ("llava", "clip.use_silu", True, "clip.use_silu must not be true if clip.use_gelu is"),
        ("llava", f"{CLIP}image_grid_pinpoints", [336, 672], "is not supported: images in several resolutions"),
        ("llava", f"{CLIP}mm_patch_merge_type", "spatial_unpad", "mm_patch_merge_type is not supported"),
        ("llava", f"{CLIP}feature_layer", [1, 2], "is not supported: features of several layers"),
        ("llava", f"{CLIP}feature_layer", [4], "must be a number from 1 to 3"),
        ("llava", f"{CLIP}feature_layer", [1.5], "must be a number from 1 to 3"),
        ("llava", f"{CLIP}block_count", 400, "is larger than the file's number of tensors allows"),
        ("llava", f"{CLIP}patch_size", 33, "must be at most the image's side, 32"),
        ("llava", f"{CLIP}patch_size", 16, "the checkpoint holds"),
        ("llava", f"{CLIP}image_size", 1 << 20, "must be an integer from 1 to 16384"),
        ("llava", f"{CLIP}attention.head_count", 5, "must divide the embedding's length, 32"),
        ("llava", f"{CLIP}attention.layer_norm_epsilon", None, "is missing from the metadata"),
        ("llava", f"{CLIP}feed_forward_length", 32, "must differ from the embedding's length"),
        ("smolvlm", f"{CLIP}projector.scale_factor", 3, "must divide the 8 patches of an image's side"),
        ("smolvlm", f"{CLIP}projector.scale_factor", 2, "the checkpoint holds"),
    ],
)
def test_metadata_that_does_not_fit(kind: str, key: str, value: Any, what: str, pair: Pair, tmp_path: Path) -> None:
    keys = {key: value}
    if key.endswith("use_silu"):
        keys["clip.use_gelu"] = True
    path = write_pair(pair(kind)[0], tmp_path, keys=keys)
    with pytest.raises(CheckpointError) as caught:
        resolve(path)
    assert what in caught.value.what
    assert PROJECTOR in (caught.value.within or "")
    assert "--mmproj none reads the language model alone" in caught.value.hint.command  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("image_mean", None, "image_mean is missing"),
        ("image_std", [0.5, 0.0, 0.5], "image_std must be three numbers above 0"),
        ("image_mean", [0.5, float("nan"), 0.5], "image_mean must be three numbers"),
        ("image_mean", [0.5, 0.5], "image_mean must be three numbers"),
        ("image_aspect_ratio", "anyres", "image_aspect_ratio is not supported"),
    ],
)
def test_settings_for_images_that_do_not_fit(key: str, value: Any, what: str, pair: Pair, tmp_path: Path) -> None:
    path = write_pair(pair("llava")[0], tmp_path, keys={f"{CLIP}{key}": value})
    with pytest.raises(CheckpointError, match=what) as caught:
        image_options(encoder_of(path))
    assert f"key {CLIP}{key}" in (caught.value.within or "")


def test_a_missing_tensor_is_named(pair: Pair, tmp_path: Path) -> None:
    for tensor in ("v.class_embd", "mm.2.weight", "v.blk.1.ffn_down.weight"):
        with pytest.raises(CheckpointError) as caught:
            resolve(write_pair(pair("llava")[0], tmp_path, without=tensor))
        assert tensor.replace(".1.", ".{i}.") in str(caught.value) or tensor in str(caught.value)
        assert PROJECTOR in (caught.value.within or "")


@pytest.mark.parametrize("tensor", ["v.post_ln.weight", "mm.3.weight", "model.image_newline"])
def test_models_that_resemble_llava_are_refused(tensor: str, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tensor} is not supported: a ") as caught:
        resolve(write_pair(pair("llava")[0], tmp_path, also=tensor))
    assert f"tensor {tensor}" in (caught.value.within or "")


def test_files_of_two_models(copied: Path, tmp_path: Path) -> None:
    wide, other = tmp_path / "wide.gguf", tmp_path / "other.gguf"
    for path, sizes in ((wide, Sizes(dim=64)), (other, Sizes(architecture="phi3"))):
        write_model(path, sizes, tensors(sizes))
    for language, what in (
        (wide, "the image encoder belongs to another language model"),
        (other, r"general\.architecture is not supported for a model that reads images"),
    ):
        with pytest.raises(CheckpointError, match=what) as caught:
            resolve(language)
        assert str(language) in str(caught.value) and PROJECTOR in str(caught.value)
        assert "--mmproj none reads the language model alone" in caught.value.hint.command  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"general\.architecture must be clip"):
        ModelSource.open(copied, mmproj=wide).resolve()
    with pytest.raises(CheckpointError, match="is that of an image encoder") as caught:
        resolve(copied.parent / PROJECTOR)
    assert "this file as --mmproj" in caught.value.hint.command  # type: ignore[union-attr]


def test_mutations(pair: Pair, tmp_path: Path) -> None:
    """60 damaged image encoders; `python -m tests.fuzz.gguf_files --pairs` reads more of the same kind."""
    language, outcomes = pair("smolvlm")[1], set()
    files = [encoder_of(pair(kind)[1]).file.path for kind in ("llava", "smolvlm")]
    damaged = mutations(60, 3, [Path(file).read_bytes() for file in files])
    for number, (kind, file) in enumerate(damaged):
        verdict = judge(file, tmp_path / f"{number}.gguf", language)
        assert verdict.failure is None, f"mutation {number} ({kind}): {verdict.failure}"
        outcomes.add(verdict.outcome)
    assert outcomes >= {"read", "opening", "model"}


def test_images_without_an_image_encoder(copied: Path) -> None:
    (copied.parent / PROJECTOR).unlink()
    with pytest.raises(UsageError, match="llama reads no images") as caught:
        TextWriter.open(copied, backend="numpy").read_images(image_files(1))
    assert '; or a GGUF file with its image encoder: mmproj="FILE"' in str(caught.value.hint)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_the_commands(pair: Pair, tmp_path: Path) -> None:
    place, file = pair("llava")[1], tmp_path / "a.png"
    file.write_bytes(image_files(1)[0])
    words = ["describe", str(place), str(file), "What?", "--tokens", "5", "--backend", "numpy", "--json"]
    described = json.loads(CliRunner().invoke(app, words).stdout)["answer"]
    model = t.load(place, backend="numpy", mmproj=place.parent / PROJECTOR)
    assert described == model.describe(str(file), "What?", most=5)
    (data,) = image_files(1)
    served = ServedWriter("m", model.writer, rows=1, capacity=300, queue=2)
    assert served.chat_prompt(asked(1, "What?"), [data]).tokens.count(model.writer.tokenizer.id_of("<image>")) == 16
    served.close(drain=0.0)
    assert CliRunner().invoke(app, ["inspect", str(place)]).stdout.startswith("# llava optimized")
    shown = CliRunner().invoke(app, ["inspect", str(place), "--mmproj", "none"]).stdout
    assert shown.startswith("# llama optimized")


def test_tasks_of_the_language_model_alone(pair: Pair, tmp_path: Path) -> None:
    place = pair("llava")[1]
    with pytest.raises(UsageError, match="it is not a causal language model of tokens alone") as caught:
        t.load(place, backend="numpy").perplexity("Hello")
    assert 'mmproj="none" reads the language model alone' in str(caught.value.hint)
    assert t.load(place, backend="numpy", mmproj="none").perplexity("Hello").tokens == 4
