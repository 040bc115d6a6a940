"""Read image files as inputs of a model. Pillow decodes the file. preprocessor_config.json specifies the resize, the
crop and the normalization.

    reader = ImageReader.open(folder, "vit", sides=(224, 224))
    pixels = reader.read(["cat.jpg"])            # f32[1, 3, 224, 224]

Sources: the image processors of Hugging Face transformers that use Pillow, and their defaults for each kind of model.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike, read_regular
from treadle.files.installation import pip_install
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.errors import CheckpointError, FrontendError, UsageError

Pixels = npt.NDArray[np.float32]
T = TypeVar("T")


class PillowImage(Protocol):
    """An image of Pillow, which may be not installed."""

    def convert(self, mode: str) -> Any: ...


Image = PathLike | bytes | npt.NDArray[np.uint8] | PillowImage
"""The path of an image file, its bytes, an array u8[height, width, 3] of red, green and blue, or an image of Pillow."""

_FILE, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_IMAGE_BYTES = 256 << 20
_IMAGE_PIXELS = 100_000_000
MOST_SIDE = 1 << 14
"""Maximum length of an image's side after conversion."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_HALF = (0.5, 0.5, 0.5)
_LANCZOS, _BILINEAR, _BICUBIC = 1, 2, 3  # Pillow's numbers of these filters

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
    "llava": _CLIP,
    "idefics3": {
        "size": {"longest_edge": 4 * 364},
        "max_image_size": {"longest_edge": 364},
        "resample": _LANCZOS,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "qwen2_vl": {
        **{name: _CLIP[name] for name in ("resample", "image_mean", "image_std")},
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    },
    "siglip": {"size": 224, "resample": _BICUBIC, "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
}
"""Defaults for options that preprocessor_config.json does not set, by config.json's model_type."""


@dataclass(frozen=True)
class ImageSettings:
    """The options of a folder's image processor, with the defaults of a kind of model.

    file  the file's name in errors; for a folder without such a file, the folder's name
    is_default  True if the folder has no such file
    """

    options: Mapping[str, Any]
    file: str
    is_default: bool = False

    @classmethod
    def read(cls, place: ImagePlace, kind: str) -> ImageSettings:
        """Read preprocessor_config.json, or the image processor in processor_config.json. Settings are returned as they
        are.

        Raises CheckpointError if the file is damaged, and FrontendError if Pillow is not installed.
        """
        if isinstance(place, ImageSettings):
            return place
        _need_pillow()
        if place.has(_FILE):
            name, given = _FILE, place.read_settings(_FILE)
        elif place.has(_PROCESSOR) and isinstance(
            inner := place.read_settings(_PROCESSOR).get("image_processor"), dict
        ):
            name, given = _PROCESSOR, inner
        else:
            return replace(cls.of({}, place.shown, kind), is_default=True)
        return cls.of(given, place.show(name), kind)

    @classmethod
    def of(cls, options: Mapping[str, Any], file: str, kind: str) -> ImageSettings:
        """Return these options, in a file, with the defaults of `kind`, the kind of model. Raises FrontendError if
        Pillow is not installed.
        """
        _need_pillow()
        return cls({**DEFAULTS[kind], **{key: value for key, value in options.items() if value is not None}}, file)

    def read_with(self, read: Callable[[Mapping[str, Any]], T]) -> T:
        """Return the result of a reader of the options. Raises CheckpointError if it finds an invalid option."""
        try:
            return read(self.options)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                "the settings for reading images are invalid", received=printable(str(error), 200), within=self.file
            ) from None

    def misfit(self, what: str, received: str, fitting: Mapping[str, Any]) -> CheckpointError:
        """Return the error for settings that do not fit the model.

        what      the requirement of the model
        fitting   options that fit it
        """
        if not self.is_default:
            return CheckpointError(what, received=received, within=self.file)
        return CheckpointError(
            f"the folder has no {_FILE}, and the default settings do not fit the model",
            received=f"{received}; {what}",
            within=self.file,
            hint=f"{json.dumps(fitting)} in {_FILE}, if the other defaults fit; or that file of the original model",
        )


def _need_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise FrontendError(
            "reading images needs the package pillow", received=str(error), hint=pip_install("images")
        ) from error


ImagePlace = ModelFolder | ImageSettings
"""The settings for images, or the folder that has them."""


@dataclass(frozen=True)
class ImageReader:
    """A converter of images to pixels.

    size       (height, width), or the length of the shorter side; None: no resize
    resample   Pillow's number of the resize filter
    crop       (height, width) of the center crop; None: no crop
    scale      factor for pixel values of 0 to 255
    mean, std  one value per channel, for (pixels - mean) / std; None: no normalization
    square     True if images are padded to squares first, with the mean color
    """

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    square: bool = False

    @classmethod
    def open(cls, place: ImagePlace, kind: str, *, sides: tuple[int, int] | None = None) -> ImageReader:
        """Return the reader that a folder specifies, with the defaults of `kind`, the kind of model.

        sides  the (height, width) that images must have after conversion, the model's input size; None: any size

        Raises CheckpointError if the file is damaged or contradicts the model, and FrontendError if Pillow is not
        installed.
        """
        settings = ImageSettings.read(place, kind)
        made = settings.read_with(lambda options: cls.of(options, square=kind == "llava"))
        if sides is not None and made.sides != sides:
            what = f"images must be converted to {sides[0]} x {sides[1]} pixels, the model's input size"
            given = dict(zip(("height", "width"), sides, strict=True))
            fitting = {"size": {"shortest_edge": max(sides)} if isinstance(made.size, int) else given}
            fitting |= {"crop_size": given} if made.crop is not None else {}
            raise settings.misfit(what, repr(made.crop or made.size), fitting)
        return made

    @classmethod
    def of(cls, options: Mapping[str, Any], *, square: bool = False, resizes: bool = True) -> ImageReader:
        """Return the reader that an image processor's options specify. Raises ValueError, TypeError or KeyError for an
        invalid option.

        square   True if the option `do_pad` pads images to squares
        resizes  False if the reader only scales and normalizes
        """
        return cls(
            _size(options["size"]) if resizes and options.get("do_resize", True) else None,
            number_from(options["resample"], 0, 5),
            _pair(options.get("crop_size")) if resizes and options["do_center_crop"] else None,
            float(options.get("rescale_factor", 1 / 255)) if options.get("do_rescale", True) else 1.0,
            _channels(options["image_mean"]) if options.get("do_normalize", True) else None,
            _channels(options["image_std"]) if options.get("do_normalize", True) else None,
            square and bool(options.get("do_pad", False)),
        )

    @property
    def sides(self) -> tuple[int, int] | None:
        """The (height, width) of all images after conversion; None if the size depends on the image."""
        found = self.crop or self.size
        return found if isinstance(found, tuple) else None

    def read(self, images: Sequence[Image]) -> Pixels:
        """Return images as pixels f32[N, 3, height, width]. Raises UsageError if a file is not an image or is too
        large.
        """
        return np.stack([self.pixels(open_image(image)) for image in images])

    def pixels(self, image: Any) -> Pixels:
        """Return the pixels f32[3, height, width] of an RGB image of Pillow."""
        if self.square:
            image = _padded_to_square(image, self.mean)
        if self.size is not None:
            width, height = image.size
            if isinstance(self.size, int):
                longer = int(self.size * max(width, height) / min(width, height))
                if longer > MOST_SIDE:
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


def open_image(image: Image) -> Any:
    """Return an image, or the image in a file, as an RGB image of Pillow, rotated as its EXIF orientation specifies.

    Raises UsageError if the file is not an image or is too large, and for an array of another shape or dtype.
    """
    import PIL.Image
    import PIL.ImageOps

    shown, data = "the image", image
    if isinstance(image, str | os.PathLike):
        shown = shown_path(image)
        data = read_regular(image, _IMAGE_BYTES, shown)
    if isinstance(data, np.ndarray) and (data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3):
        raise UsageError(
            "an array is an image if it has the shape [height, width, 3] and the dtype uint8",
            received=f"{data.dtype}[{', '.join(map(str, data.shape))}]",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened: Any = data
            if isinstance(data, bytes):
                opened = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
            elif isinstance(data, np.ndarray):
                opened = PIL.Image.fromarray(data)
            if opened.width * opened.height > _IMAGE_PIXELS:
                raise UsageError(
                    "the image has more pixels than the limit",
                    received=f"{opened.width} x {opened.height}, limit {_IMAGE_PIXELS}",
                    within=shown,
                )
            return PIL.ImageOps.exif_transpose(opened).convert("RGB")
    except UsageError:
        raise
    except Exception as error:  # Pillow's readers may raise any exception
        raise UsageError(
            "the file is not an image that can be read",
            received=type(error).__name__ if "BytesIO" in str(error) else printable(str(error), 200),
            within=shown,
            hint="a file of " + ", ".join(_FORMATS),
        ) from None


def _padded_to_square(image: Any, mean: tuple[float, float, float] | None) -> Any:
    """Return an image in the middle of a square of the mean color."""
    import PIL.Image

    side = max(image.size)
    color = tuple(int(x * 255) for x in mean or (0, 0, 0))
    padded = PIL.Image.new("RGB", (side, side), color)
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


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
        return number_from(value["shortest_edge"], 1, MOST_SIDE)
    return _pair(value)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return number_from(value["height"], 1, MOST_SIDE), number_from(value["width"], 1, MOST_SIDE)
    return number_from(value, 1, MOST_SIDE), number_from(value, 1, MOST_SIDE)


def number_from(value: Any, least: int, most: int) -> int:
    """Return an integer from `least` to `most`. Raises ValueError for any other value."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is not an integer from {least} to {most}")
    return value


def _channels(value: Any) -> tuple[float, float, float]:
    first, second, third = (float(each) for each in value)
    return first, second, third
