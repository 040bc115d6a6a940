"""Accuracy of MiniLM's sentence vectors in reduced precision relative to float32, and its ranking of pairs of words.

    python benchmarks/embeddings.py WHEEL [--count 500] [--ways int8,bf16] [--backend tvm] [--json]

WHEEL is gensim's (`pip download --no-deps gensim==4.4.0`), which contains two sets of texts and need not be installed:
sentences of news (Lee, Pincombe & Welsh 2005), for which the mean and the least cosine between both vectors are
printed; and the pairs of words of WordSim-353 and SimLex-999, for which Spearman's correlation of cosines with people's
judgements is printed. Exits with 1 if a mean is below 0.999, or a correlation further than 0.5 % from float32's.
`minilm` must have been fetched (`treadle fetch minilm`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.sentence_embedding import SentenceEmbedder

Array = np.ndarray[Any, Any]

WAYS: dict[str, dict[str, str]] = {
    "int8": {"quantize": "int8"},
    "bf16": {"dtype": "bf16"},
    "int4": {"quantize": "int4"},
}
_DATA = "gensim/test/test_data/"
PAIRS = {"WordSim-353": f"{_DATA}wordsim353.tsv", "SimLex-999": f"{_DATA}simlex999.txt"}
LEAST_COSINE = 0.999
MOST_APART = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", help="gensim's wheel")
    parser.add_argument("--count", type=int, default=500, help="number of sentences")
    parser.add_argument("--ways", default="int8,bf16", help="of " + ", ".join(WAYS))
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as wheel:
        news = wheel.read(f"{_DATA}lee_background.cor").decode()
        pairs = {name: _pairs(wheel.read(path).decode()) for name, path in PAIRS.items()}
    sentences = [s.strip() for s in re.split(r"(?<=[.?!])\s", news) if len(s.split()) > 4][: options.count]
    words = sorted({word for rows in pairs.values() for x, y, _ in rows for word in (x, y)})
    wanted = _vectors(options.backend, {}, sentences, words)
    rows = [{"way": "f32", "cosine": 1.0, "least": 1.0, **_correlations(pairs, words, wanted[1])}]
    for way in options.ways.split(","):
        made = _vectors(options.backend, WAYS[way], sentences, words)
        near = (made[0] * wanted[0]).sum(axis=-1)
        measures = {"cosine": float(near.mean()), "least": float(near.min()), **_correlations(pairs, words, made[1])}
        rows.append({"way": way, **measures})
    if options.json:
        print(json.dumps({"sentences": len(sentences), "ways": rows}))
    else:
        print(f"{len(sentences)} sentences, {len(words)} words, {options.backend}\n")
        print("".join(f"{name:>14}" for name in rows[0]))
        for row in rows:
            print("".join(f"{v:>14}" if isinstance(v, str) else f"{v:>14.5f}" for v in row.values()))
    return int(any(_misses(row, rows[0]) for row in rows[1:]))


def _vectors(backend: str, way: dict[str, str], *texts: Sequence[str]) -> list[Array]:
    embedder = SentenceEmbedder.open("minilm", backend=backend, **way)
    return [embedder.embed(each) for each in texts]


def _pairs(text: str) -> list[tuple[str, str, float]]:
    """Return two words and a number from each line; a line without a number is a heading or a comment."""
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return [(x, y, float(z)) for x, y, z in (r[:3] for r in rows if len(r) > 2) if re.fullmatch(r"[\d.]+", z.strip())]


def _correlations(
    pairs: dict[str, list[tuple[str, str, float]]], words: Sequence[str], vectors: Array
) -> dict[str, float]:
    """Return Spearman's correlation of cosines with judgements, for each set."""
    at = {word: i for i, word in enumerate(words)}
    made = {}
    for name, rows in pairs.items():
        near = np.array([vectors[at[x]] @ vectors[at[y]] for x, y, _ in rows])
        made[name] = float(np.corrcoef(_ranks(near), _ranks(np.array([z for *_, z in rows])))[0, 1])
    return made


def _ranks(numbers: Array) -> Array:
    """Return ranks; equal numbers get the mean of their ranks."""
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def _misses(row: dict[str, Any], f32: dict[str, Any]) -> bool:
    apart = [abs(row[name] / f32[name] - 1) for name in PAIRS]
    return row["cosine"] < LEAST_COSINE or max(apart) > MOST_APART


if __name__ == "__main__":
    sys.exit(main())
