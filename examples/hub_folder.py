"""A model from the hub: load its folder, continue a text, quantize it, and compare the two.

    python examples/hub_folder.py FOLDER "The capital of France is" [BACKEND]

FOLDER has config.json, model.safetensors and tokenizer.json, as the Hugging Face hub has them (docs/models.md lists the
families). A GGUF file works too, and so does the name of a model that `treadle fetch` has fetched, such as smollm2. No
code of the folder runs.

Cost: SmolLM2-135M (98 MB, 4 bits) on two cores of an EPYC with tvm took 10 s of CPU time at first, 5 s with compiled
kernels in the cache, and 0.8 GB and 0.4 GB of memory.
"""

import sys
import time

import treadle as t
from treadle.tasks.perplexity import Perplexity


def main(folder: str, prompt: str, backend: str = "tvm", most: int = 24) -> None:
    for scheme in (None, "int8"):  # weights in 8 bits (blocks of a GGUF file stay as they are), and activations
        started = time.perf_counter()
        model = t.load(folder, backend=backend, quantize=scheme)
        text = model.generate(prompt, most=most)  # greedy; sampling=t.Sampling(temperature=0.8) draws
        print(f"== {scheme or 'as stored'}: {time.perf_counter() - started:.2f} s from the folder to this text")
        print(prompt + text)

        # Several prompts are generated together, each as if it were alone.
        drawn = t.Sampling(temperature=0.8, seed=1)
        print("drawn:", model.generate([prompt, prompt], most=8, sampling=drawn))

        if scheme is not None:
            print(compared(model.perplexity(prompt + text, window=32)))


def compared(found: Perplexity) -> str:
    """Return the perplexity of a text with and without quantization, as a line."""
    plain = "" if found.beside is None else f", {found.beside.perplexity:.2f} without quantization"
    return f"perplexity of {found.tokens} tokens: {found.perplexity:.2f}{plain}"


if __name__ == "__main__":
    if not 2 <= len(sys.argv) - 1 <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
