"""Tasks on image files: pixels, labels and matches equal the results of Hugging Face's pipelines with Pillow."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
image_module = pytest.importorskip("PIL.Image")

import treadle as t
from treadle.backends.registry import find_backend
from treadle.cli import app
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.errors import CheckpointError, UsageError
from treadle.tasks.images.patches import PatchReader
from treadle.tasks.images.reading import ImageReader
from treadle.tasks.images.tiles import TileReader

SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 0,
    "hidden_size": 20,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "intermediate_size": 30,
    "max_position_embeddings": 24,
}


@pytest.fixture(params=("numpy", "torch", "tvm"))
def backend(request: pytest.FixtureRequest) -> str:
    if reason := find_backend(request.param).available():
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Draw 50 images: in color, in grayscale, with transparency, with a palette, rotated by EXIF, small and wide;
    return their paths.
    """
    place, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for number in range(50):
        height, width = (int(side) for side in draw.integers(20, 90, 2))
        ramp = np.add.outer(np.linspace(0, 1, height), np.linspace(0, 1, width))[..., None] * draw.uniform(0, 127, 3)
        pixels = np.clip(ramp + draw.normal(0, 20, ramp.shape), 0, 255).astype(np.uint8)
        image = image_module.fromarray(pixels)
        mode = ("RGB", "L", "RGBA", "P", "RGB")[number % 5]
        suffix = "jpg" if mode == "RGB" and number % 2 else "png"
        path = place / f"{number}.{suffix}"
        exif = image_module.Exif()
        exif[0x0112] = 6 if number % 5 == 4 else 1
        image.convert(mode).save(path, exif=exif)
        paths.append(str(path))
    return paths


def spread(model: Any, scale: float) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name.lower() and name != "logit_scale":
                weight.mul_(scale)
    return model


def labelled(place: Path, kind: str, **reading: Any) -> None:
    """Save a random image classifier as a folder that describes its preprocessing."""
    torch.manual_seed(2)
    sizes = {"vision_config": SIZES} if kind == "Siglip" else SIZES
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=5)
    spread(getattr(transformers, f"{kind}ForImageClassification")(config), 3.0).save_pretrained(place)
    processor = {"image_processor_type": f"{'Bit' if kind == 'Dinov2' else kind}ImageProcessor", **reading}
    (place / "preprocessor_config.json").write_text(json.dumps(processor))


READINGS = [
    ("ViT", {"size": {"height": 32, "width": 32}}),
    ("ViT", {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "do_rescale": False}),
    ("DeiT", {"size": {"height": 40, "width": 36}, "crop_size": {"height": 32, "width": 32}}),
    ("DeiT", {"size": {"height": 24, "width": 40}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False}),
    ("Siglip", {"size": {"height": 32, "width": 32}}),
    ("Dinov2", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    (
        "Dinov2",
        {"size": {"shortest_edge": 50}, "crop_size": {"height": 48, "width": 40}},
    ),  # differs from the config's image_size
]


@pytest.mark.parametrize(("kind", "reading"), READINGS)
def test_labels_as_hugging_face(
    kind: str, reading: dict[str, Any], backend: str, images: list[str], tmp_path: Path
) -> None:
    labelled(tmp_path, kind, **reading)
    theirs = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu", top_k=5)
    for ours, wanted in zip(t.load(tmp_path, backend=backend).label(images), theirs(images), strict=True):
        assert [each.label for each in ours] == [each["label"] for each in wanted]
        np.testing.assert_allclose([each.score for each in ours], [each["score"] for each in wanted], atol=1e-5)


def test_an_image_may_be_a_path_bytes_an_array_or_an_image_of_pillow(images: list[str], tmp_path: Path) -> None:
    labelled(tmp_path, "ViT", size={"height": 32, "width": 32})
    model, path = t.load(tmp_path, backend="numpy"), images[0]
    wanted = model.label(path)
    with image_module.open(path) as image:
        array = np.asarray(image_module.open(path).convert("RGB"))
        assert model.label(image) == model.label(array) == model.label(Path(path).read_bytes()) == wanted
        assert model.label([image, array]) == model.label([path, path])
    for wrong in (array.astype(np.float32), array[..., 0], array[None]):
        with pytest.raises(UsageError, match=r"an array is an image if it has the shape \[height, width, 3\]"):
            model.label(wrong)


@pytest.mark.parametrize("size", [{"shortest_edge": 32}, {"shortest_edge": 20}])
def test_pixels_of_the_shorter_side_are_those_of_hugging_face(
    size: dict[str, int], images: list[str], tmp_path: Path
) -> None:
    reading = {"size": size, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(reading))
    ours = ImageReader.open(ModelFolder.find(tmp_path), "clip", sides=(32, 32)).read(images)
    assert_pixels(ours, transformers.CLIPImageProcessor(**reading), images)


@pytest.mark.parametrize(
    ("kind", "processor"),
    [("vit", "ViT"), ("deit", "DeiT"), ("clip", "CLIP"), ("dinov2", "Bit"), ("siglip", "Siglip")],
)
def test_a_folder_that_says_nothing_of_images_has_the_pixels_of_its_kind(
    kind: str, processor: str, images: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    ours = ImageReader.open(ModelFolder.find(tmp_path), kind, sides=(224, 224)).read(images[:2])
    assert_pixels(ours, getattr(transformers, f"{processor}ImageProcessor")(), images[:2])


def assert_pixels(ours: Any, theirs: Any, images: list[str]) -> None:
    turned = [pytest.importorskip("PIL.ImageOps").exif_transpose(image_module.open(p)).convert("RGB") for p in images]
    wanted = np.stack(theirs(turned)["pixel_values"])
    np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random CLIP, with the two vocabulary files that were used before tokenizer.json."""
    place = tmp_path_factory.mktemp("clip")
    made = pytest.importorskip("tokenizers").CharBPETokenizer(suffix="</w>", lowercase=True)
    captions = ["a photo of a cat", "a drawing of the sky, blue", "two dogs 2 play in the park"] * 3
    made.train_from_iterator(captions, vocab_size=120, suffix="</w>", special_tokens=[])
    model = json.loads(made.to_str())["model"]
    letters = [*map(chr, range(33, 127)), *(chr(c) + "</w>" for c in range(33, 127))]
    names = list(dict.fromkeys([*letters, *model["vocab"], "<|startoftext|>", "<|endoftext|>"]))
    (place / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    end = len(names) - 1
    text = {**TEXT, "vocab_size": len(names), "eos_token_id": end, "bos_token_id": end - 1}
    torch.manual_seed(4)
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=16)
    spread(transformers.CLIPModel(config), 2.0).save_pretrained(place)
    reading = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (place / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **reading})
    )
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return place


@pytest.mark.parametrize(
    ("named", "command"),
    [("CLIPModel", "match(IMAGE, [TEXT, TEXT])"), ("ViTForImageClassification", "label(IMAGE)")],
)
def test_a_model_that_reads_images_for_another_task_names_that_task(
    named: str, command: str, images: list[str], tmp_path: Path
) -> None:
    config = transformers.CLIPConfig() if named == "CLIPModel" else transformers.ViTConfig()
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": [named]}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="answers no questions about images: it has no language model") as caught:
        t.load(tmp_path).describe(images[0])
    assert caught.value.received == named
    assert caught.value.hint == f"t.load({str(tmp_path)!r}).{command}"


def test_matches_as_hugging_face(clip: Path, backend: str, images: list[str]) -> None:
    labels = ["a photo of a cat", "Blue  sky", "two dogs play in the 3rd park!", "a"]
    theirs = transformers.pipeline("zero-shot-image-classification", model=str(clip), device="cpu")
    wanted = theirs(images, candidate_labels=labels, hypothesis_template="{}")
    for ours, each in zip(t.load(clip, backend=backend).match(images, labels), wanted, strict=True):
        assert [scored.label for scored in ours.scores] == [row["label"] for row in each]
        np.testing.assert_allclose([s.score for s in ours.scores], [row["score"] for row in each], atol=1e-5)


@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "attention_mask"]])
def test_matches_each_text_by_itself_as_hugging_face(
    names: list[str], backend: str, images: list[str], tmp_path: Path
) -> None:
    """SigLIP: texts are padded to 64 tokens, which attention sees if the folder says so, and a sigmoid is applied to
    each text.
    """
    vocabulary = {name: i for i, name in enumerate(["<unk>", "</s>", "a", "photo", "of", "cat", "dog", "sky"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special)
    tokenizer.save_pretrained(tmp_path)
    text = {**TEXT, "vocab_size": len(vocabulary), "max_position_embeddings": 64, "projection_size": 24}
    torch.manual_seed(4)
    model = spread(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=SIZES)), 2.0)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-0.5)
    model.save_pretrained(tmp_path)
    reading = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(reading))
    labels = ["a photo of a cat", "dog", "sky of a " * 40, "a"]
    theirs = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path), device="cpu")
    few = images[:10]
    wanted = theirs(few, candidate_labels=labels, hypothesis_template="{}")
    for ours, each in zip(t.load(tmp_path, backend=backend).match(few, labels), wanted, strict=True):
        assert [scored.label for scored in ours.scores] == [row["label"] for row in each]
        np.testing.assert_allclose([s.score for s in ours.scores], [row["score"] for row in each], atol=1e-5)
        assert abs(sum(s.score for s in ours.scores) - 1) > 1e-3


def test_the_commands(clip: Path, images: list[str], tmp_path: Path) -> None:
    labelled(tmp_path, "ViT", size={"height": 32, "width": 32})
    run = CliRunner()
    report = json.loads(run.invoke(app, ["label", str(tmp_path), *images[:2], "--top", "2", "--json"]).stdout)
    assert [len(each["labels"]) for each in report["images"]] == [2, 2]
    best = report["images"][0]["labels"][0]
    shown = run.invoke(app, ["label", str(tmp_path), images[0], "--top", "1"]).stdout
    assert shown == f"{images[0]}: {best['label']} {best['score']:.4f}\n"
    words = ["match", str(clip), images[0], "--text", "a cat", "--text", "a dog"]
    report = json.loads(run.invoke(app, [*words, "--json"]).stdout)
    assert sum(each["score"] for each in report["images"][0]["texts"]) == pytest.approx(1)
    assert "a cat" in run.invoke(app, words).stdout


@pytest.mark.parametrize(("kind", "reading"), [READINGS[1], READINGS[-1]])
def test_an_artifact_labels_as_its_folder_does(
    kind: str, reading: dict[str, Any], images: list[str], tmp_path: Path
) -> None:
    place, file = tmp_path / "folder", tmp_path / "model.treadle"
    labelled(place, kind, **reading)
    sides = reading.get("crop_size", reading["size"])
    wanted = t.load(place, backend="numpy").label(images[:5])
    flags = [word for name, size in sides.items() for word in ("--set", f"{name}={size}")] if kind == "Dinov2" else []
    said = CliRunner().invoke(app, ["compile", str(place), "-o", str(file), "--backend", "numpy", *flags])
    assert "its settings are in the file: `label` takes it as MODEL" in said.stdout
    place.rename(tmp_path / "away")  # the file needs no other
    for ours, theirs in zip(t.load(file).label(images[:5]), wanted, strict=True):
        assert [each.label for each in ours] == [each.label for each in theirs]
        np.testing.assert_allclose([each.score for each in ours], [each.score for each in theirs], atol=1e-6)


def test_an_artifact_matches_as_its_folder_does(clip: Path, images: list[str], tmp_path: Path) -> None:
    file, labels = tmp_path / "model.treadle", ["a photo of a cat", "Blue  sky"]
    wanted = t.load(clip, backend="numpy").match(images[:3], labels)
    t.compile(clip, backend="numpy", inputs=["lengths"]).save(file)
    for ours, theirs in zip(t.load(file).match(images[:3], labels), wanted, strict=True):
        np.testing.assert_allclose([s.score for s in ours.scores], [s.score for s in theirs.scores], atol=1e-6)
    t.compile(clip, backend="numpy").save(file)
    with pytest.raises(UsageError, match="has no input lengths") as caught:
        t.load(file).match(images[:3], labels)
    assert str(caught.value.hint) == "compile it again, with inputs=['lengths']"


# -- files that are not images -----------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """Return a file whose header declares this number of black and white pixels, but that has no pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_damaged_and_hostile_files(tmp_path: Path, images: list[str]) -> None:
    labelled(tmp_path, "ViT", size={"height": 32, "width": 32})
    model, draw = t.load(tmp_path), np.random.default_rng(5)
    whole = Path(images[0]).read_bytes()
    bad = tmp_path / "bad.png"
    for number in range(60):
        data = bytearray(whole[: int(draw.integers(0, len(whole)))] if number % 2 else whole)
        for at in draw.integers(0, max(1, len(data)), 8):
            data[at : at + 1] = bytes([int(draw.integers(256))])
        bad.write_bytes(bytes(data))
        with contextlib.suppress(UsageError):  # any other error is a bug
            model.label(str(bad))
    bad.write_bytes(png(60_000, 60_000))
    with pytest.raises(UsageError, match=r"more pixels than the limit|not an image that can be read"):
        model.label(str(bad))
    bad.write_text("P1 not an image")
    with pytest.raises(UsageError, match="not an image that can be read"):
        model.label(str(bad))
    image_module.new("RGB", (20_000, 1)).save(bad)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 32})
    )
    with pytest.raises(UsageError, match="too long and narrow"):
        t.load(tmp_path).label(str(bad))


@pytest.mark.parametrize(
    "reading",
    [
        {"size": {"height": 48, "width": 32}},
        {"size": "large"},
        {"size": {"height": -1, "width": 3}},
        {"size": {"height": 32, "width": 32}, "image_mean": [1, 2]},
        {"size": {"height": 32, "width": 32}, "resample": 9},
        {"size": {"height": 32, "width": 32}, "rescale_factor": "x"},
    ],
)
def test_a_preprocessor_that_does_not_fit(reading: dict[str, Any], tmp_path: Path, images: list[str]) -> None:
    labelled(tmp_path, "ViT", **reading)
    with pytest.raises(CheckpointError, match=r"the settings for reading images|images must be converted to 32 x 32"):
        t.load(tmp_path).label(images[0])


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Siglip", "Dinov2"])
def test_a_folder_without_a_preprocessor_says_so_and_names_the_options(
    kind: str, tmp_path: Path, images: list[str]
) -> None:
    labelled(tmp_path, kind)
    settings = tmp_path / "preprocessor_config.json"
    settings.unlink()
    if kind == "Dinov2":  # its images may have the size of the defaults
        assert t.load(tmp_path, backend="numpy").label(images[0])
        return
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json") as refused:
        t.load(tmp_path, backend="numpy").label(images[0])
    assert "224" in (refused.value.received or "") and "32 x 32" in (refused.value.received or "")
    assert str(refused.value.within) == str(tmp_path)
    options, _, rest = (refused.value.hint or "").partition(" in preprocessor_config.json")
    assert rest
    settings.write_text(options)
    assert t.load(tmp_path, backend="numpy").label(images[0])


@pytest.mark.parametrize(
    ("opens", "fits"),
    [
        (lambda place: ImageReader.open(place, "clip", sides=(40, 32)), lambda made: made.sides == (40, 32)),
        (lambda place: TileReader.open(place, "idefics3", side=32), lambda made: made.side == 32),
        (
            lambda place: PatchReader.open(place, "qwen2_vl", merge=1, width=3 * 2 * 8 * 8),
            lambda made: (made.merge, made.patch) == (1, 8),
        ),
    ],
    ids=["crop", "tiles", "patches"],
)
def test_every_reader_names_the_options_that_fit(opens: Any, fits: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json") as refused:
        opens(ModelFolder.find(tmp_path))
    options = (refused.value.hint or "").partition(" in preprocessor_config.json")[0]
    (tmp_path / "preprocessor_config.json").write_text(options)
    assert fits(opens(ModelFolder.find(tmp_path)))
