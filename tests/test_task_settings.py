"""A folder's settings for a task: for each setting the extreme accepted value, the first rejected value, and the
default.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.errors import CheckpointError, UsageError
from treadle.runtime.beams import Beams
from treadle.runtime.token_rules import TokenRules
from treadle.tasks import rewriting
from treadle.tasks.generation_settings import GenerationSettings
from treadle.tasks.images.reading import ImageReader, _middle, open_image
from treadle.tasks.labelling import ImageLabeller, image_kind
from treadle.tasks.opening import read_labels

# -- settings of generation --------------------------------------------------------------------------------------------


def settings(
    place: Path, said: dict[str, Any], config: dict[str, Any] | None = None, **task: Any
) -> GenerationSettings:
    """Return the settings of a folder whose generation_config.json is `said`."""
    (place / "config.json").write_text("{}")
    (place / "generation_config.json").write_text(json.dumps(said))
    return GenerationSettings.read(ModelFolder.find(place), config or {}, task)


def test_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert settings(tmp_path, {}) == GenerationSettings(None, (), None, None, TokenRules())


def test_special_tokens_alone_are_config_jsons_where_there_is_the_other_file(tmp_path: Path) -> None:
    config = {"eos_token_id": 3, "bos_token_id": 4, "num_beams": 5, "max_length": 9}
    assert settings(tmp_path, {}, config) == GenerationSettings(4, (3,), None, None, TokenRules())
    assert settings(tmp_path, {"eos_token_id": [7, 8]}, config | {"decoder_start_token_id": [6]}).end == (7, 8)
    (tmp_path / "generation_config.json").unlink()
    found = GenerationSettings.read(ModelFolder.find(tmp_path), config)
    assert found == GenerationSettings(4, (3,), 8, Beams(5), TokenRules())


@pytest.mark.parametrize(
    ("said", "most"),
    [
        ({"max_new_tokens": 7, "max_length": 3}, 7), ({"max_length": 7}, 6), ({"max_length": 1}, None),
        ({"max_length": 0}, None), ({"max_new_tokens": 0}, None), ({"max_new_tokens": 1}, 1),
        ({"max_length": 2**20}, 2**20 - 1),
    ],
)  # fmt: skip
def test_how_many_tokens_at_most(said: dict[str, Any], most: int | None, tmp_path: Path) -> None:
    """max_length includes the start token of the decoder, so that one is subtracted."""
    assert settings(tmp_path, said).most == most


def test_a_task_goes_before(tmp_path: Path) -> None:
    said = {"max_new_tokens": 7, "num_beams": 2}
    assert settings(tmp_path, said, num_beams=3).most == 7
    found = settings(tmp_path, said, max_length=5, num_beams=3)
    assert (found.most, found.beams) == (4, Beams(3))


@pytest.mark.parametrize(
    ("said", "rules"),
    [
        ({"min_length": 5}, TokenRules(shortest=5)),
        ({"min_length": 5, "min_new_tokens": 6}, TokenRules(shortest=5, fewest=6)),
        ({"min_length": 0}, TokenRules()),
    ],
)
def test_how_many_tokens_at_least(said: dict[str, Any], rules: TokenRules, tmp_path: Path) -> None:
    """min_length includes the start token of the decoder; min_new_tokens does not."""
    assert settings(tmp_path, said).rules == rules


@pytest.mark.parametrize(
    ("said", "early"), [(True, True), (False, False), ("never", "never"), ("always", False), (None, False)]
)
def test_when_a_search_ends(said: object, early: object, tmp_path: Path) -> None:
    found = settings(tmp_path, {"num_beams": 2, "early_stopping": said, "length_penalty": -99})
    assert found.beams == Beams(2, length_penalty=-99, early=early)  # type: ignore[arg-type]


def test_rules_of_each_token(tmp_path: Path) -> None:
    said = {
        "repetition_penalty": 1e-6, "no_repeat_ngram_size": 2**20, "bad_words_ids": [[5], [6], [3], [3, 4]],
        "eos_token_id": 3,
        "suppress_tokens": [6, 7], "forced_bos_token_id": 0, "forced_eos_token_id": [2**31 - 1],
        "begin_suppress_tokens": 9,
    }  # fmt: skip
    found = settings(tmp_path, said).rules
    assert found == TokenRules(1e-6, 0.0, 2**20, (5, 6, 7), ((3, 4),), 0, 0, 0, 2**31 - 1, (9,))


@pytest.mark.parametrize(
    "said",
    [
        {"num_beams": 0}, {"num_beams": 513}, {"num_beams": True}, {"num_beams": 2.0}, {"max_length": 2**20 + 1},
        {"max_length": -1}, {"no_repeat_ngram_size": -1}, {"no_repeat_ngram_size": 2**20 + 1}, {"min_length": -1},
        {"min_length": 2**20 + 1}, {"min_new_tokens": -1}, {"min_new_tokens": 2**20 + 1}, {"repetition_penalty": 0},
        {"repetition_penalty": 100}, {"repetition_penalty": True}, {"length_penalty": -100}, {"length_penalty": 100},
        {"length_penalty": "x"}, {"forced_bos_token_id": 2**31}, {"forced_bos_token_id": -1},
        {"forced_bos_token_id": [1, 2]},
        {"eos_token_id": True}, {"eos_token_id": [1, "x"]}, {"bad_words_ids": [5]}, {"bad_words_ids": [[]]},
        {"bad_words_ids": {"a": [1]}}, {"suppress_tokens": [True]},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_contents(said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        settings(tmp_path, said)
    ((name, value),) = said.items()
    assert caught.value.what.startswith(f"{name} must be")
    assert caught.value.received == printable(repr(value), 100)
    assert "generation_config.json" in str(caught.value.within)


def test_the_most_beams(tmp_path: Path) -> None:
    found = settings(tmp_path, {"num_beams": 512})
    assert found.beams is not None and found.beams.count == 512


@pytest.mark.parametrize(
    ("most", "said", "context", "count"),
    [(None, None, None, 128), (3, 9, None, 3), (None, 9, None, 9), (None, 9, 5, 5), (5, None, 5, 5), (1, None, 5, 1)],
)
def test_how_many_tokens_a_text_gets(most: int | None, said: int | None, context: int | None, count: int) -> None:
    model: Any = SimpleNamespace(name="m", derived=SimpleNamespace(context=context))
    asked = GenerationSettings(0, (), said, None, TokenRules())
    assert rewriting._most_tokens(most, asked, model) == count


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [{}, [], "x", {"0": 1}, {"1": "a"}, {"0": "a", "2": "b"}, {"a": "b"}], ids=str)
def test_labels_are_named_from_0_on(found: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: id2label must"):
        read_labels({"id2label": found})


def test_labels_without_names() -> None:
    assert read_labels({}) == ("LABEL_0", "LABEL_1")
    assert read_labels({"id2label": {"1": "b", "0": "a"}}) == ("a", "b")


def test_images_are_read_eight_at_a_time() -> None:
    read: list[int] = []
    images: Any = SimpleNamespace(read=lambda paths: read.append(len(paths)) or np.zeros(len(paths)))
    report: list[int] = []
    model: Any = lambda pixels: {"logits": np.zeros((len(pixels), 2))}  # noqa: E731
    found = ImageLabeller(model, images, ("a", "b"), {}).label(["x.png"] * 17, progress=report.append)
    assert (read, report, len(found)) == ([8, 8, 1], [8, 16, 17], 17)


@pytest.mark.parametrize(("kind", "read"), [("clip", "clip"), ("swin", "vit"), (None, "vit")])
def test_images_of_a_kind_that_is_not_known_are_read_as_vits(kind: str | None, read: str) -> None:
    assert image_kind({"model_type": kind}) == read
    assert image_kind({}) == "vit"


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ({"resample": 0}, True), ({"resample": 5}, True), ({"resample": 6}, False), ({"resample": -1}, False),
        ({"resample": True}, False), ({"size": 1}, True), ({"size": 0}, False), ({"size": 2**14}, True),
        ({"size": 2**14 + 1}, False), ({"size": {"shortest_edge": 0}}, False),
        ({"size": {"shortest_edge": 2**14}}, True),
        ({"size": {"shortest_edge": 2**14 + 1}}, False), ({"size": {"height": 2**14, "width": 1}}, True),
        ({"size": {"height": 1, "width": 2**14 + 1}}, False), ({"size": {"height": 0, "width": 1}}, False),
        ({"size": {"height": 1}}, False), ({"image_mean": [0, 0, 0, 0]}, False), ({"image_std": "x"}, False),
        ({"size": True}, False), ({"size": 3.0}, False),
    ],
    ids=str,
)  # fmt: skip
def test_how_images_may_be_read(said: dict[str, Any], good: bool, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    if good:
        ImageReader.open(ModelFolder.find(tmp_path), "vit")
        return
    with pytest.raises(CheckpointError, match="the settings for reading images are invalid"):
        ImageReader.open(ModelFolder.find(tmp_path), "vit")


def test_defaults_of_incomplete_folders(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "config.json").write_text("{}")
    half = (0.5, 0.5, 0.5)

    def reader(kind: str, **said: Any) -> ImageReader:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        return ImageReader.open(ModelFolder.find(tmp_path), kind)

    assert reader("vit") == ImageReader((224, 224), 2, None, 1 / 255, half, half)
    assert reader("siglip") == ImageReader((224, 224), 3, None, 1 / 255, half, half)
    assert reader("deit") == ImageReader((256, 256), 3, (224, 224), 1 / 255, half, half)
    clip = reader("clip")
    assert (clip.size, clip.resample, clip.crop, clip.sides) == (224, 3, (224, 224), (224, 224))
    assert clip == reader("dinov2")
    plain = reader("vit", do_resize=False, do_rescale=False, do_normalize=False)
    assert plain == ImageReader(None, 2, None, 1.0, None, None)
    assert plain.sides is None and reader("clip", do_center_crop=False).sides is None
    assert reader("vit", do_center_crop=True, crop_size=5, size=9, rescale_factor=0.5) == ImageReader(
        (9, 9), 2, (5, 5), 0.5, half, half
    )


def test_the_middle_of_an_image() -> None:
    """If the numbers of rows to crop or to pad are odd, cropping removes one more at the end, and padding adds one more
    black row at the start.
    """
    row = np.arange(1, 6)[None, None, :].repeat(3, axis=0)
    assert _middle(row, (1, 2))[0].tolist() == [[2, 3]]
    assert _middle(row, (1, 5))[0].tolist() == [[1, 2, 3, 4, 5]]
    assert _middle(row, (2, 8))[0].tolist() == [[0] * 8, [0, 0, 1, 2, 3, 4, 5, 0]]


def test_an_image_of_another_format_is_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (16, 16))
    for name, good in (("a.bmp", True), ("a.gif", True), ("a.ico", False), ("a.tga", False)):
        image.save(tmp_path / name)
        if good:
            assert open_image(tmp_path / name).size == (16, 16)
            continue
        with pytest.raises(UsageError, match="the file is not an image that can be read"):
            open_image(tmp_path / name)


def test_how_long_and_how_large_an_image_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    reader = ImageReader(1, 2, None, 1.0, None, None)
    for length, good in ((2**14, True), (2**14 + 1, False)):
        for side in ((length, 1), (1, length)):
            image.new("RGB", side).save(tmp_path / "a.png")
            if good:
                assert reader.read([tmp_path / "a.png"]).shape[2:] == side[::-1]
                continue
            with pytest.raises(UsageError, match="too long and narrow") as caught:
                reader.read([tmp_path / "a.png"])
            assert caught.value.received == f"{side[0]} x {side[1]} pixels"
    for width, good in ((10_000, True), (10_001, False)):
        opened = SimpleNamespace(width=width, height=10_000, convert=lambda mode: mode)
        monkeypatch.setattr("PIL.Image.open", lambda *_, **__: opened)  # noqa: B023
        monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: image)
        if good:
            assert open_image(tmp_path / "a.png") == "RGB"
            continue
        with pytest.raises(UsageError, match="more pixels than the limit") as caught:
            reader.read([tmp_path / "a.png"])
        assert caught.value.received == "10001 x 10000, limit 100000000"
