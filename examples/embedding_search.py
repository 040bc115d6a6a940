"""Search a text file by meaning: embed its lines once, then rank them by cosine similarity to each query.

    python examples/embedding_search.py MODEL notes.txt "Where do cats sleep?" [BACKEND]

MODEL is a folder with a sentence embedding model, or a fetched one: `treadle fetch minilm` downloads 84 MB.

Cost: 996 short lines took 3.1 s of CPU time and 136 MB of memory, including loading MiniLM (91 MB), with tvm on two
cores of an EPYC.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

import treadle as t
from treadle.tasks.loaded import LoadedModel

BEST = 3


def embedded(name: str, model: LoadedModel, texts: list[str]) -> np.ndarray:
    """Return unit vectors f32[N, D] of texts, from a file if these texts were embedded by this model before."""
    cache = Path(f"vectors-{hashlib.sha256(json.dumps([name, texts]).encode()).hexdigest()[:12]}.npy")
    if cache.exists():
        return np.load(cache, allow_pickle=False)
    started = time.perf_counter()
    found = model.embed(texts)  # batches of texts of similar length; a text's vector does not depend on the others
    print(f"{len(texts)} texts as {found.shape[1]} numbers each, in {time.perf_counter() - started:.2f} s")
    np.save(cache, found)
    return found


def main(name: str, path: str, query: str, backend: str = "tvm") -> None:
    model = t.load(name, backend=backend)
    texts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    vectors = embedded(name, model, texts)

    scores = vectors @ model.embed(query)  # [N]; vectors have length 1, so products are cosines
    for i in np.argsort(-scores)[:BEST]:
        print(f"{scores[i]:.3f}  {texts[i]}")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) - 1 <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
