"""Matching images and texts: which of some texts says best what an image shows (Radford et al. 2021).

matcher = ImageMatcher.open(ModelOptions("folder"))
matcher.match(["photo.jpg"], ["a photo of a cat", "a photo of a dog"])[0].best.label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treadle.compiled import Compiled
from treadle.files.contained_files import PathLike
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import UsageError
from treadle.tasks.classifying import Progress
from treadle.tasks.images import ImageReader
from treadle.tasks.labelling import image_sides
from treadle.tasks.opening import Head, checked_folder
from treadle.tasks.options import ModelOptions
from treadle.tasks.scoring import Scored, best_first, softmax

HEAD = Head("match images and texts", ("CLIPModel",))
_BATCH = 8


@dataclass(frozen=True)
class Matched:
    """How well texts fit an image.

    scores        every text with its probability among all, best first
    similarities  the cosine between the image and each text, in the order in which texts were given
    """

    scores: tuple[Scored, ...]
    similarities: tuple[float, ...]

    @property
    def best(self) -> Scored:
        """The text that fits best."""
        return self.scores[0]


@dataclass(frozen=True)
class ImageMatcher:
    """A model that places images and texts side by side."""

    model: Compiled
    images: ImageReader
    tokenizer: TextTokenizer

    @classmethod
    def open(cls, options: ModelOptions) -> ImageMatcher:
        """Raises UsageError where the folder has no such model, CheckpointError for a damaged file, and as
        `compile`.
        """
        place, _ = checked_folder(options, HEAD)
        made = options.compile(["lengths"])
        reader = ImageReader.open(place, "clip", sides=image_sides(made))
        tokens = next(port for port in made.inputs if port.name == "tokens")
        symbol = tokens.type.shape[-1].as_symbol
        context = None if symbol is None else made.graph.symbols[symbol].upper
        return cls(made, reader, TextTokenizer.open(place.path, context=context))

    def match(
        self, paths: Sequence[PathLike], texts: Sequence[str], *, progress: Progress | None = None
    ) -> list[Matched]:
        """How well each text fits each image file. Raises UsageError for no image or no text, or what is no image."""
        if not paths or not texts:
            raise UsageError("matching takes an image and a text", received=f"{len(paths)} images, {len(texts)} texts")
        batch = self.tokenizer.batch(texts)
        found: list[Matched] = []
        for at in range(0, len(paths), _BATCH):
            pixels = self.images.read(paths[at : at + _BATCH])
            out = self.model(tokens=batch.ids, lengths=batch.lengths, pixels=pixels)
            near = np.asarray(out["image_embeds"]) @ np.asarray(out["text_embeds"]).T
            for scores, cosines in zip(softmax(np.asarray(out["logits_per_image"])), near, strict=True):
                found.append(Matched(best_first(scores, texts), tuple(map(float, cosines))))
            if progress is not None:
                progress(len(found))
        return found
