"""Comparison of converted images with the PIL processors of Hugging Face transformers."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from treadle.frontends.model_folder import ModelFolder
from treadle.tasks.images.patches import PatchReader
from treadle.tasks.images.reading import ImageReader, open_image
from treadle.tasks.images.tiles import TileReader

PROCESSORS: Sequence[tuple[str, dict[str, Any]]] = (
    ("llava", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
    ("llava", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_pad": True}),
    ("idefics3", {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}),
    ("smolvlm", {"size": {"longest_edge": 200}, "max_image_size": {"longest_edge": 200}}),
    ("smolvlm", {"size": {"longest_edge": 90}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": False}),
    ("qwen2_vl", {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 60}}),
    (
        "qwen2_vl",
        {"min_pixels": 3136, "max_pixels": 100352, "patch_size": 4, "merge_size": 3, "temporal_patch_size": 1},
    ),
)
"""Kinds of image processors with settings."""

_CLASSES = {"llava": "Llava", "idefics3": "Idefics3", "smolvlm": "SmolVLM", "qwen2_vl": "Qwen2VL"}
_SIDES = ((16, 16), (300, 2000), (2000, 300), (200, 200), (201, 199), (33, 700))


def drawn_images(count: int) -> list[bytes]:
    """Return PNG files: RGB, grey, with alpha and with palettes, of 16 x 16 to 2,000 x 300 pixels."""
    draw = np.random.default_rng(0)
    sides = [*_SIDES, *(tuple(int(side) for side in draw.integers(16, 900, 2)) for _ in range(count))]
    files = []
    for number, (height, width) in enumerate(sides[:count]):
        ramp = np.add.outer(np.linspace(0, 255, height), np.linspace(0, 100, width))[..., None] * draw.uniform(0, 1, 3)
        pixels = np.clip(ramp + draw.normal(0, 20, ramp.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(("RGB", "L", "RGBA", "P")[number % 4]).save(buffer, "png")
        files.append(buffer.getvalue())
    return files


def pixel_distance(kind: str, options: dict[str, Any], files: Sequence[bytes], place: Path) -> float:
    """Return the largest distance of pixel values of the images. Raises AssertionError if shapes differ."""
    (place / "preprocessor_config.json").write_text(json.dumps(options))
    folder = ModelFolder.find(place)
    module = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    processor = getattr(module, f"{_CLASSES[kind]}ImageProcessorPil")(**options)
    worst = 0.0
    for file in files:
        wanted = processor(Image.open(io.BytesIO(file)).convert("RGB"), return_tensors="np")
        pixels = wanted["pixel_values"]
        if kind == "llava":
            found = ImageReader.open(folder, kind, sides=(56, 56)).read([file])
        elif kind == "qwen2_vl":
            merge, width = options.get("merge_size", 2), pixels.shape[1]
            patches = PatchReader.open(folder, kind, merge=merge, width=width).patches(open_image(file))
            assert list(wanted["image_grid_thw"][0]) == [1, patches.rows * merge, patches.columns * merge]
            found = patches.groups.reshape(-1, width)
        else:
            side = options["max_image_size"]["longest_edge"]
            found = TileReader.open(folder, "idefics3", side=side).tiles(open_image(file)).pixels[None]
        assert found.shape == pixels.shape
        worst = max(worst, float(np.abs(found - pixels).max()))
    return worst
