"""Split images into tiles, as the image processor of Idefics3 and SmolVLM does.

    tiles = TileReader.open(folder, "idefics3", side=512).tiles(open_image("photo.jpg"))
    tiles.pixels                 # f32[rows * columns + 1, 3, 512, 512]: the tiles row by row, then the whole image

An image is resized to a longest side, then to a multiple of the tile's side in both directions, and split. If it fits
into a single tile, there is only this tile, and rows and columns are 0.

Source: image_processing_pil_idefics3.py of Hugging Face transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import CheckpointError
from treadle.tasks.images.reading import MOST_SIDE, ImagePlace, ImageReader, ImageSettings, Pixels, number_from

_LONGEST = 4096  # the longest side of a resized image
_MOST_TILES = 1024


@dataclass(frozen=True)
class Tiles:
    """The tiles of an image: pixels f32[tiles, 3, side, side], and the numbers of rows and columns; both 0 for a single
    tile.
    """

    pixels: Pixels
    rows: int
    columns: int


@dataclass(frozen=True)
class TileReader:
    """A converter of images to tiles.

    reader   scales and normalizes the pixels
    size     the length of the longest side, or (height, width), before the image is split; None: its own size
    side     the side of a tile
    splits   False if an image is resized to a single tile
    """

    reader: ImageReader
    size: tuple[int, int] | int | None
    side: int
    splits: bool

    @classmethod
    def open(cls, place: ImagePlace, kind: str, *, side: int) -> TileReader:
        """Return the reader that a folder specifies. `side` is the side of the model's images.

        Raises as `ImageReader.open` does.
        """
        settings = ImageSettings.read(place, kind)
        made = settings.read_with(cls._of)
        if made.side != side:
            what = f"images must be split into tiles of {side} x {side} pixels, the model's input size"
            raise settings.misfit(what, f"max_image_size {made.side}", {"max_image_size": {"longest_edge": side}})
        return made

    @classmethod
    def _of(cls, options: Mapping[str, Any]) -> TileReader:
        size = options["size"]
        resized: tuple[int, int] | int | None = None
        if options.get("do_resize", True):
            if "longest_edge" in size:
                resized = number_from(size["longest_edge"], 1, MOST_SIDE)
            else:
                resized = number_from(size["height"], 1, _LONGEST), number_from(size["width"], 1, _LONGEST)
        return cls(
            ImageReader.of(options, resizes=False),
            resized,
            number_from(options["max_image_size"]["longest_edge"], 1, _LONGEST),
            bool(options.get("do_image_splitting", True)),
        )

    def tiles(self, image: Any) -> Tiles:
        """Return the tiles of an RGB image of Pillow. Raises CheckpointError if there are too many."""
        side = self.side
        if isinstance(self.size, int):
            image = self._resized(image, *_fitted(image.height, image.width, self.size))
        elif self.size is not None:
            image = self._resized(image, *self.size)
        if not self.splits:
            return Tiles(self.reader.pixels(self._resized(image, side, side))[None], 0, 0)
        image = self._resized(image, *_multiples(image.height, image.width, side))
        rows, columns = image.height // side, image.width // side
        if rows * columns == 1:
            return Tiles(self.reader.pixels(image)[None], 0, 0)
        if rows * columns > _MOST_TILES:
            raise CheckpointError(
                f"an image would be split into more than {_MOST_TILES} tiles", received=f"{rows} x {columns} tiles"
            )
        corners = [(c * side, r * side) for r in range(rows) for c in range(columns)]
        parts = [image.crop((left, top, left + side, top + side)) for left, top in corners]
        parts.append(self._resized(image, side, side))
        return Tiles(np.stack([self.reader.pixels(part) for part in parts]), rows, columns)

    def _resized(self, image: Any, height: int, width: int) -> Any:
        return image.resize((width, height), resample=self.reader.resample)


def _fitted(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return the (height, width) of an image whose longer side is resized to `longest`."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > _LONGEST:
        width, height = _LONGEST, int(_LONGEST / ratio)
    elif height > width and height > _LONGEST:
        height, width = _LONGEST, int(_LONGEST * ratio)
    return max(height, 1), max(width, 1)


def _multiples(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the (height, width) of an image after both are rounded up to multiples of a tile's side."""

    def up(length: int) -> int:
        return math.ceil(length / side) * side

    ratio = width / height
    if width >= height:
        width = up(width)
        return up(int(width / ratio)), width
    height = up(height)
    return height, up(int(height * ratio))
