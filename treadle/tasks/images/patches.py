"""Split images of any size into patches, as the image processor of Qwen2-VL does.

    patches = PatchReader.open(folder, "qwen2_vl", merge=2).patches(open_image("photo.jpg"))
    patches.groups               # f32[groups, 4, width]: the patches of each square of 2 x 2
    patches.rows, patches.columns   # of groups

An image is resized so that both sides are multiples of a group's side, and its number of pixels is within limits.

Source: image_processing_pil_qwen2_vl.py of Hugging Face transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import UsageError
from treadle.tasks.images.reading import ImagePlace, ImageReader, ImageSettings, Pixels, number_from

_MOST_RATIO = 200
_MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class Patches:
    """The patches of an image, group by group: f32[rows * columns, merge * merge, channels * frames * patch ** 2]."""

    groups: Pixels
    rows: int
    columns: int


@dataclass(frozen=True)
class PatchReader:
    """A converter of images to patches.

    reader        scales and normalizes the pixels
    limits        bounds of the number of pixels of a resized image; None: images keep their size
    patch, merge  the side of a patch, and the number of patches along a group's side
    frames        the number of frames of a patch: an image is repeated
    """

    reader: ImageReader
    limits: tuple[int, int] | None
    patch: int
    merge: int
    frames: int

    @classmethod
    def open(cls, place: ImagePlace, kind: str, *, merge: int, width: int) -> PatchReader:
        """Return the reader that a folder specifies. `merge` is the model's number of patches along a group's side, and
        `width` the length of its flattened patches.

        Raises as `ImageReader.open` does.
        """
        settings = ImageSettings.read(place, kind)
        made = settings.read_with(cls._of)
        length = 3 * made.frames * made.patch**2
        if (made.merge, length) != (merge, width):
            what = f"patches must have {width} values, in groups of {merge} x {merge}, the model's input"
            received = f"{length} values, in groups of {made.merge} x {made.merge}"
            fitting = {"merge_size": merge, "patch_size": math.isqrt(width // (3 * made.frames))}
            raise settings.misfit(what, received, fitting)
        return made

    @classmethod
    def _of(cls, options: Mapping[str, Any]) -> PatchReader:
        size = dict(options["size"])
        least = number_from(options.get("min_pixels", size.get("shortest_edge")), 1, _MOST_PIXELS)
        most = number_from(options.get("max_pixels", size.get("longest_edge")), 1, _MOST_PIXELS)
        return cls(
            ImageReader.of(options, resizes=False),
            (least, most) if options.get("do_resize", True) else None,
            number_from(options.get("patch_size", 14), 1, 1024),
            number_from(options.get("merge_size", 2), 1, 64),
            number_from(options.get("temporal_patch_size", 2), 1, 64),
        )

    def patches(self, image: Any) -> Patches:
        """Return the patches of an RGB image of Pillow. Raises UsageError for an image that is too long and narrow."""
        factor = self.patch * self.merge
        if self.limits is not None:
            height, width = self._sides(image.height, image.width, factor)
            image = image.resize((width, height), resample=self.reader.resample)
        rows, columns = image.height // factor, image.width // factor
        if rows * factor != image.height or columns * factor != image.width:
            raise UsageError(
                f"both sides of an image must be multiples of {factor} pixels, since images keep their size",
                received=f"{image.width} x {image.height} pixels",
            )
        pixels = self.reader.pixels(image)
        split = pixels.reshape(3, rows, self.merge, self.patch, columns, self.merge, self.patch)
        split = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        repeated = np.broadcast_to(split, (*split.shape[:5], self.frames, *split.shape[6:]))
        return Patches(repeated.reshape(rows * columns, self.merge**2, -1), rows, columns)

    def _sides(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """Return the (height, width) of the resized image."""
        assert self.limits is not None
        least, most = self.limits
        if max(height, width) / min(height, width) > _MOST_RATIO:
            raise UsageError("the image is too long and narrow", received=f"{width} x {height} pixels")
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > most:
            by = math.sqrt(height * width / most)
            high = max(factor, math.floor(height / by / factor) * factor)
            wide = max(factor, math.floor(width / by / factor) * factor)
        elif high * wide < least:
            by = math.sqrt(least / (height * width))
            high, wide = math.ceil(height * by / factor) * factor, math.ceil(width * by / factor) * factor
        return high, wide
