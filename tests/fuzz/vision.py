"""Compare every vision-language model with Hugging Face's, on all backends, with zero, one and three images.

python -m tests.fuzz.vision [KIND ...]
python -m tests.fuzz.vision pairs         LLaVA and SmolVLM as pairs of GGUF files, with weights in several types
python -m tests.fuzz.vision pixels        the pixels of 50 images, of every image processor
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.gguf_pairs import PairForm, write_pair
from tests.image_processors import PROCESSORS, drawn_images, pixel_distance
from tests.vision_answers import NEAR, compare_answers
from tests.vision_models import KINDS, save_vision_model

FORMS = [PairForm(blocks, is_older) for blocks in ("F32", "F16", "Q8_0") for is_older in (False, True)]


def main() -> None:
    """Print the largest distance of logits for each model, backend and number of images."""
    if sys.argv[1:] == ["pixels"]:
        files = drawn_images(50)
        for kind, options in PROCESSORS:
            with tempfile.TemporaryDirectory() as place:
                print(f"{kind:12} {pixel_distance(kind, options, files, Path(place)):.1e}", options, flush=True)
        return
    pairs = sys.argv[1:] == ["pairs"]
    for kind in ("llava", "smolvlm") if pairs else sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as place:
            made = save_vision_model(kind, Path(place), wide=pairs)
            for form in FORMS if pairs else [None]:
                file = None if form is None else write_pair(made, Path(place) / "pair", form)
                for backend in ("numpy", "torch", "tvm"):
                    for images in (0, 1, 3):
                        apart = compare_answers(made, backend, images, file)
                        shown = f"{kind:12} {backend:6} {images} images: {apart:.1e} of the range"
                        print(shown, form or "", flush=True)
                        assert apart <= NEAR


if __name__ == "__main__":
    main()
