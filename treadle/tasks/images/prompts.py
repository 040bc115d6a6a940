"""Prompts with images: the token ids, and the model's image inputs, of a text that marks the places of its images.

    prompts = ImagePrompts.open(source, tokenizer)
    prompts.prompt("User: <image>What is this?", [prompts.read("photo.jpg")])     # token ids, and a row's inputs

A chat template writes a mark for each image. The mark is replaced by as many image tokens as the image has features, as
the processors of Hugging Face transformers do. Images are read from files or from their bytes; no address is fetched.
"""

from __future__ import annotations

import math
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from treadle.chatting.prompts import ChatPrompt
from treadle.files.shown_names import printable
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.program.image_inputs import ImageModel
from treadle.program.source import ModelSource
from treadle.reporting.counts import counted
from treadle.tasks.heads import HEADS, classes_of
from treadle.tasks.images.patches import PatchReader
from treadle.tasks.images.reading import Image, ImagePlace, ImageReader, ImageSettings, open_image
from treadle.tasks.images.tiles import TileReader

Array = npt.NDArray[Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class ReadImage:
    """A converted image.

    text      the text that replaces its mark, with one image token for each feature
    features  number of features
    arrays    the model's inputs for the image, by name; those of several images are concatenated
    grid      (rows, columns) of the features, if the model distinguishes their positions
    """

    text: str
    features: int
    arrays: Mapping[str, Array]
    grid: tuple[int, int] = (0, 0)


class ImagePrompts(ABC):
    """The images of a model's prompts.

    mark          the text that marks an image in a prompt, the name of the image token
    token         the id of the image token in the tokenizer
    embeddings    the number of the model's embeddings; the id of the image token may be larger, since its embedding is
                  not used
    default_mark  the mark if no file names the image token
    needs_token   False if GGUF files of the family may lack the image token in their vocabulary
    """

    default_mark: ClassVar[str] = "<image>"
    needs_token: ClassVar[bool] = True

    def __init__(self, source: ModelSource, tokenizer: TextTokenizer, model: ImageModel) -> None:
        self.tokenizer, self.family, self.embeddings = tokenizer, model.family, int(model.config["text"]["vocab"])
        self.mark = self.default_mark if model.token is None else tokenizer.name_of(model.token)
        found = tokenizer.id_of(self.mark)
        if found is None and model.options is not None and not self.needs_token:
            self.tokenizer, found = tokenizer.with_token(self.mark)
        if found is None or model.token not in (None, found):
            raise CheckpointError(
                f"the tokenizer has no image token {printable(self.mark)}",
                received=None if model.token is None else f"image_token_id {model.token} of config.json",
                within=printable(source.label),
            )
        self.token = found
        options = model.options
        place = source.folder if options is None else ImageSettings.of(options, model.file, self.family)
        self._open(place, model.config)

    @staticmethod
    def open(source: ModelSource, tokenizer: TextTokenizer) -> ImagePrompts | None:
        """Return the images of a model's prompts; None if the model reads no images, or has no settings for them.

        Raises CheckpointError if the settings for images do not fit the model, FrontendError if Pillow is not
        installed.
        """
        model = source.image_model
        if model is None or model.family not in _FAMILIES:
            return None
        return _FAMILIES[model.family](source, tokenizer, model)

    @staticmethod
    def check(source: ModelSource) -> None:
        """Raise UsageError if the model reads no images, CheckpointError for a damaged file. Weights are not read."""
        model = source.image_model
        if model is None or model.family not in _FAMILIES:
            if (other := _of_other_task(source)) is not None:
                raise other
            kinds = {"declaration": "a declaration", "graph": "a graph", "artifact": "an artifact"}
            kind = f"{kinds[source.kind]}, which has no settings for images" if source.kind in kinds else None
            raise without_images(printable(source.label), kind)

    @abstractmethod
    def _open(self, place: ImagePlace, config: Mapping[str, Any]) -> None:
        """Open the reader of images for a model with this configuration."""

    @abstractmethod
    def read(self, image: Image) -> ReadImage:
        """Convert an image. Raises UsageError if the file is not an image, or is too large."""

    @abstractmethod
    def memory(self, tokens: int) -> dict[str, int]:
        """Return the maximum sizes of inputs, for `session(memory=...)`, of rows of this many tokens."""

    def prompt(self, text: str, images: Sequence[ReadImage]) -> ChatPrompt:
        """Return a prompt for a text that marks its images. Special tokens are not added.

        Raises UsageError if the number of images and the number of marks differ.
        """
        parts = text.split(self.mark)
        if len(parts) - 1 != len(images):
            raise self._other_count(len(parts) - 1, len(images))
        whole = parts[0] + "".join(image.text + part for image, part in zip(images, parts[1:], strict=True))
        ids = list(self.tokenizer.encode([whole], special=False)[0][0].ids)
        if not images:
            return ChatPrompt(ids)
        (places,) = np.nonzero(np.array(ids) == self.token)
        features = sum(image.features for image in images)
        if len(places) != features:
            raise CheckpointError(
                f"the tokenizer does not encode each {printable(self.mark)} as one image token",
                received=f"{len(places)} tokens for {features} features",
            )
        index = np.zeros(len(ids), np.int64)
        index[places] = np.arange(1, features + 1)
        if self.token >= self.embeddings:
            ids = [0 if number == self.token else number for number in ids]
        joined = {name: np.concatenate([image.arrays[name] for image in images]) for name in images[0].arrays}
        return ChatPrompt(ids, {"image_index": index, **joined, **self._placed(images, index)})

    def refuse_marks(self, prompt: str | Sequence[int]) -> None:
        """Raise UsageError for a text, or for token ids, that mark an image where there are no images."""
        marks = prompt.count(self.mark if isinstance(prompt, str) else self.token)  # type: ignore[arg-type]
        if marks:
            raise self._other_count(marks, 0)

    def _other_count(self, marks: int, images: int) -> UsageError:
        mark = printable(self.mark)
        hint: str = f"one {mark} for each image, which the chat template writes"
        if not images:
            hint = Hint(
                f"describe(image, question) of t.load(MODEL), or a text without {mark}",
                f"treadle describe MODEL IMAGE QUESTION, treadle chat MODEL --image FILE, or a text without {mark}",
            )
        what = f"the text marks {counted(marks, 'image')}, and there are {images}"
        return UsageError(what, received=f"marks {mark}", hint=hint)

    def _placed(self, images: Sequence[ReadImage], index: Array) -> dict[str, Array]:
        """Return the inputs that depend on the places of the image tokens in the text."""
        return {}

    def messages(self, messages: Sequence[Message], template: str) -> list[Message]:
        """Return messages in the form that a chat template expects: lists of parts, or, for a template that places no
        images, texts that begin with a mark for each image.
        """
        if "'image'" in template or '"image"' in template:
            return [{**m, "content": _as_parts(m["content"])} for m in messages]
        return [{**m, "content": self._marked(m["content"])} for m in messages]

    def _marked(self, content: Any) -> str:
        parts = _as_parts(content)
        marks = "".join(f"{self.mark}\n" for part in parts if part["type"] == "image")
        return marks + "".join(part["text"] for part in parts if part["type"] == "text")


def _as_parts(content: Any) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


class _LlavaPrompts(ImagePrompts):
    needs_token = False

    def _open(self, place: ImagePlace, config: Mapping[str, Any]) -> None:
        sides = config["height"], config["width"]
        patch = config["vision"]["patch"]
        self.count = sides[0] // patch * (sides[1] // patch) + config["class_token"]
        self.reader = ImageReader.open(place, self.family, sides=sides)

    def read(self, image: Image) -> ReadImage:
        return ReadImage(self.mark * self.count, self.count, {"pixels": self.reader.read([image])})

    def memory(self, tokens: int) -> dict[str, int]:
        return {"N": 1 + max(1, tokens // self.count)}


class _TilePrompts(ImagePrompts):
    _FAKE, _WHOLE = "<fake_token_around_image>", "<global-img>"

    def _open(self, place: ImagePlace, config: Mapping[str, Any]) -> None:
        side, patch = config["height"], config["vision"]["patch"]
        self.count = (side // patch // config["shuffle"]) ** 2
        self.reader = TileReader.open(place, self.family, side=side)

    def read(self, image: Image) -> ReadImage:
        tiles = self.reader.tiles(open_image(image))
        features = self.mark * self.count
        text = ""
        for row in range(1, tiles.rows + 1):
            text += "".join(f"{self._FAKE}<row_{row}_col_{c}>{features}" for c in range(1, tiles.columns + 1)) + "\n"
        text += ("\n" if text else "") + f"{self._FAKE}{self._WHOLE}{features}{self._FAKE}"
        return ReadImage(text, self.count * len(tiles.pixels), {"pixels": tiles.pixels})

    def memory(self, tokens: int) -> dict[str, int]:
        return {"N": 1 + max(1, tokens // self.count)}


class _PatchPrompts(ImagePrompts):
    default_mark = "<|image_pad|>"

    def _open(self, place: ImagePlace, config: Mapping[str, Any]) -> None:
        merge = math.isqrt(config["merged"])
        self.reader = PatchReader.open(place, self.family, merge=merge, width=config["width"])

    def read(self, image: Image) -> ReadImage:
        patches = self.reader.patches(open_image(image))
        rows, columns, merge = patches.rows, patches.columns, self.reader.merge
        row, column = np.indices((rows * merge, columns * merge))
        places = np.stack([np.zeros_like(row), row, column], axis=-1)
        grouped = places.reshape(rows, merge, columns, merge, 3).transpose(0, 2, 1, 3, 4)
        arrays: dict[str, Array] = {"patches": patches.groups, "places": grouped.reshape(rows * columns, merge**2, 3)}
        return ReadImage(self.mark * (rows * columns), rows * columns, arrays, (rows, columns))

    def memory(self, tokens: int) -> dict[str, int]:
        return {"M": 1 + tokens}

    def _placed(self, images: Sequence[ReadImage], index: Array) -> dict[str, Array]:
        """Return the places with the numbers of the images, and the three positions of each token."""
        numbers = np.repeat(np.arange(len(images)), [image.features for image in images])
        places = np.concatenate([image.arrays["places"] for image in images])
        places[:, :, 0] = numbers[:, None]
        positions = np.zeros((len(index), 3), np.int64)
        at = following = 0
        for image in images:
            start = at + int((index[at:] > 0).argmax())
            positions[at:start] = (following + np.arange(start - at))[:, None]
            following += start - at
            row, column = (each.ravel() for each in np.indices(image.grid))
            at = start + image.features
            positions[start:at] = following + np.stack([np.zeros_like(row), row, column], axis=-1)
            following += max(image.grid)
        positions[at:] = (following + np.arange(len(index) - at))[:, None]
        return {"places": places, "position_ids": positions}


def _of_other_task(source: ModelSource) -> UsageError | None:
    """Return the error for a folder of a model that reads images for another task; None for any other model."""
    if source.kind != "safetensors" or not source.place.is_dir():
        return None
    label, model = printable(source.label), printable(shlex.quote(source.label))
    for head, python, command in (
        (HEADS["label"], "label(IMAGE)", f"treadle label {model} IMAGE"),
        (HEADS["match"], "match(IMAGE, [TEXT, TEXT])", f"treadle match {model} IMAGE --text TEXT --text TEXT"),
    ):
        if head.is_of(source.config):
            return UsageError(
                f"{label} answers no questions about images: it has no language model",
                received=printable(classes_of(source.config)[0]),
                hint=Hint(f"t.load({source.label!r}).{python}", f"`{command}`"),
            )
    return None


def without_images(name: str, received: str | None = None, why: str = "reads no images") -> UsageError:
    """Return the error for images and a model that reads none."""
    which = "the folder of a model that reads images, such as SmolVLM's or LLaVA's"
    return UsageError(
        f"{name} {why}",
        received=received,
        hint=Hint(
            f'{which}; or a GGUF file with its image encoder: mmproj="FILE"',
            f"{which}; or a GGUF file with its image encoder: --mmproj FILE",
        ),
    )


_FAMILIES: Mapping[str, type[ImagePrompts]] = {
    "llava": _LlavaPrompts,
    "idefics3": _TilePrompts,
    "qwen2_vl": _PatchPrompts,
}
"""The families of models that read images."""
