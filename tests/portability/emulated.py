"""Small models on emulated CPUs, by qemu-user, compared with this machine's numbers.

    python -m tests.portability.emulated Haswell Nehalem            CPUs of x86-64
    python -m tests.portability.emulated aarch64 --root FOLDER      Linux on arm64; `arm64_root.sh` makes the folder

The emulated CPU's instruction set comes from CPUID; /proc/cpuinfo lists this machine's features. On x86-64, the numbers
must be bitwise identical to the numbers of the same instruction set on this machine. On arm64, they must equal the
numbers of AVX2 up to the order of sums, and for int8 up to a step of a few activations. Needs the package qemu-user.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ISAS = {"Haswell": "x86-64-v3", "Nehalem": "x86-64-v2", "qemu64": "x86-64", "aarch64": "x86-64-v3"}
"""The instruction set on this machine with which the numbers of an emulated CPU are compared."""

BOUNDS = {"gpt2": 1e-5, "int8": 2e-2}
"""The largest differences between two instruction sets, for logits below 2."""


def run(out: Path, *options: str, before: Sequence[str] = (), python: str = sys.executable, **env: str) -> None:
    """Run the small models in a new process, with a cache of its own. Raises CalledProcessError if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "TREADLE_"))}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "TREADLE_CACHE": f"{out}.cache"} | env
    command = [*before, python, "-m", "tests.portability.small_models", str(out), "--only", "gpt2", "int8", *options]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


def worst(one: Path, other: Path) -> dict[str, float]:
    """Return the largest difference of each model's numbers in two files; 0 if they are equal bitwise."""
    found: dict[str, float] = {}
    with np.load(one) as first, np.load(other) as second:
        assert first.files == second.files
        for name in first.files:
            model = name.partition(".")[0]
            found[model] = max(found.get(model, 0.0), float(np.abs(first[name] - second[name]).max()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cpus", nargs="+", choices=ISAS)
    parser.add_argument("--root", type=Path, help="the root file system of arm64")
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        for cpu in options.cpus:
            emulated, here, started = Path(place) / f"{cpu}.npz", Path(place) / f"{cpu}-here.npz", time.perf_counter()
            if cpu == "aarch64":
                site = os.pathsep.join((str(ROOT), str(options.root / "site")))
                python = str(next(options.root.glob("usr/bin/python3.*[0-9]")))
                run(emulated, before=("qemu-aarch64", "-L", str(options.root)), python=python, PYTHONPATH=site)
            else:
                run(emulated, before=("qemu-x86_64", "-cpu", cpu))
            seconds = time.perf_counter() - started
            run(here, TREADLE_ISA=ISAS[cpu])
            found = worst(emulated, here)
            failures += any(found[model] > (bound if cpu == "aarch64" else 0.0) for model, bound in BOUNDS.items())
            print(f"{cpu}: {seconds:.0f} s, largest differences {found}", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
