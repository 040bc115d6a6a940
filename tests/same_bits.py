"""Whether this tree computes the same bits as another commit: every model of the zoo, on every backend that is here.

    python -m tests.same_bits 82c0506

The other commit's files are unpacked into a temporary folder, and both trees run the same program: compile each model
of `tests/test_models.py` with drawn weights, call it at small sizes, and hash what it gives. The models are those that
both trees have. Exit status 1 if any differ. A refactoring is done when this prints no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib import import_module
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("numpy", "torch", "tvm")


def digests() -> dict[str, str]:
    """By model and backend, a hash of the outputs; of the tree that is imported."""
    import numpy as np

    import treadle
    from tests.test_models import ZOO
    from treadle.backends.registry import find_backend

    moved = (Path.cwd() / "ir" / "analysis").is_dir()  # an older commit has it elsewhere
    drawing = import_module("treadle.ir.analysis.drawn_inputs" if moved else "treadle.ir.drawn_inputs")
    found = {}
    for backend in BACKENDS:
        if find_backend(backend).available() is not None:
            continue
        for name, (model, _) in ZOO.items():
            graph = model.graph()
            executable = treadle.compile(graph, backend=backend, seed=1)
            digest = hashlib.sha256()
            for number, sizes in enumerate(drawing.small_sizes(graph)):
                for output, array in executable(**drawing.draw_inputs(graph, sizes, [number])).items():
                    digest.update(f"{output} {array.dtype} {array.shape}".encode())
                    digest.update(np.ascontiguousarray(array).tobytes())
            found[f"{name}, {backend}"] = digest.hexdigest()
    return found


def digests_of(tree: Path) -> dict[str, str]:
    """The same of another tree, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--digests"]
    here = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run(command, cwd=tree, env=here, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{tree}: the models could not be run\n{run.stderr[-2000:]}")
    found: dict[str, str] = json.loads(run.stdout)
    return found


def unpacked(commit: str, folder: Path) -> Path:
    """The files of a commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", nargs="?", help="the commit to compare with")
    parser.add_argument("--digests", action="store_true", help="print the hashes of this tree")
    given = parser.parse_args()
    if given.digests or given.commit is None:
        print(json.dumps(digests()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        before = digests_of(unpacked(given.commit, Path(folder)))
    now = digests_of(ROOT)
    both = sorted(before.keys() & now.keys())
    different = [name for name in both if before[name] != now[name]]
    print(*(f"differs: {name}" for name in different), sep="\n", end="\n" if different else "")
    print(f"{len(both)} of {len(now)} compared with {given.commit}: {len(different)} differ")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
