"""Two users with one cache folder: right numbers, no traceback, and neither opens a file that the other wrote.

    python -m tests.portability.two_users       as root, with an interpreter that every user can read

For each kind of folder, the first user runs small models, then the second, then both at once, then root and the first
again. Files that root wrote may be opened.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import treadle as t
from tests.portability.small_models import SIZES

ONE, OTHER = 51_001, 51_002
GROUP = 51_000

WATCHED = """
import os, runpy, sys

cache, opened = os.path.realpath(os.environ["TREADLE_CACHE"]), set()
near = os.path.dirname(cache)

def note(event, arguments):
    if event in ("open", "ctypes.dlopen") and isinstance(arguments[0], str) and arguments[0].startswith(near):
        try:
            opened.add((os.stat(arguments[0]).st_uid, arguments[0]))
        except OSError:
            pass

sys.addaudithook(note)
runpy.run_module("tests.portability.small_models", run_name="__main__", alter_sys=True)
from treadle.backends.tvm.panel_memory import finish_writing
finish_writing()
others = [path for user, path in opened if user not in (0, os.geteuid()) and ("kernels" in path or "panels" in path)]
own = [path for user, path in opened if user == os.geteuid() and path.endswith((".so", ".panels"))]
print(f"opened {len(own)} files of its own, {len(others)} of other users", *others)
"""


def started(user: int, group: int, cache: Path, artifact: Path, out: Path) -> subprocess.Popen[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "TREADLE_CACHE": str(cache)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCHED, str(out), "--only", "gpt2", "--artifact", str(artifact)]
    return subprocess.Popen(
        command, env=environment, user=user, group=group, extra_groups=[], umask=0o002, text=True, cwd=out.parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def main() -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        artifact = root / "model.treadle"
        t.compile("gpt2", **{**SIZES, "vocab": 4000, "dim": 128}).save(artifact)
        artifact.chmod(0o644)
        right: dict[str, bytes] = {}
        for kind, owner, mode in (
            ("open to all, sticky", 0, 0o1777),
            ("the first user's", ONE, 0o755),
            ("the group's", ONE, 0o2775),
            ("open to all", 0, 0o777),
        ):
            print(f"-- {kind}")
            base = root / kind.replace(" ", "-").replace(",", "").replace("'", "")
            base.mkdir()
            base.chmod(0o1777)
            cache = base / "cache"
            cache.mkdir()
            os.chown(cache, owner, GROUP)
            cache.chmod(mode)
            turns: Sequence[Sequence[int]] = ((ONE,), (OTHER,), (ONE, OTHER), (0,), (ONE,))
            for number, users in enumerate(turns):
                outs = [base / f"{number}-{user}" for user in users]
                for out in outs:
                    out.mkdir()
                    out.chmod(0o777)
                group = 0 if users == (0,) else GROUP
                running = [
                    started(user, group, cache, artifact, out / "numbers.npz")
                    for user, out in zip(users, outs, strict=True)
                ]
                for user, out, process in zip(users, outs, running, strict=True):
                    said = process.communicate()[0].strip()
                    numbers = {}
                    if process.returncode == 0:
                        with np.load(out / "numbers.npz") as file:
                            numbers = {name: file[name].tobytes() for name in file.files}
                    right = right or numbers
                    good = numbers == right and process.returncode == 0 and ", 0 of other users" in said
                    failures += not (good and "Traceback" not in said)
                    print(f"{'ok' if good else 'FAILS':6}", f"user {user}:", said.replace("\n", "\n         "))
    print(f"{failures} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
