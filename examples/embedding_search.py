"""Search a text file by meaning: embed its lines once, then rank them by cosine similarity to each query.

    python examples/embedding_search.py MODEL notes.txt "Where do cats sleep?" [BACKEND]

MODEL is a folder with a sentence embedding model, or a fetched one: `treadle fetch minilm` downloads 84 MB.

Cost: With MiniLM (91 MB), 996 short lines took 3.1 s of CPU time and 136 MB of memory on two cores of an EPYC with
tvm, with the loading of the model.
"""

import sys
import time
from pathlib import Path

import numpy as np

import treadle as t

BEST = 3


def embedded(model: object, texts: list[str], cache: Path) -> np.ndarray:
    """Return unit vectors f32[N, D] of texts, from the cache if it has them."""
    if cache.exists():
        found = np.load(cache, allow_pickle=False)
        if len(found) == len(texts):
            return found
    started = time.perf_counter()
    found = model.embed(texts)  # batches of texts of similar length; a text's vector does not depend on the others
    print(f"{len(texts)} texts as {found.shape[1]} numbers each, in {time.perf_counter() - started:.2f} s")
    np.save(cache, found)
    return found


def main(name: str, path: str, query: str, backend: str = "tvm") -> None:
    model = t.load(name, backend=backend)
    texts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    vectors = embedded(model, texts, Path(path).with_suffix(".npy"))

    scores = vectors @ model.embed(query)  # [N]; vectors have length 1, so products are cosines
    for i in np.argsort(-scores)[:BEST]:
        print(f"{scores[i]:.3f}  {texts[i]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
