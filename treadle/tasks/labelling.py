"""Label images: predict which of the model's labels an image file shows.

labeller = ImageLabeller.open(Program("folder"))
labeller.label(["cat.jpg"])[0][0].label
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.compiled import Compiled
from treadle.compiling import compile_program
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.program import Program
from treadle.tasks.classifying import Progress
from treadle.tasks.heads import HEADS
from treadle.tasks.images.reading import DEFAULTS, Image, ImageReader
from treadle.tasks.opening import checked_folder, read_labels
from treadle.tasks.scoring import Scored, best_first, label_scores

HEAD = HEADS["label"]
_BATCH = 8
_RESIZED = ("dinov2",)
"""Kinds of models that accept images of any size. Their input size follows from the folder's preprocessing, and not
from config.json's image_size.
"""


@dataclass(frozen=True)
class ImageLabeller:
    """An image classifier."""

    model: Compiled
    images: ImageReader
    labels: tuple[str, ...]
    config: Mapping[str, object]

    @classmethod
    def open(cls, program: Program) -> ImageLabeller:
        """Open a model. Raises UsageError if the folder's class has no such head, CheckpointError for a damaged file,
        and the errors of `compile`.
        """
        place, config = checked_folder(program, HEAD)
        kind = image_kind(config)
        if (
            program.source.kind != "artifact"
            and kind in _RESIZED
            and (sides := ImageReader.open(place, kind).sides) is not None
        ):
            program = program.but(config={"height": sides[0], "width": sides[1], **program.options.config})
        made = compile_program(program)
        reader = ImageReader.open(place, kind, sides=image_sides(made))
        return cls(made, reader, read_labels(config), config)

    def label(self, images: Sequence[Image], *, progress: Progress | None = None) -> list[tuple[Scored, ...]]:
        """Return all labels of each image with their scores, best first. Raises UsageError if there is no file, or if a
        file is not an image.
        """
        if not images:
            raise UsageError("there is no image to label")
        found: list[tuple[Scored, ...]] = []
        for at in range(0, len(images), _BATCH):
            logits = self.model(pixels=self.images.read(images[at : at + _BATCH]))["logits"]
            found += [best_first(label_scores(row, self.config), self.labels) for row in logits]
            if progress is not None:
                progress(len(found))
        return found


def image_sides(model: Compiled) -> tuple[int, int]:
    """Return the (height, width) of the images that a model accepts. Raises CheckpointError if the model's images do
    not have three channels.
    """
    pixels = next(port for port in model.inputs if port.name == "pixels")
    channels, height, width = (size.constant for size in pixels.type.shape[1:])
    if channels != 3 or height is None or width is None:
        raise CheckpointError("images must have three channels and a fixed size", received=f"the model needs {pixels}")
    return height, width


def image_kind(config: Mapping[str, object]) -> str:
    """Return the kind of model whose preprocessing defaults apply to a folder with this config.json."""
    kind = str(config.get("model_type"))
    return kind if kind in DEFAULTS else "vit"
