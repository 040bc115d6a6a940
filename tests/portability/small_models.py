"""Small models on one backend, whose numbers go to a file: run in an environment, and compared with another one's.

    python -m tests.portability.small_models numbers.npz --backend tvm --threads 2 --only gpt2 int8

Only NumPy, TVM and Treadle are needed. A line a model has the number of compiled kernels, and the notes on kernels
that could not be stored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import treadle as t
from treadle.training.texts import next_token_targets

SIZES = {"vocab": 97, "context": 64, "dim": 64, "heads": 4, "layers": 2}
TOKENS = (np.arange(2 * 40) * 7 % 97).reshape(2, 40)

Numbers = dict[str, np.ndarray[Any, Any]]


def gpt2(compile: Callable[..., t.Compiled], quantize: str | None = None) -> tuple[Numbers, t.Compiled]:
    """A GPT-2 at three sizes, and token by token in a session."""
    exe = compile("gpt2", quantize=quantize, **SIZES)
    made = {f"{b}x{s}": exe(tokens=TOKENS[:b, :s])["logits"] for b, s in ((1, 1), (2, 40), (1, 17))}
    session = exe.session(rows=2, capacity=48)
    row, other = session.open(), session.open()
    made["prefill"] = np.stack([*session.prefill({row: TOKENS[0, :9].tolist(), other: [5]}).values()])
    made["steps"] = np.stack([session.step({row: int(token)})[row] for token in TOKENS[1, :6]])
    return made, exe


def bert(compile: Callable[..., t.Compiled]) -> tuple[Numbers, t.Compiled]:
    exe = compile("bert", vocab=97, context=64, dim=64, heads=4, layers=2)
    return dict(exe(tokens=TOKENS)), exe


def trained(backend: str, target: t.Target) -> tuple[Numbers, t.Compiled]:
    """Losses of five steps, and the logits after them."""
    trainer = t.Trainer("gpt2", learning_rate=3e-3, backend=backend, target=target, **SIZES)
    losses = [trainer.step(tokens=TOKENS, targets=next_token_targets(TOKENS)).loss for _ in range(5)]
    exe = trainer.compiled()
    return {"losses": np.array(losses), "logits": exe(tokens=TOKENS)["logits"]}, exe


def loaded(path: Path, backend: str, target: t.Target) -> tuple[Numbers, t.Compiled]:
    """An artifact, whose weights are packed into a file of the cache."""
    exe = t.load_artifact(path, backend=backend, target=target)
    return {"logits": exe(tokens=TOKENS)["logits"]}, exe


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("numbers", type=Path, help="the .npz file to write")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--artifact", type=Path, help="run this artifact too")
    parser.add_argument("--only", nargs="+", default=["gpt2", "int8", "bert", "trained"])
    options = parser.parse_args()
    target = t.Target("cpu", threads=None if options.backend == "numpy" else options.threads)  # NumPy sets its own
    compile = partial(t.compile, backend=options.backend, target=target)
    models = {
        "gpt2": partial(gpt2, compile),
        "int8": partial(gpt2, compile, "int8"),
        "bert": partial(bert, compile),
        "trained": partial(trained, options.backend, target),
    }
    if options.artifact:
        models["loaded"] = partial(loaded, options.artifact, options.backend, target)
    numbers: Numbers = {}
    for name in [*options.only, *(["loaded"] if options.artifact else [])]:
        made, exe = models[name]()
        numbers |= {f"{name}.{key}": value for key, value in made.items()}
        notes = [note for note in getattr(exe.executable, "notes", ()) if "kernel" in note]
        print(f"{name}: {getattr(exe.executable, 'compiled', 0)} kernels compiled", *notes, sep="; ", flush=True)
    np.savez(options.numbers, **numbers)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
