"""Matching images and texts: which of some texts says best what an image shows (Radford et al. 2021), or how likely
each by itself does (Zhai et al. 2023).

matcher = ImageMatcher.open(ModelOptions("folder"))
matcher.match(["photo.jpg"], ["a photo of a cat", "a photo of a dog"])[0].best.label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.compiled import Compiled
from treadle.files.contained_files import PathLike
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, UsageError
from treadle.tasks.classifying import Progress
from treadle.tasks.images import ImageReader
from treadle.tasks.labelling import image_sides
from treadle.tasks.opening import Head, checked_folder, token_positions
from treadle.tasks.options import ModelOptions
from treadle.tasks.scoring import Scored, best_first, softmax

Array = np.ndarray[Any, Any]

HEAD = Head("match images and texts", ("CLIPModel", "SiglipModel"))
_BATCH = 8
_SIGLIP_TOKENS = 64
"""To how many tokens SigLIP's texts are padded, which it was trained to read to their ends."""


@dataclass(frozen=True)
class Matched:
    """How well texts fit an image.

    scores        every text with its probability, best first: among all texts (CLIP), or of each by itself (SigLIP)
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
    """A model that places images and texts side by side.

    length   how many tokens every text is padded to; None: as many as the longest has
    padding  the token that pads it
    apart    whether texts do not exclude each other
    """

    model: Compiled
    images: ImageReader
    tokenizer: TextTokenizer
    length: int | None = None
    padding: int = 0
    apart: bool = False

    @classmethod
    def open(cls, options: ModelOptions) -> ImageMatcher:
        """Raises UsageError where the folder has no such model, CheckpointError for a damaged file, and as
        `compile`.
        """
        place, config = checked_folder(options, HEAD)
        kind = str(config.get("model_type"))
        made = options.compile(["lengths"])
        reader = ImageReader.open(place, kind, sides=image_sides(made))
        context = token_positions(made)
        if kind != "siglip":
            return cls(made, reader, TextTokenizer.open(place.path, context=context))
        length = min(_SIGLIP_TOKENS, context or _SIGLIP_TOKENS)
        tokenizer = TextTokenizer.open(place.path, max_tokens=length, context=context)
        padding = tokenizer.id_of(tokenizer.special_names.get("pad_token", "</s>"))
        if padding is None:
            raise CheckpointError(
                "the folder's vocabulary has no token that pads texts",
                hint='"pad_token": "</s>" in tokenizer_config.json',
            )
        return cls(made, reader, tokenizer, length, padding, apart=True)

    def match(
        self, paths: Sequence[PathLike], texts: Sequence[str], *, progress: Progress | None = None
    ) -> list[Matched]:
        """How well each text fits each image file. Raises UsageError for no image or no text, or what is no image."""
        if not paths or not texts:
            raise UsageError("matching takes an image and a text", received=f"{len(paths)} images, {len(texts)} texts")
        given = self._batch(texts)
        found: list[Matched] = []
        for at in range(0, len(paths), _BATCH):
            out = self.model(**given, pixels=self.images.read(paths[at : at + _BATCH]))
            near = np.asarray(out["image_embeds"]) @ np.asarray(out["text_embeds"]).T
            logits = np.asarray(out["logits_per_image"]).astype(np.float64)
            likely = 1 / (1 + np.exp(-logits)) if self.apart else softmax(logits)
            for scores, cosines in zip(likely, near, strict=True):
                found.append(Matched(best_first(scores, texts), tuple(map(float, cosines))))
            if progress is not None:
                progress(len(found))
        return found

    def _batch(self, texts: Sequence[str]) -> dict[str, Array]:
        """The texts as the model takes them."""
        batch = self.tokenizer.batch(texts)
        if self.length is None:
            return {"tokens": batch.ids, "lengths": batch.lengths}
        tokens = np.full((len(texts), self.length), self.padding, np.int64)
        for row, ids, length in zip(tokens, batch.ids, batch.lengths, strict=True):
            row[:length] = ids[:length]
        masked = "attention_mask" in self.tokenizer.input_names
        return {"tokens": tokens, "lengths": batch.lengths if masked else np.full(len(texts), self.length)}
