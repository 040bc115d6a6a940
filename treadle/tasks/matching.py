"""Match images and texts: the probability that a text describes an image, either among all the texts (CLIP; Radford et
al. 2021) or independently of the other texts (SigLIP; Zhai et al. 2023).

    matcher = ImageMatcher.open(Program("folder"))
    matcher.match(["photo.jpg"], ["a photo of a cat", "a photo of a dog"])[0].best.label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.compiled import Compiled
from treadle.compiling import compile_program
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.program import Program
from treadle.tasks.classifying import Progress
from treadle.tasks.fitted_tokenizers import fit_tokenizer, no_tokens
from treadle.tasks.heads import HEADS
from treadle.tasks.images.reading import Image, ImageReader
from treadle.tasks.labelling import image_sides
from treadle.tasks.opening import checked_folder, token_positions, without_input
from treadle.tasks.scoring import Scored, best_first, softmax

Array = np.ndarray[Any, Any]

HEAD = HEADS["match"]
_BATCH = 8
_SIGLIP_TOKENS = 64
"""The number of tokens to which SigLIP's texts are padded, as in its training."""


@dataclass(frozen=True)
class Matched:
    """The texts' scores for an image.

    scores        all texts with their probabilities, best first: probabilities among all texts (CLIP), or independent
                  probabilities (SigLIP)
    similarities  cosine similarities between the image and each text, in the order of the texts
    """

    scores: tuple[Scored, ...]
    similarities: tuple[float, ...]

    @property
    def best(self) -> Scored:
        """The text with the highest score."""
        return self.scores[0]


@dataclass(frozen=True)
class ImageMatcher:
    """A model that embeds images and texts in one space.

    length   number of tokens to which all texts are padded; None: the length of the longest text
    padding  the padding token
    apart    True if the probability of a text is independent of the other texts (SigLIP)
    """

    model: Compiled
    images: ImageReader
    tokenizer: TextTokenizer
    length: int | None = None
    padding: int = 0
    apart: bool = False

    @classmethod
    def open(cls, program: Program) -> ImageMatcher:
        """Open a model. Raises UsageError if the folder's class is not such a model, CheckpointError for a damaged
        file, and the errors of `compile`.
        """
        place, config = checked_folder(program, HEAD)
        kind = str(config.get("model_type"))
        made = compile_program(program, ["lengths"])
        if program.source.kind == "artifact" and all(port.name != "lengths" for port in made.inputs):
            raise without_input(made.name, "lengths, by which texts of several lengths are matched")
        reader = ImageReader.open(place, kind, sides=image_sides(made))
        context, source = token_positions(made), program.source
        if kind != "siglip":
            tokenizer = fit_tokenizer(source.tokenizer(context=context), source, made.graph.main)
            return cls(made, reader, tokenizer)
        length = min(_SIGLIP_TOKENS, context or _SIGLIP_TOKENS)
        tokenizer = source.tokenizer(max_tokens=length, context=context)
        padding = tokenizer.id_of(tokenizer.special_names.get("pad_token", "</s>"))
        if padding is None:
            raise CheckpointError(
                "the folder's vocabulary has no padding token",
                hint='"pad_token": "</s>" in tokenizer_config.json',
            )
        tokenizer = fit_tokenizer(tokenizer, source, made.graph.main)
        return cls(made, reader, tokenizer, length, padding, apart=True)

    def match(
        self, images: Sequence[Image], texts: Sequence[str], *, progress: Progress | None = None
    ) -> list[Matched]:
        """Return the scores of all texts for each image file. Raises UsageError if there is no image or no text, for
        a text without tokens, or if a file is not an image.
        """
        if not images or not texts:
            raise UsageError("matching needs an image and a text", received=f"{len(images)} images, {len(texts)} texts")
        given = self._batch(texts)
        found: list[Matched] = []
        for at in range(0, len(images), _BATCH):
            out = self.model(**given, pixels=self.images.read(images[at : at + _BATCH]))
            near = np.asarray(out["image_embeds"]) @ np.asarray(out["text_embeds"]).T
            logits = np.asarray(out["logits_per_image"]).astype(np.float64)
            likely = 1 / (1 + np.exp(-logits)) if self.apart else softmax(logits)
            for scores, cosines in zip(likely, near, strict=True):
                found.append(Matched(best_first(scores, texts), tuple(map(float, cosines))))
            if progress is not None:
                progress(len(found))
        return found

    def _batch(self, texts: Sequence[str]) -> dict[str, Array]:
        """Return the texts as input arrays of the model, by name."""
        batch = self.tokenizer.batch(texts)
        if self.length is None and not batch.lengths.all():
            raise no_tokens(int(batch.lengths.argmin()), len(texts))
        if self.length is None:
            return {"tokens": batch.ids, "lengths": batch.lengths}
        tokens = np.full((len(texts), self.length), self.padding, np.int64)
        for row, ids, length in zip(tokens, batch.ids, batch.lengths, strict=True):
            row[:length] = ids[:length]
        masked = "attention_mask" in self.tokenizer.input_names
        return {"tokens": tokens, "lengths": batch.lengths if masked else np.full(len(texts), self.length)}
