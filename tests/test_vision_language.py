"""Vision-language models: prompts, logits and answers equal Hugging Face's; images in chats, requests and commands."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle as t
from treadle.chatting.conversation import Conversation
from treadle.cli import app
from treadle.continuation import TextWriter
from treadle.ir.errors import CheckpointError, UsageError
from treadle.serving.models import ServedWriter
from treadle.serving.refusals import RequestRefusal
from treadle.serving.requests import Fields, Prompt, read_chat
from treadle.verifying import verify_model

Array = np.ndarray[Any, Any]

# -- models of Hugging Face --------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
for package in ("torch", "tokenizers", "PIL", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from tests.image_processors import PROCESSORS, drawn_images, pixel_distance
from tests.sharded_models import SPECIAL
from tests.vision_answers import NEAR, compare_answers
from tests.vision_models import KINDS, VisionModel, asked, image_files, save_vision_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VisionModel]:
    """Return a function that returns the saved model of a kind."""
    held: dict[str, VisionModel] = {}

    def model(kind: str) -> VisionModel:
        if kind not in held:
            held[kind] = save_vision_model(kind, tmp_path_factory.mktemp(kind))
        return held[kind]

    return model


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_hugging_face(kind: str, saved: Callable[[str], VisionModel]) -> None:
    """A sample of `python -m tests.fuzz.vision`, which compares all backends and numbers of images."""
    backend = {"qwen2_5_vl": "torch"}.get(kind, "numpy")
    for images in (0, 3) if kind == "smolvlm" else (3,):
        assert compare_answers(saved(kind), backend, images) <= NEAR


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_backends_agree_on_prompts_without_images(kind: str) -> None:
    report = verify_model(kind, backends=["numpy"], sizes=[{"N": 1, "B": 2}, {"N": 3}], **SPECIAL[kind])
    assert report.passed and "N=1" in str(report)


def test_a_second_question_about_an_image_computes_only_its_tokens(saved: Callable[[str], VisionModel]) -> None:
    talk = Conversation.open(TextWriter.open(saved("smolvlm").place, backend="numpy"), capacity=400)
    computed: list[int] = []
    prefill, prologue = talk.session.prefill, talk.session._prologue
    talk.session.prefill = lambda tokens: (computed.extend(map(len, tokens.values())), prefill(tokens))[1]  # type: ignore
    encoded: list[int] = []
    talk.session._prologue = lambda *given, **named: (encoded.append(1), prologue(*given, **named))[1]  # type: ignore
    first = list(talk.say("What?", images=image_files(1), most=4))
    held = talk.session.length(talk._row or 0)
    list(talk.say("And?", most=4))
    whole = len(talk.writer.chat_prompt(talk.template, talk.messages[:3], talk.images).ids)
    assert len(first) == 4 and len(encoded) == 1, "the image is encoded once"
    assert computed[0] > 60 and computed[1] <= whole - held + 4, computed
    assert [type(message["content"]) for message in talk.messages] == [list, str, str, str]
    talk.forget()
    assert not talk.images


@pytest.mark.parametrize(("kind", "options"), PROCESSORS)
def test_pixels_are_those_of_hugging_face(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A sample of the 50 images of `python -m tests.fuzz.vision pixels`."""
    assert pixel_distance(kind, options, drawn_images(8), tmp_path) <= 1e-5


@pytest.mark.parametrize("files", [[], image_files(2)])
def test_images_and_marks_must_agree(files: list[bytes], saved: Callable[[str], VisionModel]) -> None:
    writer = TextWriter.open(saved("llava").place, backend="numpy")
    with pytest.raises(UsageError, match=f"the text marks 1 image, and there are {len(files)}"):
        writer.chat_prompt(writer.chat_template(), asked(1), writer.read_images(files))
    with pytest.raises(UsageError, match="marks 1 image, and there are 0"):
        writer.chat_prompt(writer.chat_template(), asked(0, "an <image>, as text"))


def test_a_text_to_continue_marks_no_image(saved: Callable[[str], VisionModel]) -> None:
    """Commands, Python and the server refuse it before a token is computed."""
    place = str(saved("llava").place)
    done = CliRunner().invoke(app, ["generate", place, "x<image>", "--tokens", "2", "--backend", "numpy"])
    assert done.exit_code == 2 and "the text marks 1 image, and there are 0" in done.output
    assert "treadle describe MODEL IMAGE QUESTION, treadle chat MODEL --image FILE" in done.output
    loaded = t.load(place, backend="numpy")
    with pytest.raises(UsageError, match="marks 2 images, and there are 0") as caught:
        loaded.generate("a <image> and an <image>", most=2)
    assert str(caught.value.hint).startswith("describe(image, question) of t.load(MODEL)")
    assert loaded.generate("an image", most=2)
    assert loaded.writer.images is not None
    with pytest.raises(UsageError, match="marks 1 image"):
        loaded.writer.images.refuse_marks((3, loaded.writer.images.token))


def test_damaged_images_are_refused(saved: Callable[[str], VisionModel], tmp_path: Path) -> None:
    writer = TextWriter.open(saved("llava").place, backend="numpy")
    (tmp_path / "a.png").write_bytes(image_files(1)[0][:60])
    for wrong in (b"GIF89a", image_files(1)[0][:60], str(tmp_path / "a.png")):
        with pytest.raises(UsageError, match="is not an image that can be read"):
            writer.read_images([wrong])
    with pytest.raises(CheckpointError, match="does not exist"):
        writer.read_images([str(tmp_path / "none.png")])


def test_an_artifact_continues_text(saved: Callable[[str], VisionModel], tmp_path: Path) -> None:
    """An artifact has no settings for images."""
    t.compile(saved("smolvlm").place, backend="numpy").save(tmp_path / "m.treadle")
    writers = [TextWriter.open(place, backend="numpy") for place in (tmp_path / "m.treadle", saved("smolvlm").place)]
    made = [[piece.id for piece in writer.continued(["Hello"], most=5)] for writer in writers]
    assert made[0] == made[1]
    with pytest.raises(UsageError, match="was opened without its settings for images"):
        writers[0].read_images(image_files(1))
    report = CliRunner().invoke(app, ["explain", str(saved("smolvlm").place), "step"]).stdout
    assert "f32[R, 4*C_N-3, 32]       kept    512 B a position" in report


def test_settings_must_fit_the_model(saved: Callable[[str], VisionModel], tmp_path: Path) -> None:
    for kind, change, said in (
        ("smolvlm", {"max_image_size": {"longest_edge": 64}}, "tiles of 32 x 32 pixels"),
        ("qwen2_vl", {"patch_size": 8}, "patches must have 96 values"),
        ("llava", {"crop_size": {"height": 16, "width": 16}}, "converted to 32 x 32 pixels"),
    ):
        place = tmp_path / kind
        place.mkdir()
        for file in saved(kind).place.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        settings = place / "preprocessor_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **change}))
        with pytest.raises(CheckpointError, match=said):
            TextWriter.open(place, backend="numpy")


def test_the_commands(saved: Callable[[str], VisionModel], tmp_path: Path) -> None:
    place, file = str(saved("llava").place), tmp_path / "a.png"
    file.write_bytes(image_files(1)[0])
    words = ["describe", place, str(file), "What?", "--tokens", "5", "--backend", "numpy", "--json"]
    described = json.loads(CliRunner().invoke(app, words).stdout)
    assert described["question"] == "What?"
    assert described["answer"] == t.load(place, backend="numpy").describe(str(file), "What?", most=5)
    words = ["chat", place, "--image", str(file), "--tokens", "5", "--backend", "numpy", "--json"]
    messages = json.loads(CliRunner().invoke(app, words, input="What?\nAnd?\n").stdout)["messages"]
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert [message["content"] for message in messages[1:3]] == [described["answer"], "And?"]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_shows_images(saved: Callable[[str], VisionModel]) -> None:
    (file,) = image_files(1)
    url = "data:image/png;base64," + base64.b64encode(file).decode()
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
    wanted = read_chat(Fields({"model": "m", "messages": [{"role": "user", "content": parts}]}))
    assert wanted.images == (file,)
    writer = TextWriter.open(saved("smolvlm").place, backend="numpy")
    served = ServedWriter("m", writer, rows=1, capacity=400, queue=2)
    prompt = served.chat_prompt(wanted.messages, wanted.images)
    talk = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    plain = writer.chat_prompt(writer.chat_template(), talk, writer.read_images([file]))
    assert prompt.tokens == plain.ids and prompt.key
    with pytest.raises(RequestRefusal, match="is not an image that can be read") as caught:
        served.chat_prompt(wanted.messages, [b"no image"])
    assert (caught.value.status, caught.value.field) == (400, "messages")
    assert writer.images is not None
    for marking in (Prompt(text=f"a {writer.images.mark}"), Prompt(ids=(3, writer.images.token))):
        with pytest.raises(RequestRefusal, match="marks 1 image, and there are 0"):
            served.prompt_ids(marking)
    served.close(drain=0.0)
