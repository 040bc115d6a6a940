"""Equal inputs give equal bytes: what is printed, logged, emitted and computed, in every process and on every call."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import treadle as t
from tests.backend_checks import both
from treadle.backends.registry import find_backend
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2
from treadle.models.t5 import t5

SMALL = {"vocab": 13, "dim": 12, "heads": 3, "hidden": 20, "layers": 2}
MODELS = {
    "gpt2": gpt2.configure(**SMALL),
    "bert": bert.configure(**SMALL, head="masked_lm", inputs=("token_types", "lengths")),
    "t5": t5.configure(**SMALL, head_dim=4, inputs=("lengths",)),
}


def inputs(exe: t.Compiled) -> dict[str, np.ndarray]:
    """Something for every input: the axes of 3 rows and 5 positions, the lengths of rows within them."""
    rng = np.random.default_rng(0)
    shapes = {port.name: [3 if axis == "B" else 5 for axis in port.axes] for port in exe.inputs}
    return {name: rng.integers(0, 2, shape) for name, shape in shapes.items()}


def answers(exe: t.Compiled) -> bytes:
    return b"".join(array.tobytes() for array in exe(**inputs(exe)).values())


def everything(name: str) -> Iterator[str]:
    """All that the compiler says of a model, and the digest of what it computes."""
    graph = MODELS[name].graph()
    yield str(graph)
    for axis in ("S", "heads"):
        yield str(t.follow(graph, axis))
    for backend in ("numpy", "torch"):
        if find_backend(backend).available() is None:
            exe = t.compile(graph, backend=backend)
            yield from (str(exe.graph), json.dumps(exe.log.as_dict(), indent=1), exe.log.explain(), exe.source)
            yield hashlib.sha256(answers(exe)).hexdigest()


def test_another_process_with_another_hash_seed_says_the_same() -> None:
    """Python orders sets of strings by a seed that differs from process to process unless it is given."""
    program = f"from {__name__} import *\nprint(*(text for name in MODELS for text in everything(name)), sep='\\n')"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    (first, said), (second, said_too) = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], (said + said_too).decode()
    assert first.count(b"\n") > 500
    assert first.splitlines() == second.splitlines()  # by lines, so that a failure shows which


@both
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_twice(name: str, backend: str) -> None:
    first, second = (t.compile(MODELS[name], backend=backend) for _ in range(2))
    assert first.source == second.source
    assert answers(first) == answers(first) == answers(second)
