"""Draw causal models, derive their step function, and compare the step's results with the whole model's on every
backend.

    python -m tests.fuzz.steps [--seed N] [--count 300] [--sessions] [--backends numpy,torch,tvm]

Each model's step entries run in float64 in the interpreter, and in float32 on each backend, on rows of drawn lengths,
in drawn chunks and order. With `--sessions`, four drawn sessions with each model run instead, on one of the backends in
turn (`tests/random_sessions.py`). There, the backend `emulator` is the tvm backend with states on an emulated device.
The exit status is 1 if a result differs.
"""

from __future__ import annotations

import argparse
import collections
import sys
import traceback
from collections.abc import Sequence

import numpy as np

from tests.random_sessions import play
from tests.random_steps import drawn_model
from tests.stepped_models import optimized
from tests.test_derive_step import hold_to_the_whole
from tests.test_stepped_backends import Whole
from treadle.backends.registry import find_backend

SESSIONS = 4
"""Number of sessions for each model."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="models (default 300)")
    parser.add_argument("--backends", default="numpy,torch,tvm")
    parser.add_argument("--sessions", action="store_true", help="play sessions")
    options = parser.parse_args()
    extra = ("emulator",) if options.sessions else ()
    names = [name for name in options.backends.split(",") if name]
    backends = [name for name in names if name in extra or find_backend(name).available() is None]
    seeds = range(options.seed, options.seed + options.count)
    return 1 if (play_sessions if options.sessions else hold_steps)(seeds, backends) else 0


def hold_steps(seeds: Sequence[int], backends: Sequence[str]) -> int:
    """Compare the step entries of drawn models with the whole models; return the number of wrong models."""
    wrong = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        try:
            graph = optimized(drawn_model(rng))
            hold_to_the_whole(graph, rng, runs=1)
            for backend in backends:
                Whole.of(graph, rng).hold(backend, rng, runs=1)
        except Exception:
            wrong += 1
            print(f"seed {seed}:\n{traceback.format_exc(limit=-3)}", flush=True)
    print(f"{len(seeds)} models on the interpreter and {', '.join(backends) or 'no backend'}: {wrong} wrong")
    return wrong


def play_sessions(seeds: Sequence[int], backends: Sequence[str]) -> int:
    """Run drawn sessions with drawn models; return the number of wrong models."""
    wrong = sessions = checked = sharp = overflowed = special = 0
    events: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        backend = backends[seed % len(backends)]
        try:
            played = play(seed, backend, sessions=SESSIONS)
        except Exception:
            wrong += 1
            print(f"seed {seed}, {backend}:\n{traceback.format_exc(limit=-3)}", flush=True)
            continue
        sessions += len(played.sessions)
        special += len(played.sessions) * (played.chosen.shared or "quantize" in played.chosen.compiled)
        checked, sharp, overflowed = checked + played.checked, sharp + played.sharp, overflowed + played.overflowed
        events.update(played.events)
    print(f"{sessions} sessions of {len(seeds)} models, {special} with shared blocks or quantization: {wrong} wrong")
    print(f"{checked} logits compared, {sharp} of them within a tenth of the largest or less, {overflowed} overflowed")
    print(", ".join(f"{name} {count}" for name, count in sorted(events.items())))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
