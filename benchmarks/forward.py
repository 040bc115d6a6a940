"""A forward pass of BERT-base, one sentence of 128 tokens, beside Hugging Face in the same process.

    python benchmarks/forward.py [--threads 1] [--tokens 128] [--json]

Weights are drawn. Both sides must give the same numbers first. Then they run in turns, so that a busy machine slows
both; on one thread the thread's own processor time is taken, which a neighbour cannot lengthen. The target: on one
thread at most 0.75 of the time of Hugging Face's eager mode with its fused attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

TARGET = 0.75
ROUNDS = 15


BACKENDS = ("tvm", "torch")
"""TVM holds the target; PyTorch shows what fusion and packed weights give without kernels of our own."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    theirs, ours = both(options.threads, options.tokens, options.layers)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    times = in_turns([theirs, *(side.call for side in ours)], clock)
    theirs_ms, *ours_ms = (statistics.median(t) * 1e3 for t in times)
    rows = [
        {
            "backend": side.backend,
            "threads": options.threads,
            "tokens": options.tokens,
            "treadle_ms": ms,
            "huggingface_eager_ms": theirs_ms,
            "ratio": ms / theirs_ms,
            "ratio_of_the_best": min(found) / min(times[0]),
            "difference": side.difference,
            "compile_s": side.compile_seconds,
        }
        for side, ms, found in zip(ours, ours_ms, times[1:], strict=True)
    ]
    if options.json:
        print(json.dumps(rows))
    else:
        print(f"BERT-base, {options.layers} layers, 1 x {options.tokens} tokens, {options.threads} threads, float32")
        print(f"  Hugging Face, eager     {theirs_ms:8.1f} ms")
        for row in rows:
            name = f"treadle, {row['backend']}"
            ratios = f"ratio of the medians {row['ratio']:.3f}, of the best {row['ratio_of_the_best']:.3f}"
            print(f"  {name:<22}  {row['treadle_ms']:8.1f} ms    {ratios}", end="")
            print(f"; compiled in {row['compile_s']:.1f} s; largest difference {row['difference']:.1e}")
        print(f"  target {TARGET} on one thread, for {BACKENDS[0]}")
    right = all(side.difference < 2e-5 for side in ours)
    return 0 if right and (options.threads > 1 or ours_ms[0] <= TARGET * theirs_ms) else 1


class Side(NamedTuple):
    """One backend of ours: its name, how far its outputs are off, and how long it took to compile."""

    backend: str
    call: Callable[[], Any]
    difference: float
    compile_seconds: float


def both(threads: int, tokens: int, layers: int) -> tuple[Callable[[], Any], list[Side]]:
    """Hugging Face's model and ours, as functions without arguments."""
    import torch
    from transformers import BertConfig, BertModel

    import treadle
    from treadle.ir.target import Target

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()
    ids = np.random.default_rng(0).integers(0, 30000, (1, tokens))
    tensor = torch.from_numpy(ids)

    def theirs() -> Any:
        with torch.inference_mode():
            return model(input_ids=tensor).last_hidden_state

    reference = theirs().numpy()
    ours = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for backend in BACKENDS:
            started = time.perf_counter()
            exe = treadle.compile(folder, backend=backend, target=Target("cpu", threads=threads))
            seconds = time.perf_counter() - started
            call = partial(exe, **{exe.inputs[0].name: ids})
            difference = np.abs(call()[exe.outputs[0].name] - reference).max() / np.abs(reference).max()
            ours.append(Side(backend, call, float(difference), seconds))
    return theirs, ours


def in_turns(calls: list[Callable[[], Any]], clock: Callable[[], float]) -> list[list[float]]:
    """Times of each, taken in turns."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            started = clock()
            call()
            found.append(clock() - started)
    return times


if __name__ == "__main__":
    sys.exit(main())
