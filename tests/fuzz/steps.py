"""Draws causal models, derives their step, and holds it to the whole model on every backend.

    python -m tests.fuzz.steps [--seed N] [--count 300] [--backends numpy,torch,tvm]

Every model goes through the entries of its step in float64, by the interpreter, and on each backend in float32: rows of
drawn lengths, in drawn chunks, in drawn order. Exit status 1 if one differs.
"""

from __future__ import annotations

import argparse
import sys
import traceback

import numpy as np

from tests.random_steps import drawn_model
from tests.stepped_models import optimized
from tests.test_derive_step import hold_to_the_whole
from tests.test_stepped_backends import Whole
from treadle.backends.registry import find_backend


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--backends", default="numpy,torch,tvm")
    options = parser.parse_args()
    backends = [name for name in options.backends.split(",") if name and find_backend(name).available() is None]
    wrong = 0
    for seed in range(options.seed, options.seed + options.count):
        rng = np.random.default_rng(seed)
        try:
            graph = optimized(drawn_model(rng))
            hold_to_the_whole(graph, rng, runs=1)
            for backend in backends:
                Whole.of(graph, rng).hold(backend, rng, runs=1)
        except Exception:
            wrong += 1
            print(f"seed {seed}:\n{traceback.format_exc(limit=-3)}", flush=True)
    print(f"{options.count} models on the interpreter and {', '.join(backends) or 'no backend'}: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
