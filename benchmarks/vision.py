"""Time to the first token of SmolVLM-256M's shape: one image of 512 x 512 as a single tile, and 32 tokens of text.

python benchmarks/vision.py [ROUNDS]

Random weights, float32, one thread, in turns with Hugging Face transformers. CPU seconds of the process are compared,
so that other processes do not count. A second question about the same image follows; its tokens are counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

import treadle as t
from treadle.stepped import open_stepped

TEXT = {
    "model_type": "llama",
    "vocab_size": 49280,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
FEATURES = 64


def main() -> None:
    """Print the seconds of both, and their ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    config = transformers.SmolVLMConfig(text_config=TEXT, vision_config=VISION, image_token_id=49190, scale_factor=4)
    model = transformers.SmolVLMForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(Path(place))
        stepped = open_stepped(place, backend="tvm", target=t.Target("cpu", threads=1))
        session = stepped.session(rows=2, capacity=256, memory={"N": 2})
    ids = rng.integers(0, 49000, FEATURES + 32)
    ids[8 : 8 + FEATURES] = 49190
    index = np.zeros(len(ids), np.int64)
    index[8 : 8 + FEATURES] = 1 + np.arange(FEATURES)

    def ours(pixels: np.ndarray) -> int:
        row = session.open(pixels=pixels, image_index=index)
        logits = session.prefill({row: ids.tolist()})[row]
        session.close(row, keep=True)
        return int(logits.argmax())

    def theirs(pixels: np.ndarray) -> int:
        with torch.no_grad():
            found = model(input_ids=torch.tensor(ids[None]), pixel_values=torch.tensor(pixels[None]), logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    seconds: dict[str, list[float]] = {"treadle": [], "transformers": []}
    for number in range(rounds + 1):
        pixels = rng.standard_normal((1, 3, 512, 512)).astype(np.float32)
        calls: dict[str, Callable[[np.ndarray], int]] = {"treadle": ours, "transformers": theirs}
        tokens = []
        for name, call in calls.items():
            started = time.process_time()
            tokens.append(call(pixels))
            if number:  # the first round compiles and warms up
                seconds[name].append(time.process_time() - started)
        assert tokens[0] == tokens[1], "both choose the same first token"
    best = {name: min(times) for name, times in seconds.items()}
    middle = {name: float(np.median(times)) for name, times in seconds.items()}
    print("  ".join(f"{name} {best[name]:.3f} s (median {middle[name]:.3f})" for name in best))
    ratios = [times["treadle"] / times["transformers"] for times in (best, middle)]
    print(f"ratio {ratios[0]:.3f} (of medians {ratios[1]:.3f})")

    row = session.resume([*ids.tolist(), *range(20)], pixels=pixels, image_index=index)
    print(f"second question: {session.length(row)} of {len(ids) + 20} tokens are reused")


if __name__ == "__main__":
    main()
