"""A check that this tree computes the same bits as another commit: every model of the zoo, on every available backend.

    python -m tests.same_bits 82c0506
    python -m tests.same_bits 82c0506 --real
    python -m tests.same_bits 82c0506 --graphs 5000 --seed 0

The other commit's files are unpacked into a temporary folder, and both trees run the same program: compile each model
of `tests/test_models.py` with drawn weights, call it at small sizes, and hash its outputs. The models are those that
both trees have. With `--real`, the fetched models (`treadle fetch NAME`) and their weights replace the zoo's models.
With `--graphs`, the given number of random graphs (tests/fuzz/graphs.py) are drawn by this tree and read by both trees;
a graph that a backend refuses in both trees is not a difference. The exit status is 1 if any output differs. A
refactoring is complete when this prints no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("numpy", "torch", "tvm")
VOCABULARY = 300
"""Token ids are smaller than this; every fetched model has at least so large a vocabulary."""


def digests(real: Mapping[str, str] | None, graphs: Path | None = None) -> dict[str, str]:
    """Return a hash of the outputs by model and backend, for the imported tree.

    real    paths of models by name, used instead of the zoo
    graphs  a folder of graphs with their arrays, used instead of models
    """
    from treadle.backends.registry import find_backend

    found = {}
    for backend in BACKENDS:
        if find_backend(backend).available() is None:
            models = _graphs(backend, graphs) if graphs else _zoo(backend) if real is None else _real(backend, real)
            for name, calls in models:
                digest = hashlib.sha256()
                for outputs in calls:
                    for output, array in outputs.items():
                        digest.update(f"{output} {array.dtype} {array.shape}".encode())
                        digest.update(np.ascontiguousarray(array).tobytes())
                found[f"{name}, {backend}"] = digest.hexdigest()
    return found


def _graphs(backend: str, folder: Path) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
    """Yield the name and the outputs of each graph in a folder; a refusal counts as an output."""
    import treadle
    from treadle.ir.text.parser import parse_graph

    for path in sorted(folder.glob("*.txt")):
        with np.load(path.with_suffix(".npz")) as file:
            given = {kind: {n[2:]: file[n] for n in file.files if n[0] == kind} for kind in "iw"}
        graph = parse_graph(path.read_text(encoding="utf-8"))
        try:
            outputs = treadle.compile(graph, backend=backend, weights=given["w"])(**given["i"])
        except treadle.TreadleError as error:
            outputs = {type(error).__name__: np.zeros(0)}
        yield path.stem, iter([{name: np.asarray(x) for name, x in outputs.items()}])


def draw_graphs(seeds: range, folder: Path) -> None:
    """Write the random graphs of some seeds into a folder, each as its text and its arrays."""
    from tests.fuzz.graphs import draw

    for seed in seeds:
        case = draw(seed)
        (folder / f"{seed}.txt").write_text(str(case.graph), encoding="utf-8")
        arrays = {f"i {name}": x for name, x in case.inputs.items()} | {f"w {n}": x for n, x in case.weights.items()}
        np.savez(folder / f"{seed}.npz", **{name: np.asarray(x) for name, x in arrays.items()})


def _zoo(backend: str) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
    """Yield the name, and the outputs at some sizes, of every model of the zoo."""
    import treadle
    from tests.test_models import ZOO

    drawing = _drawing()
    for name, (model, _) in ZOO.items():
        graph = model.graph()
        executable = treadle.compile(graph, backend=backend, seed=1)
        cases = enumerate(drawing.small_sizes(graph))
        yield name, (executable(**drawing.draw_inputs(graph, sizes, [number])) for number, sizes in cases)


def _real(backend: str, paths: Mapping[str, str]) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
    """Yield the name and the outputs of the models at these paths. Inputs are drawn here, identically for both
    trees.
    """
    import treadle

    for name, path in paths.items():
        executable = treadle.compile(path, backend=backend)
        rng = np.random.default_rng(0)
        cases = [
            {v.name: _drawn(rng, v.name, v.type.evaluate(sizes), v.type.dtype) for v in executable.graph.main.inputs}
            for sizes in _drawing().small_sizes(executable.graph)
        ]
        yield name, (executable(**case) for case in cases)


def _drawing() -> Any:
    moved = (Path.cwd() / "ir" / "analysis").is_dir()  # an older commit defines it in another module
    return import_module("treadle.ir.analysis.drawn_inputs" if moved else "treadle.ir.drawn_inputs")


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Draw normal floats, token ids, and 0 or 1 for masks and token types."""
    if dtype.is_float:
        return rng.standard_normal(shape).astype(dtype.numpy)
    return rng.integers(0, VOCABULARY if name.endswith(("tokens", "input_ids")) else 2, shape).astype(dtype.numpy)


def fetched(folder: Path) -> dict[str, str]:
    """Return the paths of the fetched models by name; a pickle is converted to safetensors in `folder`."""
    from treadle.fetching import fetched_model
    from treadle.wheels.pinned_models import PINNED

    paths = {}
    for name in PINNED:
        path = fetched_model(name)
        if path is None:
            print(f"not compared: {name}, which is not here (treadle fetch {name})")
            continue
        if (path / "pytorch_model.bin").exists():
            import torch
            from safetensors.torch import save_file

            kept = folder / name
            kept.mkdir()
            shutil.copy(path / "config.json", kept)
            tensors = torch.load(path / "pytorch_model.bin", weights_only=True, map_location="cpu")
            save_file({key: x.contiguous().clone() for key, x in tensors.items()}, kept / "model.safetensors")
            path = kept
        paths[name] = str(path)
    return paths


def digests_of(tree: Path, real: Mapping[str, str] | None, graphs: Path | None = None) -> dict[str, str]:
    """Return the digests of another tree, computed in a separate process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--digests"]
    if real is not None:
        command += ["--paths", json.dumps(real)]
    if graphs is not None:
        command += ["--folder", str(graphs)]
    here = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run(command, cwd=tree, env=here, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{tree}: the models could not be run\n{run.stderr[-2000:]}")
    found: dict[str, str] = json.loads(run.stdout)
    return found


def unpacked(commit: str, folder: Path) -> Path:
    """Unpack the files of a commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", nargs="?", help="the commit to compare with")
    parser.add_argument("--real", action="store_true", help="the fetched models, not the zoo's")
    parser.add_argument("--digests", action="store_true", help="print the hashes of the tree that is imported")
    parser.add_argument("--paths", type=json.loads, help="with --digests: real models, as JSON of paths by name")
    parser.add_argument("--graphs", type=int, default=0, help="number of random graphs, in place of the zoo")
    parser.add_argument("--seed", type=int, default=0, help="of the first random graph")
    parser.add_argument("--folder", type=Path, help="with --digests: where graphs and their arrays are")
    given = parser.parse_args()
    if given.digests or given.commit is None:
        print(json.dumps(digests(given.paths, given.folder)))
        return 0
    with tempfile.TemporaryDirectory() as place:
        real = fetched(Path(place)) if given.real else None
        (folder := Path(place) / "before").mkdir()
        graphs = Path(place) / "graphs" if given.graphs else None
        if graphs is not None:
            graphs.mkdir()
            draw_graphs(range(given.seed, given.seed + given.graphs), graphs)
        before = digests_of(unpacked(given.commit, folder), real, graphs)
        now = digests_of(ROOT, real, graphs)
    both = sorted(before.keys() & now.keys())
    different = [name for name in both if before[name] != now[name]]
    print(*(f"differs: {name}" for name in different), sep="\n", end="\n" if different else "")
    print(f"{len(both)} of {len(now)} compared with {given.commit}: {len(different)} differ")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
