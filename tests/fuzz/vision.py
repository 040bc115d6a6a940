"""Compare every vision-language model with Hugging Face's, on all backends, with zero, one and three images.

python -m tests.fuzz.vision [KIND ...]
python -m tests.fuzz.vision pixels        the pixels of 50 images, of every image processor
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.image_processors import PROCESSORS, drawn_images, pixel_distance
from tests.vision_answers import NEAR, compare_answers
from tests.vision_models import KINDS, save_vision_model


def main() -> None:
    """Print the largest distance of logits for each model, backend and number of images."""
    if sys.argv[1:] == ["pixels"]:
        files = drawn_images(50)
        for kind, options in PROCESSORS:
            with tempfile.TemporaryDirectory() as place:
                print(f"{kind:12} {pixel_distance(kind, options, files, Path(place)):.1e}", options, flush=True)
        return
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as place:
            made = save_vision_model(kind, Path(place))
            for backend in ("numpy", "torch", "tvm"):
                for images in (0, 1, 3):
                    apart = compare_answers(made, backend, images)
                    print(f"{kind:12} {backend:6} {images} images: {apart:.1e} of the range", flush=True)
                    assert apart <= NEAR


if __name__ == "__main__":
    main()
