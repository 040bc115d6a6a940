"""Equal inputs produce equal bytes: printed texts, logs, emitted code and results, in every process and every call."""

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
from tests.backend_checks import each_backend
from tests.test_models import ZOO
from treadle.backends.registry import find_backend
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2
from treadle.models.t5 import t5

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"vocab": 13, "dim": 12, "heads": 3, "hidden": 20, "layers": 2}
MODELS = {
    "gpt2": gpt2.configure(**SMALL),
    "bert": bert.configure(**SMALL, head="masked_lm", inputs=("token_types", "lengths")),
    "t5": t5.configure(**SMALL, head_dim=4, inputs=("lengths",)),
}


def inputs(exe: t.Compiled) -> dict[str, np.ndarray]:
    """Return a value for every input, with 3 rows and 5 positions, and lengths up to 5."""
    rng = np.random.default_rng(0)
    shapes = {port.name: [3 if axis == "B" else 5 for axis in port.axes] for port in exe.inputs}
    return {name: rng.integers(0, 2, shape) for name, shape in shapes.items()}


def answers(exe: t.Compiled) -> bytes:
    return b"".join(array.tobytes() for array in exe(**inputs(exe)).values())


def everything(name: str) -> Iterator[str]:
    """Yield all texts of the compiler for a model, and the digest of its results."""
    graph = MODELS[name].graph()
    yield str(graph)
    for axis in ("S", "heads"):
        yield str(t.follow(graph, axis))
    for backend in ("numpy", "torch"):
        if find_backend(backend).available() is None:
            exe = t.compile(graph, backend=backend)
            yield from (str(exe.graph), json.dumps(exe.log.as_dict(), indent=1), exe.log.explain(), exe.source)
            yield hashlib.sha256(answers(exe)).hexdigest()


def in_another_process(program: str, *arguments: str) -> str:
    """Return the output of a program in another process with these arguments and another hash seed. The process
    certifies rewrites as this one does, with the same store.
    """
    certified = "from tests.known_certificates import remember\nremember()\n"
    seed = "4242" if os.environ.get("PYTHONHASHSEED") != "4242" else "1"
    run = subprocess.run(
        [sys.executable, "-c", certified + program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "TREADLE_CERTIFY": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_another_process_with_another_hash_seed_says_the_same() -> None:
    """Python orders sets of strings by a seed that differs from process to process unless it is set."""
    program = f"from {__name__} import *\nprint(*(text for name in MODELS for text in everything(name)), sep='\\n')"
    here = "\n".join(text for name in MODELS for text in everything(name)) + "\n"
    assert here.count("\n") > 500
    assert here.splitlines() == in_another_process(program).splitlines()  # by lines, to show the difference


def save_every_model(folder: str) -> None:
    """Save an artifact of each model declaration of the zoo, numbered in order, and an artifact of the first model on
    PyTorch.
    """
    for number, (model, _) in enumerate(ZOO.values()):
        t.compile(model).save(Path(folder) / f"{number}.treadle")
    if find_backend("torch").available() is None:
        t.compile(next(iter(ZOO.values()))[0], backend="torch").save(Path(folder) / "torch.treadle")


def test_artifacts_of_every_model_are_byte_identical_in_another_process(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "another"]
    for folder in folders:
        folder.mkdir()
    program = f"import sys\nfrom {__name__} import save_every_model\nsave_every_model(sys.argv[1])"
    save_every_model(str(folders[0]))
    in_another_process(program, str(folders[1]))
    names = {f"{number}.treadle": name for number, name in enumerate(ZOO)}
    made, made_too = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert made.keys() == made_too.keys()
    assert made.keys() - {"torch.treadle"} == names.keys()
    for file, data in made.items():
        assert data == made_too[file], names.get(file, file)
        assert not any(place.encode() in data for place in (str(ROOT), str(tmp_path), str(Path.home())))


@each_backend
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_twice(name: str, backend: str) -> None:
    first, second = (t.compile(MODELS[name], backend=backend) for _ in range(2))
    assert first.source == second.source
    assert answers(first) == answers(first) == answers(second)
