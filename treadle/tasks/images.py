"""Read image files as inputs of a model. Pillow decodes the file. preprocessor_config.json specifies the resize, the
crop and the normalization.

    reader = ImageReader.open(folder, "vit", sides=(224, 224))
    pixels = reader.read(["cat.jpg"])            # f32[1, 3, 224, 224]

Sources: the image processors of Hugging Face transformers that use Pillow, and their defaults for each kind of model.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike, read_regular
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.huggingface import ModelFolder
from treadle.ir.errors import CheckpointError, FrontendError, UsageError

Pixels = npt.NDArray[np.float32]

_FILE = "preprocessor_config.json"
_IMAGE_BYTES = 256 << 20
_IMAGE_PIXELS = 100_000_000
_MOST_SIDE = 1 << 14
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_HALF = (0.5, 0.5, 0.5)
_BILINEAR, _BICUBIC = 2, 3  # Pillow's numbers of these filters

_CLIP: Mapping[str, Any] = {
    "size": {"shortest_edge": 224},
    "resample": _BICUBIC,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "vit": {"size": 224, "resample": _BILINEAR, "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
    "deit": {
        "size": 256,
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": 224,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "clip": _CLIP,
    "dinov2": _CLIP,
    "siglip": {"size": 224, "resample": _BICUBIC, "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
}
"""Defaults for options that preprocessor_config.json does not set, by config.json's model_type."""


@dataclass(frozen=True)
class ImageReader:
    """A converter of images to pixels.

    size       (height, width), or the length of the shorter side; None: no resize
    resample   Pillow's number of the resize filter
    crop       (height, width) of the center crop; None: no crop
    scale      factor for pixel values of 0 to 255
    mean, std  one value per channel, for (pixels - mean) / std; None: no normalization
    """

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    @classmethod
    def open(cls, place: ModelFolder, kind: str, *, sides: tuple[int, int] | None = None) -> ImageReader:
        """Return the reader that a folder specifies, with the defaults of `kind`, the kind of model.

        sides  the (height, width) that images must have after conversion, the model's input size; None: any size

        Raises CheckpointError if the file is damaged or contradicts the model, and FrontendError if Pillow is not
        installed.
        """
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise FrontendError(
                "reading images needs the package pillow", received=str(error), hint="pip install 'treadle[images]'"
            ) from error
        shown = place.show(_FILE)
        given: Mapping[str, Any] = place.read_settings(_FILE) if place.has(_FILE) else {}
        said = {**DEFAULTS[kind], **{name: value for name, value in given.items() if value is not None}}
        try:
            made = cls(
                _size(said["size"]) if said.get("do_resize", True) else None,
                _number(said["resample"], 0, 5),
                _pair(said.get("crop_size")) if said["do_center_crop"] else None,
                float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
                _channels(said["image_mean"]) if said.get("do_normalize", True) else None,
                _channels(said["image_std"]) if said.get("do_normalize", True) else None,
            )
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                "the settings for reading images are invalid", received=printable(str(error), 200), within=shown
            ) from None
        if sides is not None and made.sides != sides:
            raise CheckpointError(
                f"images must be converted to {sides[0]} x {sides[1]} pixels, the model's input size",
                received=repr(made.crop or made.size),
                within=shown,
            )
        return made

    @property
    def sides(self) -> tuple[int, int] | None:
        """The (height, width) of all images after conversion; None if the size depends on the image."""
        found = self.crop or self.size
        return found if isinstance(found, tuple) else None

    def read(self, paths: Sequence[PathLike]) -> Pixels:
        """Return images as pixels f32[N, 3, height, width]. Raises UsageError if a file is not an image or is too
        large.
        """
        return np.stack([self._pixels(path) for path in paths])

    def _pixels(self, path: PathLike) -> Pixels:
        image = _read_image(path)
        if self.size is not None:
            width, height = image.size
            if isinstance(self.size, int):
                longer = int(self.size * max(width, height) / min(width, height))
                if longer > _MOST_SIDE:
                    raise UsageError("the image is too long and narrow", received=f"{width} x {height} pixels")
                wanted = (self.size, longer) if width <= height else (longer, self.size)
            else:
                wanted = self.size[::-1]
            image = image.resize(wanted, resample=self.resample)
        pixels: npt.NDArray[Any] = np.moveaxis(np.asarray(image), -1, 0).astype(np.float64)
        if self.crop is not None:
            pixels = _middle(pixels, self.crop)
        made: Pixels = (pixels * self.scale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(x, np.float32)[:, None, None] for x in (self.mean, self.std))
            made = (made - mean) / std
        return made


def _read_image(path: PathLike) -> Any:
    """Return the image in a file as RGB, rotated as its EXIF orientation specifies."""
    import PIL.Image
    import PIL.ImageOps

    shown = shown_path(path)
    data = read_regular(path, _IMAGE_BYTES, shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > _IMAGE_PIXELS:
                raise UsageError(
                    "the image has more pixels than the limit",
                    received=f"{image.width} x {image.height}, limit {_IMAGE_PIXELS}",
                    within=shown,
                )
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except UsageError:
        raise
    except Exception as error:  # Pillow's readers may raise any exception
        raise UsageError(
            "the file is not an image that can be read",
            received=type(error).__name__ if "BytesIO" in str(error) else printable(str(error), 200),
            within=shown,
            hint="a file of " + ", ".join(_FORMATS),
        ) from None


def _middle(pixels: npt.NDArray[Any], crop: tuple[int, int]) -> npt.NDArray[Any]:
    """Return the center crop of an image [3, H, W]. If the image is smaller than the crop, it is padded with black on
    all sides.
    """
    for axis, side in zip((1, 2), crop, strict=True):
        have = pixels.shape[axis]
        if have < side:
            before = -(-(side - have) // 2)
            pad = [(0, 0)] * 3
            pad[axis] = (before, side - have - before)
            pixels = np.pad(pixels, pad)
        else:
            start = (have - side) // 2
            pixels = pixels.take(np.arange(start, start + side), axis=axis)
    return pixels


def _size(value: Any) -> tuple[int, int] | int:
    if isinstance(value, Mapping) and "shortest_edge" in value:
        return _number(value["shortest_edge"], 1, _MOST_SIDE)
    return _pair(value)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return _number(value["height"], 1, _MOST_SIDE), _number(value["width"], 1, _MOST_SIDE)
    return _number(value, 1, _MOST_SIDE), _number(value, 1, _MOST_SIDE)


def _number(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is not an integer from {least} to {most}")
    return value


def _channels(value: Any) -> tuple[float, float, float]:
    first, second, third = (float(each) for each in value)
    return first, second, third
